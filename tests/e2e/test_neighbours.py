"""Ten thousand malformed requests hurt nobody but themselves.

They come on a few connections while good requests are asked one by one. Those that
must be refused never reach the engine, so the good ones have it to themselves, as in
the quiet run, and equal it to the last bit. Those that may be served share batches with
the good ones: there tokens and verdicts are equal, and scores as far as rounding goes.
"""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from e2e.serving import Server, Toy
from e2e.traffic import rounding
from e2e.tripwires import LONG_PROMPT, PROMPT
from e2e.wire import Answer, ask
from malformed import (
    COMPLETIONS,
    Malformed,
    draw_odd,
    draw_refused,
    draw_schema,
    write_request,
)
from prometheus_client.parser import text_string_to_metric_families

MALFORMED = 10_000
ODD = 600
FIELDS = 2
"""Of each field of our routes, values by schemathesis: in and against its schema."""
HANG_UPS = 60
AT_ONCE = 20
"""Good requests at the same time; the engine runs 16."""
CONNECTIONS = 3
SECONDS = 60

GOOD: tuple[dict[str, Any], ...] = (
    {"prompt": "w3 w1 w4"},
    {"prompt": "w3 w1 w4", "policy": "open"},
    {"prompt": "w9 w2 w6 w5", "policy": "held", "route": "chat/completions"},
    {"prompt": "w9 w2 w6 w5", "policy": "default", "stream": True},
    {"prompt": PROMPT, "policy": "middle-output"},
    {"prompt": PROMPT, "policy": "first-output-observed", "stream": True},
    {"prompt": LONG_PROMPT, "policy": "default", "max_tokens": 8},
)


@dataclass(frozen=True)
class Reply:
    """What a malformed request was told."""

    to: Malformed
    status: int | None
    """None where there was no answer."""
    body: bytes = b""

    @property
    def served(self) -> int:
        """Choices that the engine has worked on."""
        if self.status != 200:
            return 0
        chunks = [self.body]
        if self.body.startswith(b"data: "):
            lines = self.body.splitlines()
            chunks = [line[6:] for line in lines if line.startswith(b"data: {")]
        return len(
            {
                choice["index"]
                for chunk in chunks
                for choice in json.loads(chunk).get("choices", ())
            }
        )


def connect(server: Server) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


class Connection:
    """A client's connection, kept alive as long as the server does."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._socket: socket.socket | None = None

    def ask(self, request: Malformed) -> Reply:
        """Send a request; where a kept connection has ended meanwhile, once more."""
        is_kept = self._socket is not None
        try:
            return self._ask(request)
        except (OSError, http.client.HTTPException):
            self.close()
            if is_kept:
                return self.ask(request)
            return Reply(request, None)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, request: Malformed) -> Reply:
        if self._socket is None:
            self._socket = connect(self._server)
        error = None
        try:
            self._socket.sendall(request.raw)
        except OSError as broken:
            error = broken  # it may have been answered before it was all said
        if request.hangs_up:
            self.close()
            return Reply(request, None)
        answer = http.client.HTTPResponse(self._socket, method="POST")
        try:
            answer.begin()
            body = answer.read()
        except OSError:
            raise error or ConnectionError from None
        if answer.will_close or not request.body:
            self.close()
        return Reply(request, answer.status, body)


def hang_up_in_the_middle(server: Server, number: int) -> None:
    """Be a client of a stream that is gone when the first token has come."""
    body = {"model": "model", "prompt": f"w{number} w2", "stream": True}
    body |= {"max_tokens": 500, "ignore_eos": True}
    with connect(server) as client:
        client.sendall(write_request(COMPLETIONS, json.dumps(body).encode()))
        heard = b""
        while b"data: " not in heard:
            piece = client.recv(4096)
            assert piece, heard
            heard += piece


def storm(server: Server, requests: Sequence[Malformed]) -> list[Reply]:
    """Send requests on a few connections."""
    shares = [requests[start::CONNECTIONS] for start in range(CONNECTIONS)]

    def send(share: Sequence[Malformed]) -> list[Reply]:
        connection = Connection(server)
        with contextlib.closing(connection):
            return [connection.ask(request) for request in share]

    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(itertools.chain.from_iterable(pool.map(send, shares)))


def ask_good(server: Server, number: int) -> Answer:
    """Ask one of the good requests; nothing of it is in the cache."""
    fields = dict(GOOD[number])
    guard = {"policy": fields.pop("policy", None), "trace": "summary"}
    logprobs = True if "route" in fields else 0
    salt = token_hex(8)
    return ask(server, guard=guard, logprobs=logprobs, cache_salt=salt, **fields)


def ask_while(server: Server, busy: Callable[[], bool]) -> list[tuple[int, Answer]]:
    """Ask the good requests in turn, at least once each, while something goes on."""
    answers = []
    for turn in itertools.count():
        if turn >= len(GOOD) and not busy():
            return answers
        number = turn % len(GOOD)
        answers.append((number, ask_good(server, number)))
    raise AssertionError


def weather(
    server: Server, work: Callable[[], list[Reply]]
) -> tuple[list[Reply], list[tuple[int, Answer]]]:
    """Do something to a server, and ask good requests until it is over."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        answers = ask_while(server, lambda: not done.done())
        return done.result(), answers


