"""Scores of every token after the clamp, and what they add up to in a request.

A score is one small pair of functions, fit and apply; `SCORES` lists them. `Monitor`
runs in the worker, inside the graph: one column of numbers per score. `Watch` runs in
the engine core: it holds one request's numbers against the thresholds of its policy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from guard.policy import Policy, PolicyFile

__all__ = [
    "SCORES",
    "Activations",
    "Column",
    "Monitor",
    "Reading",
    "Score",
    "Watch",
    "list_columns",
]

Stage = Literal["prompt", "output"]


class Activations(NamedTuple):
    """What a score may look at, after the clamp; both fp32 `[num_tokens, d_model]`."""

    resid: Tensor
    """The residual stream."""
    error: Tensor
    """What the SAE does not explain: `resid - decode(encode(resid))`."""


Statistics = Mapping[str, Tensor]


class Score(NamedTuple):
    """A number per token, and how to learn on benign traffic what is usual."""

    fit: Callable[[Activations], dict[str, Tensor]]
    """Benign activations to the statistics that `apply` needs."""
    apply: Callable[[Activations, Statistics], Tensor]
    """Activations and statistics to `[num_tokens]`; larger is less usual."""


def fit_nothing(_activations: Activations) -> dict[str, Tensor]:
    """Return no statistics, for a score that needs none."""
    return {}


def error_norm(activations: Activations, _statistics: Statistics) -> Tensor:
    """Return the norm of the SAE's reconstruction error, `[num_tokens]`."""
    return activations.error.norm(dim=1)


def fit_density(activations: Activations) -> dict[str, Tensor]:
    """Fit mean and whitening of `resid`, covariance shrunk by Ledoit and Wolf.

    The shrinkage towards a scaled identity has the closed form of Ledoit and Wolf,
    "A well-conditioned estimator for large-dimensional covariance matrices" (2004),
    section 3.3.

    Returns:
        `mean` `[d_model]` and `whitener` `[d_model, d_model]`.
    """
    resid = activations.resid.double()
    num_tokens, d_model = resid.shape
    mean = resid.mean(0)
    centred = resid - mean
    covariance = centred.T @ centred / num_tokens
    scale = covariance.diagonal().mean()
    target = scale * torch.eye(d_model, dtype=resid.dtype)
    distance = (covariance - target).square().sum()
    noise = centred.square().sum(1).square().sum() / num_tokens
    noise = (noise - covariance.square().sum()) / num_tokens
    shrinkage = (noise / distance).clamp(0, 1) if distance > 0 else 1.0
    shrunk = shrinkage * target + (1 - shrinkage) * covariance
    values, vectors = torch.linalg.eigh(shrunk)
    whitener = vectors / values.clamp(min=1e-12).sqrt()
    return {"mean": mean.float(), "whitener": whitener.float()}


def density(activations: Activations, statistics: Statistics) -> Tensor:
    """Return the Mahalanobis distance of `resid`, `[num_tokens]`."""
    return ((activations.resid - statistics["mean"]) @ statistics["whitener"]).norm(
        dim=1
    )


SCORES: dict[str, Score] = {
    "error_norm": Score(fit_nothing, error_norm),
    "density": Score(fit_density, density),
}


@dataclass(frozen=True, slots=True)
class Column:
    """One number per token row, as the worker computes and the engine core reads it."""

    sae: str
    """Name of the SAE in the policy file."""
    score: str
    """A key of `SCORES`, or `error_ratio` or `clamp_residual`, which are only seen."""
    calibration: str | None = None
    """Path of the statistics, where the score has a calibration."""


def list_columns(policy_file: PolicyFile) -> tuple[Column, ...]:
    """Return the columns of a policy file, in the order of their numbers.

    Every process derives the same order from the same file. Each monitored SAE also
    has two columns without a threshold, for the metrics people ask for.
    """
    columns: dict[Column, None] = {}
    for policy in policy_file.policies.values():
        for monitor in policy.monitors:
            columns.setdefault(Column(monitor.sae, "error_ratio"))
            columns.setdefault(Column(monitor.sae, "clamp_residual"))
            path = str(monitor.calibration)
            columns.setdefault(Column(monitor.sae, monitor.score, path))
    return tuple(columns)


