"""What a server says of requests that go on though nobody vouches for them."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm_guard import board, context
from vllm_guard.board import SILENT_SECONDS, Board
from vllm_guard.readings import Progress

from guard.verdict import Action, Verdict


def finish(one: Board, *, action: Action, reason: str | None) -> None:
    verdict = Verdict("id", "open", "fp", "enforce", action, reason=reason)
    progress = Progress(verdict.to_wire(), {}, {}, {}, [])
    request: Any = SimpleNamespace(
        guard_begun=verdict, guard_progress=(verdict, progress)
    )
    one.finish(request)


def test_who_is_let_through_is_logged_at_once_and_then_by_number(
    state: context.Context,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 1000.0
    monkeypatch.setattr(board.time, "monotonic", lambda: now)
    registry = CollectorRegistry()
    one = Board(state.current, secret=b"0" * 32, registry=registry)
    with caplog.at_level(logging.WARNING, logger=board.__name__):
        finish(one, action="block", reason="unguarded")
        finish(one, action="allow", reason=None)
        assert not caplog.records
        for _ in range(50):
            finish(one, action="flag", reason="unguarded")
        now += SILENT_SECONDS
        finish(one, action="flag", reason="not_finite")
    first, second = (record.getMessage() for record in caplog.records)
    assert "1 requests, the last of them unguarded, under policy 'open'" in first
    assert "50 requests, the last of them not_finite" in second
    name, labels = "guard_requests_let_through_total", {"fault": "unguarded"}
    assert registry.get_sample_value(name, labels) == 50
