"""What the memory of a server did while it was under load.

On a CPU oneDNN keeps a primitive for each shape of input that a worker met, a thousand
of them, which looks like a leak for hours: a server whose memory is watched keeps few.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.operator import Memory

__all__ = [
    "FEW_PRIMITIVES",
    "Sample",
    "Slope",
    "describe_memory",
    "describe_reloads",
    "fit_slope",
    "is_flat",
]

FEW_PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""Environment of a server whose memory is watched."""
FLAT_SHARE = 0.01
"""By how much memory may grow in the second half, relative to what it was there."""
WARM = 0.2
"""Share of the samples before the first that counts: what is filled once has been."""
PIECES = 10
_STUDENT = 2.306
"""97.5 % of the t distribution of `PIECES - 2` degrees of freedom."""
_ROWS = 60
"""Samples that the results file shows, at most."""


class Sample(NamedTuple):
    """Memory at one moment."""

    seconds: float
    """Since the crowd came."""
    tokens: int
    """Computed so far."""
    memory: Memory


class Slope(NamedTuple):
    """A trend, with its 95 % interval."""

    value: float
    low: float
    high: float


def fit_slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Fit a line to the means of ten pieces of a series; None if it is too short.

    Neighbouring samples are much alike, the means of pieces hardly: the interval is
    that of ten independent points.

    Args:
        points: Pairs of position and value, in order.
    """
    size = len(points) // PIECES
    if not size:
        return None
    pieces = [points[i * size : (i + 1) * size] for i in range(PIECES)]
    xs, ys = ([sum(p[k] for p in piece) / size for piece in pieces] for k in (0, 1))
    x_mean, y_mean = sum(xs) / PIECES, sum(ys) / PIECES
    spread = sum((x - x_mean) ** 2 for x in xs)
    if not spread:
        return None
    pairs = list(zip(xs, ys, strict=True))
    value = sum((x - x_mean) * (y - y_mean) for x, y in pairs) / spread
    errors = sum((y - y_mean - value * (x - x_mean)) ** 2 for x, y in pairs)
    reach = _STUDENT * math.sqrt(errors / (PIECES - 2) / spread)
    return Slope(value, value - reach, value + reach)


def is_flat(half: float, end: float) -> bool:
    """Whether memory is the same at the end as when half was done, in any unit."""
    return end <= half * (1 + FLAT_SHARE)


def describe_memory(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what a results file says of memory, in MB.

    `rss_start_mb`, `rss_half_mb` and `rss_end_mb` add up all processes, after warm-up,
    when half of the samples were taken and at the end. The slope is that of the second
    half, per minute.
    """
    first = samples[int(WARM * (len(samples) - 1))]
    last, half = samples[-1], samples[len(samples) // 2 :]
    slope = fit_slope([(s.seconds / 60, sum(s.memory.rss.values())) for s in half])
    shown = samples[:: max(len(samples) // _ROWS, 1)]
    return {
        "rss_start_mb": round(sum(first.memory.rss.values()), 1),
        "rss_half_mb": round(sum(half[0].memory.rss.values()), 1),
        "rss_end_mb": round(sum(last.memory.rss.values()), 1),
        "start_tokens": first.tokens,
        "pss_start_mb": first.memory.pss,
        "pss_end_mb": last.memory.pss,
        "processes_start_mb": first.memory.rss,
        "processes_end_mb": last.memory.rss,
        "slope_second_half_mb_per_minute": slope and [round(x, 2) for x in slope],
        "samples": [
            [round(s.seconds), s.tokens, round(sum(s.memory.rss.values()), 1)]
            for s in shown
        ],
    }


def describe_reloads(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return what a results file says of a series of reloads.

    Args:
        points: Hundreds of reloads, and the RSS of all processes in MB after each.
    """
    half = points[len(points) // 2 :]
    slope = fit_slope(half)
    marks = points[:: max(len(points) // PIECES, 1)]
    return {
        "reloads": len(points),
        "rss_mb": [round(value, 1) for _, value in [*marks, *points[-1:]]],
        "slope_second_half_mb_per_100": slope and [round(x, 2) for x in slope],
    }
