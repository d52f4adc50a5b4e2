"""A running server that logs all it can tells nobody its secrets."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from e2e.drills import ADMIN_TOKEN
from e2e.serving import Server

KEY = "sk-a-key-nobody-knows-of"
PROMPT = "w21 w7 w33 w54"
BODIES = [
    {"model": "model", "prompt": PROMPT, "max_tokens": 2},
    {"model": "model", "prompt": PROMPT, "max_tokens": 2, "stream": True},
    {"model": "model", "prompt": PROMPT, "max_tokens": 2, "guard": {"drill": "last"}},
    {"model": "model", "prompt": PROMPT, "guard": {"policy": "nowhere"}},
    {"model": "model", "prompt": PROMPT, "vllm_xargs": {"guard_ticket": "x"}},
    {"model": "other", "prompt": PROMPT},
    {"model": "model", "prompt": PROMPT, "temperature": "hot"},
]
ROUTES = [
    *("/metrics", "/health", "/version", "/v1/models", "/openapi.json"),
    *("/guard/ready", "/guard/status", "/guard/drills", "/guard/nowhere", "/load"),
]


def environment_of(process: Path) -> dict[str, str]:
    """Return what a process was started with and what it has set since."""
    pairs = process.joinpath("environ").read_bytes().decode(errors="replace")
    return dict(pair.split("=", 1) for pair in pairs.split("\0") if "=" in pair)


def processes_of(server: Server) -> Iterator[Path]:
    """Yield the folders in /proc of a server and all that it started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            rest = folder.joinpath("stat").read_text().rpartition(") ")[2]
        except OSError:
            continue
        if int(rest.split()[3]) == server.process.pid:
            yield folder


@pytest.fixture(scope="module")
def answers(toy_server: Server) -> str:
    """Everything the server says: to good requests, to bad ones, to all who ask."""
    said = []
    for token in (ADMIN_TOKEN, "wrong" * 5, None):
        headers = {"authorization": f"Bearer {KEY}"}
        headers |= {"x-guard-admin-token": token} if token else {}
        with httpx.Client(base_url=toy_server.url, headers=headers) as client:
            said += [
                client.post("/v1/completions", json=body, timeout=60) for body in BODIES
            ]
            said += [client.get(route) for route in ROUTES]
            said.append(client.post("/v1/completions", content=b"{", timeout=60))
    assert {200, 400, 403, 404} <= {answer.status_code for answer in said}
    return "\n".join(f"{answer.headers}\n{answer.text}" for answer in said)


@pytest.fixture(scope="module")
def secrets(toy_server: Server) -> dict[str, str]:
    """What nobody may read, as the server's own processes know it."""
    found = {"key": KEY, "admin token": ADMIN_TOKEN}
    for process in processes_of(toy_server):
        if secret := environment_of(process).get("GUARD_SECRET"):
            found["ticket secret"] = secret
    assert len(found["ticket secret"]) == 64
    return found


def leaks(text: str, secrets: dict[str, str]) -> list[str]:
    return [name for name, secret in secrets.items() if secret in text]


def test_no_answer_and_no_metric_holds_a_secret(
    answers: str, secrets: dict[str, str]
) -> None:
    assert "guard_requests_total" in answers
    assert leaks(answers, secrets) == []
    assert 'guard_ticket":' not in answers


def test_a_log_of_everything_holds_no_secret_no_ticket_and_no_prompt(
    toy_server: Server, answers: str, secrets: dict[str, str]
) -> None:
    assert answers
    log = toy_server.log.read_text(errors="replace")
    assert re.search(r"DEBUG", log), "the server did not log all it can"
    assert leaks(log, secrets) == []
    assert not re.search(r"g1\.[A-Za-z0-9_=-]{40,}\.", log), "a ticket"
    assert PROMPT not in log


def test_no_process_shows_a_secret_in_its_arguments(
    toy_server: Server, answers: str, secrets: dict[str, str]
) -> None:
    assert answers
    shown = [
        (process / "cmdline").read_bytes().decode(errors="replace")
        for process in Path("/proc").glob("[0-9]*")
        if (process / "cmdline").exists()
    ]
    own = [
        (process / "cmdline").read_bytes().decode(errors="replace")
        for process in processes_of(toy_server)
    ]
    assert len(own) >= 3
    assert leaks("\n".join(shown + own), secrets) == []


def test_a_secret_that_is_told_would_be_found(secrets: dict[str, str]) -> None:
    told = [f"key {secret}!" for secret in secrets.values()]
    assert [leaks(text, secrets) for text in told] == [[name] for name in secrets]
