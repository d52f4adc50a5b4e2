"""What an adaptive attacker pays: how far an edit is above the guard's thresholds.

The scores, sums and thresholds are those of serving, with a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from guard.hook import HookPoint
from guard.probe import largest_sum
from guard.watch import stage_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from guard.policy import Monitor
    from guard.recording import Reader
    from guard.redteam.forward import Batch
    from guard.redteam.judge import Receiver

__all__ = ["Evasion", "Penalty", "peak"]


class Penalty(Protocol):
    """What an adaptive attacker pays to stay unseen, differentiable."""

    @property
    def layers(self) -> Sequence[int]:
        """Whose output it reads."""

    def __call__(
        self, found: Mapping[int, Tensor], batch: Batch, behind: Sequence[int]
    ) -> Tensor:
        """Return what each sample pays, `[batch]`; 0 where nobody would notice.

        Args:
            found: By layer, resid `[batch, length, d_model]` as the guard reads it.
            batch: Prompts, each with its answer up to the last token but one.
            behind: How many rows of each belong to the answer.
        """


class Evasion:
    """The excess of a policy's blocking monitors over their thresholds."""

    def __init__(
        self,
        reader: Reader,
        receiver: Receiver,
        *,
        max_tokens: int,
        margin: float = 0.1,
    ) -> None:
        """Prepare to read for the monitors that block.

        Args:
            reader: Of the policy.
            receiver: Knows the policy's thresholds.
            max_tokens: Longest answer that a request asks for.
            margin: How far below a threshold nothing is paid, in units of the spread.
        """
        self._reader, self._receiver = reader, receiver
        self._max_tokens, self._margin = max_tokens, margin
        self._monitors = [
            one for one in receiver.policy.monitors if one.on_alarm == "block"
        ]

    @property
    def layers(self) -> list[int]:
        """Whose output the monitors read."""
        places = dict.fromkeys(map(self._reader.hook_point, self._monitors))
        return [HookPoint.parse(at).layer for at in places]

    def __call__(
        self, found: Mapping[int, Tensor], batch: Batch, behind: Sequence[int]
    ) -> Tensor:
        """Return what each sequence pays, `[batch]`; 0 is below every threshold.

        Args:
            found: By layer, resid `[batch, length, d_model]`.
            batch: The sequences, ends aligned.
            behind: How many tokens of each belong to its answer.
        """
        rows = batch.rows
        resid = {str(HookPoint(n)): found[n][rows] for n in self.layers}
        scores = self._reader.score_rows(
            self._monitors, self._receiver.statistics, resid
        )
        counts = rows.sum(dim=1).tolist()
        # Rows are without the BOS, which counts as a token of the request.
        totals = [
            count + 1 - answered + self._max_tokens
            for count, answered in zip(counts, behind, strict=True)
        ]
        bars = [self._receiver.thresholds(total) for total in totals]
        units = [self._receiver.spread(total) for total in totals]
        paid = torch.zeros(len(counts))
        for monitor in self._monitors:
            name = monitor.name
            peaks = [
                peak(part, monitor, prompt_length=len(part) - answered)
                for part, answered in zip(
                    scores[name].split(counts), behind, strict=True
                )
            ]
            bar = torch.tensor([one[name] for one in bars])
            unit = torch.tensor([one[name] for one in units])
            paid = paid + ((torch.stack(peaks) - bar) / unit + self._margin).relu()
        return paid


def peak(scores: Tensor, monitor: Monitor, *, prompt_length: int) -> Tensor:
    """Return what a monitor makes of a request, as `sum_up` does, with a gradient.

    Args:
        scores: Of every row that is scored, in order, `[num_tokens]`.
        monitor: Says which rows count, and how they are added up.
        prompt_length: How many of them belong to the prompt.
    """
    rows = stage_rows(
        monitor.stage, first=0, count=len(scores), prompt_length=prompt_length
    )
    scores = scores[rows]
    if not len(scores):
        return scores.new_tensor(-torch.inf)
    if monitor.drift is not None:
        every = torch.ones(1, len(scores), dtype=torch.bool)
        return largest_sum(scores[None], every, monitor.drift)[0]
    if monitor.window > 1:
        sums = torch.cat([scores.new_zeros(1), scores.cumsum(0)])
        end = torch.arange(1, len(scores) + 1)
        start = (end - monitor.window).clamp(min=0)
        scores = (sums[end] - sums[start]) / (end - start)
    return scores.amax()
