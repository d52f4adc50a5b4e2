"""Bets on exchangeable scores win nothing, and bets on changed ones win soon."""

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from guard import martingale
from guard.martingale import CELLS, Martingale, Ranks, Reference

LINE = math.log(100)
Change = Callable[[np.random.Generator, float], float]


class Fixed(random.Random):
    """Draws that are all the same."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def make_reference(scores: list[float], stopped: list[bool] | None = None) -> Reference:
    return Reference(
        np.array(scores), np.array(stopped or [False] * len(scores), dtype=bool)
    )


def run(
    seed: int,
    *,
    count: int = 1000,
    reference: int = 300,
    bar: float = math.inf,
    start: int = 0,
    change: Change = lambda _, score: score,
) -> list[float]:
    """Return the log wealth after each of `count` scores, of which a bar stops some."""
    drawn = np.random.default_rng(seed)
    known = drawn.standard_normal(reference)
    ranks = Ranks(Reference(known, known > bar), draw=random.Random(seed))
    gambler = Martingale()
    found = []
    for number in range(count):
        score = float(drawn.standard_normal())
        score = change(drawn, score) if number >= start else score
        gambler.bet(ranks.rank(score, stopped=score > bar))
        found.append(gambler.log_wealth)
    return found


def test_a_score_is_ranked_from_the_top_among_the_reference_and_itself() -> None:
    for score, above in ((9.0, 0), (2.5, 1), (1.5, 2), (-1.0, 3)):
        low, high = (
            Ranks(make_reference([1.0, 2.0, 3.0]), draw=Fixed(u)).rank(score)
            for u in (0.0, 1 - 1e-12)
        )
        assert low == above / 4
        assert high == pytest.approx((above + 1) / 4)


def test_a_score_is_ranked_among_those_that_came_before_it_too() -> None:
    ranks = Ranks(make_reference([1.0, 2.0, 3.0]), draw=Fixed(0.5))
    assert [ranks.rank(9.0) for _ in range(3)] == [0.5 / 4, 1 / 5, 1.5 / 6]
    assert ranks.rank(2.5) == (1 + 3 + 0.5) / 7


@pytest.mark.parametrize("values", [(0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 2.0)])
def test_p_values_are_uniform_whatever_is_tied(values: tuple[float, ...]) -> None:
    """Each order of the values is as probable: so is each third of the p-values."""
    found = []
    for seed, order in itertools.product(range(400), itertools.permutations(values)):
        ranks = Ranks(make_reference(list(order[:2])), draw=random.Random(seed))
        found.append(ranks.rank(order[2]))
    thirds = np.histogram(found, bins=3, range=(0, 1))[0]
    # Of 2,400: four standard deviations.
    assert np.abs(thirds - 800).max() < 93


def test_what_is_stopped_ranks_above_all_else_and_among_itself_by_its_score() -> None:
    reference = make_reference([1.0, 2.0, 7.0, 8.0], [False, False, True, True])
    places = [(99.0, False), (-math.inf, True), (7.5, True), (8.5, True)]
    found = []
    for score, stopped in places:
        ranks = Ranks(reference, draw=Fixed(0.5))
        found.append(ranks.rank(score, stopped=stopped) * 5)
    # Two of five gaps are theirs; the score of the lowest of them bounds nothing.
    assert found == [2.5, 1.5, 1.5, 0.5]


def test_what_is_no_number_ranks_with_what_is_infinite() -> None:
    ranks = Ranks(make_reference([1.0, 2.0, 3.0]), draw=Fixed(0.5))
    assert ranks.rank(math.nan) == 0.5 / 4
    assert ranks.rank(math.inf) == 1 / 5
    assert ranks.rank(-math.inf) == 5.5 / 6


@pytest.mark.parametrize("score", [0.0, 1e-6, 0.7, 3.1294, 123.4, -5.5])
def test_rounding_of_another_machine_is_no_drift(score: float) -> None:
    reference = make_reference([score] * 50)
    for off in (1e-5, -1e-5):
        near = score * (1 + off) + off / 10
        places = set()
        for seed in range(40):
            ranks = Ranks(reference, draw=random.Random(seed))
            places.add(round(ranks.rank(near), 1))
        # In random order among its like, not on one side of them.
        assert len(places) > 8


def test_a_reference_of_any_size_takes_the_same_memory() -> None:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal(20_000)
    ranks = Ranks(Reference(scores, scores > 2), draw=random.Random(0))
    num_stopped = int((scores > 2).sum())
    assert len(ranks._weights) <= CELLS
    assert ranks._weights.sum() == 20_001
    first = bool_index(ranks)
    assert ranks._weights[first:].sum() == num_stopped
    for _ in range(1000):
        ranks.rank(float(generator.standard_normal()))
    assert len(ranks._weights) == len(ranks._bounds) + 1 <= CELLS
    assert ranks._weights.sum() == 21_001


def bool_index(ranks: Ranks) -> int:
    """Return the first cell of what is stopped."""
    return next(i for i, place in enumerate(ranks._bounds) if place[0]) + 1


def test_coarse_cells_give_the_p_values_of_fine_ones() -> None:
    generator = np.random.default_rng(1)
    scores = generator.standard_normal(20_000)
    ranks = Ranks(make_reference(scores.tolist()), draw=random.Random(0))
    for quantile in (0.999, 0.99, 0.9, 0.5, 0.1):
        p_value = ranks.rank(float(np.quantile(scores, quantile)))
        assert p_value == pytest.approx(1 - quantile, rel=0.08)


def test_every_bet_is_a_density_and_none_wins_by_a_lower_rank_of_the_stopped() -> None:
    densities = np.exp(martingale._LOG_ODDS)
    widths = np.diff(martingale._EDGES)
    assert densities.min() > 0
    assert np.allclose(widths @ densities, 1)
    within = martingale._EDGES[1:] <= 0.1
    assert (np.diff(densities[within], axis=0) <= 1e-12).all()


def test_the_wealth_is_what_the_sum_over_all_beginnings_says() -> None:
    p_values = [0.2, 0.0005, 0.9, 0.03, 0.5]
    gambler = Martingale()
    for p_value in p_values:
        gambler.bet(p_value)
    cells = np.searchsorted(martingale._EDGES, p_values, side="right") - 1
    odds = np.exp(martingale._LOG_ODDS)[cells]
    left = (np.arange(6) + 1.0) ** -0.25
    expected = left[-1] + sum(
        (left[t] - left[t + 1]) * odds[t:].prod(axis=0).mean() for t in range(5)
    )
    assert gambler.log_wealth == pytest.approx(math.log(expected))


def test_no_p_value_is_expected_to_win() -> None:
    """A martingale: the mean over the next p-value is the wealth of now."""
    before = [0.01, 0.7, 0.0001, 0.04]

    def wealth(p_values: list[float]) -> float:
        gambler = Martingale()
        for p_value in p_values:
            gambler.bet(p_value)
        return math.exp(gambler.log_wealth)

    middles = (martingale._EDGES[1:] + martingale._EDGES[:-1]) / 2
    widths = np.diff(martingale._EDGES)
    after = sum(
        width * wealth([*before, middle])
        for width, middle in zip(widths, middles, strict=True)
    )
    assert after == pytest.approx(wealth(before))


@pytest.mark.parametrize("bar", [math.inf, 2.0], ids=["flags", "blocks"])
def test_exchangeable_scores_cross_no_more_often_than_is_promised(bar: float) -> None:
    """120 runs, the line at 1 in 20: more than 12 have a probability of 1 in 100."""
    crossed = sum(max(run(seed, bar=bar)) >= math.log(20) for seed in range(120))
    assert crossed <= 12


def test_a_reference_that_stays_as_it_was_would_be_bet_against_without_end() -> None:
    """Why scores join the reference: the twin of the test above."""

    class Inductive(Ranks):
        def rank(self, score: float, *, stopped: bool = False) -> float:
            weights = self._weights.copy()
            found = super().rank(score, stopped=stopped)
            self._weights = weights
            return found

    crossed = 0
    for seed in range(20):
        drawn = np.random.default_rng(seed)
        known = drawn.standard_normal(50)
        ranks = Inductive(make_reference(known.tolist()), draw=random.Random(seed))
        gambler = Martingale()
        best = -math.inf
        for _ in range(1000):
            gambler.bet(ranks.rank(float(drawn.standard_normal())))
            best = max(best, gambler.log_wealth)
        crossed += best >= LINE
    assert crossed > 10


CHANGES: dict[str, tuple[Change, float]] = {
    "one in 50 far out": (lambda d, s: 9.0 if d.random() < 0.02 else s, 2.5),
    "half a deviation up": (lambda _, s: s + 0.5, math.inf),
    "half a deviation down": (lambda _, s: s - 0.5, math.inf),
    "half as wide again": (lambda _, s: 1.5 * s, math.inf),
    "narrower": (lambda _, s: 0.6 * s, math.inf),
    "stuck": (lambda _, s: 0.1, math.inf),
}


@pytest.mark.parametrize("start", [0, 1500], ids=["at once", "late"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str, start: int) -> None:
    change, bar = CHANGES[name]
    for seed in range(4):
        count = start + 1500
        found = run(
            seed, count=count, reference=2000, start=start, bar=bar, change=change
        )
        assert max(found[:start], default=0.0) < LINE
        assert max(found[start:]) >= LINE


def test_a_long_quiet_time_costs_little() -> None:
    quiet = run(0, count=20_000, reference=2000)
    bound = float(Fraction(1, 4)) * math.log(20_001)
    assert min(quiet) > -bound - 0.01
