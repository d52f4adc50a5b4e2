"""Columns of scores: one number per token and monitor, computed beside the clamp.

Runs in the worker, inside the graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from guard.errors import PolicyError
from guard.policy import Monitor as MonitorRule
from guard.policy import PolicyFile
from guard.score import SCORES, Activations, Score, Statistics

__all__ = [
    "EXEMPT",
    "Column",
    "Monitor",
    "assign_columns",
    "column_of",
    "list_columns",
]


EXEMPT = float(np.finfo(np.float32).min)
"""Reads instead of a score on a row that is not scored: a true BOS at position 0."""


@dataclass(frozen=True, slots=True)
class Column:
    """One number per token row, as the worker computes and the engine core reads it."""

    hook_point: str
    """Where it is read."""
    score: str
    """A key of `SCORES`; `error_ratio` is only seen, and so is what has no entry."""
    sae: str | None = None
    """Name in the policy file of the SAE that the score needs."""
    calibration: str | None = None
    """Path of the calibration that holds its statistics."""
    entry: str | None = None
    """Under which name they stand there."""


def column_of(policy_file: PolicyFile, monitor: MonitorRule) -> Column:
    """Return the column that a monitor of a policy reads."""
    return Column(
        hook_point=policy_file.hook_point(monitor),
        score=monitor.score,
        sae=monitor.sae if SCORES[monitor.score].needs_sae else None,
        calibration=str(monitor.calibration),
        entry=monitor.name,
    )


def list_columns(policy_file: PolicyFile) -> tuple[Column, ...]:
    """Return the columns of a policy file, in the order of their numbers.

    Every process derives the same order from the same file. Each SAE that a monitor
    decodes also has two columns without a threshold, for the metrics people ask for.
    """
    columns: dict[Column, None] = {}
    for policy in policy_file.policies.values():
        for monitor in policy.monitors:
            column = column_of(policy_file, monitor)
            if column.sae is not None:
                for seen in ("error_ratio", "clamp_residual"):
                    columns.setdefault(Column(column.hook_point, seen, column.sae))
            columns.setdefault(column)
    return tuple(columns)


def assign_columns(
    reserved: Sequence[Column], policy_file: PolicyFile
) -> dict[Column, int]:
    """Return which of the columns that a server has each column of a file takes.

    A column goes where it already is; another calibration, or another monitor of the
    same score, takes the place of one that is gone.

    Args:
        reserved: Of the file the server started with (`list_columns`).
        policy_file: Another one, or the same.

    Raises:
        PolicyError: It needs a column that nobody computes.
    """
    wanted = list_columns(policy_file)
    found = {column: i for i, column in enumerate(reserved) if column in wanted}
    free = [i for i, column in enumerate(reserved) if column not in found]
    # What is only seen comes last: it has no name that anybody gave it.
    for column in sorted(wanted, key=lambda column: column.entry is None):
        if column in found:
            continue
        place = next((i for i in free if _kind(reserved[i]) == _kind(column)), None)
        if place is None:
            message = (
                f"a further score {column.score!r} at {column.hook_point} has no column"
            )
            raise PolicyError(message)
        free.remove(place)
        found[column] = place
    return found


def _kind(column: Column) -> tuple[str, str, str | None]:
    return column.hook_point, column.score, column.sae


class Monitor(nn.Module):
    """Scores that look at the same activations, with their statistics as buffers."""

    def __init__(
        self,
        columns: Sequence[tuple[int, Column]],
        statistics: Sequence[Statistics],
        *,
        banks: int = 1,
    ) -> None:
        """Keep the statistics of the given columns.

        Args:
            columns: Scored columns, with their numbers.
            statistics: Of each.
            banks: For how many generations of policies there is room.
        """
        super().__init__()
        self._scores: list[tuple[int, Score, list[str]]] = []
        for (number, column), values in zip(columns, statistics, strict=True):
            for name, value in values.items():
                several = torch.stack([value] * banks)
                self.register_buffer(f"{number}_{name}", several, persistent=False)
            self._scores.append((number, SCORES[column.score], list(values)))

    def write(self, statistics: Mapping[int, Statistics], *, bank: int) -> None:
        """Let a bank's rows be scored with other statistics.

        Args:
            statistics: By number of the column; those of other monitors are left out.
            bank: Of the generation of policies that they belong to.

        Raises:
            PolicyError: They are of another shape than those the server started with.
        """
        for number, _, names in self._scores:
            values = statistics.get(number, {})
            shapes = {name: value.shape for name, value in values.items()}
            places = {name: getattr(self, f"{number}_{name}")[bank] for name in names}
            if values and shapes != {k: place.shape for k, place in places.items()}:
                message = (
                    "a calibration whose statistics have another shape needs a restart"
                )
                raise PolicyError(message)
            for name, value in values.items():
                places[name].copy_(value)

    def __len__(self) -> int:
        """Return how many columns it fills."""
        return len(self._scores)

    def forward(
        self, activations: Activations, *, out: Tensor, keep: Mapping[int, Tensor]
    ) -> None:
        """Write each score into its column of `out`.

        Args:
            activations: The stream after the clamp, and what the scores need besides.
            out: `[num_tokens, num_columns]`.
            keep: Rows that are scored, bool `[num_tokens]`, by bank; the others read
                `EXEMPT`.
        """
        for number, score, names in self._scores:
            column: Tensor | float = EXEMPT
            for bank, rows in keep.items():
                statistics = {n: getattr(self, f"{number}_{n}")[bank] for n in names}
                scores = score.apply(activations, statistics)
                column = torch.where(rows, scores, column)
            out[:, number] = column
