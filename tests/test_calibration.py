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
from specimens import AT, draw_rows, make_ellipsoid
from torch import Tensor

from guard.calibration import (
    Calibration,
    Entry,
    load_calibration,
    save_calibration,
)
from guard.errors import CalibrationError
from guard.recording import fit_calibration
from guard.score import SCORES, Activations

TARGETS = ["0.001", "0.002", "0.01", "0.05", "0.07", "0.1", "0.25", "0.45", "0.5"]


def make_calibration(*counts: int, **values: Any) -> Calibration:
    """Return one whose i-th bucket holds maxima 1, 2, ... of `counts[i]` requests."""
    statistics = make_ellipsoid(torch.eye(3)[:, :2])
    wanted: dict[str, Any] = {
        "entries": {"watch": Entry("density", AT, None, 1, statistics)},
        "lengths": tuple(10 * (i + 1) for i in range(len(counts))),
        "scales": tuple(torch.tensor([[0.0, 1.0]]) for _ in counts),
        "maxima": tuple(torch.arange(1.0, count + 1)[:, None] for count in counts),
        "provenance": {"model": "toy"},
    }
    return Calibration(**(wanted | values))


def find_threshold(calibration: Calibration, length: int, target_fpr: object) -> float:
    """Return the threshold of the only monitor."""
    (name,) = calibration.entries
    targets = {name: Fraction(str(target_fpr))}
    return calibration.thresholds(length, targets=targets)[name]


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
        assert find_threshold(calibration, 1, target) == rank
        return
    needed = next(n for n in itertools.count(1) if (n + 1) * Fraction(target) >= 1)
    with pytest.raises(CalibrationError, match=f"holds {count} .* at least {needed}"):
        find_threshold(calibration, 1, target)
    find_threshold(make_calibration(needed), 1, target)


def test_every_order_of_a_few_numbers_keeps_the_promise() -> None:
    """All 5 choices of the request that comes last, counted one by one."""
    numbers = [0.5, 1.5, 2.5, 3.5, 4.5]
    for target in (0.2, 0.25, 0.45, 0.5):
        alarms = 0
        for last in numbers:
            held_out = torch.tensor([[n] for n in numbers if n != last])
            calibration = make_calibration(4, maxima=(held_out,))
            alarms += last > find_threshold(calibration, 1, target)
        assert alarms == math.floor(target * 5)


def test_fresh_benign_requests_alarm_as_often_as_was_asked_for() -> None:
    target, count, fresh = 0.05, 1000, 4000
    score = SCORES["density"].apply
    statistics = SCORES["density"].fit(Activations(draw_rows(2000, seed=70_000)))

    def find_maxima(requests: int, *, seed: int) -> Tensor:
        rows = draw_rows(8 * requests, seed=seed)
        return score(Activations(rows), statistics).view(requests, 8).amax(1)

    calibration = fit_calibration(
        {"watch": Entry("density", AT, None, 1, statistics)},
        reference=[(8, one[None]) for one in find_maxima(300, seed=90_000)],
        held_out=[(8, one[None]) for one in find_maxima(count, seed=100_000)],
        lengths=[8],
        provenance={},
    )
    threshold = find_threshold(calibration, 8, target)
    alarms = int((find_maxima(fresh, seed=80_000) > threshold).sum())
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
    assert find_threshold(make_calibration(9, 19), length, 0.1) == threshold


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
    assert_same(loaded, saved)


def assert_same(one: Calibration, other: Calibration) -> None:
    """Fail where two calibrations differ in a bit."""
    assert (one.lengths, one.provenance) == (other.lengths, other.provenance)
    for tensors in (
        zip(one.scales, other.scales, strict=True),
        zip(one.maxima, other.maxima, strict=True),
    ):
        assert all(torch.equal(*pair) for pair in tensors)
    assert list(one.entries) == list(other.entries)
    for name, entry in one.entries.items():
        twin = other.entries[name]
        assert replace(entry, statistics={}) == replace(twin, statistics={})
        assert entry.statistics.keys() == twin.statistics.keys()
        for key, value in entry.statistics.items():
            assert torch.equal(value, twin.statistics[key])


