"""Many clients at once, and those who read slowly, not at all, or leave.

Which requests wait is vLLM's affair. The guard adds no queue: whoever is let in has one
verdict in the end, and whoever leaves is forgotten.
"""

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from e2e.serving import Server
from e2e.tripwires import PROMPT
from e2e.wire import Answer, ask, request_body

from benchmarks.operator import Operator, total

STREAMS = 256
SECONDS = 240
POLICIES = (
    "default",
    "held",
    "open",
    "middle-output",
    "middle-output-hold-4",
    "first-output-observed",
)
LONG = {"max_tokens": 1900, "ignore_eos": True, "stream": True}
SHORT = {"max_tokens": 60, "ignore_eos": True, "stream": True}
QUEUE_SECONDS = "vllm:request_queue_time_seconds_sum"
CHOICES = 4
FAMILY = {"n": CHOICES, "temperature": 1, "logprobs": 20}
SLOW_BYTES = 16
SLOW_SECONDS = 0.1


@pytest.fixture
def operator(toy_server: Server) -> Iterator[Operator]:
    """Whoever runs the server; nobody has a request open before or afterwards."""
    with httpx.Client(base_url=toy_server.url, timeout=60) as client:
        operator = Operator(client, toy_server.process.pid)
        operator.wait_until_idle()
        yield operator
        operator.wait_until_idle()
        expect_nothing_held(operator)


def expect_nothing_held(operator: Operator) -> None:
    """Check that no part of the server keeps anything of a request that is over."""
    assert total(operator.read_metrics(), "vllm:kv_cache_usage_perc") == 0
    deadline = time.monotonic() + 30
    while any(part["requests"] for part in operator.read_engines()):
        assert time.monotonic() < deadline, operator.read_engines()
        time.sleep(0.1)


