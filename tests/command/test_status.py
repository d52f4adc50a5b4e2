"""`guard status` against servers that are played, with real metrics behind them."""

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from played import Answer, Played, play_server
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from specimens import make_policy_file

from guard.cli import main
from guard.client import Client
from guard.command.status import look_at, show_servers, watch_servers
from guard.errors import EngineError
from guard.metrics import Metrics
from guard.policy import Policy
from guard.verdict import Verdict

PRINT = "ab12" * 16
CERTIFICATE = "cd34" * 16
POLICIES = make_policy_file({"default": Policy()}, saes={"a": "layers.1.resid_post"})


@dataclass
class Shown:
    """A guarded server, as far as `guard status` looks at one."""

    played: Played
    registry: CollectorRegistry
    metrics: Metrics
    status: dict[str, Any]
    ready: Answer = (200, {"ready": True})

    @property
    def url(self) -> str:
        return self.played.url

    def answer(self, path: str, _body: object) -> Answer:
        """Answer the three routes that are asked."""
        routes: dict[str, Answer] = {
            "/guard/status": (200, self.status),
            "/guard/ready": self.ready,
            "/metrics": (200, generate_latest(self.registry)),
        }
        return routes[path]


@pytest.fixture
def server() -> Iterator[Shown]:
    registry = CollectorRegistry()
    metrics = Metrics(
        POLICIES,
        fingerprints={"default": PRINT},
        digests={"a": "0" * 64},
        certificates={"default": CERTIFICATE},
        registry=registry,
    )
    status = {
        "version": "1.2.3",
        "generation": 4,
        "fingerprint": "ef56" * 16,
        "on_error": "closed",
        "default_policy": "default",
        "policies": {
            "default": {
                "fingerprint": PRINT,
                "mode": "enforce",
                "certificate": {"id": CERTIFICATE, "issued": "2026-01-01"},
            }
        },
        "last_reload": None,
    }
    with play_server() as played:
        shown = Shown(played, registry, metrics, status)
        played.answer = shown.answer
        yield shown


def show(*urls: str) -> str:
    screen = io.StringIO()
    show_servers(urls, connect=Client, console=Console(file=screen, width=160))
    return screen.getvalue()


def finish(metrics: Metrics, action: Any) -> None:
    verdict = Verdict("x", "default", PRINT, "enforce", action)
    metrics.finish(verdict, {})


def test_what_is_served_and_what_happened_is_shown(server: Shown) -> None:
    for action in ("allow", "allow", "flag", "block"):
        finish(server.metrics, action)
    server.metrics.count_tokens("prefill", 17)
    server.metrics.count_unscored("no_score", 2)
    server.metrics.count_error("worker")
    shown = show(server.url)
    row = next(line for line in shown.splitlines() if "enforce" in line)
    cells = [cell.strip() for cell in re.split("[│┃]", row)[1:-1]]
    assert cells == [
        *("default", "enforce", PRINT[:12], CERTIFICATE[:12]),
        *("4", "1", "1", "0"),
    ]
    assert "ready" in shown
    assert "not ready" not in shown
    assert "generation 4, file ef56ef56ef56, vllm-guard 1.2.3" in shown
    assert "17 tokens guarded, unscored 2, errors 1, let through 0" in shown
    assert "never reloaded, 0 reloads refused" in shown


def test_the_last_reload_is_shown_with_its_reason(server: Shown) -> None:
    server.status["last_reload"] = {
        "result": "refused",
        "reason": "p.yaml:3: clamps[0]: no",
        "at": 1.0,
    }
    server.metrics.count_reload("refused")
    shown = show(server.url)
    assert ": refused (p.yaml:3: clamps[0]: no), 1 reloads refused" in shown


def test_a_policy_that_the_key_may_not_name_is_counted_all_the_same(
    server: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status["policies"] = {}
    shown = show(server.url)
    assert PRINT[:12] in shown
    # Where several processes share a series it cannot end, and becomes 0.
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    server.metrics.show_policies(POLICIES, fingerprints={}, digests={"a": ""})
    assert PRINT[:12] not in show(server.url)


def test_a_server_that_is_not_ready_says_why_and_is_shown(server: Shown) -> None:
    server.ready = (503, {"ready": False, "reason": "An engine hangs."})
    sight = look_at(server.url)
    assert sight.not_ready == (
        f"{server.url}/guard/ready answered 503: An engine hangs."
    )
    with pytest.raises(EngineError, match="An engine hangs"):
        show(server.url)


def test_a_server_that_cannot_be_reached_hides_no_other(server: Shown) -> None:
    screen = io.StringIO()
    gone = "http://127.0.0.1:9"
    with pytest.raises(EngineError) as refused:
        show_servers(
            [gone, server.url], connect=Client, console=Console(file=screen, width=160)
        )
    assert str(refused.value).startswith(f"{gone} does not answer as a guarded server")
    assert str(refused.value).count("\n") == 0
    assert server.url in screen.getvalue()


def test_secrets_come_from_the_environment(
    server: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-1")
    monkeypatch.setenv("GUARD_ADMIN_TOKEN", "token")
    monkeypatch.setattr(sys, "argv", ["guard", "status", "--url", server.url])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    asked = {path: headers for path, headers, _ in server.played.asked}
    assert asked["/guard/status"]["authorization"] == "Bearer sk-1"
    assert asked["/guard/status"]["x-guard-admin-token"] == "token"


def test_a_server_without_a_guard_is_named(server: Shown) -> None:
    server.status = {"something": "else"}
    with pytest.raises(EngineError, match="has no guard status; expected a guarded"):
        show(server.url)


def test_what_a_server_says_steers_no_terminal(server: Shown) -> None:
    server.status["version"] = "[/]\x1b[2J"
    server.status["policies"] = {"[bold]x\x07": server.status["policies"]["default"]}
    shown = show(server.url)
    assert "vllm-guard [/]\\x1b[2J" in shown
    assert "[bold]x\\x07" in shown
    assert shown.replace("\n", "").isprintable()


def test_watching_shows_what_changes_and_survives_a_server_that_goes(
    server: Shown,
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=160)
    urls = [server.url, "http://127.0.0.1:9"]
    finish(server.metrics, "block")
    watch_servers(urls, connect=Client, every=0.01, console=console, rounds=1)
    assert "http://127.0.0.1:9 does not answer as a guarded server" in screen.getvalue()
    assert re.search(r"│ +1 +│ +0 +│ +1 +│ +0 +│", screen.getvalue())
    asked = [path for path, _, _ in server.played.asked]
    watch_servers(urls, connect=Client, every=0.01, console=console, rounds=3)
    assert len(server.played.asked) == 4 * len(asked)
