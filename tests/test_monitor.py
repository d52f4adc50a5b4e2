"""What monitors see of a token, and what it adds up to in a request."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from specimens import AT, make_monitor, make_policy_file

from guard.monitor import Column, Reading, Watch, column_of, list_columns
from guard.policy import Policy, Rule

POISON = [math.nan, math.inf, -math.inf]


def test_columns_are_listed_once_and_in_the_order_of_the_file() -> None:
    late = "layers.5.resid_post"
    shared = make_monitor("x", calibration="c1")
    several = {
        "p": Policy(
            monitors=(
                shared,
                make_monitor("y", score="density", calibration="c1"),
                make_monitor("z", hook_point=late, score="density", calibration="c1"),
            )
        ),
        "q": Policy(
            monitors=(
                make_monitor("w", sae="b", score="error", calibration="c3"),
                shared,
                make_monitor("left", sae="b", score="clamp_residual"),
            )
        ),
        "open": Policy(),
    }
    policy_file = make_policy_file(several, saes={"a": AT, "b": late})
    columns = list_columns(policy_file)
    assert columns == (
        Column(AT, "error_ratio", "a"),
        Column(AT, "clamp_residual", "a"),
        Column(AT, "error_norm", "a", "c1", "x"),
        Column(AT, "density", None, "c1", "y"),
        Column(late, "density", None, "c1", "z"),
        Column(late, "error_ratio", "b"),
        Column(late, "clamp_residual", "b"),
        Column(late, "error", "b", "c3", "w"),
        Column(late, "clamp_residual", "b", "calibration", "left"),
    )
    for policy in several.values():
        for monitor in policy.monitors:
            assert column_of(policy_file, monitor) in columns


def make_policy(*actions: str, mode: str = "enforce") -> Policy:
    monitors = tuple(
        make_monitor(f"m{i}", on_alarm=action) for i, action in enumerate(actions)
    )
    clamps = tuple(
        Rule(name=f"r{i}", sae="a", latents=(i,), law="ablate") for i in range(2)
    )
    return Policy.model_validate({"mode": mode, "clamps": clamps, "monitors": monitors})


def make_watch(policy: Policy, *, prompt_length: int = 4) -> Watch:
    """Watch a policy whose monitor i reads column i and alarms above i + 1."""
    numbers = range(len(policy.monitors))
    return Watch(
        policy,
        columns=list(numbers),
        thresholds=[float(i + 1) for i in numbers],
        prompt_length=prompt_length,
        seen_columns={"first": 0},
    )


def observe(watch: Watch, first: int, *columns: list[float], bits: Any = None) -> None:
    scores = np.array(columns, dtype=np.float32).T
    clamped = np.zeros(len(scores)) if bits is None else np.array(bits)
    watch.observe(first, scores, clamped.astype(np.int32))


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("score", [1.5, *POISON])
def test_an_alarm_is_seen_wherever_it_is(position: int, score: float) -> None:
    watch = make_watch(make_policy("block"))
    scores = [0.5] * 8
    scores[position] = score
    observe(watch, 0, scores[:3])
    observe(watch, 3, scores[3:])
    (reading,) = watch.readings()
    assert reading.alarm
    assert reading.position == watch.block_position == position
    assert reading.stage == ("prompt" if position < 4 else "output")
    assert reading.score == (1.5 if score == 1.5 else math.inf)
    assert reading.ratio > 1
    assert watch.tokens_seen == position + 1


def test_a_score_at_the_threshold_is_no_alarm() -> None:
    watch = make_watch(make_policy("block"))
    observe(watch, 0, [1.0, 0.5])
    (reading,) = watch.readings()
    assert not reading.alarm
    assert watch.block_position is None
    assert (reading.score, reading.position, reading.ratio) == (1.0, 0, 1.0)
    assert watch.tokens_seen == 2


def test_a_threshold_is_compared_in_fp32_however_many_rows_there_are() -> None:
    tenth = float(np.float32(0.1))  # a little more than 0.1
    for scores in ([tenth], [tenth, 0.0]):
        watch = Watch(
            make_policy("block"), columns=[0], thresholds=[0.1], prompt_length=4
        )
        observe(watch, 0, scores)
        assert not watch.is_alarmed


def test_before_its_first_token_a_request_has_no_alarm() -> None:
    (reading,) = make_watch(make_policy("block")).readings()
    assert not reading.alarm
    assert reading.position is None
    assert reading.stage == "prompt"


def test_nothing_counts_behind_the_position_that_blocks() -> None:
    watch = make_watch(make_policy("flag", "block"))
    observe(watch, 0, [0, 0, 0, 9], [0, 0, 5, 0], bits=[1, 0, 3, 3])
    observe(watch, 4, [9, 9], [9, 9], bits=[3, 3])
    flag, block = watch.readings()
    assert not flag.alarm
    assert flag.score == 0
    assert (block.position, block.score) == (2, 5)
    assert watch.tokens_seen == 3
    assert watch.clamped_tokens == [2, 1]


def test_the_first_of_two_blocking_monitors_decides_where_a_request_ends() -> None:
    watch = make_watch(make_policy("block", "block"))
    observe(watch, 0, [0, 0, 0, 9], [0, 9, 0, 0])
    first, second = watch.readings()
    assert watch.block_position == second.position == 1
    assert not first.alarm


@pytest.mark.parametrize(
    "policy", [make_policy("block", mode="observe"), make_policy("flag")]
)
def test_what_may_not_block_is_counted_to_the_end(policy: Policy) -> None:
    watch = make_watch(policy)
    observe(watch, 0, [0, 2, 0], bits=[1, 1, 1])
    observe(watch, 3, [math.nan, 0], bits=[2, 2])
    (reading,) = watch.readings()
    assert watch.block_position is None
    assert (reading.alarm, reading.position) == (True, 1)
    assert reading.score == math.inf
    assert watch.tokens_seen == 5
    assert watch.clamped_tokens == [3, 2]


@st.composite
def computations(draw: st.DrawFn) -> tuple[list[float], list[tuple[int, int]]]:
    """Scores by position, and steps that cover them, some of them again in parts."""
    scores = draw(
        st.lists(
            st.sampled_from([0.0, 0.3, 0.9, 1.1, 4.0, math.nan]),
            min_size=1,
            max_size=12,
        )
    )
    steps, known = [], 0
    while known < len(scores):
        first = draw(st.integers(0, known))
        between = draw(st.integers(first, known))
        last = draw(st.integers(known + 1, len(scores)))
        steps += [(first, between), (between, last)]
        known = last
    return scores, steps


@pytest.mark.parametrize("mode", ["observe", "enforce"])
@pytest.mark.parametrize("action", ["flag", "block"])
@given(computation=computations())
def test_a_position_counts_once_however_often_it_is_computed(
    mode: str, action: str, computation: tuple[list[float], list[tuple[int, int]]]
) -> None:
    scores, steps = computation
    policy = make_policy(action, mode=mode)
    once, often = make_watch(policy), make_watch(policy)
    observe(once, 0, scores, bits=[3] * len(scores))
    for first, last in steps:
        observe(often, first, scores[first:last], bits=[3] * (last - first))
    assert often.readings() == once.readings()
    assert often.tokens_seen == once.tokens_seen
    assert often.clamped_tokens == once.clamped_tokens == [once.tokens_seen] * 2
    assert often.block_position == once.block_position
    assert often.observed == once.observed
    assert often.ratios == {r.monitor: r.ratio for r in once.readings()}
    assert often.is_alarmed == any(r.alarm for r in once.readings())


def test_a_reading_above_its_threshold_has_a_ratio_above_one() -> None:
    reading = Reading("m", 3.0, 2.0, 0, "prompt", alarm=True, action="flag")
    assert reading.ratio == 1.5
    nothing = Reading("m", 3.0, 0.0, 0, "prompt", alarm=True, action="flag")
    assert nothing.ratio == math.inf