def count_verdicts(operator: Operator) -> Counter[tuple[str, str]]:
    """Return how many requests are over, by policy and action."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, value in operator.read_metrics().items():
        if name.startswith("guard_requests_total{"):
            labels = dict(
                pair.split("=") for pair in name.partition("{")[2][:-1].split(",")
            )
            pair = labels["policy"].strip('"'), labels["action"].strip('"')
            counts[pair] = int(value)
    return counts


# Many at once


@dataclass
class Audience:
    """Streams that run at the same time."""

    server: Server
    answers: list[Answer] = field(default_factory=list)

    async def attend(self, bodies: list[dict[str, Any]]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=SECONDS, limits=limits) as client:
            reading = [self._read(client, body) for body in bodies]
            self.answers = await asyncio.gather(*reading)

    async def _read(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
        url = f"{self.server.url}/v1/completions"
        async with client.stream("POST", url, json=body) as stream:
            answer = Answer(stream.status_code, body)
            async for line in stream.aiter_lines():
                if line == "data: [DONE]":
                    answer.is_done = True
                elif line.startswith("data: "):
                    answer.take(json.loads(line.removeprefix("data: ")))
        return answer


def test_every_one_of_many_streams_has_one_verdict_and_is_counted_once(
    toy_server: Server, operator: Operator
) -> None:
    draw = random.Random(8)
    before, bodies = count_verdicts(operator), []
    queued = total(operator.read_metrics(), QUEUE_SECONDS)
    for number in range(STREAMS):
        policy = POLICIES[number % len(POLICIES)]
        prompt = PROMPT if draw.random() < 0.5 else f"w{draw.randrange(110)} w5 w6"
        more = {"max_tokens": draw.randint(8, 60), "ignore_eos": True, "stream": True}
        bodies.append(request_body(prompt, policy, **more))
    audience = Audience(toy_server)
    asyncio.run(audience.attend(bodies))
    told: Counter[tuple[str, str]] = Counter()
    for answer in audience.answers:
        assert (answer.status, answer.is_done, len(answer.guards)) == (200, True, 1)
        assert answer.guard["policy"] == answer.body["guard"]["policy"]
        is_blocked = answer.guard["action"] == "block"
        reason = answer.choices[0].finish_reason
        assert reason == ("content_filter" if is_blocked else "length")
        told[answer.guard["policy"], answer.guard["action"]] += 1
    assert {action for _, action in told} == {"allow", "flag", "block"}
    assert len({answer.guard["id"] for answer in audience.answers}) == STREAMS
    operator.wait_until_idle()
    assert count_verdicts(operator) - before == told
    # They waited in vLLM's own queue.
    assert total(operator.read_metrics(), QUEUE_SECONDS) > queued + 1


# Slow ones


class Reader(threading.Thread):
    """A client of a stream who reads a little now and then, or no more at all."""

    def __init__(self, server: Server, body: dict[str, Any], *, size: int) -> None:
        super().__init__(daemon=True)
        host, _, port = server.url.removeprefix("http://").partition(":")
        self.socket = socket.socket()
        # Whatever the kernel takes for him, he has not read.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.socket.settimeout(SECONDS)
        self.socket.connect((host, int(port)))
        content = json.dumps(body).encode()
        self.socket.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: server\r\nconnection: close\r\n"
            b"content-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(content), content)
        )
        self.heard = b""
        while b"data: " not in self.heard:
            piece = self.socket.recv(256)
            assert piece, self.heard
            self.heard += piece
        self._size = size
        self._left = threading.Event()

    def run(self) -> None:
        while self._size and not self._left.wait(SLOW_SECONDS):
            with contextlib.suppress(OSError):
                piece = self.socket.recv(self._size)
                if not piece:
                    return
                self.heard += piece

    def leave(self) -> None:
        self._left.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@pytest.mark.parametrize("size", [SLOW_BYTES, 0])
def test_who_reads_slowly_or_no_more_hurts_nobody_and_is_forgotten_when_he_leaves(
    toy_server: Server, operator: Operator, size: int
) -> None:
    alone = ask(toy_server, PROMPT, "default", **SHORT)
    # More than the kernel takes on its way, and fewer than the server runs at once.
    body = request_body("w1 w2", "default", **FAMILY, **LONG)
    before = sum(count_verdicts(operator).values())
    readers = [Reader(toy_server, body, size=size) for _ in range(2)]
    try:
        for reader in readers:
            reader.start()
        for _ in range(5):
            beside = ask(toy_server, PROMPT, "default", **SHORT)
            assert beside.choices[0].token_ids == alone.choices[0].token_ids
            assert beside.guard["action"] == alone.guard["action"]
        # The engine does not wait for them: no place, no block of KV is theirs.
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        deadline = time.monotonic() + SECONDS
        while any(total(operator.read_metrics(), name) for name in names):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        expect_nothing_held(operator)
        assert total(operator.read_metrics(), "guard_open_requests") > 0
    finally:
        for reader in readers:
            reader.leave()
    operator.wait_until_idle()
    assert sum(count_verdicts(operator).values()) == before + CHOICES * len(readers) + 5


def test_who_reads_slowly_has_his_whole_answer_in_the_end(
    toy_server: Server, operator: Operator
) -> None:
    body = request_body(PROMPT, "default", stream=True, ignore_eos=True)
    reader = Reader(toy_server, body, size=512)
    reader.start()
    reader.join(SECONDS)
    assert reader.heard.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
    assert reader.heard.count(b'"guard"') == 1
    reader.leave()


# Those who leave


async def leave_streams(server: Server, bodies: list[dict[str, Any]]) -> None:
    """Hang up on each stream after two tokens."""

    async def leave(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        url = f"{server.url}/v1/completions"
        async with client.stream("POST", url, json=body) as stream:
            heard = 0
            async for line in stream.aiter_lines():
                heard += line.startswith("data: ")
                if heard == 2:
                    return

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=SECONDS) as client:
        await asyncio.gather(*(leave(client, body) for body in bodies))


async def leave_whole_answers(
    server: Server, bodies: list[dict[str, Any]], *, choices: int
) -> None:
    """Hang up on answers in one piece when the engine has all of them."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=SECONDS) as client:
        url = f"{server.url}/v1/completions"
        asking = [
            asyncio.create_task(client.post(url, json=body | {"stream": False}))
            for body in bodies
        ]
        known = 0.0
        while known < choices:
            await asyncio.sleep(0.1)
            text = (await client.get(f"{server.url}/metrics")).text
            known = sum(
                float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith(
                    ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
                )
            )
        for task in asking:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


@pytest.mark.parametrize("leave", ["streams", "whole answers"])
def test_of_those_who_leave_nothing_stays_and_each_is_counted_once(
    toy_server: Server, operator: Operator, leave: str
) -> None:
    alone = ask(toy_server, PROMPT, "default")
    operator.wait_until_idle()
    metrics, before = operator.read_metrics(), count_verdicts(operator)
    bodies, begun = [], Counter[str]()
    for number in range(48):
        policy = ("default", "held", "open", "open-hold-40")[number % 4]
        n = 2 if number % 7 == 0 else 1
        more = LONG | {"n": n, "temperature": 1.0}
        bodies.append(request_body(f"w{number} w3", policy, **more))
        begun[policy] += n
    if leave == "streams":
        asyncio.run(leave_streams(toy_server, bodies))
    else:
        choices = sum(begun.values())
        asyncio.run(leave_whole_answers(toy_server, bodies, choices=choices))
    operator.wait_until_idle()
    expect_nothing_held(operator)
    ended: Counter[str] = Counter()
    for (policy, _), count in (count_verdicts(operator) - before).items():
        ended[policy] += count
    assert ended == begun
    errors = "guard_errors_total"
    assert total(operator.read_metrics(), errors) == total(metrics, errors)
    after = ask(toy_server, PROMPT, "default")
    assert after.choices[0].token_ids == alone.choices[0].token_ids