def test_several_monitors_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    rows = draw_rows(60, seed=0)
    benign = Activations(rows, rows.flip(1))
    entries = {
        # Not in the order of the alphabet: columns are counted in this one.
        "z": Entry("density", AT, "prompt", 3, SCORES["density"].fit(benign)),
        "a.b-c": Entry("error", AT, None, 1, SCORES["error"].fit(benign), "f" * 64),
        "m": Entry("error_norm", AT, "output", 64, {}, "e" * 64),
    }
    saved = Calibration(
        entries=entries,
        lengths=(7, 100),
        scales=(torch.rand(3, 2), torch.rand(3, 2)),
        maxima=(torch.rand(5, 3), torch.tensor([[1.0, -math.inf, 2.0]])),
        provenance={"versions": {"torch": None}, "lengths": [7, 100]},
    )
    save_calibration(saved, tmp_path / "c")
    loaded = load_calibration(tmp_path / "c")
    assert_same(loaded, saved)
    fresh = Activations(draw_rows(6, seed=9), draw_rows(6, seed=10))
    for name in ("z", "a.b-c"):
        apply = SCORES[entries[name].score].apply
        assert torch.equal(
            apply(fresh, loaded.entries[name].statistics),
            apply(fresh, entries[name].statistics),
        )


WATCH = {
    "score": "density",
    "hook_point": AT,
    "stage": None,
    "window": 1,
    "sae_sha256": None,
}
ABOUT = {"format": 2, "entries": {"watch": WATCH}, "provenance": {}}
GOOD = {
    "maxima/10": torch.arange(3.0)[:, None],
    "scales/10": torch.tensor([[0.0, 1.0]]),
    "statistics/watch/mean": torch.zeros(3),
}


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in GOOD.items() if key != name}


def write(path: Path, tensors: dict[str, Tensor], about: object) -> None:
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
        (GOOD, {"format": 2}),
        (GOOD, ABOUT | {"format": 3}),
        (GOOD, ABOUT | {"format": "2"}),
        (GOOD, ABOUT | {"entries": []}),
        (GOOD, ABOUT | {"entries": {}}),
        (GOOD, ABOUT | {"entries": {"watch": []}}),
        (GOOD, ABOUT | {"entries": {"watch": {"score": "density"}}}),
        (GOOD, ABOUT | {"entries": {"watch": WATCH | {"score": "magic"}}}),
        (GOOD, ABOUT | {"entries": {"watch": WATCH | {"more": 1}}}),
        (GOOD, ABOUT | {"provenance": None}),
        (without("maxima/10"), ABOUT),
        (without("scales/10"), ABOUT),
        (GOOD | {"maxima/ten": torch.ones(1, 1)}, ABOUT),
        (GOOD | {"maxima/20": torch.ones(1, 1)}, ABOUT),
        (GOOD | {"maxima/10": torch.empty(0, 1)}, ABOUT),
        (GOOD | {"maxima/10": torch.ones(2, 2)}, ABOUT),
        (GOOD | {"maxima/10": torch.ones(2)}, ABOUT),
        (GOOD | {"maxima/10": torch.tensor([[1.0], [torch.nan]])}, ABOUT),
        (GOOD | {"maxima/10": torch.tensor([[1.0], [torch.inf]])}, ABOUT),
        (GOOD | {"scales/10": torch.ones(2, 2)}, ABOUT),
        (GOOD | {"scales/10": torch.ones(2)}, ABOUT),
        (GOOD | {"scales/10": torch.tensor([[torch.nan, 1.0]])}, ABOUT),
        (GOOD | {"scales/10": torch.tensor([[0.0, torch.inf]])}, ABOUT),
        (GOOD | {"scales/10": torch.tensor([[0.0, 0.0]])}, ABOUT),
        (GOOD | {"scales/10": torch.tensor([[0.0, -1.0]])}, ABOUT),
    ],
)
def test_a_damaged_calibration_is_one_clear_line(
    tmp_path: Path, tensors: dict[str, Tensor], about: object
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


def test_a_calibration_of_the_first_format_asks_for_a_new_one(tmp_path: Path) -> None:
    write(tmp_path / "c", {"maxima.10": torch.arange(3.0)}, {"format": 1})
    with pytest.raises(CalibrationError, match=r"format 1; expected format 2\. Calibr"):
        load_calibration(tmp_path / "c")
