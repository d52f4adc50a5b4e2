"""Clients of every kind, and what became of what they asked.

Each draws its requests from a seed of its own: several policies and keys, both routes,
streams and whole answers, several choices, drills, what must be refused, and clients
that hang up at any moment.
"""

import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from benchmarks.deployment import Deployment
from benchmarks.operator import TOKEN
from benchmarks.reload import keep_busy

__all__ = ["KINDS", "Crowd", "Request", "check_verdicts", "draw_request"]

Route = Literal["completions", "chat/completions"]

_SECONDS = 300
"""A request that takes longer is lost."""
KINDS = {"ask": 78, "hang up": 12, "malformed": 5, "drill": 3, "not allowed": 2}
"""Of a hundred requests, how many are of which kind."""
_MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"model": NaN}',
    b"\xff\xfe",
    b'{"prompt": "a", "guard": {}, "guard": []}',
    b'{"prompt": "a", "guard": 7}',
    b'{"prompt": "a", "guard": {"policy": "no such policy"}}',
    b'{"prompt": "a", "guard": {"mode": "observe"}}',
    b'{"prompt": "a", "vllm_xargs": {"guard_ticket": "g1.x.y"}}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "n": 1e9}',
    b'{"prompt": ' + 2000 * b"[" + 2000 * b"]" + b"}",
)


@dataclass(frozen=True, slots=True)
class Request:
    """What one client asks."""

    kind: str
    """A key of `KINDS`."""
    route: Route
    body: Mapping[str, Any] | bytes
    headers: Mapping[str, str]
    hangs_up: float | None = None
    """After so many events of a stream, or seconds of waiting for a whole answer."""

    @property
    def choices(self) -> int:
        """How many it asks for."""
        return self.body.get("n", 1) if isinstance(self.body, Mapping) else 0

    @property
    def streams(self) -> bool:
        """Whether it asks for a stream."""
        return isinstance(self.body, Mapping) and bool(self.body.get("stream"))


def draw_request(draw: random.Random, deployment: Deployment, kind: str) -> Request:
    """Draw one request of a client, of one of `KINDS`."""
    route: Route = draw.choice(["completions", "chat/completions"])
    every = {name for offer in deployment.keys.values() for name in offer}
    offers = list(deployment.keys.items())
    if kind == "not allowed":
        offers = [(key, offer) for key, offer in offers if set(offer) != every]
    key, policies = draw.choice(offers)
    headers = {"authorization": f"Bearer {key}"}
    if kind == "malformed":
        return Request(kind, route, draw.choice(_MALFORMED), headers)
    body = _draw_body(draw, deployment, route)
    guard = {"policy": draw.choice(policies), "trace": draw.choice(["none", "summary"])}
    if kind == "drill":
        guard["drill"] = draw.choice(deployment.drills)
        headers["x-guard-admin-token"] = TOKEN
    if kind == "not allowed":
        guard["policy"] = draw.choice(sorted(every - set(policies)))
    if draw.random() < 0.9 or kind in ("drill", "not allowed"):
        body["guard"] = guard
    hangs_up = None
    if kind == "hang up":
        streams = body["stream"]
        hangs_up = draw.choice([0, 1, 2, 5, 20]) if streams else draw.uniform(0.01, 0.5)
    return Request(kind, route, body, headers, hangs_up)


def draw_kind(draw: random.Random, kinds: Mapping[str, int]) -> str:
    """Draw a kind of request by its share."""
    return draw.choices(list(kinds), list(kinds.values()))[0]


def _draw_body(
    draw: random.Random, deployment: Deployment, route: Route
) -> dict[str, Any]:
    """Return what is asked of the model."""
    text = deployment.draw_prompt(draw)
    is_sampled = draw.random() < 0.3
    body: dict[str, Any] = {
        "model": deployment.name,
        "max_tokens": draw.randint(1, deployment.max_tokens),
        "temperature": 1.0 if is_sampled else 0.0,
        "n": draw.choice([1, 2, 3]) if is_sampled else 1,
        "stream": draw.random() < 0.5,
        "ignore_eos": draw.random() < 0.5,
    }
    if draw.random() < 0.1:
        body["logprobs"] = 1 if route == "completions" else True
    if route == "completions":
        return body | {"prompt": text}
    return body | {"messages": [{"role": "user", "content": text}]}


Check = Callable[[Request, list[dict[str, Any]]], dict[str, int]]
"""Counts what an answer's events say; raises ValueError where they are not as asked."""


