"""A running server that has keys and logs all it can tells nobody its secrets."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from e2e.drills import ADMIN_TOKEN, Drills
from e2e.serving import TOY_POLICIES, Server, ServerFactory, Toy

KEYS = ["sk-a-key-of-the-file", "sk-another-key-of-the-file"]
SECRETS = {
    "key of the file": KEYS[0],
    "other key of the file": KEYS[1],
    "key of the environment": "sk-a-key-of-the-environment",
    "admin token": ADMIN_TOKEN,
    "wrong key": "sk-of-somebody-who-is-mistaken",
    "wrong token": "of-no-administrator-at-all",
}
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
def policy(toy: Toy, drills: Drills) -> Path:
    return toy.write_policy("secrets", drills.add_to(TOY_POLICIES))


@pytest.fixture(scope="module")
def server(toy: Toy, policy: Path, start_server: ServerFactory) -> Server:
    """Serve with keys in a file, one in the environment, and an administrator."""
    keys = policy.with_name("keys.yaml")
    keys.write_text(f"api-key: [{', '.join(KEYS)}]\n")
    return start_server(
        toy.model,
        policy,
        *("--config", str(keys), "--enforce-eager"),
        environment={
            "GUARD_ADMIN_TOKEN": ADMIN_TOKEN,
            "VLLM_API_KEY": SECRETS["key of the environment"],
            "VLLM_LOGGING_LEVEL": "DEBUG",
        },
    )


@pytest.fixture(scope="module")
def answers(server: Server, policy: Path) -> str:
    """Everything the server says: to good requests, to bad ones, to all who ask."""
    policy.write_text("no policy at all")
    said = []
    for key in (*KEYS, SECRETS["wrong key"]):
        for token in (ADMIN_TOKEN, SECRETS["wrong token"], None):
            headers = {"authorization": f"Bearer {key}"}
            headers |= {"x-guard-admin-token": token} if token else {}
            with httpx.Client(
                base_url=server.url, headers=headers, timeout=60
            ) as client:
                said += [client.post("/v1/completions", json=body) for body in BODIES]
                said += [client.get(route) for route in ROUTES]
                said.append(client.post("/v1/completions", content=b"{"))
                said.append(client.post("/guard/reload"))
    assert {200, 400, 401, 403, 404, 422} <= {answer.status_code for answer in said}
    return "\n".join(f"{answer.headers}\n{answer.text}" for answer in said)


@pytest.fixture(scope="module")
def secrets(server: Server) -> dict[str, str]:
    """What nobody may read, as the server's own processes know it."""
    found = dict(SECRETS)
    for process in processes_of(server):
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
    server: Server, answers: str, secrets: dict[str, str]
) -> None:
    assert answers
    log = server.log.read_text(errors="replace")
    assert re.search(r"DEBUG", log), "the server did not log all it can"
    assert leaks(log, secrets) == []
    assert not re.search(r"g1\.[A-Za-z0-9_=-]{40,}\.", log), "a ticket"
    assert PROMPT not in log


def test_no_process_shows_a_secret_in_its_arguments(
    server: Server, answers: str, secrets: dict[str, str]
) -> None:
    assert answers
    shown = [
        (process / "cmdline").read_bytes().decode(errors="replace")
        for process in Path("/proc").glob("[0-9]*")
        if (process / "cmdline").exists()
    ]
    own = [
        (process / "cmdline").read_bytes().decode(errors="replace")
        for process in processes_of(server)
    ]
    assert len(own) >= 3
    assert leaks("\n".join(shown + own), secrets) == []


def test_a_secret_that_is_told_would_be_found(secrets: dict[str, str]) -> None:
    told = [f"key {secret}!" for secret in secrets.values()]
    assert [leaks(text, secrets) for text in told] == [[name] for name in secrets]
