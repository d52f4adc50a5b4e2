"""How far a share of samples may be from the share of all: binomial intervals.

As if samples were independent. Intervals hold at 95 %.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["clopper_pearson", "upper_bound", "wilson"]

_MISS = 0.05
"""How often an interval may leave the true share out."""
_Z = 1.959964
"""Standard normal quantile of the two-sided interval."""
_HALVINGS = 60


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the two-sided score interval of a share (Wilson, JASA 22, 1927).

    Args:
        hits: Of the samples.
        n: Samples; of none nothing is known.

    Raises:
        ValueError: There are fewer than 0 hits, or more than samples.
    """
    _check(hits, n)
    if not n:
        return 0.0, 1.0
    share = hits / n
    centre = share + _Z * _Z / (2 * n)
    reach = _Z * math.sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n))
    scale = 1 + _Z * _Z / n
    # At the ends the formula is exact, and rounding is not.
    low = (centre - reach) / scale if hits else 0.0
    high = (centre + reach) / scale if hits < n else 1.0
    return low, high


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """Return the two-sided exact interval (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        hits: Of the samples.
        n: Samples; of none nothing is known.

    Raises:
        ValueError: There are fewer than 0 hits, or more than samples.
    """
    _check(hits, n)
    # What is low for hits is high for misses.
    return 1.0 - _upper(n - hits, n, _MISS / 2), _upper(hits, n, _MISS / 2)


def upper_bound(hits: int, n: int) -> float:
    """Return the one-sided exact bound (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        hits: Of the samples.
        n: Samples; of none nothing is known.

    Raises:
        ValueError: There are fewer than 0 hits, or more than samples.
    """
    _check(hits, n)
    return _upper(hits, n, _MISS)


def _upper(hits: int, n: int, miss: float) -> float:
    """Return the share under which at most `hits` come with the chance `miss`."""
    if hits == n:
        return 1.0
    at_most = _tail(hits, n)
    low, high = hits / n, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(middle) > miss else (low, middle)
    return high


def _tail(hits: int, n: int) -> Callable[[float], float]:
    """Return the chance of at most `hits` of `n`, as a function of the share."""
    # Binomial coefficients of some thousand samples are too large for a float.
    logs = list(
        itertools.accumulate(
            range(hits), lambda log, k: log + math.log((n - k) / (k + 1)), initial=0.0
        )
    )

    def at_most(share: float) -> float:
        if not 0.0 < share < 1.0:
            return float(share <= 0.0)
        yes, no = math.log(share), math.log1p(-share)
        return math.fsum(
            math.exp(log + k * yes + (n - k) * no) for k, log in enumerate(logs)
        )

    return at_most


def _check(hits: int, n: int) -> None:
    if not 0 <= hits <= n:
        message = f"{hits} hits among {n} samples; expected 0 to {n}."
        raise ValueError(message)
