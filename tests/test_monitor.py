"""What monitors see of a token, and what it adds up to in a request."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specimens import AT, make_monitor, make_policy_file

from guard.monitor import EXEMPT, Column, column_of, list_columns
from guard.policy import Monitor as MonitorRule
from guard.policy import Policy, Rule
from guard.watch import Reading, Watch, sum_up

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


def judge_plainly(
    scores: list[float], monitor: MonitorRule, threshold: float, prompt_length: int
) -> tuple[float, int | None, int | None]:
    """Return the largest mean or sum, where it is, and where the first alarm is."""
    stages = ["prompt" if i < prompt_length else "output" for i in range(len(scores))]
    positions = [
        i
        for i, stage in enumerate(stages)
        if (
            monitor.stage in (None, stage)
            or (monitor.stage == "last_prompt" and i == prompt_length - 1)
        )
        and (i > 0 or scores[i] != EXEMPT)
    ]
    largest, where, alarm, total = -math.inf, None, None, 0.0
    for number, position in enumerate(positions):
        window = positions[max(0, number + 1 - monitor.window) : number + 1]
        values = [scores[i] for i in window]
        known = sum(values) / len(values)
        if monitor.drift is not None:
            total = known = float(np.float32(max(0, total + known - monitor.drift)))
        if all(math.isfinite(value) and value != EXEMPT for value in values):
            made = float(np.float32(known))
        else:
            made = total = math.inf
        if made > largest:
            largest, where = made, position
        if alarm is None and (made > np.float32(threshold) or made == math.inf):
            alarm = position
    return largest, where, alarm


USUAL = st.floats(-8, 8, width=32)
SICK = st.sampled_from([*POISON, EXEMPT])
CHUNKS = st.sampled_from([1, 1, 2, 3, 7])
WAYS = st.sampled_from(
    [{"window": window} for window in (1, 2, 3, 5, 64)]
    + [{"drift": drift} for drift in (0.1, 0.25, 3.0)]
)
"""How a monitor puts scores together."""


@st.composite
def requests(draw: st.DrawFn) -> tuple[Policy, list[float], np.ndarray, int]:
    """A policy with its thresholds, scores of a request, and its prompt's length."""
    count = draw(st.integers(1, 3))
    monitors = tuple(
        make_monitor(
            f"m{i}",
            stage=draw(st.sampled_from([None, "prompt", "last_prompt", "output"])),
            **draw(WAYS),
            on_alarm=draw(st.sampled_from(["flag", "block"])),
        )
        for i in range(count)
    )
    policy = Policy(
        mode=draw(st.sampled_from(["observe", "enforce"])), monitors=monitors
    )
    length = draw(st.integers(1, 14))
    values = draw(st.lists(USUAL, min_size=length * count, max_size=length * count))
    scores = np.array(values, dtype=np.float32).reshape(length, count)
    if draw(st.booleans()):
        scores[0] = EXEMPT
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, length - 1)), draw(st.integers(0, count - 1))
        scores[at] = draw(SICK)
    thresholds = [draw(st.sampled_from([-1.0, 0.0, 0.1, 3.0, 9.0])) for _ in monitors]
    return policy, thresholds, scores, draw(st.integers(1, length + 1))


