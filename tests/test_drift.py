"""What a policy's finished requests say together, against its calibration's."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from specimens import make_calibration, make_monitor, make_policy_file

from guard.calibration import Calibration
from guard.drift import ALPHA, LINE, Drift, PolicyDrift
from guard.martingale import Reference
from guard.policy import Policy
from guard.verdict import Action, Alarm, Verdict

LENGTH = 100


def make_policy(*on_alarm: Any, mode: Any = "enforce", **values: Any) -> Policy:
    """Return a policy of monitors `m0`, `m1` ..., of what each does on an alarm."""
    monitors = tuple(
        make_monitor(f"m{number}", on_alarm=action, **values)
        for number, action in enumerate(on_alarm)
    )
    return Policy(mode=mode, monitors=monitors)


def calibrate(policy: Policy, *maxima: Any, lengths: Sequence[int] = (LENGTH,)) -> Any:
    policy_file = make_policy_file({"p": policy}, saes={"a": "layers.1.resid_post"})
    rows = [torch.as_tensor(one).float() for one in maxima]
    return make_calibration(policy_file, maxima=rows, lengths=lengths)


def make_drift(policy: Policy, calibration: Calibration) -> PolicyDrift:
    return PolicyDrift(policy, {str(policy.monitors[0].calibration): calibration})


def make_verdict(*stoppers: str, **values: Any) -> Verdict:
    """Return the verdict on a request that monitors stopped, if any did."""
    alarms = tuple(
        Alarm(name, 9.0, 1.0, 9.0, 3, "prompt", "block") for name in stoppers
    )
    action: Action = "block" if stoppers else "allow"
    return Verdict("id", "p", "f", "enforce", action, alarms=alarms, **values)


def test_the_line_is_that_of_the_stated_alpha() -> None:
    assert math.exp(-LINE) == pytest.approx(ALPHA)
    assert round(LINE, 1) == 6.9


def test_each_monitor_moves_by_its_own_scores() -> None:
    policy = make_policy("flag", "flag")
    usual = torch.linspace(1, 2, 500)
    drift = make_drift(policy, calibrate(policy, torch.stack([usual, usual], dim=1)))
    assert drift.log_evalues == {"m0": 0.0, "m1": 0.0}
    for score in np.random.default_rng(0).permutation(usual.numpy())[:200].tolist():
        drift.observe(make_verdict(), [score, score + 3], total_length=LENGTH)
    assert drift.log_evalues["m0"] < 1 < LINE < drift.log_evalues["m1"]


@pytest.mark.parametrize(
    "values", [{"drill": "d"}, {"reason": "unscored"}], ids=["a drill", "a fault"]
)
def test_what_is_no_traffic_moves_nothing(values: dict[str, Any]) -> None:
    policy = make_policy("block")
    drift = make_drift(policy, calibrate(policy, torch.linspace(1, 2, 500)))
    for verdict in (make_verdict(**values), make_verdict("m0", **values)):
        assert drift.observe(verdict, [9.0], total_length=LENGTH) == {}
    assert drift.log_evalues == {"m0": 0.0}
    assert drift.observe(make_verdict(), [1.5], total_length=LENGTH).keys() == {"m0"}


def test_as_many_of_the_calibration_count_as_stopped_as_a_policy_would_stop() -> None:
    rows = torch.linspace(1, 2, 99)
    for mode, action, stopped in (
        ("enforce", "block", 10),
        ("enforce", "flag", 0),
        ("observe", "block", 0),
    ):
        policy = make_policy(action, mode=mode)
        drift = make_drift(policy, calibrate(policy, rows))
        ranks = drift._drifts["m0"]._ranks[0]
        # Of 100 gaps a tenth: the target.
        first = len(ranks._weights) - sum(is_one for is_one, *_ in ranks._bounds)
        assert ranks._weights[first:].sum() == stopped


def test_a_request_that_one_monitor_stopped_is_above_all_others_for_each() -> None:
    policy = make_policy("block", "block", "flag", target_fpr=0.005)
    drawn = torch.randn(999, 3, generator=torch.Generator().manual_seed(0))
    drift = make_drift(policy, calibrate(policy, drawn))
    for _ in range(60):
        drift.observe(make_verdict("m0"), [9.0, -9.0, -9.0], total_length=LENGTH)
    assert min(drift.log_evalues.values()) > LINE


def test_what_another_calibration_stopped_says_nothing() -> None:
    first = make_policy("block")
    other = make_monitor("m1", calibration=Path("other"))
    policy = first.model_copy(update={"monitors": (*first.monitors, other)})
    rows = torch.linspace(1, 2, 99)
    calibrations = {
        "calibration": calibrate(first, rows),
        "other": calibrate(Policy(monitors=(other,)), rows),
    }
    drift = PolicyDrift(policy, calibrations)
    moved = drift.observe(make_verdict("m1"), [1.5, 9.0], total_length=LENGTH)
    assert moved.keys() == {"m1"}
    moved = drift.observe(make_verdict("m0", "m1"), [9.0, 9.0], total_length=LENGTH)
    assert moved.keys() == {"m0", "m1"}


def test_a_request_is_held_against_those_that_could_be_as_long() -> None:
    policy = make_policy("flag")
    short, long = torch.linspace(1, 2, 500), torch.linspace(11, 12, 500)
    calibration = calibrate(policy, short, long, lengths=(50, LENGTH))
    for total_length, moves in ((50, True), (51, False), (999, False)):
        drift = make_drift(policy, calibration)
        for score in np.random.default_rng(1).permutation(long.numpy())[:100].tolist():
            drift.observe(make_verdict(), [score], total_length=total_length)
        assert (drift.log_evalues["m0"] > LINE) is moves


def test_a_policy_that_stops_crosses_no_more_often_than_is_promised() -> None:
    """Two correlated monitors, cut off where one alarms; 60 runs, the line at 1 in 20.

    More than 8 of either monitor have a probability of at most 1 in 170.
    """
    policy = make_policy("block", "block", target_fpr=0.02)
    crossed = np.zeros(2, dtype=int)
    for seed in range(60):
        drawn = np.random.default_rng(seed)
        rows = drawn.standard_normal((1100, 2)) + drawn.standard_normal((1100, 1))
        calibration = calibrate(policy, rows[:500])
        drift = make_drift(policy, calibration)
        bars = calibration.thresholds(LENGTH, targets={"m0": 0.02, "m1": 0.02})
        highest = np.full(2, -math.inf)
        for row in rows[500:].astype(np.float32):
            over = row > np.array([bars["m0"], bars["m1"]])
            # Only the first that alarms is known of, as far as its threshold.
            names = [f"m{int(over.argmax())}"] if over.any() else []
            told = np.minimum(row, list(bars.values())) if names else row
            drift.observe(make_verdict(*names), told.tolist(), total_length=LENGTH)
            highest = np.maximum(highest, list(drift.log_evalues.values()))
        crossed += highest >= math.log(20)
    assert crossed.max() <= 8


def test_a_reference_without_any_request_still_bets_fairly() -> None:
    nothing = Reference(np.zeros(0), np.zeros(0, dtype=bool))
    drift = Drift([nothing])
    drawn = np.random.default_rng(0)
    found = [drift.observe(float(drawn.standard_normal())) for _ in range(300)]
    assert max(found) < LINE