def check_verdicts(request: Request, events: list[dict[str, Any]]) -> dict[str, int]:
    """Hold an answer against what was asked: one verdict for each choice.

    Raises:
        ValueError: It has another number of verdicts, or none of its policy.
    """
    told = [event["guard"] for event in events if "guard" in event]
    if len(told) != 1:
        raise ValueError(f"{len(told)} guard objects")
    verdicts = told[0].get("choices", told)
    reasons = {
        choice["index"]: choice["finish_reason"]
        for event in events
        for choice in event["choices"]
        if choice["finish_reason"]
    }
    if not len(verdicts) == len(reasons) == request.choices:
        message = f"{len(verdicts)} verdicts, {len(reasons)} ends of {request.choices}"
        raise ValueError(message)
    asked = request.body.get("guard", {}) if isinstance(request.body, Mapping) else {}
    for verdict, (_, reason) in zip(verdicts, sorted(reasons.items()), strict=True):
        if verdict["policy"] != asked.get("policy", verdict["policy"]):
            raise ValueError("a verdict under another policy")
        if (verdict["action"] == "block") != (reason == "content_filter"):
            raise ValueError(f"{verdict['action']} ended by {reason}")
        if verdict.get("drill") != asked.get("drill"):
            raise ValueError("a drill where none was asked for, or none where one was")
    counts = Counter(f"answered {verdict['action']}" for verdict in verdicts)
    return {"answers": 1, "choices": len(verdicts), **counts}


@dataclass
class Crowd:
    """Clients that ask until they are told to stop."""

    url: str
    deployment: Deployment
    seed: int
    clients: int
    kinds: Mapping[str, int] = field(default_factory=lambda: KINDS)
    """Those of `KINDS` that it asks, and their shares."""
    check: Check = check_verdicts
    """Holds a whole answer against its request."""
    ended: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    """What became of requests and choices, by what it is called."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Keep all clients busy."""
        with keep_busy(self._run, self.clients, until=self.ended):
            yield

    def _run(self, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        kinds = list(self.kinds)
        first: str | None = kinds[number % len(kinds)]
        with httpx.Client(base_url=f"{self.url}/v1/", timeout=_SECONDS) as client:
            while not self.ended.is_set():
                kind = first or draw_kind(draw, self.kinds)
                request = draw_request(draw, self.deployment, kind)
                first = None
                try:
                    found = ask(client, request, self.check)
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    found = {"lost": 1, f"lost: {type(error).__name__}: {error}": 1}
                with self._lock:
                    self.counts.update({request.kind: 1, **found})


def ask(client: httpx.Client, request: Request, check: Check) -> dict[str, int]:
    """Send a request; return what became of it.

    Raises:
        ValueError: It was answered as it should not be.
        KeyError: Something is missing in its answer.
    """
    if request.kind in ("malformed", "not allowed"):
        return _be_refused(client, request)
    if request.hangs_up is None:
        events = _read(client, request)
        return check(request, events)
    if request.streams:
        events = _read(client, request, most=int(request.hangs_up))
        return {"streams left": 1, "events before": len(events)}
    try:
        _read(client, request, seconds=request.hangs_up)
    except httpx.ReadTimeout:
        return {"answers not waited for": 1}
    return {"answers in time": 1}


def _be_refused(client: httpx.Client, request: Request) -> dict[str, int]:
    content = request.body
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    headers = {"content-type": "application/json", **request.headers}
    answer = client.post(request.route, content=content, headers=headers)
    wanted = 403 if request.kind == "not allowed" else 400
    if answer.status_code != wanted:
        raise ValueError(f"{request.kind}: {answer.status_code}, not {wanted}")
    return {f"refused {wanted}": 1}


def _read(
    client: httpx.Client,
    request: Request,
    *,
    most: int | None = None,
    seconds: float = _SECONDS,
) -> list[dict[str, Any]]:
    """Return the events of a stream, at most so many, or the one answer."""
    body, headers = request.body, request.headers
    if not request.streams:
        answer = client.post(request.route, json=body, headers=headers, timeout=seconds)
        answer.raise_for_status()
        return [answer.json()]
    events: list[dict[str, Any]] = []
    with client.stream("POST", request.route, json=body, headers=headers) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            if len(events) == most:
                return events
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
            elif line == "data: [DONE]":
                return events
    raise ValueError("a stream ended before its end")