@settings(max_examples=400)
@given(request=requests(), data=st.data())
def test_a_watch_sees_means_and_sums_whatever_the_pieces_a_request_comes_in(
    request: tuple[Policy, list[float], np.ndarray, int], data: st.DataObject
) -> None:
    policy, thresholds, scores, prompt_length = request
    watch = Watch(
        policy,
        columns=list(range(len(thresholds))),
        thresholds=thresholds,
        prompt_length=prompt_length,
    )
    while watch.tokens_seen < len(scores) and watch.block_position is None:
        first = data.draw(st.integers(0, watch.tokens_seen))
        last = min(watch.tokens_seen + data.draw(CHUNKS), len(scores))
        watch.observe(first, scores[first:last], np.zeros(last - first, np.int32))

    def judge(column: int, length: int) -> tuple[float, int | None, int | None]:
        return judge_plainly(
            scores[:length, column].tolist(),
            policy.monitors[column],
            thresholds[column],
            prompt_length,
        )

    blocks = [
        judge(column, len(scores))[2]
        for column, monitor in enumerate(policy.monitors)
        if policy.mode == "enforce" and monitor.on_alarm == "block"
    ]
    blocked = min((at for at in blocks if at is not None), default=None)
    seen = len(scores) if blocked is None else blocked + 1
    assert watch.block_position == blocked
    assert watch.tokens_seen == seen
    exempt = int(scores[0, 0] == EXEMPT)
    for column, reading in enumerate(watch.readings()):
        largest, where, alarm = judge(column, seen)
        assert reading.score == largest
        assert reading.alarm == (alarm is not None)
        assert reading.position == (where if alarm is None else alarm)
        if (scores[0] == EXEMPT).all() == (scores[0, column] == EXEMPT):
            start = exempt if scores[0, column] == EXEMPT else 0
            whole = sum_up(
                scores[start:seen, column],
                policy.monitors[column],
                prompt_length=prompt_length - start,
            )
            assert whole == largest


def watch_one(prompt_length: int = 4, **values: Any) -> Watch:
    """Watch one monitor that reads column 0 and alarms above 1."""
    return make_watch(
        Policy(monitors=(make_monitor(**values),)), prompt_length=prompt_length
    )


def in_pieces(watch: Watch, scores: list[float], *pieces: int) -> Watch:
    """Let a watch observe so many tokens at once, and so on."""
    first = 0
    for count in pieces:
        observe(watch, first, scores[first : first + count])
        first += count
    assert first == len(scores)
    return watch


PIECES = [(6,), (1,) * 6, (2, 1, 3), (5, 1)]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(
    ("window", "position"), [(1, 2), (2, 3), (3, 4), (4, 4), (64, None)]
)
def test_an_alarm_lies_where_the_mean_over_the_window_is_above_the_threshold_first(
    window: int, position: int | None, pieces: tuple[int, ...]
) -> None:
    # Up to position 3: 1.3 over two, .87 over three; up to 4: 1.22 over four, .98 over
    # all five.
    watch = watch_one(window=window)
    in_pieces(watch, [0.0, 0.0, 1.1, 1.5, 2.3, -9.0], *pieces)
    assert watch.block_position == position
    assert watch.tokens_seen == (6 if position is None else position + 1)


@pytest.mark.parametrize("pieces", PIECES)
def test_weak_evidence_adds_up_to_an_alarm_and_one_weak_score_does_not(
    pieces: tuple[int, ...],
) -> None:
    weak = [0.75] * 6
    assert in_pieces(watch_one(), weak, *pieces).block_position is None
    assert in_pieces(watch_one(window=4), weak, *pieces).block_position is None
    # .5 a token above the drift: exactly 1, which is no alarm yet, at the second.
    assert in_pieces(watch_one(drift=0.25), weak, *pieces).block_position == 2
    alone = in_pieces(watch_one(drift=0.25), [0.0, 0.0, 0.75, *[0.0] * 3], *pieces)
    (reading,) = alone.readings()
    assert (reading.alarm, reading.score, reading.position) == (False, 0.5, 2)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(
    ("scores", "sums"),
    [
        # A pause lets it fall by the drift a token.
        ([1.0, 1.0, 0.0, 0.0, 0.75, 0.0], [0.75, 1.5, 1.25, 1.0, 1.5, 1.25]),
        # However long and harmless it was, the next score counts in full.
        ([0.5, -90.0, -90.0, 0.0, 1.0, 1.0], [0.25, 0.0, 0.0, 0.0, 0.75, 1.5]),
    ],
)
def test_harmless_tokens_let_a_sum_fall_but_never_below_zero(
    scores: list[float], sums: list[float], pieces: tuple[int, ...]
) -> None:
    watch = watch_one(drift=0.25, on_alarm="flag")
    (running,) = watch._running
    first = 0
    for count in pieces:
        observe(watch, first, scores[first : first + count])
        first += count
        assert running.total == sums[first - 1]
    whole = np.array(scores, dtype=np.float32)
    assert sum_up(whole, make_monitor(drift=0.25), prompt_length=4) == max(sums)
    (reading,) = watch.readings()
    assert reading.score == max(sums)
    assert reading.position == next(i for i, one in enumerate(sums) if one > 1)


