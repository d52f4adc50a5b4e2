"""A guard that does not do what it says never serves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm_guard import context, ops
from vllm_guard.rows import StepRows
from vllm_guard.selftest import check_canary, check_hooks_ran, check_stream

from guard.check import load_saes
from guard.errors import EngineError
from guard.hook import HookPoint
from guard.pipeline import Guard, StepBuffers, build_guards

WIDTH = 16


@pytest.fixture
def guard(state: context.Context) -> Guard:
    """The guard of the policy folder, bound."""
    step = StepBuffers(
        max_tokens=32, max_requests=4, num_columns=len(state.current.layout)
    )
    saes = load_saes(state.current.policy_file)
    (guard,) = build_guards(
        state.current.policy_file, saes, state.current.calibrations, step
    ).values()
    ops.bind([guard])
    return guard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_clamp_passes_and_leaves_no_trace(
    guard: Guard, state: context.Context, dtype: torch.dtype
) -> None:
    check_canary(guard, state.current, dtype=dtype, width=64)
    for buffer in guard.step.buffers():
        assert not buffer.any()


def test_a_place_without_an_sae_must_leave_every_row_as_it_was(
    state: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = StepBuffers(
        max_tokens=32, max_requests=4, num_columns=len(state.current.layout)
    )
    late = HookPoint.parse("layers.2.resid_post")
    guards = build_guards(
        state.current.policy_file,
        load_saes(state.current.policy_file),
        state.current.calibrations,
        step,
        hook_points=[late],
    )
    ops.bind(list(guards.values()))
    bare = guards[late]
    assert not bare.dictionaries
    check_canary(bare, state.current, dtype=torch.bfloat16, width=64)
    monkeypatch.setattr(ops, "call_guard", lambda rows, *_: rows.add_(0.1))
    with pytest.raises(
        EngineError, match=r"at 'layers.2.resid_post' under .* off by 0\.1"
    ):
        check_canary(bare, state.current, dtype=torch.float32, width=64)


@pytest.mark.parametrize(
    ("table", "slot", "policy"),
    [("offset", 1, "default"), ("gain", 2, "research"), ("enforces", 1, "default")],
)
def test_a_clamp_that_lost_a_rule_does_not_pass(
    guard: Guard, state: context.Context, table: str, slot: int, policy: str
) -> None:
    clamp = guard.dictionaries[0].clamp
    getattr(clamp, table)[slot] = 1.0 if table == "gain" else 0.0
    with pytest.raises(EngineError, match=f"under policy '{policy}' is off by"):
        check_canary(guard, state.current, dtype=torch.float32, width=64)


def test_an_op_that_does_nothing_does_not_pass(
    guard: Guard, state: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "call_guard", lambda *_: None)
    with pytest.raises(EngineError, match="is off by"):
        check_canary(guard, state.current, dtype=torch.float32, width=64)


def test_an_op_that_writes_what_is_not_a_number_does_not_pass(
    guard: Guard, state: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "call_guard", lambda rows, *_: rows.fill_(torch.nan))
    with pytest.raises(EngineError, match="is off by nan"):
        check_canary(guard, state.current, dtype=torch.float32, width=64)


def make_runner(guard: Guard, *, times: int) -> Any:
    """Return what runs a pass of dummy rows through the hook so many times."""

    def dummy_run(num_tokens: int) -> None:
        for _ in range(times):
            ops.call_guard(torch.zeros(num_tokens, 64), None, 0)

    return SimpleNamespace(_dummy_run=dummy_run)


@pytest.fixture
def drilling(drilled: context.Context) -> Guard:
    """The guard of the policy folder with drills, bound."""
    step = StepBuffers(
        max_tokens=32, max_requests=4, num_columns=len(drilled.current.layout)
    )
    saes = load_saes(drilled.current.policy_file)
    (guard,) = build_guards(
        drilled.current.policy_file,
        saes,
        drilled.current.calibrations,
        step,
        edits=drilled.current.edits,
    ).values()
    ops.bind([guard])
    return guard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_drills_pass_and_leave_no_trace(
    drilling: Guard, drilled: context.Context, dtype: torch.dtype
) -> None:
    check_canary(drilling, drilled.current, dtype=dtype, width=64)
    for buffer in drilling.step.buffers():
        assert not buffer.any()


def test_a_drill_that_does_nothing_does_not_pass(
    drilling: Guard, drilled: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would say of every policy that it holds.
    monkeypatch.setattr(
        StepBuffers, "drills_of", lambda step, count: 0 * step.rows_in[:count, 3]
    )
    with pytest.raises(EngineError, match=r"Drill 1 at 'layers\..* is off by"):
        check_canary(drilling, drilled.current, dtype=torch.float32, width=64)


@pytest.mark.parametrize("times", [0, 2])
def test_a_pass_that_misses_the_hook_or_meets_it_twice_stops_the_start(
    guard: Guard, times: int
) -> None:
    rows = StepRows(guard.step, num_hooks=1, default_slot=1)
    with pytest.raises(EngineError, match=f"ran {times} of 1 hooks"):
        check_hooks_ran(make_runner(guard, times=times), rows)


def test_a_pass_through_every_hook_is_enough_and_forgotten(guard: Guard) -> None:
    rows = StepRows(guard.step, num_hooks=1, default_slot=1)
    guard.step.marks.fill_(3)
    check_hooks_ran(make_runner(guard, times=1), rows)
    assert not guard.step.marks.any()


def test_a_model_that_was_loaded_without_the_guard_stops_the_start() -> None:
    with pytest.raises(EngineError, match="loaded without the guard"):
        check_hooks_ran(SimpleNamespace(), None)


class Layer(nn.Module):
    """A decoder layer as vLLM writes them: its norm adds the two halves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        resid = hidden_states + residual
        return self.mlp(resid / resid.norm(dim=1, keepdim=True)), resid


class SummedLayer(Layer):
    """A layer whose input is the whole stream; the residual only comes along."""

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.mlp(hidden_states), residual


class ForeignLayer(Layer):
    """A layer with a signature nobody has seen."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


@pytest.fixture
def config() -> VllmConfig:
    """An engine's configuration, with a model of `WIDTH`."""
    config = VllmConfig()
    model = SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: WIDTH)
    object.__setattr__(config, "model_config", model)
    return config


def test_a_layer_that_reads_the_sum_passes(config: VllmConfig) -> None:
    check_stream([Layer(), Layer()], config, allow_unverified=False)


def test_a_layer_that_reads_something_else_stops_the_start(config: VllmConfig) -> None:
    for allow_unverified in (False, True):
        with pytest.raises(EngineError, match="SummedLayer does not read"):
            check_stream(
                [Layer(), SummedLayer()], config, allow_unverified=allow_unverified
            )


def test_a_layer_that_cannot_be_checked_needs_permission(config: VllmConfig) -> None:
    layers = [Layer(), ForeignLayer()]
    with pytest.raises(EngineError, match="Set allow_unverified_model: true"):
        check_stream(layers, config, allow_unverified=False)
    check_stream(layers, config, allow_unverified=True)
