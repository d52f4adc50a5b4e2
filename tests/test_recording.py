"""What is fitted on recordings: statistics, and the maxima of benign requests."""

import math

import pytest
import torch
from specimens import AT, draw_rows
from torch import Tensor

from guard.calibration import Calibration, Entry
from guard.errors import CalibrationError
from guard.recording import fit_calibration

ENTRIES = {
    "far": Entry("density", AT, None, 1, {}),
    "unexplained": Entry("error_norm", AT, None, 1, {}),
}


def fit(
    *lengths_of_requests: int, lengths: tuple[int, ...] = (4, 8), sick: float = 0.0
) -> Calibration:
    """Fit on requests of given total lengths, whose maxima are those lengths."""
    requests = [
        (length, torch.tensor([float(length), sick - length]))
        for length in lengths_of_requests
    ]
    return fit_calibration(
        ENTRIES,
        reference=[
            (n, row) for n, row in zip((3, 7) * 20, draw_rows(40, seed=0)[:, :2])
        ],
        held_out=requests,
        lengths=lengths,
        provenance={"model": "toy"},
    )


def test_a_bucket_keeps_the_maxima_of_the_requests_that_fall_into_it() -> None:
    calibration = fit(3, 4, 5, 1, 8)
    assert calibration.lengths == (4, 8)
    assert calibration.maxima[0].tolist() == [[3, -3], [4, -4], [1, -1]]
    assert calibration.maxima[1].tolist() == [[5, -5], [8, -8]]
    assert calibration.entries == ENTRIES
    assert calibration.provenance == {"model": "toy"}


def test_a_request_without_a_token_of_a_stage_is_kept() -> None:
    calibration = fit(3, 5, sick=-math.inf)
    assert calibration.maxima[0].tolist() == [[3, -math.inf]]


def test_fitting_refuses_what_it_cannot_promise_anything_for() -> None:
    with pytest.raises(CalibrationError, match=r"No held-out request falls into .* 8"):
        fit(3, 4)
    with pytest.raises(CalibrationError, match=r"has 9 tokens.*expected at most 8"):
        fit(3, 5, 9)
    for sick in (math.inf, math.nan):
        with pytest.raises(CalibrationError, match="not finite; expected numbers"):
            fit(3, 5, sick=sick)
    for lengths in ((), (4, 4), (8, 4)):
        with pytest.raises(CalibrationError, match="do not ascend; expected e.g. 64"):
            fit(3, 5, lengths=lengths)


def excess(column: Tensor) -> tuple[float, float]:
    """Return level and spread as the docstring says them, by sorting."""
    ranked = sorted(column.double().tolist())
    at = 0.9 * (len(ranked) - 1)
    low, high = ranked[int(at)], ranked[math.ceil(at)]
    level = low + (high - low) * (at - int(at))
    above = [value - level for value in ranked if value > level]
    return level, sum(above) / len(above)


def test_a_bucket_with_enough_requests_has_a_scale_of_its_own() -> None:
    rows = draw_rows(350, seed=5)[:, :2]
    lengths = [3] * 100 + [7] * 99 + [20] * 151
    calibration = fit_calibration(
        ENTRIES,
        reference=list(zip(lengths, rows, strict=True)),
        held_out=[(n, row) for n, row in zip((3, 7, 20), rows, strict=False)],
        lengths=(4, 8, 32),
        provenance={},
    )
    # 99 requests are too few: that bucket borrows from all.
    for scale, own in zip(
        calibration.scales, (rows[:100], rows, rows[199:]), strict=True
    ):
        for found, column in zip(scale, own.T, strict=True):
            assert found.tolist() == pytest.approx(excess(column), rel=1e-6)
