"""What the scores of a request add up to, held against its policy's thresholds.

`Watch` runs in the engine core, position by position as tokens come; `sum_up` is the
same over a whole request at once, for calibration and as the plain reference of it.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt

from guard.monitor import EXEMPT
from guard.policy import Monitor, Policy, Stage

__all__ = ["Reading", "Watch", "stage_rows", "sum_up"]


def stage_rows(
    stage: Stage | None, *, first: int, count: int, prompt_length: int
) -> slice:
    """Return which of `count` rows, the first at position `first`, are of a stage."""
    begin, end = {
        None: (0, first + count),
        "prompt": (0, prompt_length),
        "last_prompt": (prompt_length - 1, prompt_length),
        "output": (prompt_length, first + count),
    }[stage]
    start = min(max(begin - first, 0), count)
    return slice(start, min(max(end - first, start), count))


def _stages_of(position: int, prompt_length: int) -> tuple[Stage | None, ...]:
    if position >= prompt_length:
        return None, "output"
    if position < prompt_length - 1:
        return None, "prompt"
    return None, "prompt", "last_prompt"


def sum_up(
    scores: npt.NDArray[np.float32], monitor: Monitor, *, prompt_length: int
) -> float:
    """Return what a monitor makes of the scores of a whole request.

    The largest mean over `window` consecutive positions of its stage, shorter windows
    at their beginning included; with a `drift` the largest sum S_t = max(0, S_(t-1) +
    score_t - drift), which begins at 0 (Page, "Continuous inspection schemes", 1954).
    Infinite where a score is not finite; -inf where no position is of that stage.

    Args:
        scores: Of every position that is scored, in order, `[num_tokens]`.
        monitor: Says which positions count, and how they are put together.
        prompt_length: How many of them belong to the prompt.
    """
    rows = stage_rows(
        monitor.stage, first=0, count=len(scores), prompt_length=prompt_length
    )
    running = _Running(0, window=monitor.window, drift=monitor.drift)
    return float(running.smooth(scores[rows]).max(initial=-math.inf))


@dataclass(frozen=True, slots=True)
class Reading:
    """A monitor's number for one request so far, with its threshold."""

    monitor: str
    score: float
    """Largest score so far; infinite if any was not finite."""
    threshold: float
    position: int | None
    """Token position of the first alarm, else of the largest score."""
    stage: Literal["prompt", "output"]
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
    """Return score over threshold: above 1 if and only if the score is an alarm.

    Where a threshold is below 0 it is as far from it as from one above: `1 + (score -
    threshold) / |threshold|` is the same where both exist.
    """
    if math.isinf(score):
        return score
    if threshold:
        return score / threshold if threshold > 0 else 2 - score / threshold
    return math.inf if score > 0 else float(score == 0)


