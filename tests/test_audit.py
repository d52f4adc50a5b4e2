"""The audit log has whole lines about what was not simply allowed, and no one waits."""

import json
import math
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from guard.audit import MAX_FILES, AuditLog, check_audit_log
from guard.errors import EngineError
from guard.metrics import Metrics
from guard.policy import Policy, PolicyFile
from guard.verdict import Alarm, Verdict

ALARM = Alarm("recovery", 7.0, 3.5, 2.0, 12, "output", "block")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    policy_file = PolicyFile(
        version=1, policies={"default": Policy()}, default_policy="default"
    )
    return Metrics(
        policy_file, fingerprints={"default": "f"}, digests={}, registry=registry
    )


def make_verdict(action: Any = "block", **values: Any) -> Verdict:
    defaults: dict[str, Any] = {
        "id": "g1",
        "policy": "default",
        "fingerprint": "f",
        "mode": "enforce",
        "action": action,
    }
    return Verdict(**defaults | values)


def wait_for(registry: CollectorRegistry, result: str, count: int) -> None:
    """Wait until so many events had that result."""
    deadline = time.monotonic() + 20
    name = "guard_audit_events_total"
    while registry.get_sample_value(name, {"result": result}) != count:
        assert time.monotonic() < deadline, f"not {count} {result}"
        time.sleep(0.005)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_was_decided_and_why(
    tmp_path: Path, metrics: Metrics, registry: CollectorRegistry
) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", metrics)
    blank = Alarm("recovery", math.nan, 3.5, math.nan, 3, "prompt", "flag")
    log.record(make_verdict("allow"), 0)
    log.record(make_verdict("block", stage="output", alarms=(ALARM,)), 0)
    log.record(make_verdict("flag", id="g2", alarms=(blank,)), 3)
    wait_for(registry, "written", 2)
    first, second = read(log.path)
    assert first.pop("time").endswith("+00:00")
    alarm = {"monitor": "recovery", "score": 7.0, "threshold": 3.5, "ratio": 2.0}
    alarm |= {"position": 12, "stage": "output", "action": "block"}
    assert first == {
        "choice": 0,
        "schema": 1,
        "id": "g1",
        "policy": "default",
        "fingerprint": "f",
        "mode": "enforce",
        "action": "block",
        "stage": "output",
        "alarms": [alarm],
        "clamped_tokens": {},
        "tokens_seen": 0,
    }
    assert (second["id"], second["choice"]) == ("g2", 3)
    assert second["alarms"][0]["score"] is None
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_files_are_rotated_between_lines_and_the_oldest_goes(
    tmp_path: Path, metrics: Metrics, registry: CollectorRegistry
) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", metrics, max_bytes=600)
    count = 30
    for number in range(count):
        log.record(make_verdict(id=f"g{number:02}"), 0)
    wait_for(registry, "written", count)
    files = [log.path, *(Path(f"{log.path}.{n}") for n in range(1, MAX_FILES))]
    assert sorted(map(str, tmp_path.glob("audit.jsonl*"))) == sorted(
        [*map(str, files), f"{log.path}.lock"]
    )
    kept = [event["id"] for file in reversed(files) for event in read(file)]
    assert kept == [f"g{number:02}" for number in range(count)][-len(kept) :]
    assert len(kept) < count
    assert all(file.stat().st_size <= 600 for file in files)


def test_a_file_that_was_moved_away_is_begun_anew(
    tmp_path: Path, metrics: Metrics, registry: CollectorRegistry
) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", metrics)
    log.record(make_verdict(), 0)
    wait_for(registry, "written", 1)
    log.path.rename(tmp_path / "kept")
    log.record(make_verdict(id="g2"), 0)
    wait_for(registry, "written", 2)
    assert [event["id"] for event in read(log.path)] == ["g2"]


def test_a_full_disk_is_counted_and_takes_nothing_from_what_comes_later(
    tmp_path: Path,
    metrics: Metrics,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "audit.jsonl"
    path.symlink_to("/dev/full")
    log = AuditLog(path, metrics)
    for _ in range(3):
        log.record(make_verdict(), 0)
    wait_for(registry, "failed", 3)
    assert len(caplog.records) == 1
    path.unlink()
    log.record(make_verdict(id="later"), 0)
    wait_for(registry, "written", 1)
    assert [event["id"] for event in read(path)] == ["later"]


def test_a_line_of_which_the_disk_took_a_part_is_taken_back(
    tmp_path: Path,
    metrics: Metrics,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = os.write
    log = AuditLog(tmp_path / "audit.jsonl", metrics)
    log.record(make_verdict(id="before"), 0)
    wait_for(registry, "written", 1)
    monkeypatch.setattr(os, "write", lambda fd, line: write(fd, line[: len(line) // 2]))
    log.record(make_verdict(id="torn"), 0)
    wait_for(registry, "failed", 1)
    monkeypatch.setattr(os, "write", write)
    log.record(make_verdict(id="after"), 0)
    wait_for(registry, "written", 2)
    assert [event["id"] for event in read(log.path)] == ["before", "after"]


def test_a_disk_that_hangs_keeps_nobody_waiting(
    tmp_path: Path,
    metrics: Metrics,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, goes_on = os.write, threading.Event()

    def hang(descriptor: int, line: bytes) -> int:
        goes_on.wait(60)
        return write(descriptor, line)

    monkeypatch.setattr(os, "write", hang)
    log = AuditLog(tmp_path / "audit.jsonl", metrics, max_waiting=4)
    since = time.monotonic()
    for _ in range(100):
        log.record(make_verdict(), 0)
    assert time.monotonic() - since < 5
    dropped = registry.get_sample_value(
        "guard_audit_events_total", {"result": "dropped"}
    )
    # Four wait, and the writer may have one more in its hands.
    assert dropped in (95, 96)
    goes_on.set()
    wait_for(registry, "written", 100 - int(dropped))


def test_api_servers_do_not_write_over_each_other(
    tmp_path: Path, metrics: Metrics, registry: CollectorRegistry
) -> None:
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path, metrics, rank=rank) for rank in range(2)]
    for rank, log in enumerate(logs):
        log.record(make_verdict(id=f"of {rank}"), 0)
    wait_for(registry, "written", 2)
    assert [event["id"] for event in read(path)] == ["of 0"]
    assert [event["id"] for event in read(tmp_path / "audit-1.jsonl")] == ["of 1"]


def test_a_log_that_another_server_writes_is_refused(
    tmp_path: Path, metrics: Metrics
) -> None:
    path = tmp_path / "audit.jsonl"
    check_audit_log(path)
    log = AuditLog(path, metrics)
    with pytest.raises(EngineError, match="another server writes this audit log"):
        check_audit_log(log.path)


@pytest.mark.parametrize("name", ["absent/audit.jsonl", "folder", "pipe"])
def test_a_place_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngineError, match=f"{name}: not usable as an audit log"):
        check_audit_log(tmp_path / name)