@pytest.mark.parametrize("pieces", PIECES)
def test_a_sum_begins_at_the_first_position_of_its_stage(
    pieces: tuple[int, ...],
) -> None:
    watch = watch_one(drift=0.25, stage="output")
    scores = [9.0, 9.0, 9.0, 9.0, 1.0, 0.5]
    in_pieces(watch, scores, *pieces)
    (reading,) = watch.readings()
    assert (reading.alarm, reading.score, reading.position) == (False, 1.0, 5)


def test_a_block_is_found_without_adding_a_score_twice() -> None:
    for pieces in PIECES:
        watch = in_pieces(watch_one(drift=0.5), [0.75] * 6, *pieces)
        assert (watch.readings()[0].score, watch.block_position) == (1.25, 4)


@pytest.mark.parametrize("pieces", PIECES)
def test_a_sum_beyond_what_fp32_holds_is_infinite(pieces: tuple[int, ...]) -> None:
    watch = watch_one(drift=0.5, on_alarm="flag")
    in_pieces(watch, [0.0, 3e38, 3e38, 0.0, 0.0, 0.0], *pieces)
    (reading,) = watch.readings()
    assert (reading.score, reading.position) == (math.inf, 1)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("poison", [*POISON, EXEMPT])
@pytest.mark.parametrize("position", range(1, 6))
@pytest.mark.parametrize("way", [{"window": 3}, {"drift": 0.5}])
def test_what_is_not_finite_anywhere_in_a_mean_or_sum_is_an_alarm(
    way: dict[str, Any], position: int, poison: float, pieces: tuple[int, ...]
) -> None:
    scores = [-50.0] * 6
    scores[position] = poison
    watch = in_pieces(watch_one(**way, on_alarm="flag"), scores, *pieces)
    (reading,) = watch.readings()
    assert (reading.alarm, reading.position, reading.score) == (
        True,
        position,
        math.inf,
    )
    blocking = in_pieces(watch_one(**way), scores, *pieces)
    assert blocking.block_position == position


@pytest.mark.parametrize("pieces", PIECES)
def test_a_row_that_is_exempt_counts_nowhere_at_position_0(
    pieces: tuple[int, ...],
) -> None:
    watch = in_pieces(watch_one(window=2), [EXEMPT, 0.5, 0.5, 0.0, 0.0, 0.0], *pieces)
    (reading,) = watch.readings()
    assert (reading.alarm, reading.score, reading.position) == (False, 0.5, 1)
    assert watch.tokens_seen == 6


def test_a_request_of_one_exempt_row_has_no_score_yet() -> None:
    for stage in (None, "prompt", "last_prompt", "output"):
        watch = watch_one(stage=stage, prompt_length=1)
        observe(watch, 0, [EXEMPT])
        (reading,) = watch.readings()
        assert (reading.alarm, reading.score, reading.position) == (
            False,
            -math.inf,
            None,
        )
        assert watch.tokens_seen == 1


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(
    ("stage", "position"), [("prompt", 2), ("last_prompt", 3), ("output", 4)]
)
def test_a_stage_sees_its_own_tokens_and_no_window_reaches_out_of_it(
    stage: str, position: int, pieces: tuple[int, ...]
) -> None:
    spike = [0.0, 0.0, 8.0, 0.0, 8.0, 0.0]
    watch = in_pieces(watch_one(stage=stage, on_alarm="flag"), spike, *pieces)
    assert watch.readings()[0].position == position
    # The mean over two prompt tokens and one of the output would be above 1.
    bridge = [0.0, 0.0, 1.2, 1.7, 0.9, 0.9]
    watch = in_pieces(watch_one(stage="output", window=3), bridge, *pieces)
    (reading,) = watch.readings()
    assert not reading.alarm
    assert reading.score == np.float32(0.9)
    assert reading.stage == "output"


