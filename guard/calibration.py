"""What benign traffic looks like to a policy's monitors, and the thresholds it sets.

Fitted once on benign requests, saved as one safetensors file, loaded by the worker (the
statistics of each score) and by the engine core (the thresholds).

Thresholds are split-conformal and joint. Each request gives one row of maxima, a number
per monitor; a monitor's threshold is one of its own largest, so that odd traffic which
one of them cannot read lifts no other's; or, where those are too few for the promise,
as far out in its tail as the others' are. That any of them alarms on a benign request
is bounded, whatever their correlation, and nothing is given away where they alarm
together.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guard.artefact import explaining, read_artefact, write_artefact
from guard.errors import CalibrationError
from guard.policy import OnAlarm, Policy, Stage
from guard.score import SCORES

__all__ = [
    "Calibration",
    "Entry",
    "as_written",
    "check_lengths",
    "excess_probability",
    "fit_scales",
    "load_calibration",
    "needed_requests",
    "policy_thresholds",
    "save_calibration",
    "share_budgets",
]

FORMAT = 2
_TAIL = 0.9
"""Quantile above which a monitor's maxima are taken to fall off exponentially."""
_BEYOND = 0.1
"""How far a bar is above the largest maximum, in units of the tail's spread."""
_LEAST = 1e-6
"""Smallest spread, relative to the level: a score may be constant on benign traffic."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One monitor, as it was calibrated."""

    score: str
    """A key of `guard.score.SCORES`."""
    hook_point: str
    stage: Stage | None
    """Which tokens counted."""
    window: int
    """Over how many consecutive tokens the score was averaged."""
    statistics: Mapping[str, Tensor]
    """What the score's `fit` returned; the weights of a probe."""
    sae_sha256: str | None = None
    """Digest of the SAE that the score needs."""
    drift: float | None = None
    """What each token's score had to exceed to add up; None: scores were averaged."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The statistics of a policy's monitors, and the maxima of benign requests."""

    entries: Mapping[str, Entry]
    """By the monitor's name; their order is that of the columns below."""
    lengths: tuple[int, ...]
    """Largest total length, in tokens, of each bucket; ascending."""
    scales: tuple[Tensor, ...]
    """For each bucket level and spread of each monitor, `[num_entries, 2]`."""
    maxima: tuple[Tensor, ...]
    """For each bucket the maxima of each held-out request, `[num_requests,
    num_entries]`; -inf where a request had no token of the monitor's stage."""
    provenance: Mapping[str, Any]
    """Where it came from: model, clamps, dtype, prompts, versions, date."""

    def bucket(self, total_length: int) -> int:
        """Return the bucket of a request that can have so many tokens.

        One longer than every bucket is judged by the last.
        """
        found = bisect.bisect_left(self.lengths, total_length)
        return min(found, len(self.lengths) - 1)

    def thresholds(
        self, total_length: int, *, targets: Mapping[str, Fraction]
    ) -> dict[str, float]:
        """Return the joint thresholds of some monitors for a request.

        Each monitor's is one of its own largest maxima, the r-th of n, so that a
        further exchangeable request exceeds it with a probability of at most r / (n +
        1) (Vovk et al., "Algorithmic Learning in a Random World", 2005); a larger one
        where more than r requests have it in common. The ranks are in the proportion of
        the targets, and as large as they can be while no more than (n + 1) * target
        requests reach any threshold. That any is exceeded has then a probability of at
        most the target; of m monitors, plus (m - 1) / (n + 1).

        Where that many requests reach even the highest bar of each, one rank is taken
        of the largest of all monitors, each in units of its tail, and the probability
        is at most the target.

        Args:
            total_length: Most tokens the request can have, prompt and output.
            targets: By name of the entry, its share of false alarms.

        Returns:
            By name, in the score's unit; a larger score is an alarm.

        Raises:
            CalibrationError: The bucket holds too few requests for the target, or too
                few with a token that counts.
        """
        bucket = self.bucket(total_length)
        target = sum(targets.values(), Fraction(0))
        columns = [list(self.entries).index(name) for name in targets]
        maxima = self.maxima[bucket].double()[:, columns]
        tails = self.scales[bucket].double()[columns]
        most = math.floor((len(maxima) + 1) * target)
        if most < 1:
            message = (
                f"The calibration holds {len(maxima)} requests of up to "
                f"{self.lengths[bucket]} tokens; a target_fpr of {float(target):g}, "
                f"the sum over {', '.join(targets)}, needs at least "
                f"{needed_requests(target)}."
            )
            raise CalibrationError(message)
        if not bool(maxima.isfinite().any(0).all()):
            message = (
                "Too few requests of the calibration have a token of the stage of "
                f"{', '.join(targets)}; expected longer answers in more of them."
            )
            raise CalibrationError(message)
        shares = list(targets.values())
        found = _fit_ranks(maxima, shares, most, tails)
        if found is None:
            found = _fit_tails(maxima, shares, most, tails)
        return dict(zip(targets, found.tolist(), strict=True))


