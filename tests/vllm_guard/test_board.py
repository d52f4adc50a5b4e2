"""What an API server keeps of finished requests, and says of some."""

import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm_guard import board as board_module
from vllm_guard import context
from vllm_guard.board import SILENT_SECONDS, Board
from vllm_guard.readings import Progress

from guard.http.keys import KeyRing
from guard.verdict import Action, Verdict

SERIES = "guard_drift_log_evalue", {"policy": "default", "monitor": "watch"}
STRANGE = 99.0


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def board(state: context.Context, registry: CollectorRegistry) -> Board:
    return context.get_board(registry)


@pytest.fixture
def serve(board: Board, state: context.Context) -> Callable[..., None]:
    """Let strange requests of the policy `default` come to an end."""

    def finish(count: int, *, cut_short: bool = False, **values: Any) -> None:
        prints = state.start.fingerprints
        wanted = {"fingerprint": prints["default"], "action": "allow"} | values
        verdict = Verdict("id", "default", mode="enforce", **wanted)
        progress = Progress(
            verdict.to_wire(), {"watch": 0.1}, [STRANGE], 16, {}, {}, []
        )
        for _ in range(count):
            request = SimpleNamespace(
                guard_begun=verdict, guard_progress=(verdict, progress)
            )
            board.finish(request, cut_short=cut_short)

    return finish


def test_strange_requests_are_evidence_of_drift(
    serve: Callable[..., None], registry: CollectorRegistry
) -> None:
    assert registry.get_sample_value(*SERIES) == 0
    serve(1)
    first = registry.get_sample_value(*SERIES)
    serve(30)
    # The calibration has 19 requests: against so few not much can be said.
    assert registry.get_sample_value(*SERIES) > 3 > first != 0


@pytest.mark.parametrize(
    "values",
    [{"cut_short": True}, {"fingerprint": "before a reload"}, {"drill": "last"}],
    ids=["its client left", "of another generation", "a drill"],
)
def test_what_ran_not_to_its_end_or_under_other_terms_is_none(
    serve: Callable[..., None], registry: CollectorRegistry, values: dict[str, Any]
) -> None:
    serve(30, **values)
    assert registry.get_sample_value(*SERIES) == 0


@pytest.mark.parametrize("changed", [True, False])
def test_a_reload_begins_anew_only_where_a_policy_changed(
    serve: Callable[..., None],
    registry: CollectorRegistry,
    board: Board,
    state: context.Context,
    changed: bool,
) -> None:
    serve(30)
    before = registry.get_sample_value(*SERIES)
    prints = dict(state.start.fingerprints)
    if changed:
        prints["default"] = "another"
    now = replace(state.start, number=2, fingerprints=prints)
    board.show(now, keys=KeyRing((), accepted=()))
    assert registry.get_sample_value(*SERIES) == (0 if changed else before)


def test_without_a_calibration_nothing_drifts(
    serve: Callable[..., None],
    registry: CollectorRegistry,
    board: Board,
    state: context.Context,
) -> None:
    serve(30)
    prints = {**state.start.fingerprints, "default": "another"}
    now = replace(state.start, number=2, fingerprints=prints, calibrations={})
    board.show(now, keys=KeyRing((), accepted=()))
    serve(30, fingerprint="another")
    assert registry.get_sample_value(*SERIES) == 0


def test_a_policy_that_is_gone_drifts_no_more(
    serve: Callable[..., None],
    registry: CollectorRegistry,
    board: Board,
    state: context.Context,
) -> None:
    serve(30)
    prints = {k: v for k, v in state.start.fingerprints.items() if k != "default"}
    now = replace(state.start, number=2, fingerprints=prints)
    board.show(now, keys=KeyRing((), accepted=()))
    assert registry.get_sample_value(*SERIES) == 0


def finish(one: Board, *, action: Action, reason: str | None) -> None:
    verdict = Verdict("id", "open", "fp", "enforce", action, reason=reason)
    progress = Progress(verdict.to_wire(), {}, [], 16, {}, {}, [])
    request: Any = SimpleNamespace(
        guard_begun=verdict, guard_progress=(verdict, progress)
    )
    one.finish(request, cut_short=False)


def test_who_is_let_through_is_logged_at_once_and_then_by_number(
    state: context.Context,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 1000.0
    monkeypatch.setattr(board_module.time, "monotonic", lambda: now)
    registry = CollectorRegistry()
    one = Board(state.current, secret=b"0" * 32, registry=registry)
    with caplog.at_level(logging.WARNING, logger=board_module.__name__):
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