# What is said

EXPECTED: dict[str, tuple[int | None, ...]] = {
    "guard_fields": (400, 403),
    "guard_fields_twice": (400, 403),
    "headers": (400, 403),
    "lies": (400, 413),
    "too_much": (413, None),
    "cut": (None,),
}
"""How a family is refused where not by 400 alone; None is without an answer, which
may be lost where the connection ends while the client still talks."""
OWN = {
    "guard_fields": "guard",
    "guard_fields_twice": "guard",
    "headers": "guard",
    "reserved_keys": "vllm_xargs",
    "shapeless": "structured_outputs",
}
"""Families that the guard itself finds fault with, and the field at fault."""


def check_error(reply: Reply) -> None:
    """Check that the guard says what is wrong as OpenAI would."""
    param = OWN.get(reply.to.family)
    if param is not None:
        error = json.loads(reply.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == reply.status
        assert str(error["param"]).split(".")[0] == param, reply


# What is compared


def tell(answer: Answer) -> dict[str, Any]:
    """Return everything a client learnt, but for ids."""
    return {
        "status": answer.status,
        "done": answer.is_done,
        "choices": {i: vars(choice) for i, choice in answer.choices.items()},
        "guard": {key: some for key, some in answer.guard.items() if key != "id"},
    }


def tell_roughly(told: Any, *, score: Callable[[float], Any] = float) -> Any:
    """Return what is equal however a request was batched, but for scores' rounding.

    A matrix product of other rows may sum in another order. The scores of a tripwire,
    whose direction is solved for and may be much longer than what it reads, are left
    out, and so are logprobs. Tokens, alarms and counts are not.

    Args:
        told: By `tell`.
        score: What to write in the place of a score.
    """
    if isinstance(told, list):
        return [tell_roughly(some, score=score) for some in told]
    if not isinstance(told, dict):
        return told
    left_out = {"logprobs"}
    if told.get("monitor") == "tripwire":
        left_out |= _SCORES
    return {
        key: score(some) if key in _SCORES else tell_roughly(some, score=score)
        for key, some in told.items()
        if key not in left_out
    }


_SCORES = {"score", "ratio"}


def about(score: float) -> Any:
    return pytest.approx(score, rel=rounding())


def count_seen(answers: Sequence[tuple[int, Answer]]) -> int:
    return sum(answer.guard["tokens_seen"] for _, answer in answers)


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + SECONDS
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    while any(read_gauge(server, name) for name in names):
        assert time.monotonic() < deadline, "a request runs on that nobody waits for"
        time.sleep(0.1)


def read_gauge(server: Server, name: str) -> float:
    families = text_string_to_metric_families(server.get("/metrics"))
    samples = [s for family in families for s in family.samples if s.name == name]
    assert samples, f"no {name}"
    return sum(sample.value for sample in samples)


def count(server: Server, name: str) -> float:
    samples = server.metrics().items()
    return sum(value for key, value in samples if key.startswith(f"guard_{name}_total"))


def find_secrets(replies: Sequence[Reply], secrets: re.Pattern[bytes]) -> list[Reply]:
    return [reply for reply in replies if secrets.search(reply.body)]


def find_server_errors(replies: Sequence[Reply]) -> list[Reply]:
    """Return those answered 5xx, in the head or, in a stream, in an event."""
    return [
        reply
        for reply in replies
        if (reply.status or 0) >= 500 or re.search(rb'"code": ?5', reply.body)
    ]


@pytest.fixture(scope="module")
def secrets(toy: Toy) -> re.Pattern[bytes]:
    """Return what no client may read.

    Stack traces, paths of this machine, tickets, and a policy that is not public.
    """
    places = [sys.prefix, str(toy.folder), str(Path(__file__).parents[2])]
    words = ["Traceback", 'File "', "site-packages", "staff", *places]
    patterns = [*map(re.escape, words), r"\.py\b", r"g1\.\w{20}"]
    return re.compile("|".join(patterns).encode())


@pytest.fixture(scope="module")
def quiet(toy_server: Server) -> list[dict[str, Any]]:
    """Return what the good requests are told when nobody else asks."""
    return [tell(ask_good(toy_server, number)) for number in range(len(GOOD))]


@pytest.fixture(scope="module")
def odd(toy_server: Server) -> list[Malformed]:
    document = json.loads(toy_server.get("/openapi.json"))
    return draw_schema(document, FIELDS) + draw_odd(ODD)


def test_good_requests_alone_are_told_the_same_every_time(
    toy_server: Server, quiet: list[dict[str, Any]]
) -> None:
    assert [tell(ask_good(toy_server, number)) for number in range(len(GOOD))] == quiet
    actions = Counter(told["guard"]["action"] for told in quiet)
    assert set(actions) == {"allow", "flag", "block"}


def test_what_must_be_refused_changes_nothing_for_its_neighbours(
    toy_server: Server,
    quiet: list[dict[str, Any]],
    odd: list[Malformed],
    secrets: re.Pattern[bytes],
) -> None:
    malformed = draw_refused(MALFORMED - len(odd) - HANG_UPS)
    assert len(malformed) + len(odd) + HANG_UPS == MALFORMED
    wait_until_idle(toy_server)
    finished, tokens = count(toy_server, "requests"), count(toy_server, "tokens")
    replies, answers = weather(toy_server, lambda: storm(toy_server, malformed))
    assert len(replies) == len(malformed)
    assert find_secrets(replies, secrets) == []
    for reply in replies:
        assert reply.status in EXPECTED.get(reply.to.family, (400,)), reply
        check_error(reply)
    for number, answer in answers:
        assert tell(answer) == quiet[number]
    # Whatever else had reached the engine would have been counted.
    wait_until_idle(toy_server)
    assert count(toy_server, "requests") == finished + len(answers)
    assert count(toy_server, "tokens") == tokens + count_seen(answers)


def test_what_may_be_served_hurts_only_itself(
    toy_server: Server,
    quiet: list[dict[str, Any]],
    odd: list[Malformed],
    secrets: re.Pattern[bytes],
) -> None:
    def work() -> list[Reply]:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            gone = [
                pool.submit(hang_up_in_the_middle, toy_server, number)
                for number in range(HANG_UPS)
            ]
            replies = storm(toy_server, odd)
            for hang_up in gone:
                hang_up.result()
        return replies

    wait_until_idle(toy_server)
    finished = count(toy_server, "requests")
    replies, answers = weather(toy_server, work)
    assert find_secrets(replies, secrets) == []
    assert find_server_errors(replies) == []
    assert [reply for reply in replies if reply.status is None] == []
    for number, answer in answers:
        assert tell_roughly(tell(answer)) == tell_roughly(quiet[number], score=about)
    wait_until_idle(toy_server)
    served = sum(reply.served for reply in replies)
    over = count(toy_server, "requests") - finished
    # Of several prompts one may be refused when others are in: those are over as well.
    refused = sum(not reply.served for reply in replies)
    assert 0 <= over - (served + HANG_UPS + len(answers)) <= refused


def test_afterwards_the_server_has_room_for_everybody(
    toy_server: Server, quiet: list[dict[str, Any]]
) -> None:
    wait_until_idle(toy_server)
    assert read_gauge(toy_server, "vllm:kv_cache_usage_perc") == 0
    assert count(toy_server, "errors") == 0
    numbers = [number % len(GOOD) for number in range(AT_ONCE)]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda number: ask_good(toy_server, number), numbers))
    for number, answer in zip(numbers, answers, strict=True):
        assert tell_roughly(tell(answer)) == tell_roughly(quiet[number], score=about)
