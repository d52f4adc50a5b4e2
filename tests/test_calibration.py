"""Thresholds that keep their promise, and files that are what they say."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from specimens import (
    AT,
    assert_same_calibration,
    draw_rows,
    make_ellipsoid,
    make_monitor,
)
from torch import Tensor

from guard.calibration import (
    Calibration,
    Entry,
    excess_probability,
    fit_scales,
    load_calibration,
    needed_requests,
    save_calibration,
    share_budgets,
)
from guard.errors import CalibrationError
from guard.policy import Monitor, Policy
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
    assert_same_calibration(loaded, saved)


def test_several_monitors_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    rows = draw_rows(60, seed=0)
    benign = Activations(rows, rows.flip(1))
    entries = {
        # Not in the order of the alphabet: columns are counted in this one.
        "z": Entry("density", AT, "prompt", 3, SCORES["density"].fit(benign)),
        "a.b-c": Entry("error", AT, None, 1, SCORES["error"].fit(benign), "f" * 64),
        "m": Entry("error_norm", AT, "output", 64, {}, "e" * 64, drift=0.1),
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
    assert_same_calibration(loaded, saved)
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


def test_a_file_from_before_scores_could_add_up_is_still_read(tmp_path: Path) -> None:
    assert "drift" not in WATCH
    write(tmp_path / "c", GOOD, ABOUT)
    assert load_calibration(tmp_path / "c").entries["watch"].drift is None
    about = ABOUT | {"entries": {"watch": WATCH | {"drift": 0.1}}}
    write(tmp_path / "c", GOOD, about)
    assert load_calibration(tmp_path / "c").entries["watch"].drift == 0.1


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


def over(
    calibration: Calibration, targets: Mapping[str, Fraction], row: Tensor
) -> bool:
    """Whether a request with these maxima alarms, as a watch compares them."""
    thresholds = calibration.thresholds(1, targets=targets)
    places = {name: place for place, name in enumerate(calibration.entries)}
    return any(
        bool(row[places[name]] > torch.tensor(threshold, dtype=torch.float32))
        for name, threshold in thresholds.items()
    )


def make_joint(maxima: Tensor, scale: Tensor | None = None) -> Calibration:
    """Return a calibration of as many monitors as there are columns."""
    width = maxima.shape[1]
    if scale is None:
        scale = torch.tensor([[0.0, 1.0]]).repeat(width, 1)
    return make_calibration(
        entries={f"m{i}": Entry("density", AT, None, 1, {}) for i in range(width)},
        lengths=(10,),
        scales=(scale,),
        maxima=(maxima,),
    )


def share(*targets: str) -> dict[str, Fraction]:
    return {f"m{i}": Fraction(target) for i, target in enumerate(targets)}


@st.composite
def samples(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Fraction]]:
    """Maxima of exchangeable requests, any scale, and targets of the monitors."""
    count, width = draw(st.integers(8, 30)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    own = torch.randn(count, width, generator=generator)
    shared = torch.randn(count, 1, generator=generator)
    weight = draw(st.sampled_from([0.0, 0.5, 1.0]))
    sizes = torch.tensor(
        [draw(st.sampled_from([1e-3, 1.0, 1e4])) for _ in range(width)]
    )
    maxima = (weight * shared + (1 - weight) * own) * sizes
    # Of one that reads words and no context, many requests have the same to show.
    if width > 1 and draw(st.booleans()):
        maxima[:, -1] = (maxima[:, -1] / sizes[-1]).round() * sizes[-1]
    # Some requests have no token of a monitor's stage.
    if width > 1 and draw(st.booleans()):
        maxima[::3, -1] = -math.inf
    level = torch.randn(width, generator=generator) * sizes
    spread = torch.rand(width, generator=generator) * sizes + 1e-6
    targets = share(*(draw(st.sampled_from(["0.05", "0.1", "0.12"])) for _ in sizes))
    return maxima, torch.stack([level, spread], 1), targets


@given(sample=samples())
def test_any_of_several_monitors_alarms_no_more_often_than_their_targets_allow(
    sample: tuple[Tensor, Tensor, dict[str, Fraction]],
) -> None:
    """Each of n + 1 exchangeable requests is as likely to be the last one."""
    maxima, scale, targets = sample
    target = sum(targets.values())
    assume(target * len(maxima) >= 1)
    alarms = 0
    for last in range(len(maxima)):
        others = torch.cat([maxima[:last], maxima[last + 1 :]])
        alarms += over(make_joint(others, scale), targets, maxima[last])
    assert alarms <= math.floor(target * len(maxima)) + len(targets) - 1
    if len(targets) == 1:
        assert alarms == math.floor(target * len(maxima))


def test_the_promise_holds_over_many_small_calibrations() -> None:
    """What a single one may give away for each further monitor, others make up for."""
    alarms = allowed = 0.0
    for seed in range(300):
        maxima = draw_tails(20, 3, seed=seed, common=0.3)
        targets = share("0.05", "0.1", "0.05")
        alarms += over(make_joint(maxima[1:]), targets, maxima[0])
        allowed += 0.2
    assert alarms <= allowed


def test_a_target_too_small_for_the_largest_of_each_monitor_is_kept() -> None:
    """One request of 20 may alarm, and each of 4 monitors has a largest of its own."""
    alarms = 0
    for seed in range(600):
        maxima = draw_tails(20, 4, seed=seed, common=0.0)
        targets = share("0.0125", "0.0125", "0.0125", "0.0125")
        alarms += over(make_joint(maxima[1:]), targets, maxima[0])
    assert 15 <= alarms <= 30  # of the 30 that one in 20 is


def test_odd_traffic_that_one_monitor_cannot_read_lifts_no_other() -> None:
    maxima = draw_tails(400, 2, seed=0, common=0.0)
    usual = make_joint(maxima).thresholds(1, targets=share("0.02", "0.02"))
    maxima[:12, 1] += 1000.0
    found = make_joint(maxima).thresholds(1, targets=share("0.02", "0.02"))
    assert found["m1"] > 1000
    assert found["m0"] == pytest.approx(usual["m0"], rel=0.1)


def test_a_maximum_that_many_share_is_below_its_threshold_and_lifts_no_other() -> None:
    """A word that one in twenty requests has, where one in a hundred may alarm."""
    maxima = draw_tails(400, 2, seed=0, common=0.0)
    targets = share("0.02", "0.01")
    usual = make_joint(maxima).thresholds(1, targets=targets)
    maxima[:, 1] = torch.linspace(0.0, 1.0, 400).floor()
    maxima[::20, 1] = 3.0
    found = make_joint(maxima).thresholds(1, targets=targets)
    # By a tenth of the spread, which is 1 here.
    assert found["m1"] == pytest.approx(3.1)
    # The other one has what it would have alone.
    assert found["m0"] <= usual["m0"]
    # Twin: where few enough share it, it is the threshold.
    maxima[::20, 1] = 0.0
    maxima[10:14, 1] = 3.0
    assert make_joint(maxima).thresholds(1, targets=targets)["m1"] == 3.0


@given(sample=samples(), target=st.sampled_from(TARGETS))
def test_the_threshold_of_one_monitor_is_one_of_its_maxima_whatever_the_scale(
    sample: tuple[Tensor, Tensor, dict[str, Fraction]], target: str
) -> None:
    maxima, scale, _ = sample
    calibration = make_joint(maxima[:, :1], scale[:1])
    rank = exact_rank(len(maxima), target)
    if rank is not None:
        expected = maxima[:, 0].sort().values[rank - 1]
        found = calibration.thresholds(1, targets=share(target))["m0"]
        assert torch.tensor(found, dtype=torch.float32) == expected


def test_a_threshold_is_never_below_a_maximum_that_it_admits_by_a_rounding() -> None:
    # A latent that a clamp ablates reads 0 on most requests: 0 must not be above it.
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        maxima = torch.rand(40, 2, generator=generator)
        maxima[:36, 0] = 0.0
        scale = torch.rand(2, 2, generator=generator) + 0.1
        for targets in (share("0.3"), share("0.2", "0.3")):
            calibration = make_joint(maxima[:, : len(targets)], scale[: len(targets)])
            assert calibration.thresholds(1, targets=targets)["m0"] >= 0.0


def draw_tails(count: int, width: int, *, seed: int, common: float) -> Tensor:
    """Return exponential numbers; `common` is the share that all columns share."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.empty(count, width).exponential_(generator=generator)
    shared = torch.empty(count, 1).exponential_(generator=generator)
    mixed = torch.rand(count, 1, generator=generator) < common
    return torch.where(mixed, shared, own)