def _fit_ranks(
    maxima: Tensor, shares: Sequence[Fraction], most: int, tails: Tensor
) -> Tensor | None:
    """Return the lowest bar of each monitor that at most so many requests reach.

    Args:
        maxima: Of held-out requests, `[num_requests, num_monitors]`.
        shares: Of each monitor, its part of the false alarms.
        most: How many requests may be at or above any of their thresholds.
        tails: Level and spread of each, of other requests, `[num_monitors, 2]`.

    Returns:
        `[num_monitors]`; None where more reach even the highest bar of each.
    """
    ladders = [
        _list_bars(column[column.isfinite()].tolist(), spread)
        for column, spread in zip(maxima.unbind(1), tails[:, 1].tolist(), strict=True)
    ]

    def bars(scale: Fraction) -> Tensor:
        ranks = [max(math.floor(scale * share), 1) for share in shares]
        pairs = zip(ladders, ranks, strict=True)
        return torch.tensor(
            [ladder[min(rank, len(ladder)) - 1] for ladder, rank in pairs],
            dtype=maxima.dtype,
        )

    def fits(scale: Fraction) -> bool:
        # Those at one, too: a further request may push each of them over it.
        return int((maxima >= bars(scale)).any(1).sum()) <= most

    # Between two of these scales no rank changes.
    scales = sorted({rank / share for share in shares for rank in range(1, most + 1)})
    too_large = bisect.bisect_left(scales, True, key=lambda scale: not fits(scale))
    return bars(scales[too_large - 1]) if too_large else None


def _list_bars(maxima: Sequence[float], spread: float) -> list[float]:
    """Return, from rank 1 on, the lowest bar that at most so many requests reach.

    A monitor that reads words, and no context, says the same of all requests about a
    topic: where more than its rank share a maximum, the bar is the next larger one, and
    above the largest of all so far that no rounding reaches it.
    """
    descending = sorted(maxima, reverse=True)
    bar, found = descending[0] + _BEYOND * spread, []
    for value, following in pairwise([*descending, -math.inf]):
        if following < value:
            bar = value
        found.append(bar)
    return found


def _fit_tails(
    maxima: Tensor, shares: Sequence[Fraction], most: int, tails: Tensor
) -> Tensor:
    """Return thresholds as far out in each monitor's tail as its share asks for.

    Args:
        maxima: As for `_fit_ranks`, like the next two.
        shares: Of each monitor.
        most: One more exchangeable request exceeds any threshold with a probability of
            at most this number over `num_requests + 1`.
        tails: Level and spread of each, of other requests, `[num_monitors, 2]`; that
            of `level + spread * x` taken to be in proportion to exp(-x).
    """
    level, spread = tails.unbind(1)
    offset = torch.tensor([math.log(share) for share in shares]).double()
    largest = ((maxima - level) / spread + offset).amax(1)
    bar = largest.sort(descending=True).values[most - 1]
    # Not below what is under the bar, by a rounding.
    admitted = maxima[largest <= bar].amax(0)
    return (level + spread * (bar - offset)).maximum(admitted)


def share_budgets(policy: Policy) -> dict[tuple[str, OnAlarm], dict[str, Fraction]]:
    """Return which monitors of a policy share their false-alarm budgets.

    Those with one calibration and one action: what only flags takes nothing from what
    blocks.

    Returns:
        By path of the calibration and action, the target of each monitor by name.
    """
    groups: dict[tuple[str, OnAlarm], dict[str, Fraction]] = {}
    for monitor in policy.monitors:
        group = groups.setdefault((str(monitor.calibration), monitor.on_alarm), {})
        group[monitor.name] = as_written(monitor.target_fpr)
    return groups


def policy_thresholds(
    policy: Policy, calibrations: Mapping[str, Calibration], total_length: int
) -> dict[str, float]:
    """Return the threshold of each monitor of a policy, by name.

    Args:
        policy: Whose monitors share their budgets.
        calibrations: Theirs, by path.
        total_length: Most tokens the request can have, prompt and output.

    Raises:
        CalibrationError: A calibration holds too few requests.
    """
    found: dict[str, float] = {}
    for (path, _), targets in share_budgets(policy).items():
        found |= calibrations[path].thresholds(total_length, targets=targets)
    return found


def as_written(number: float) -> Fraction:
    """Return a number as it was written: 1 - 0.45 is above 0.55 in floating point."""
    return Fraction(str(number))


def excess_probability(
    alarms: int, *, requests: int, held_out: int, target_fpr: float
) -> float:
    """Return the probability of as many alarms or more on fresh benign requests.

    A threshold that is the k-th smallest of n held-out numbers is exceeded by a further
    one with a probability drawn from Beta(n + 1 - k, k); so the alarms among m requests
    are beta-binomial (Vovk, "Conditional validity of inductive conformal predictors",
    2012).

    Args:
        alarms: How many were seen.
        requests: m.
        held_out: n.
        target_fpr: From which k follows.
    """
    rank = math.ceil((held_out + 1) * (1 - as_written(target_fpr)))
    a, b = held_out + 1 - rank, rank

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    def log_probability(count: int) -> float:
        choose = -log_beta(count + 1, requests - count + 1) - math.log(requests + 1)
        return choose + log_beta(count + a, requests - count + b) - log_beta(a, b)

    below = sum(math.exp(log_probability(count)) for count in range(alarms))
    return max(1.0 - below, 0.0)


