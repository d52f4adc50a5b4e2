"""The custom op: what the compiler is told of it is true."""

from typing import Any

import torch
from specimens import (
    AT,
    D_MODEL,
    assert_same_bits,
    draw_rows,
    make_policy_file,
    make_sae,
)
from vllm_guard import ops

from guard.clamp import clamp_resid
from guard.hook import HookPoint
from guard.pipeline import Guard, StepBuffers, build_guards
from guard.policy import Policy, Rule

RULE = Rule(name="r", sae="a", latents=(0, 3), law="set", value=4.0)


def make_guard(seed: int = 0) -> Guard:
    """Return a guard that clamps 6 rows, of which the third is nobody's."""
    policy_file = make_policy_file({"p": Policy(clamps=(RULE,))}, saes={"a": AT})
    step = StepBuffers(max_tokens=6, max_requests=1, num_columns=0)
    step.rows_in[:, 0] = torch.tensor([1, 1, 0, 1, 1, 1])
    guards = build_guards(policy_file, {"a": make_sae(seed=seed)}, {}, step)
    return guards[HookPoint.parse(AT)]


def test_the_op_reaches_the_guard_of_its_index() -> None:
    guards = [make_guard(seed=1), make_guard(seed=2)]
    ops.bind(guards)
    assert ops.bound() == guards
    for index, guard in enumerate(guards):
        hidden_states = draw_rows(6, seed=0)
        expected = clamp_resid(hidden_states, guard.dictionaries[0].sae, [RULE]).resid
        expected[2] = hidden_states[2]
        ops.call_guard(hidden_states, None, index)
        torch.testing.assert_close(hidden_states, expected)


def test_binding_again_forgets_what_was_bound_before() -> None:
    ops.bind([make_guard(), make_guard()])
    last = make_guard()
    ops.bind([last])
    assert ops.bound() == [last]


def test_the_schema_says_what_is_written_and_what_is_not() -> None:
    ops.bind([make_guard()])
    for residual in (None, draw_rows(6, seed=1)):
        torch.library.opcheck(
            torch.ops.vllm.guard.default,
            (draw_rows(6, seed=0), residual, 0),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_the_other_half_of_the_stream_is_read_only() -> None:
    ops.bind([make_guard()])
    hidden_states, residual = draw_rows(6, seed=0), draw_rows(6, seed=1)
    before = residual.clone()
    ops.call_guard(hidden_states, residual, 0)
    assert_same_bits(residual, before)


def test_the_op_computes_nothing_where_shapes_are_traced() -> None:
    ops.bind([make_guard()])
    empty = torch.empty(6, D_MODEL, device="meta")
    assert ops.call_guard(empty, None, 0) is None


def test_new_rules_need_no_new_compilation() -> None:
    guard = make_guard()
    ops.bind([guard])
    compilations = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def double_and_guard(rows: torch.Tensor) -> torch.Tensor:
        rows = rows * 2
        ops.call_guard(rows, None, 0)
        return rows

    compiled = torch.compile(double_and_guard, backend=count, fullgraph=True)
    rows = draw_rows(6, seed=0)
    clamped = compiled(rows)
    guard.step.rows_in.zero_()
    assert_same_bits(compiled(rows), 2 * rows)
    assert not torch.equal(clamped, 2 * rows)
    assert compilations == 1


def test_one_call_in_sixty_four_is_timed_and_told_once() -> None:
    ops.bind([lambda _hidden_states, _residual: None])  # type: ignore[list-item]
    ops.take_seconds()
    for _ in range(2 * ops.SAMPLED):
        ops._guard(torch.zeros(1, 1), None, 0)
    assert len(ops.take_seconds()) == 2
    assert ops.take_seconds() == []
    ops.bind([])


def test_of_times_that_nobody_asks_for_the_newest_stay() -> None:
    ops.bind([lambda _hidden_states, _residual: None])  # type: ignore[list-item]
    ops.take_seconds()
    for _ in range((ops.MAX_SECONDS + 3) * ops.SAMPLED):
        ops._guard(torch.zeros(1, 1), None, 0)
    assert len(ops.take_seconds()) == ops.MAX_SECONDS
    ops.bind([])


class Seen:
    """A recorder that keeps what it is shown."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, torch.Tensor]] = []

    def see(self, guard: Guard, resid: torch.Tensor) -> None:
        self.rows.append((str(guard.hook_point), resid.clone()))


def test_a_recorder_sees_the_whole_stream_behind_the_clamp() -> None:
    recorder: Any = Seen()
    guard = make_guard()
    ops.bind([guard], recorder=recorder)
    hidden_states, residual = draw_rows(6, seed=0).bfloat16(), draw_rows(6, seed=1)
    before = hidden_states.clone()
    ops.call_guard(hidden_states, residual, 0)
    assert not torch.equal(hidden_states, before)
    ((at, resid),) = recorder.rows
    assert at == AT
    assert torch.equal(resid, hidden_states.float() + residual)
    # A server records nothing.
    ops.bind([guard])
    ops.call_guard(hidden_states, residual, 0)
    assert len(recorder.rows) == 1