@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
def test_nothing_is_given_away_where_monitors_alarm_together(common: float) -> None:
    """Held against thresholds that each monitor sets alone, as Bonferroni has it."""
    sizes = torch.tensor([1.0, 100.0, 0.01, 3.0])
    reference, held_out, fresh = (
        sizes * draw_tails(count, 4, seed=seed, common=common)
        for seed, count in enumerate((1000, 4000, 20_000))
    )
    targets = share("0.01", "0.01", "0.02", "0.01")
    calibration = make_joint(held_out, fit_scales(reference))
    joint = torch.tensor(list(calibration.thresholds(1, targets=targets).values()))
    alone = torch.tensor(
        [
            calibration.thresholds(1, targets={name: target})[name]
            for name, target in targets.items()
        ]
    )
    rate = float((fresh > joint).any(1).double().mean())
    bonferroni = float((fresh > alone).any(1).double().mean())
    rank = exact_rank(4000, "0.05")
    assert rank is not None
    low, high = beta_binomial_interval(20_000, 4001 - rank, rank, level=0.999)
    assert low <= rate * 20_000 <= high
    if common == 1.0:
        assert bonferroni < 0.6 * rate
    elif common == 0.0:
        assert bonferroni == pytest.approx(rate, rel=0.15)


def test_independent_monitors_alarm_in_proportion_to_their_targets() -> None:
    reference, held_out, fresh = (
        draw_tails(count, 3, seed=seed, common=0.0)
        for seed, count in enumerate((1000, 20_000, 100_000))
    )
    targets = share("0.004", "0.002", "0.01")
    thresholds = make_joint(held_out, fit_scales(reference)).thresholds(
        1, targets=targets
    )
    rates = (fresh > torch.tensor(list(thresholds.values()))).double().mean(0)
    assert rates.tolist() == pytest.approx([0.004, 0.002, 0.01], rel=0.5)