class _Running:
    """What one monitor has seen of one request so far."""

    __slots__ = (
        "alarm_position",
        "blocks",
        "column",
        "drift",
        "maximum",
        "position",
        "recent",
        "stage",
        "threshold",
        "total",
        "window",
    )

    def __init__(
        self,
        column: int,
        *,
        stage: Stage | None = None,
        window: int = 1,
        drift: float | None = None,
        threshold: float = math.inf,
        blocks: bool = False,
    ) -> None:
        self.column = column
        self.stage = stage
        self.window = window
        self.drift = drift
        # As numpy compares it with a column of fp32, and so for single tokens too.
        self.threshold = float(np.float32(threshold))
        self.blocks = blocks
        self.maximum = -math.inf
        self.position: int | None = None
        self.alarm_position: int | None = None
        self.recent: deque[float] = deque(maxlen=window - 1)
        """The scores before the next one that share a window with it."""
        self.total = 0.0
        """With a drift, the sum of what exceeded it; never below 0."""

    def smooth(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return what is held against the threshold at each of consecutive positions.

        The mean of the window that ends there; with a drift, the sum up to there.
        """
        known = scores.copy()
        known[~np.isfinite(scores) | (scores == EXEMPT)] = np.inf
        if self.drift is not None:
            totals = accumulate(known.tolist(), self._add, initial=self.total)
            return np.array(list(totals)[1:], dtype=np.float32)
        if self.window == 1:
            return known
        before = np.array(self.recent, dtype=np.float64)
        padded = np.concatenate(
            [np.zeros(self.window - 1 - len(before)), before, known]
        )
        total = np.zeros(len(known))
        # One addend after the other, as for a single token: the same to the last bit.
        for shift in range(self.window):
            total += padded[shift : shift + len(known)]
        counts = len(before) + 1 + np.arange(len(known))
        # Rounded here, so that two means tie or not however they were computed.
        return (total / np.minimum(counts, self.window)).astype(np.float32)

    def _add(self, total: float, score: float) -> float:
        """Return the sum after one more score, as fp32 holds it."""
        total = max(0.0, total + score - (self.drift or 0.0))
        return float(np.float32(total)) if total < -EXEMPT else math.inf

    def is_over(self, numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Whether each mean or sum is an alarm; one that is not finite always is."""
        return (numbers > self.threshold) | np.isinf(numbers)

    def observe(self, scores: npt.NDArray[np.float32], first: int) -> None:
        """Take in the column's scores of consecutive positions of its stage."""
        numbers = self.smooth(scores)
        if not len(numbers):
            return
        over = self.is_over(numbers)
        if self.alarm_position is None and over.any():
            self.alarm_position = first + int(over.argmax())
        largest = int(numbers.argmax())
        if numbers[largest] > self.maximum:
            self.maximum = float(numbers[largest])
            self.position = first + largest
        if self.drift is not None:
            self.total = float(numbers[-1])
        self.recent.extend(scores[1 - self.window or len(scores) :].tolist())

    def observe_token(self, score: float, position: int) -> None:
        """Do the same for one position: a decoding step has nothing else."""
        known = score if EXEMPT < score < math.inf else math.inf
        if self.window > 1:
            total = 0.0
            for recent in self.recent:
                total += recent
            count = len(self.recent) + 1
            self.recent.append(known)
            known = float(np.float32((total + known) / count))
        elif self.drift is not None:
            known = self.total = self._add(self.total, known)
        if known > self.maximum:
            self.maximum, self.position = known, position
        if self.alarm_position is None and (
            known > self.threshold or known == math.inf
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
                stage=monitor.stage,
                window=monitor.window,
                drift=monitor.drift,
                threshold=threshold,
                blocks=enforces and monitor.on_alarm == "block",
            )
            for monitor, column, threshold in zip(
                policy.monitors, columns, thresholds, strict=True
            )
        ]
        self._seen = {
            name: _Running(column) for name, column in (seen_columns or {}).items()
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
        position = self.tokens_seen
        stages = _stages_of(position, self._prompt_length)
        for running in self._all:
            score = scores[running.column]
            if running.stage in stages and (position or score != EXEMPT):
                running.observe_token(score, position)
        self.tokens_seen += 1
        for rule in range(len(self.clamped_tokens)) if clamped else ():
            self.clamped_tokens[rule] += clamped >> rule & 1

    def _observe_rows(
        self,
        scores: npt.NDArray[np.float32],
        clamped: npt.NDArray[np.int32],
        first: int,
    ) -> None:
        rows = self._rows_until_block(scores, first)
        scores, clamped = scores[:rows], clamped[:rows]
        for running in self._all:
            share = self._share(running, scores, first)
            running.observe(scores[share, running.column], first + share.start)
        self.tokens_seen = first + rows
        for rule in range(len(self.clamped_tokens)):
            self.clamped_tokens[rule] += int((clamped >> rule & 1).sum())

    def _rows_until_block(self, scores: npt.NDArray[np.float32], first: int) -> int:
        """Return how many rows there are up to and with the first that blocks."""
        rows = len(scores)
        for running in self._running:
            if running.blocks:
                share = self._share(running, scores[:rows], first)
                over = running.is_over(running.smooth(scores[share, running.column]))
                if over.any():
                    rows = share.start + int(over.argmax()) + 1
        return rows

    def _share(
        self, running: _Running, scores: npt.NDArray[np.float32], first: int
    ) -> slice:
        """Return which rows from position `first` on a monitor judges."""
        rows = stage_rows(
            running.stage,
            first=first,
            count=len(scores),
            prompt_length=self._prompt_length,
        )
        exempt = int(first == 0 and scores[0, running.column] == EXEMPT)
        return slice(max(rows.start, exempt), max(rows.stop, exempt))

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
    def maxima(self) -> list[float]:
        """Largest score so far of each monitor; -inf where none was of its stage."""
        return [running.maximum for running in self._running]

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