@given(
    score=st.floats(-1e6, 1e6, width=32),
    threshold=st.floats(-1e6, 1e6, width=32),
)
def test_a_ratio_is_above_one_if_and_only_if_the_score_is_an_alarm(
    score: float, threshold: float
) -> None:
    monitor = make_monitor(on_alarm="flag")
    watch = Watch(
        Policy(monitors=(monitor,)),
        columns=[0],
        thresholds=[threshold],
        prompt_length=4,
    )
    observe(watch, 0, [score])
    (reading,) = watch.readings()
    assert watch.ratios == {"watch": reading.ratio}
    if reading.alarm:
        assert reading.ratio >= 1
    else:
        assert reading.ratio <= 1
    if threshold > 0:
        assert reading.ratio == score / threshold


@pytest.mark.parametrize(
    ("score", "threshold", "ratio"),
    [
        (-1.0, -2.0, 1.5),
        (-3.0, -2.0, 0.5),
        (2.0, -2.0, 3.0),
        (-2.0, -2.0, 1.0),
        (0.0, 0.0, 1.0),
        (-1.0, 0.0, 0.0),
        (1.0, 0.0, math.inf),
        (math.inf, -2.0, math.inf),
        (-math.inf, -2.0, -math.inf),
        (-math.inf, 0.0, -math.inf),
    ],
)
def test_a_ratio_to_a_threshold_of_log_odds_counts_from_the_threshold(
    score: float, threshold: float, ratio: float
) -> None:
    reading = Reading("m", score, threshold, 0, "prompt", alarm=False, action="flag")
    assert reading.ratio == ratio


def test_summing_up_takes_the_largest_mean_or_sum_of_the_right_part() -> None:
    scores = np.array([4, 0, 2, 6, -1, 3], dtype=np.float32)
    for stage, window, expected in (
        (None, 1, 6.0),
        (None, 2, 4.0),
        (None, 3, 4.0),  # the first window holds one token
        ("prompt", 2, 4.0),
        ("last_prompt", 1, 2.0),
        ("output", 2, 6.0),
        ("output", 64, 6.0),
    ):
        monitor = make_monitor(stage=stage, window=window)
        assert sum_up(scores, monitor, prompt_length=3) == expected
    monitor = make_monitor(stage="output")
    assert sum_up(scores, monitor, prompt_length=6) == -math.inf
    monitor = make_monitor(drift=1.0)
    assert sum_up(scores, monitor, prompt_length=3) == 8.0  # 3 2 3 8 6 8
    monitor = make_monitor(drift=1.0, stage="prompt")
    assert sum_up(scores, monitor, prompt_length=2) == 3.0
    monitor = make_monitor(drift=1.0, stage="output")
    assert sum_up(scores, monitor, prompt_length=6) == -math.inf
    scores[1] = math.nan
    assert sum_up(scores, make_monitor(drift=1.0), prompt_length=3) == math.inf
    assert sum_up(scores, make_monitor(window=2), prompt_length=3) == math.inf


def test_weak_evidence_adds_up_and_a_pause_takes_it_off_again() -> None:
    monitor = make_monitor(drift=1.0)

    def total(*scores: float) -> float:
        return sum_up(np.array(scores, np.float32), monitor, prompt_length=1)

    assert total(2, 2, 2) == 3.0
    assert total(2, 0, 0, 0, 2) == 1.0
    assert total(0.5, 0.5, 0.5) == 0.0
    assert total(2, math.nan, 0) == math.inf
    watch = in_pieces(watch_one(drift=1.0), [1.5, 1.5, 0.5, 1.75, 9.0], 1, 1, 1, 1, 1)
    assert watch.block_position == 3


def test_a_reading_above_its_threshold_has_a_ratio_above_one() -> None:
    reading = Reading("m", 3.0, 2.0, 0, "prompt", alarm=True, action="flag")
    assert reading.ratio == 1.5
    nothing = Reading("m", 3.0, 0.0, 0, "prompt", alarm=True, action="flag")
    assert nothing.ratio == math.inf