def test_a_sample_that_is_too_small_is_refused_with_the_number_it_needs() -> None:
    calibration = make_joint(draw_tails(30, 3, seed=0, common=0.0))
    with pytest.raises(CalibrationError) as caught:
        calibration.thresholds(1, targets=share("0.01", "0.005"))
    assert str(caught.value) == (
        "The calibration holds 30 requests of up to 10 tokens; a target_fpr of 0.015, "
        "the sum over m0, m1, needs at least 66."
    )
    calibration.thresholds(1, targets=share("0.01", "0.005", "0.02"))


@given(st.fractions(min_value=Fraction(1, 2000), max_value=Fraction(1, 2)))
def test_the_number_that_is_needed_is_the_smallest_that_will_do(
    target: Fraction,
) -> None:
    needed = needed_requests(target)
    for count, fits in ((needed, True), (needed - 1, False)):
        assert (exact_rank(count, str(target)) is not None) == fits


def test_a_stage_that_no_request_has_is_refused() -> None:
    maxima = torch.full((20, 1), -math.inf)
    with pytest.raises(CalibrationError, match=r"Too few requests .* stage of m0"):
        make_joint(maxima).thresholds(1, targets=share("0.5"))
    maxima[0] = 1.0
    assert make_joint(maxima).thresholds(1, targets=share("0.5")) == {"m0": 1.0}


def test_a_flagging_monitor_takes_nothing_from_a_blocking_one() -> None:
    blocking = make_monitor("m0", target_fpr=0.05)
    other = make_monitor("m1", target_fpr=0.1, on_alarm="flag")
    elsewhere = make_monitor("m2", target_fpr=0.1, calibration="another")
    also = make_monitor("m2", target_fpr=0.1)
    calibration = make_joint(draw_tails(200, 3, seed=0, common=1.0))

    def threshold(*monitors: Monitor) -> float:
        groups = share_budgets(Policy(monitors=monitors))
        targets = groups["calibration", "block"]
        return calibration.thresholds(1, targets=targets)["m0"]

    alone = threshold(blocking)
    assert threshold(blocking, other, elsewhere) == alone
    assert threshold(blocking, also) != alone


def test_budgets_are_shared_by_calibration_and_action_as_they_are_written() -> None:
    monitors = (
        make_monitor("a", target_fpr=0.004),
        make_monitor("b", target_fpr=0.1, on_alarm="flag"),
        make_monitor("c", target_fpr=0.002),
        make_monitor("d", target_fpr=0.3, calibration="another"),
    )
    assert share_budgets(Policy(monitors=monitors)) == {
        ("calibration", "block"): {"a": Fraction(1, 250), "c": Fraction(1, 500)},
        ("calibration", "flag"): {"b": Fraction(1, 10)},
        ("another", "block"): {"d": Fraction(3, 10)},
    }


@pytest.mark.parametrize("held_out", [3, 6])
@pytest.mark.parametrize("requests", [1, 5])
@pytest.mark.parametrize("target", [0.25, 0.5])
def test_the_probability_of_alarms_is_that_of_counting_all_orders(
    held_out: int, requests: int, target: float
) -> None:
    rank = math.ceil((held_out + 1) * (1 - target))
    seen = Counter()
    for fresh in itertools.combinations(range(held_out + requests), requests):
        others = sorted(set(range(held_out + requests)) - set(fresh))
        seen[sum(number > others[rank - 1] for number in fresh)] += 1
    for alarms in range(requests + 1):
        expected = sum(n for count, n in seen.items() if count >= alarms)
        found = excess_probability(
            alarms, requests=requests, held_out=held_out, target_fpr=target
        )
        assert found == pytest.approx(expected / seen.total(), abs=1e-12)


def test_the_spread_of_a_tail_is_the_mean_excess_over_the_level() -> None:
    column = torch.arange(101.0)
    silent = torch.full((101,), -math.inf)
    silent[50:] = column[:51]
    constant = torch.full((101,), -200.0)
    found = fit_scales(torch.stack([column, silent, constant], 1))
    expected = [[90.0, 5.5], [45.0, 3.0], [-200.0, 2e-4]]
    for scale, wanted in zip(found.tolist(), expected, strict=True):
        assert scale == pytest.approx(wanted)


@pytest.mark.parametrize("sick", [math.nan, math.inf])
def test_a_score_that_was_never_a_number_has_no_scale(sick: float) -> None:
    with pytest.raises(CalibrationError, match="never finite on benign traffic"):
        fit_scales(torch.tensor([[1.0, 2.0], [1.0, sick]]))
    with pytest.raises(CalibrationError, match="tokens of its stage"):
        fit_scales(torch.full((9, 1), -math.inf))
