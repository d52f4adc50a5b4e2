"""Columns of scores: one number per token and monitor, computed beside the clamp.

Runs in the worker, inside the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from guard.policy import Monitor as MonitorRule
from guard.policy import PolicyFile
from guard.score import SCORES, Activations, Score, Statistics

__all__ = ["EXEMPT", "Column", "Monitor", "column_of", "list_columns"]


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


class Monitor(nn.Module):
    """Scores that look at the same activations, with their statistics as buffers."""

    def __init__(
        self, columns: Sequence[tuple[int, Column]], statistics: Sequence[Statistics]
    ) -> None:
        """Keep the statistics of the given columns.

        Args:
            columns: Scored columns, with their numbers.
            statistics: Of each.
        """
        super().__init__()
        self._scores: list[tuple[int, Score, list[str]]] = []
        for (number, column), values in zip(columns, statistics, strict=True):
            for name, value in values.items():
                self.register_buffer(f"{number}_{name}", value, persistent=False)
            self._scores.append((number, SCORES[column.score], list(values)))

    def __len__(self) -> int:
        """Return how many columns it fills."""
        return len(self._scores)

    def forward(self, activations: Activations, *, out: Tensor, keep: Tensor) -> None:
        """Write each score into its column of `out`.

        Args:
            activations: The stream after the clamp, and what the scores need besides.
            out: `[num_tokens, num_columns]`.
            keep: Rows that are scored, bool `[num_tokens]`; the others read `EXEMPT`.
        """
        for number, score, names in self._scores:
            statistics = {name: getattr(self, f"{number}_{name}") for name in names}
            scores = score.apply(activations, statistics)
            out[:, number] = torch.where(keep, scores, EXEMPT)
