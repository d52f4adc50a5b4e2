"""What a real server writes down of flagged and blocked requests, and cannot write."""

import json
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e.outage import find_processes, limited
from e2e.serving import (
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    guard_command,
    guard_environment,
)
from e2e.tripwires import PROMPT, Tripwires

ACTIONS = {"first-output": "block", "first-output-observed": "flag", "open": "allow"}
"""What becomes of `PROMPT` under some policies."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def server(
    path: Path, toy: Toy, tripwires: Tripwires, start_server: ServerFactory
) -> Server:
    """Serve behind two API servers, each of which writes."""
    return start_server(
        toy.model,
        toy.write_policy("audited", tripwires.add_to(TOY_POLICIES)),
        *("--block-size", "32", "--enforce-eager"),
        *("--api-server-count", "2", "--audit-log", str(path)),
    )


def ask(server: Server, policy: str) -> str:
    """Ask over a connection of its own, so that any API server may take it.

    Returns:
        The id that the client has.
    """
    body = {"model": "model", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json=body | {"guard": {"policy": policy}},
        headers={"connection": "close"},
        timeout=120,
    )
    assert answer.status_code == 200
    assert answer.json()["guard"]["action"] == ACTIONS[policy]
    return answer.headers["x-guard-id"]


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of both API servers."""
    files = (path, path.with_stem(f"{path.stem}-1"))
    return [json.loads(x) for file in files for x in file.read_text().splitlines()]


def counted(server: Server, result: str) -> float:
    return server.metrics()[f'guard_audit_events_total{{result="{result}"}}']


def wait_for_count(server: Server, result: str, count: float) -> None:
    deadline = time.monotonic() + 30
    while (found := counted(server, result)) != count:
        assert time.monotonic() < deadline, f"{found} {result}, expected {count}"
        time.sleep(0.1)


def test_each_request_that_was_not_simply_allowed_has_one_line(
    server: Server, path: Path
) -> None:
    expected = {}
    for _ in range(20):
        for policy, action in ACTIONS.items():
            expected[ask(server, policy)] = policy, action
    expected = {k: v for k, v in expected.items() if v[1] != "allow"}
    wait_for_count(server, "written", len(expected))
    events = read_events(path)
    assert len(events) == len(expected)
    assert {e["id"]: (e["policy"], e["action"]) for e in events} == expected
    assert all(event["alarms"][0]["ratio"] > 1 for event in events)
    samples = server.metrics()
    for action in ("flag", "block"):
        total = sum(
            value
            for name, value in samples.items()
            if name.startswith(f'guard_requests_total{{action="{action}"')
        )
        assert total == sum(event["action"] == action for event in events)
    # Both of them have written, each into its own.
    assert 0 < len(path.read_text().splitlines()) < len(events)


def test_no_text_is_written(server: Server, path: Path) -> None:
    ask(server, "first-output")
    written = "".join(file.read_text() for file in path.parent.glob("*.jsonl"))
    assert "first-output" in written
    assert [word for word in PROMPT.split() if word in written] == []


def test_a_full_disk_is_counted_and_serving_goes_on(server: Server, path: Path) -> None:
    numbers = find_processes(server)
    wait_for_count(server, "written", len(read_events(path)))
    failed, before = counted(server, "failed"), len(read_events(path))
    with limited(numbers, resource.RLIMIT_FSIZE, [0] * len(numbers)):
        for _ in range(6):
            ask(server, "first-output")
        wait_for_count(server, "failed", failed + 6)
        assert len(read_events(path)) == before
    ids = {ask(server, "first-output") for _ in range(4)}
    deadline = time.monotonic() + 30
    while not ids <= {event["id"] for event in read_events(path)}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert counted(server, "failed") == failed + 6


@pytest.mark.parametrize("taken", [True, False], ids=["another's", "no folder"])
def test_a_log_that_cannot_be_kept_is_refused_before_anything_starts(
    taken: bool, server: Server, path: Path, toy: Toy, tmp_path: Path
) -> None:
    policy = toy.write_policy("plain", TOY_POLICIES)
    log = path if taken else tmp_path / "absent" / "audit.jsonl"
    command = (
        "serve",
        str(toy.model),
        "--policy",
        str(policy),
        "--audit-log",
        str(log),
    )
    done = subprocess.run(
        guard_command(*command),
        env=guard_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    said = "another server writes" if taken else "not usable as an audit log"
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
