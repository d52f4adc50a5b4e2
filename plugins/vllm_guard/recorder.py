"""Keeps what hooks see of whole requests, for whoever calibrates or trains a probe.

Runs in the worker of an offline engine that `guard calibrate` started for this alone;
a server never has one.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from guard.pipeline import Guard
from vllm_guard.rows import StepRequest

__all__ = ["Recorder"]


class Recorder:
    """The stream after the clamps, by request and hook point."""

    def __init__(self) -> None:
        self._step: dict[str, Tensor] = {}
        self._kept: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}

    def see(self, guard: Guard, resid: Tensor) -> None:
        """Keep the rows of a step at one hook point until `close_step`."""
        self._step[str(guard.hook_point)] = resid.to("cpu", copy=True)

    def close_step(self, requests: Iterable[StepRequest]) -> None:
        """Sort the rows of a step by request."""
        start = 0
        for request in requests:
            exempt = int(request.starts_with_bos and request.first == 0)
            own = slice(start + exempt, start + request.num_rows)
            kept = self._kept.setdefault(request.id, {})
            for at, resid in self._step.items():
                kept.setdefault(at, []).append((request.first + exempt, resid[own]))
            start += request.num_rows
        self._step.clear()

    def write(self, path: Path) -> None:
        """Write all requests to a safetensors file, `request/hook point`, and forget.

        A position that was computed twice, after preemption, is there once.
        """
        tensors = {}
        for request_id, kept in self._kept.items():
            for at, pieces in kept.items():
                first = min(position for position, _ in pieces)
                end = max(position + len(rows) for position, rows in pieces)
                whole = torch.empty(end - first, pieces[0][1].shape[1])
                for position, rows in pieces:
                    whole[position - first : position - first + len(rows)] = rows
                tensors[f"{request_id}/{at}"] = whole
        self._kept.clear()
        save_file(tensors, path)
