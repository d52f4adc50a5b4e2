"""Thresholds that keep their promise, and files that are what they say."""

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from specimens import AT, D_MODEL, draw_rows

from guard.calibration import (
    Calibration,
    fit_calibration,
    load_calibration,
    save_calibration,
)
from guard.errors import CalibrationError
from guard.monitor import SCORES, Activations

TARGETS = ["0.001", "0.002", "0.01", "0.05", "0.07", "0.1", "0.25", "0.45", "0.5"]


def make_calibration(*counts: int, **values: Any) -> Calibration:
    """Return one whose i-th bucket holds maxima 1, 2, ... of `counts[i]` requests."""
    wanted: dict[str, Any] = {
        "score": "density",
        "hook_point": AT,
        "statistics": {"mean": torch.zeros(3), "whitener": torch.eye(3)},
        "lengths": tuple(10 * (i + 1) for i in range(len(counts))),
        "maxima": tuple(torch.arange(1.0, count + 1) for count in counts),
        "provenance": {"model": "toy"},
    }
    return Calibration(**(wanted | values))


def exact_rank(count: int, target: str) -> int | None:
    """Smallest k for which a further request is above the k-th with P <= target.

    Of n + 1 exchangeable numbers without ties each is as likely to be the last one;
    it is above the k-th smallest of the others in n + 1 - k of n + 1 cases.
    """
    wanted = Fraction(target)
    for k in range(1, count + 1):
        if (count + 1 - k) * wanted.denominator <= (count + 1) * wanted.numerator:
            return k
    return None


@given(st.integers(1, 1500), st.sampled_from(TARGETS))
@example(99, "0.45")  # where 1 - 0.45 in floating point would ask for one more
def test_the_threshold_has_the_exact_conformal_rank(count: int, target: str) -> None:
    calibration, rank = make_calibration(count), exact_rank(count, target)
    if rank is not None:
        assert calibration.threshold(1, target_fpr=float(target)) == rank
        return
    needed = next(n for n in itertools.count(1) if (n + 1) * Fraction(target) >= 1)
    with pytest.raises(CalibrationError, match=f"holds {count} .* at least {needed}"):
        calibration.threshold(1, target_fpr=float(target))
    make_calibration(needed).threshold(1, target_fpr=float(target))


def test_every_order_of_a_few_numbers_keeps_the_promise() -> None:
    """All 5 choices of the request that comes last, counted one by one."""
    numbers = [0.5, 1.5, 2.5, 3.5, 4.5]
    for target in (0.2, 0.25, 0.45, 0.5):
        alarms = 0
        for last in numbers:
            held_out = torch.tensor([n for n in numbers if n != last])
            calibration = make_calibration(4, maxima=(held_out,))
            alarms += last > calibration.threshold(1, target_fpr=target)
        assert alarms == math.floor(target * 5)


def test_fresh_benign_requests_alarm_as_often_as_was_asked_for() -> None:
    target, count, fresh = 0.05, 1000, 4000
    held_out = [draw_rows(8, seed=seed) for seed in range(count)]
    calibration = fit_calibration(
        "density",
        hook_point=AT,
        fitting=Activations(*[draw_rows(2000, seed=70_000)] * 2),
        held_out=[Activations(rows, rows) for rows in held_out],
        lengths=[8],
        provenance={},
    )
    threshold = calibration.threshold(8, target_fpr=target)
    score = SCORES["density"].apply
    later = draw_rows(8 * fresh, seed=80_000)
    scores = score(Activations(later, later), calibration.statistics)
    alarms = int((scores.view(fresh, 8).amax(1) > threshold).sum())
    # Alarms among fresh requests are beta-binomial: the threshold is drawn as well.
    rank = exact_rank(count, "0.05")
    assert rank is not None
    low, high = beta_binomial_interval(fresh, count + 1 - rank, rank, level=0.99)
    assert low <= alarms <= high
    assert 0.5 * target < low / fresh < high / fresh < 2 * target


def beta_binomial_interval(
    trials: int, a: int, b: int, *, level: float
) -> tuple[int, int]:
    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    bounds: list[int] = []
    total = 0.0
    for k in range(trials + 1):
        ways = -math.log(trials + 1) - log_beta(trials - k + 1, k + 1)
        total += math.exp(ways + log_beta(k + a, trials - k + b) - log_beta(a, b))
        while (
            len(bounds) < 2 and total > [(1 - level) / 2, (1 + level) / 2][len(bounds)]
        ):
            bounds.append(k)
    return bounds[0], bounds[1]


@pytest.mark.parametrize(
    ("length", "threshold"), [(1, 9.0), (10, 9.0), (11, 18.0), (20, 18.0), (99, 18.0)]
)
def test_a_request_is_judged_by_the_first_bucket_it_fits_into(
    length: int, threshold: float
) -> None:
    assert make_calibration(9, 19).threshold(length, target_fpr=0.1) == threshold


