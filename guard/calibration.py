"""What benign traffic looks like to one score: its statistics and its thresholds.

Fitted once on benign prompts, saved as one safetensors file, loaded by the worker (the
statistics) and by the engine core (the thresholds).
"""

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guard.errors import CalibrationError
from guard.monitor import SCORES, Activations

__all__ = ["Calibration", "fit_calibration", "load_calibration", "save_calibration"]

FORMAT = 1
_MAXIMA = "maxima."
_STATISTICS = "statistics."


@dataclass(frozen=True, slots=True)
class Calibration:
    """The statistics of one score, and the maxima of held-out benign requests."""

    score: str
    """A key of `guard.monitor.SCORES`."""
    hook_point: str
    statistics: Mapping[str, Tensor]
    """What the score's `fit` returned."""
    lengths: tuple[int, ...]
    """Largest total length, in tokens, of each bucket; ascending."""
    maxima: tuple[Tensor, ...]
    """For each bucket the sorted per-request maxima, `[num_requests]`."""
    provenance: Mapping[str, Any]
    """Where it came from: model, SAE digest, policy, prompts, versions, date."""

    def threshold(self, total_length: int, *, target_fpr: float) -> float:
        """Return the split-conformal threshold of a request.

        The k-th smallest of n held-out maxima, k = ceil((n + 1) (1 - target_fpr)), is
        exceeded by a further exchangeable request with probability of at most
        `target_fpr` (Vovk et al., "Algorithmic Learning in a Random World", 2005).

        Args:
            total_length: Most tokens the request can have, prompt and output. One
                longer than every bucket is judged by the last.
            target_fpr: Wanted share of benign requests that alarm.

        Raises:
            CalibrationError: The bucket holds too few requests for the target.
        """
        bucket = min(
            bisect.bisect_left(self.lengths, total_length), len(self.lengths) - 1
        )
        maxima = self.maxima[bucket]
        target = Fraction(str(target_fpr))  # as written: 1 - 0.45 is above 0.55
        rank = math.ceil((len(maxima) + 1) * (1 - target))
        if rank > len(maxima):
            needed = math.ceil(1 / target) - 1
            message = (
                f"The calibration of score {self.score!r} holds {len(maxima)} requests "
                f"of up to {self.lengths[bucket]} tokens; a target_fpr of "
                f"{target_fpr:g} needs at least {needed}."
            )
            raise CalibrationError(message)
        return float(maxima[rank - 1])


def fit_calibration(
    score: str,
    *,
    hook_point: str,
    fitting: Activations,
    held_out: Sequence[Activations],
    lengths: Sequence[int],
    provenance: Mapping[str, Any],
) -> Calibration:
    """Fit a score on some benign tokens and its thresholds on other requests.

    Args:
        score: A key of `guard.monitor.SCORES`.
        hook_point: Where the activations were taken.
        fitting: Benign tokens, all requests concatenated, without sinks.
        held_out: One entry per benign request that had no part in `fitting`.
        lengths: Largest total length of each bucket, in tokens, ascending.
        provenance: Kept in the file as it is; must be JSON.

    Raises:
        CalibrationError: The score is unknown, a bucket has no request, or one
            scores what is not a number.
    """
    if score not in SCORES:
        message = f"Unknown score {score!r}; expected one of {', '.join(SCORES)}."
        raise CalibrationError(message)
    statistics = SCORES[score].fit(fitting)
    buckets: list[list[float]] = [[] for _ in lengths]
    for request in held_out:
        bucket = bisect.bisect_left(lengths, len(request.resid))
        if bucket == len(lengths):
            message = (
                f"A held-out request has {len(request.resid)} tokens, more than the "
                f"largest bucket; expected at most {lengths[-1]}."
            )
            raise CalibrationError(message)
        maximum = float(SCORES[score].apply(request, statistics).max())
        if not math.isfinite(maximum):
            message = f"A held-out request scores {maximum}; expected a finite number."
            raise CalibrationError(message)
        buckets[bucket].append(maximum)
    for length, bucket_maxima in zip(lengths, buckets, strict=True):
        if not bucket_maxima:
            message = (
                f"No held-out request falls into the bucket up to {length} tokens."
            )
            raise CalibrationError(message)
    return Calibration(
        score=score,
        hook_point=hook_point,
        statistics=statistics,
        lengths=tuple(lengths),
        maxima=tuple(torch.tensor(sorted(bucket)) for bucket in buckets),
        provenance=provenance,
    )


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write one safetensors file; what is not a tensor goes into its metadata."""
    tensors = {f"{_STATISTICS}{k}": v for k, v in calibration.statistics.items()}
    for length, maxima in zip(calibration.lengths, calibration.maxima, strict=True):
        tensors[f"{_MAXIMA}{length}"] = maxima
    about = {
        "format": FORMAT,
        "score": calibration.score,
        "hook_point": calibration.hook_point,
        "requests": [len(maxima) for maxima in calibration.maxima],
        "provenance": dict(calibration.provenance),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"guard": json.dumps(about, sort_keys=True)})


def load_calibration(path: Path) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises:
        CalibrationError: The file is missing, damaged or not a calibration.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["guard"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if about["format"] != FORMAT or about["score"] not in SCORES:
            message = (
                f"{path}: calibration of format {about['format']!r} for score "
                f"{about['score']!r}; expected format {FORMAT} and one of "
                f"{', '.join(SCORES)}."
            )
            raise CalibrationError(message)
        buckets = sorted(
            (int(name.removeprefix(_MAXIMA)), tensor)
            for name, tensor in tensors.items()
            if name.startswith(_MAXIMA)
        )
        if not buckets or not all(_is_usable(maxima) for _, maxima in buckets):
            message = f"{path}: its maxima are not ascending numbers; calibrate again."
            raise CalibrationError(message)
        return Calibration(
            score=about["score"],
            hook_point=about["hook_point"],
            statistics={
                name.removeprefix(_STATISTICS): tensor
                for name, tensor in tensors.items()
                if name.startswith(_STATISTICS)
            },
            lengths=tuple(length for length, _ in buckets),
            maxima=tuple(maxima for _, maxima in buckets),
            provenance=dict(about["provenance"]),
        )
    except FileNotFoundError as error:
        message = f"{path}: no such calibration; `guard calibrate` writes one."
        raise CalibrationError(message) from error
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        message = f"{path}: not a calibration that `guard calibrate` wrote ({error})."
        raise CalibrationError(message) from error


def _is_usable(maxima: Tensor) -> bool:
    """Whether a threshold can be read off; no score is above one that is NaN."""
    return (
        maxima.dim() == 1
        and maxima.is_floating_point()
        and len(maxima) > 0
        and bool(maxima.isfinite().all())
        and bool((maxima.diff() >= 0).all())
    )