class Monitor(nn.Module):
    """The scores of one SAE at its hook point, with their statistics as buffers."""

    def __init__(
        self,
        columns: Sequence[tuple[int, Column]],
        statistics: Mapping[str, Statistics],
    ) -> None:
        """Keep the statistics of the given columns.

        Args:
            columns: Scored columns of one SAE, with their numbers.
            statistics: By path of the calibration.
        """
        super().__init__()
        self._scores: list[tuple[int, Score, list[str]]] = []
        for number, column in columns:
            if column.calibration is None:
                continue
            values = statistics[column.calibration]
            for name, value in values.items():
                self.register_buffer(f"{number}_{name}", value, persistent=False)
            self._scores.append((number, SCORES[column.score], list(values)))

    def forward(self, activations: Activations, *, out: Tensor, keep: Tensor) -> None:
        """Write each score into its column of `out`.

        Args:
            activations: The stream and the SAE's error, after the clamp.
            out: `[num_tokens, num_columns]`.
            keep: Rows that are scored, bool `[num_tokens]`; the others read 0.
        """
        for number, score, names in self._scores:
            statistics = {name: getattr(self, f"{number}_{name}") for name in names}
            scores = score.apply(activations, statistics)
            out[:, number] = torch.where(keep, scores, 0.0)


@dataclass(frozen=True, slots=True)
class Reading:
    """A monitor's number for one request so far, with its threshold."""

    monitor: str
    score: float
    """Largest score so far; infinite if any was not finite."""
    threshold: float
    position: int | None
    """Token position of the first alarm, else of the largest score."""
    stage: Stage
    """Whether that position lies in the prompt or in the output."""
    alarm: bool
    """Whether a score was above the threshold, or was not a number."""
    action: Literal["flag", "block"]
    """What the policy wants on an alarm."""

    @property
    def ratio(self) -> float:
        """Score over threshold; an alarm is above 1."""
        return _ratio(self.score, self.threshold)


def _ratio(score: float, threshold: float) -> float:
    return score / threshold if threshold else math.inf


def _is_over(
    scores: npt.NDArray[np.float32], threshold: float
) -> npt.NDArray[np.bool_]:
    """Whether each score is an alarm; one that is not finite always is."""
    return (scores > threshold) | ~np.isfinite(scores)


class _Running:
    """The running maximum of one column in one request."""

    __slots__ = (
        "alarm_position",
        "blocks",
        "column",
        "maximum",
        "position",
        "threshold",
    )

    def __init__(self, column: int, *, threshold: float, blocks: bool) -> None:
        self.column = column
        # As numpy compares it with a column of fp32, and so for single tokens too.
        self.threshold = float(np.float32(threshold))
        self.blocks = blocks
        self.maximum = -math.inf
        self.position: int | None = None
        self.alarm_position: int | None = None

    def observe(self, scores: npt.NDArray[np.float32], first: int) -> None:
        """Take in the column's scores of consecutive positions."""
        over = _is_over(scores, self.threshold)
        if self.alarm_position is None and over.any():
            self.alarm_position = first + int(over.argmax())
        known = np.where(np.isfinite(scores), scores, np.inf)
        largest = int(known.argmax())
        if known[largest] > self.maximum:
            self.maximum = float(known[largest])
            self.position = first + largest

    def observe_token(self, score: float, position: int) -> None:
        """Do the same for one position: a decoding step has nothing else."""
        if not -math.inf < score < math.inf:
            score = math.inf
        if score > self.maximum:
            self.maximum, self.position = score, position
        if self.alarm_position is None and (
            score > self.threshold or score == math.inf
        ):
            self.alarm_position = position

    @property
    def block_position(self) -> float:
        """Position of an alarm that blocks; infinite where there is none."""
        if self.blocks and self.alarm_position is not None:
            return self.alarm_position
        return math.inf


