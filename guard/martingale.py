"""A gambler who bets that requests are no longer like those of a reference.

A conformal test martingale (Vovk, Gammerman and Shafer, "Algorithmic Learning in a
Random World", 2nd ed. 2022, part III; Vovk, "Testing randomness online", 2021): he bets
against "these scores are exchangeable with the reference's", and his wealth is the
evidence. While they are, it ever reaches 1 / alpha with a probability of at most alpha
(Ville), however often somebody looks.

Two choices make that exact, and useful. A score is ranked among the reference and all
that came since, not among the reference alone: a finite reference differs from the
truth, and a bet on that would win without end. And bets begin anew at every request,
each with a share of the first stake. One bet sinks for as long as nothing happens, and
what then happens would have to make good for it first; an e-detector (Shiryaev and
Roberts) forgets instead, but bounds only how often it is wrong, and is wrong some day.
Here a change at request t costs about 1.25 log t of the logarithm, and the bound holds
for ever.
"""

import bisect
import math
import random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["CELLS", "Martingale", "Ranks", "Reference"]

CELLS = 256
"""Most places that a score can have among others; the highest ones hold one each."""

# In binary digits: what an engine and its twin differ by is no drift.
_DIGITS, _SMALLEST = 10, -3


class Reference(NamedTuple):
    """What a monitor made of benign requests: one bucket of a calibration."""

    scores: npt.NDArray[np.float64]
    """Largest score of each request, `[num_requests]`; -inf where it had no token of
    the monitor's stage, or was stopped by other monitors alone."""
    stopped: npt.NDArray[np.bool_]
    """Which of them the policy would stop, `[num_requests]`."""


class Ranks:
    """Where scores fall among a reference and all that came after it.

    An urn of cells, bounded by scores of the reference: by exchangeability the next
    score falls into a cell with a probability of exactly its weight over that of all.
    The weight is how many gaps between neighbours of the reference a cell holds, and
    how many scores have fallen into it. So p-values are independent and uniform, and
    memory is constant (the urn of Pólya; equal scores are put in random order).
    """

    def __init__(self, reference: Reference, *, draw: random.Random) -> None:
        """Begin with a reference.

        Args:
            reference: Of one bucket.
            draw: Puts equal scores in order.
        """
        self._draw = draw
        count, num_stopped = len(reference.scores), int(reference.stopped.sum())
        scores = [_round(score) for score in reference.scores.tolist()]
        ties = [draw.random() for _ in scores]
        order = np.lexsort((np.array(ties), np.array(scores), reference.stopped))
        chosen = _choose(count, num_stopped)
        self._bounds = [
            (bool(reference.stopped[i]), scores[i], ties[i]) for i in order[chosen]
        ]
        if num_stopped:
            # Below whatever will be stopped: as many gaps as there were stopped.
            lowest = bisect.bisect_left(chosen, count - num_stopped)
            self._bounds[lowest] = (True, -math.inf, -1.0)
        self._weights = np.diff([-1, *chosen, count]).astype(np.float64)

    def rank(self, score: float, *, stopped: bool = False) -> float:
        """Return the p-value of the next score, and put it among the others.

        Args:
            score: As in `Reference`; inf where one was not finite.
            stopped: Whether the policy stopped the request.

        Returns:
            From 0 to 1; near 0 where hardly any score was as large.
        """
        cell = bisect.bisect(self._bounds, self._place(score, stopped))
        above = self._weights[cell + 1 :].sum()
        share = above + self._draw.random() * self._weights[cell]
        p_value = float(share / (above + self._weights[: cell + 1].sum()))
        self._weights[cell] += 1
        return p_value

    def _place(self, score: float, stopped: bool) -> tuple[bool, float, float]:
        """Return what orders scores: whatever is stopped is above all that is not."""
        return stopped, _round(score), self._draw.random()


def _round(score: float) -> float:
    """Return a score to three digits, so that equal ones are equal on every machine."""
    if not math.isfinite(score):
        return math.inf if math.isnan(score) else score
    shift = _DIGITS - max(math.frexp(score)[1], _SMALLEST)
    return math.ldexp(round(math.ldexp(score, shift)), -shift)


def _choose(count: int, num_stopped: int) -> list[int]:
    """Return which of `count` points, ascending, bound the cells: most at the top.

    The lowest of those that were stopped is one.
    """
    fine = np.arange(1, count + 1)
    if count >= CELLS:
        fine = np.rint(np.geomspace(1, count, CELLS - 2)).astype(int)
    ranks = {*fine.tolist(), num_stopped} - {0}
    return sorted(count - rank for rank in ranks)


_SHARES = (0.02, 0.1, 0.5)
"""How many requests in one are taken to be strange."""
_HIGH, _LOW = (0.001, 0.005, 0.03, 0.2), (0.03, 0.2)
"""Among how many of the largest and of the smallest scores those are to be found."""
_SHIFTS, _SPREADS = (-0.8, -0.2, 0.2, 0.8), (-0.9, 0.9)
"""Slopes of densities for larger or smaller scores, bends for more or less spread."""
_PLAIN = np.array([0, *np.linspace(0.1, 1, 19)])
_EDGES = np.unique([*_PLAIN, *_HIGH, *(1 - low for low in _LOW)])
"""Of the p-values between which every density is constant."""


def _list_bets() -> npt.NDArray[np.float64]:
    """Return the logarithm of each density that a gambler bets on, `[cells, bets]`.

    Each is written as a distribution: what lies below an edge. None rises before 0.1:
    there are the stopped requests, which rank too low among each other rather than too
    high, and no bet may win by that.
    """
    p, u = _EDGES, _PLAIN
    bends = [
        *(u + s * (u - u**2) for s in _SHIFTS),
        *(u + s * (u - 3 * u**2 + 2 * u**3) for s in _SPREADS),
    ]
    bets = [
        *(p + s * (np.minimum(p / t, 1) - p) for t in _HIGH for s in _SHARES),
        *(p + s * (np.maximum(1 - (1 - p) / t, 0) - p) for t in _LOW for s in _SHARES),
        *(np.interp(p, u, bend) for bend in bends),
    ]
    logs: npt.NDArray[np.float64] = np.log(np.diff(bets) / np.diff(p)).T.copy()
    return logs


_LOG_ODDS = _list_bets()
_STEPS = _EDGES[1:-1].tolist()
_PATIENCE = 0.25
"""How soon the first stake is spent: little of it early, and some of it late."""


class Martingale:
    """The wealth of one who bets against uniform p-values; 1 at the start.

    The mean over many bets, each begun anew at every p-value with a share of the first
    stake: of that, (t + 1) ** -0.25 is left after t of them.
    """

    def __init__(self) -> None:
        """Begin with nothing at stake."""
        self._made = np.full(_LOG_ODDS.shape[1], -np.inf)
        """Logarithm of what each bet has made of its shares."""
        self._count = 0

    def bet(self, p_value: float) -> None:
        """Bet on one more p-value; win or lose."""
        self._count += 1
        shrunk = math.log1p(-1 / (self._count + 1))
        begun = math.log(-math.expm1(_PATIENCE * shrunk))
        share = begun - _PATIENCE * math.log(self._count)
        np.logaddexp(self._made, share, out=self._made)
        self._made += _LOG_ODDS[bisect.bisect(_STEPS, p_value)]

    @property
    def log_wealth(self) -> float:
        """Natural logarithm of the e-value so far."""
        kept = -_PATIENCE * math.log1p(self._count)
        made = np.logaddexp.reduce(self._made) - math.log(len(self._made))
        return float(np.logaddexp(kept, made))