def needed_requests(target_fpr: Fraction) -> int:
    """Return how many held-out requests a bucket needs for a false-alarm rate."""
    return math.ceil(1 / target_fpr) - 1


def fit_scales(maxima: Tensor) -> Tensor:
    """Return level and spread of each monitor's maxima.

    Args:
        maxima: Of requests that set no threshold, `[num_requests, num_entries]`.

    Returns:
        fp32 `[num_entries, 2]`: the 90 % quantile, and the mean excess over it, which
        describes an exponential tail (Pickands, "Statistical inference using extreme
        order statistics", 1975, with shape 0).

    Raises:
        CalibrationError: A monitor saw no token, or something that is no number.
    """
    scales = []
    for column in maxima.double().unbind(1):
        seen = column[column != -math.inf]
        if not len(seen) or not seen.isfinite().all():
            message = (
                "A monitor's score was never finite on benign traffic; expected "
                "requests with tokens of its stage."
            )
            raise CalibrationError(message)
        level = seen.quantile(_TAIL)
        above = seen[seen > level] - level
        spread = above.mean() if len(above) else level.new_zeros(())
        least = _LEAST * level.abs().clamp(min=1.0)
        scales.append(torch.stack([level, spread.clamp(min=least)]))
    return torch.stack(scales).float()


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write one safetensors file; what is not a tensor goes into its metadata."""
    tensors = {}
    for name, entry in calibration.entries.items():
        for key, value in entry.statistics.items():
            tensors[f"statistics/{name}/{key}"] = value
    for length, scales, maxima in zip(
        calibration.lengths, calibration.scales, calibration.maxima, strict=True
    ):
        tensors[f"scales/{length}"] = scales
        tensors[f"maxima/{length}"] = maxima
    about = {
        "format": FORMAT,
        "entries": {
            name: {
                "score": entry.score,
                "hook_point": entry.hook_point,
                "stage": entry.stage,
                "window": entry.window,
                "sae_sha256": entry.sae_sha256,
                "drift": entry.drift,
            }
            for name, entry in calibration.entries.items()
        },
        "requests": [len(maxima) for maxima in calibration.maxima],
        "provenance": dict(calibration.provenance),
    }
    write_artefact(path, tensors, about)


def load_calibration(path: Path) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises:
        CalibrationError: The file is missing, damaged or not a calibration.
    """
    with explaining(path, kind="calibration", command="guard calibrate"):
        tensors, about = read_artefact(path)
        if about["format"] != FORMAT:
            message = (
                f"{path}: calibration of format {about['format']!r}; expected format "
                f"{FORMAT}. Calibrate again."
            )
            raise CalibrationError(message)
        calibration = _assemble(about, tensors)
    if not _is_usable(calibration):
        message = f"{path}: its maxima and scales are not usable; calibrate again."
        raise CalibrationError(message)
    return calibration


def _assemble(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    def named(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }

    entries = {
        name: Entry(**values, statistics=named(f"statistics/{name}/"))
        for name, values in about["entries"].items()
    }
    unknown = {entry.score for entry in entries.values()} - set(SCORES)
    if unknown:
        message = f"unknown score {unknown.pop()!r}"
        raise ValueError(message)
    maxima = {int(length): tensor for length, tensor in named("maxima/").items()}
    lengths = sorted(maxima)
    return Calibration(
        entries=entries,
        lengths=tuple(lengths),
        scales=tuple(tensors[f"scales/{length}"] for length in lengths),
        maxima=tuple(maxima[length] for length in lengths),
        provenance=dict(about["provenance"]),
    )


def _is_usable(calibration: Calibration) -> bool:
    """Whether thresholds can be read off; no score is above one that is NaN."""
    width = len(calibration.entries)
    return bool(calibration.lengths) and all(
        scales.shape == (width, 2)
        and maxima.dim() == 2
        and maxima.shape[1] == width
        and len(maxima) > 0
        and bool(scales.isfinite().all())
        and bool((scales[:, 1] > 0).all())
        and bool((maxima < math.inf).all())
        for scales, maxima in zip(calibration.scales, calibration.maxima, strict=True)
    )


def check_lengths(lengths: Sequence[int]) -> None:
    """Refuse bounds of buckets that do not ascend.

    Raises:
        CalibrationError: They do not.
    """
    if not lengths or any(a >= b for a, b in pairwise(lengths)):
        message = f"Lengths {list(lengths)} do not ascend; expected e.g. 64, 128, 256."
        raise CalibrationError(message)
