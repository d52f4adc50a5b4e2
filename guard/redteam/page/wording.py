"""Numbers and names of a certificate, as a reader sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guard.redteam.page.markup import NOT_MEASURED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guard.redteam.certificate import Rate
    from guard.redteam.target import Position

__all__ = [
    "CONTROLS",
    "POSITIONS",
    "SEARCHES",
    "budget_in_words",
    "count_of",
    "least_budget",
    "percent",
    "rate",
    "share",
    "short",
    "upper",
]

POSITIONS: Mapping[Position, str] = {
    "last": "Edit at the last prompt token",
    "all": "Edits at all prompt tokens",
    "every": "Edits at the last prompt token and all generated ones",
}
SEARCHES: Mapping[str, str] = {
    "none": "Prompt as it was",
    "suffix": "Words before the message",
    "prefilled": "The same, and the first words of the answer",
    "constrained": "The same, by a constraint on decoding",
    "soft_prompt": "Free vectors for tokens (no client can send them)",
}
CONTROLS: Mapping[str, str] = {
    "random": "Random",
    "null_space": "Random, unseen by the clamp",
    "benign_direction": "Towards benign prompts",
}


def percent(value: float) -> str:
    """Write a share; what is not 0 or 1 never reads as 0 % or 100 %."""
    if 0 < value < 0.0005:
        return "<0.1\u00a0%"
    if 0.9995 < value < 1:
        return ">99.9\u00a0%"
    return f"{100 * value:.1f}".removesuffix(".0") + "\u00a0%"


def rate(value: Rate | None) -> str:
    """Write a share and its hits."""
    if value is None or not value.count:
        return NOT_MEASURED
    return f"{percent(value.share)} ({value.hits})"


def share(value: Rate | None) -> str:
    """Write the share, with its 95 % interval."""
    if value is None or not value.count:
        return NOT_MEASURED
    interval = f"{percent(value.low)} to {percent(value.high)}"
    return f"{count_of(value)}: {percent(value.share)} (95 % interval {interval})"


def count_of(value: Rate) -> str:
    """Write how many of how many."""
    return f"{value.hits} of {value.count}"


def upper(value: Rate) -> str:
    """Write the one-sided bound."""
    return percent(value.upper) if value.count else NOT_MEASURED


def least_budget(budget: float | None, *, largest: float) -> str:
    """Write an interpolated budget, or that even the largest one was not enough."""
    return f">\u2009{largest:.3g}" if budget is None else f"{budget:.2g}"


def budget_in_words(budget: float | None, *, largest: float) -> str:
    """Write at which budget, in a sentence."""
    return f"at no budget up to {largest:.3g}" if budget is None else f"at {budget:.2g}"


def short(digest: str) -> str:
    """Write the beginning of a digest."""
    return digest[:12] or "not signed"
