"""Whatever a server answers: a `guard` command that asks it ends in a line."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from fuzz.limits import attempt, fuzz
from fuzz.mutation import changed, damaged, write_json
from hypothesis import given
from hypothesis import strategies as st
from played import serving
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from specimens import AT, make_calibration, make_monitor, make_policy_file

from guard.client import Client
from guard.command.doctor import CHECKS, Subject
from guard.command.drill import run_drills
from guard.command.status import show_servers, tell_status, watch_servers
from guard.fingerprint import fingerprint
from guard.metrics import Metrics
from guard.policy import Policy, parse_policy
from guard.prompt import Prompt
from guard.traffic import recalibrate

POLICY = Policy(monitors=(make_monitor(target_fpr=0.5, on_alarm="flag"),))
POLICIES = make_policy_file({"default": POLICY}, saes={"a": AT})
CALIBRATION = make_calibration(POLICIES)
NAME = POLICY.monitors[0].name
SERVED = b"version: 1\npolicies: {default: {}}\ndefault_policy: default\n"
PRINT = fingerprint(parse_policy(SERVED, Path("policy.yaml")), "default")


def write_metrics() -> bytes:
    registry = CollectorRegistry()
    metrics = Metrics(
        POLICIES,
        fingerprints={"default": PRINT},
        digests={"a": "0" * 64},
        registry=registry,
    )
    metrics.count_tokens("decode", 3)
    # The guard's own first, for changes near the beginning.
    lines = generate_latest(registry).splitlines(keepends=True)
    kept = [line for line in lines if b"_info" in line or b"tokens" in line]
    return b"".join(kept)


GOOD: dict[str, Any] = {
    "/guard/status": {
        "version": "1.2.3",
        "generation": 4,
        "fingerprint": PRINT,
        "on_error": "closed",
        "policies": {
            "default": {
                "fingerprint": PRINT,
                "mode": "enforce",
                "certificate": {"id": PRINT, "issued": "2026-01-01"},
            }
        },
        "last_reload": {"result": "refused", "reason": "no", "at": 1.0},
        "engines": [],
    },
    "/guard/ready": {"ready": True},
    "/guard/drills": {"drills": [{"name": "last", "prompt": "how ?", "gold": "so ."}]},
    "/v1/models": {"data": [{"id": "small", "max_model_len": 100}]},
    "/v1/chat/completions": {
        "choices": [{"message": {"content": "so ."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 40},
        "guard": {
            "policy": "default",
            "action": "flag",
            "fingerprint": PRINT,
            "drill": "last",
            "alarms": [{"monitor": NAME, "score": 6.5, "position": 3, "ratio": 2.5}],
            "readings": [{"monitor": NAME, "score": 6.5, "position": 3, "ratio": 2.5}],
        },
    },
}
METRICS = write_metrics()
BODIES = {path: json.dumps(body).encode() for path, body in GOOD.items()}
BODIES["/metrics"] = METRICS
SNIPPETS = [
    *(b"{", b"}", b'"', b"\\", b"=", b",", b"#", b" NaN", b"+Inf", b"1e400", b"\n"),
    *(b"# TYPE x histogram\n", b"x_bucket 1\n", b'guard_policy_info{a="\x1b[2J"} 1\n'),
]
STATUSES = [200, 204, 301, 401, 404, 500, 503]


def write_answer(body: bytes, *, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d So\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


def bodies(path: str) -> st.SearchStrategy[bytes]:
    if path == "/metrics":
        return damaged(METRICS, snippets=SNIPPETS)
    texts = changed(GOOD[path]).map(write_json).map(str.encode)
    return texts | texts.flatmap(damaged)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, bytes]:
    """A route, and every byte of what is answered there."""
    path = draw(st.sampled_from(list(BODIES)))
    status = draw(st.just(200) | st.sampled_from(STATUSES))
    whole = write_answer(draw(bodies(path)), status=status)
    heads = [b"\r\n", b"content-length: -1\r\n", b"transfer-encoding: chunked\r\n"]
    return path, draw(st.just(whole) | damaged(whole, snippets=heads))


@dataclass
class Hostile:
    """A server that answers with whatever bytes it has for a route."""

    url: str = ""
    answers: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture(scope="module")
def hostile() -> Iterator[Hostile]:
    played = Hostile()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.wfile.write(played.answers[self.path])

        do_GET = do_POST = _serve  # noqa: N815 - as http.server calls them

        def log_message(self, *_args: object) -> None:
            return

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # who asked may be gone
                super().handle()

    with serving(Handler) as played.url:
        yield played


def show(url: str) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    watch_servers([url], connect=Client, every=1, console=console, rounds=1)
    try:
        show_servers([url], connect=Client, console=console)
    finally:
        said = screen.getvalue().replace("\n", "")
        assert said.isprintable(), repr(said)


def write_status(url: str) -> None:
    for said in tell_status([url], connect=Client):
        assert said.isascii()


def drill(url: str) -> None:
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        run_drills(
            url,
            admin_token="sixteen-letters!",
            api_key="",
            policies=[None],
            route="chat/completions",
        )
    assert screen.getvalue().replace("\n", "").isprintable()


def examine(url: str, policy: Path) -> None:
    for name in ("server", "served policies"):
        CHECKS[name](Subject(policy=policy, url=url))


def calibrate(url: str) -> None:
    prompts = [Prompt(prompt="so")] * 2
    recalibrate(CALIBRATION, POLICY, Client(url), prompts, provenance={})


@pytest.fixture
def asking(tmp_path: Path) -> dict[str, Callable[[str], None]]:
    """What is done with a server, by name; its argument is the URL."""
    policy = tmp_path / "policy.yaml"
    policy.write_bytes(SERVED)
    return {
        "status": show,
        "status --json": write_status,
        "doctor": lambda url: examine(url, policy),
        "calibrate": calibrate,
        "drill": drill,
    }


def test_any_answer_of_a_server_is_used_or_refused_in_one_line(
    hostile: Hostile, asking: dict[str, Callable[[str], None]]
) -> None:
    good = {path: write_answer(body) for path, body in BODIES.items()}
    hostile.answers = good
    assert [attempt(partial(ask, hostile.url)) for ask in asking.values()] == [None] * 5
    refused = dict.fromkeys(asking, 0)

    @fuzz
    @given(answers())
    def try_one(answer: tuple[str, bytes]) -> None:
        path, content = answer
        hostile.answers = {**good, path: content}
        for name, ask in asking.items():
            refused[name] += attempt(partial(ask, hostile.url)) is not None

    try_one()
    assert all(refused.values()), "nothing was refused: the changes reach no check"


@pytest.mark.parametrize("depth", [*range(100, 1100, 50), 100_000])
def test_an_answer_that_nests_without_end_is_used_or_refused(
    hostile: Hostile, asking: dict[str, Callable[[str], None]], depth: int
) -> None:
    deep = b'{"generation": %s%s}' % (b"[" * depth, b"]" * depth)
    hostile.answers = {path: write_answer(deep) for path in BODIES}
    for ask in asking.values():
        attempt(partial(ask, hostile.url))
    hostile.answers = {path: write_answer(deep, status=500) for path in BODIES}
    assert all(attempt(partial(ask, hostile.url)) for ask in asking.values())