class Watch:
    """One request's scores against its policy's thresholds, position by position.

    A position counts once, whether it was computed, computed again after preemption
    or found in the prefix cache.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        columns: Sequence[int],
        thresholds: Sequence[float],
        prompt_length: int,
        seen_columns: Mapping[str, int] | None = None,
    ) -> None:
        """Start a request under `policy`.

        Args:
            policy: The policy that decides.
            columns: For each of its monitors, the number of its column.
            thresholds: For each of its monitors, in the score's unit.
            prompt_length: Tokens of the prompt; later positions are output.
            seen_columns: Columns without a threshold that the metrics show, by name.
        """
        self.policy = policy
        self.tokens_seen = 0
        self.clamped_tokens = [0] * len(policy.clamps)
        self.block_position: int | None = None
        """Position from which on no token may leave, if there is one."""
        self._prompt_length = prompt_length
        enforces = policy.mode == "enforce"
        self._running = [
            _Running(
                column,
                threshold=threshold,
                blocks=enforces and monitor.on_alarm == "block",
            )
            for monitor, column, threshold in zip(
                policy.monitors, columns, thresholds, strict=True
            )
        ]
        self._seen = {
            name: _Running(column, threshold=math.inf, blocks=False)
            for name, column in (seen_columns or {}).items()
        }
        self._all = [*self._running, *self._seen.values()]

    def observe(
        self,
        first: int,
        scores: npt.NDArray[np.float32],
        clamped: npt.NDArray[np.int32],
    ) -> None:
        """Take in the rows of consecutive positions, up to the one that blocks.

        Args:
            first: Position of the first row.
            scores: `[num_rows, num_columns]`.
            clamped: Bit r is set where rule r changed the token, `[num_rows]`.
        """
        known = max(0, self.tokens_seen - first)
        new = len(scores) - known
        if new <= 0 or self.block_position is not None:
            return
        if new == 1:
            self._observe_token(scores[-1].tolist(), int(clamped[-1]))
        else:
            self._observe_rows(scores[known:], clamped[known:], first + known)
        block = min((one.block_position for one in self._running), default=math.inf)
        self.block_position = int(block) if block < math.inf else None

    def skip(self, positions: int) -> None:
        """Go on behind positions whose scores nobody knows; they are never judged."""
        self.tokens_seen += positions

    def _observe_token(self, scores: Sequence[float], clamped: int) -> None:
        for running in self._all:
            running.observe_token(scores[running.column], self.tokens_seen)
        self.tokens_seen += 1
        for rule in range(len(self.clamped_tokens)) if clamped else ():
            self.clamped_tokens[rule] += clamped >> rule & 1

    def _observe_rows(
        self,
        scores: npt.NDArray[np.float32],
        clamped: npt.NDArray[np.int32],
        first: int,
    ) -> None:
        rows = self._rows_until_block(scores)
        scores, clamped = scores[:rows], clamped[:rows]
        for running in self._all:
            running.observe(scores[:, running.column], first)
        self.tokens_seen = first + rows
        for rule in range(len(self.clamped_tokens)):
            self.clamped_tokens[rule] += int((clamped >> rule & 1).sum())

    def _rows_until_block(self, scores: npt.NDArray[np.float32]) -> int:
        """Return how many rows there are up to and with the first that blocks."""
        rows = len(scores)
        for running in self._running:
            if running.blocks:
                over = _is_over(scores[:rows, running.column], running.threshold)
                if over.any():
                    rows = int(over.argmax()) + 1
        return rows

    @property
    def is_alarmed(self) -> bool:
        """Whether any monitor has alarmed so far."""
        return any(running.alarm_position is not None for running in self._running)

    @property
    def ratios(self) -> dict[str, float]:
        """Largest score / threshold so far, by monitor."""
        return {
            monitor.name: _ratio(running.maximum, running.threshold)
            for monitor, running in zip(
                self.policy.monitors, self._running, strict=True
            )
        }

    @property
    def observed(self) -> dict[str, float]:
        """Largest value so far of each column without a threshold."""
        return {name: max(seen.maximum, 0.0) for name, seen in self._seen.items()}

    def readings(self) -> tuple[Reading, ...]:
        """Return what each monitor has seen so far."""
        return tuple(
            Reading(
                monitor=monitor.name,
                score=running.maximum,
                threshold=running.threshold,
                position=position,
                stage=(
                    "prompt"
                    if position is None or position < self._prompt_length
                    else "output"
                ),
                alarm=running.alarm_position is not None,
                action=monitor.on_alarm,
            )
            for monitor, running in zip(
                self.policy.monitors, self._running, strict=True
            )
            for position in [
                running.position
                if running.alarm_position is None
                else running.alarm_position
            ]
        )