def fit(
    *lengths_of_requests: int, score: str = "error_norm", **values: Any
) -> Calibration:
    requests = [draw_rows(n, seed=n) for n in lengths_of_requests]
    benign = draw_rows(50, seed=0)
    wanted: dict[str, Any] = {
        "hook_point": AT,
        "fitting": Activations(benign, benign),
        "held_out": [Activations(rows, rows) for rows in requests],
        "lengths": [4, 8],
        "provenance": {},
    }
    return fit_calibration(score, **(wanted | values))


def test_a_bucket_keeps_the_sorted_maxima_of_the_requests_that_fall_into_it() -> None:
    calibration = fit(3, 4, 5, 1)
    norms = {n: draw_rows(n, seed=n).norm(dim=1).max().item() for n in (3, 4, 5, 1)}
    assert calibration.maxima[0].tolist() == sorted(norms[n] for n in (3, 4, 1))
    assert calibration.maxima[1].tolist() == [norms[5]]


def test_fitting_refuses_what_it_cannot_promise_anything_for() -> None:
    with pytest.raises(CalibrationError, match=r"No held-out request falls into .* 8"):
        fit(3, 4)
    with pytest.raises(CalibrationError, match=r"has 9 tokens.*expected at most 8"):
        fit(3, 5, 9)
    with pytest.raises(CalibrationError, match="'magic'; expected one of error_norm"):
        fit(3, 5, score="magic")
    sick = torch.full((2, D_MODEL), torch.nan)
    with pytest.raises(CalibrationError, match="finite"):
        fit(held_out=[Activations(sick, sick)])


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    provenance=st.dictionaries(st.text(), st.integers() | st.text()),
)
def test_a_calibration_is_loaded_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    provenance: dict[str, Any],
) -> None:
    path = tmp_path_factory.mktemp("round") / "new" / "c.safetensors"
    saved = make_calibration(*counts, provenance=provenance)
    save_calibration(saved, path)
    loaded = load_calibration(path)
    assert replace(loaded, statistics={}, maxima=()) == replace(
        saved, statistics={}, maxima=()
    )
    for one, other in zip(loaded.maxima, saved.maxima, strict=True):
        assert torch.equal(one, other)
    assert loaded.statistics.keys() == saved.statistics.keys()
    for name, tensor in loaded.statistics.items():
        assert torch.equal(tensor, saved.statistics[name])


def test_what_is_fitted_scores_the_same_after_a_round_trip(tmp_path: Path) -> None:
    calibration = fit(3, 5, score="density")
    save_calibration(calibration, tmp_path / "c")
    loaded = load_calibration(tmp_path / "c")
    rows = Activations(*[draw_rows(6, seed=9)] * 2)
    score = SCORES["density"].apply
    assert torch.equal(
        score(rows, loaded.statistics), score(rows, calibration.statistics)
    )
    assert loaded.threshold(8, target_fpr=0.5) == calibration.threshold(
        8, target_fpr=0.5
    )


ABOUT = {"format": 1, "score": "density", "hook_point": AT, "provenance": {}}
GOOD = {"maxima.10": torch.arange(3.0), "statistics.mean": torch.zeros(3)}


def write(path: Path, tensors: dict[str, torch.Tensor], about: object) -> None:
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, path, metadata={"guard": text})


def test_the_damaged_files_below_are_damaged_only_where_they_say_so(
    tmp_path: Path,
) -> None:
    write(tmp_path / "c", GOOD, ABOUT)
    assert load_calibration(tmp_path / "c").lengths == (10,)


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        (GOOD, "not json"),
        (GOOD, []),
        (GOOD, {}),
        (GOOD, ABOUT | {"format": 2}),
        (GOOD, ABOUT | {"score": "magic"}),
        (GOOD, ABOUT | {"score": ["density"]}),
        (GOOD, ABOUT | {"provenance": 3}),
        ({"statistics.mean": torch.zeros(3)}, ABOUT),
        ({"maxima.ten": torch.ones(1)}, ABOUT),
        ({"maxima.10": torch.empty(0)}, ABOUT),
        ({"maxima.10": torch.ones(2, 2)}, ABOUT),
        ({"maxima.10": torch.tensor([1, 2])}, ABOUT),
        ({"maxima.10": torch.tensor([2.0, 1.0])}, ABOUT),
        ({"maxima.10": torch.tensor([1.0, torch.nan])}, ABOUT),
        ({"maxima.10": torch.tensor([1.0, torch.inf])}, ABOUT),
    ],
)
def test_a_damaged_calibration_is_one_clear_line(
    tmp_path: Path, tensors: dict[str, torch.Tensor], about: object
) -> None:
    path = tmp_path / "c.safetensors"
    write(path, tensors, about)
    with pytest.raises(CalibrationError) as caught:
        load_calibration(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_safetensors_file_is_one_clear_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save_calibration(make_calibration(3), whole)
    bare = tmp_path / "bare"
    save_file(load_file(whole), bare)
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[:-5])
    empty = tmp_path / "empty"
    empty.touch()
    text = tmp_path / "text"
    text.write_text("a pickle, perhaps\n" * 20)
    for path in (bare, cut, empty, text, tmp_path):
        with pytest.raises(CalibrationError, match="not a calibration") as caught:
            load_calibration(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        CalibrationError, match="no such calibration; `guard calibrate`"
    ):
        load_calibration(tmp_path / "missing")
