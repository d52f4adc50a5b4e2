"""Which token row of a step belongs to which request, and under which policy.

Runs in the worker, on the host. This is the core; `runner_v1` and `runner_v2` are small
adapters to vLLM's two model runners, which know the rows at different moments.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guard.pipeline import StepBuffers
from guard.policy import MAX_RULES
from vllm_guard.readings import RequestReadings, StepReadings

__all__ = ["SLOT_KEY", "StepRequest", "StepRows", "slot_of", "slots_of_positions"]

SLOT_KEY = "guard_slot"
"""Key of the policy slot in `extra_args`, set by the engine core and by nobody else."""


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One request's share of a step."""

    id: str
    slot: int
    first: int
    """Position of its first token row; what lies before is computed or cached."""
    num_rows: int
    starts_with_bos: bool
    """Whether position 0 is a true BOS, which is neither edited nor scored."""
    admitted: bool
    """Whether it was not in the step before: new, or resumed after preemption."""
    prefix_slots: npt.NDArray[np.int64] | None = None
    """KV slots of the positions before `first`, where it was admitted with some, or
    lost some: rejected drafts leave nothing behind."""


class StepRows:
    """Fills the step's buffers before the forward pass, empties them after it.

    Raw readings of every token are kept beside its KV, under the same slot, so that
    they are valid exactly where the KV is: a prefix found in the cache brings its
    readings along, and no eviction, reuse or preemption needs any bookkeeping.
    """

    def __init__(self, step: StepBuffers, *, num_hooks: int, default_slot: int) -> None:
        """Serve the given buffers.

        Args:
            step: What the hooks read and write.
            num_hooks: Hooks every row must pass.
            default_slot: Slot of a request that names none.
        """
        self.step = step
        self.default_slot = default_slot
        self.kv_group = 0
        """Group of KV blocks beside which readings are kept; holds every position."""
        self._num_hooks = num_hooks
        self._requests: list[StepRequest] = []
        self._kv_slots: Tensor | None = None
        self._index: dict[str, int] = {}
        self._end: dict[str, int] = {}
        self._free = list(range(len(step.state) - 1, 0, -1))
        pinned = step.rows_in.is_cuda
        self._host = torch.zeros(
            step.rows_in.shape, dtype=step.rows_in.dtype, pin_memory=pinned
        )
        self._kept_scores: Tensor | None = None
        self._kept_marks: Tensor | None = None

    def allocate_column(self, num_kv_slots: int) -> None:
        """Allocate the readings that are kept beside `num_kv_slots` KV slots."""
        like = self.step
        self._kept_scores = like.scores.new_zeros(num_kv_slots, like.scores.shape[1])
        self._kept_marks = like.marks.new_zeros(num_kv_slots, 2)

    def begin(
        self,
        requests: Iterable[StepRequest],
        *,
        kv_slots: Tensor | None,
    ) -> None:
        """Write whose tokens the rows of the coming step are, in one copy.

        Args:
            requests: In the order of their rows.
            kv_slots: KV slot of each row, on the device, `[num_tokens]`.
        """
        self._requests = list(requests)
        self._kv_slots = kv_slots
        rows = self._host.numpy()
        row = 0
        for request in self._requests:
            index = self._claim(request)
            share = rows[row : row + request.num_rows]
            share[:] = request.slot, index, row
            if request.starts_with_bos and request.first == 0:
                share[0, 0] = 0
            row += request.num_rows
        # A dummy pass, between the steps of idle data-parallel ranks, leaves visits.
        self.step.marks[:row].zero_()
        self.step.rows_in[:row].copy_(self._host[:row], non_blocking=True)

    def _claim(self, request: StepRequest) -> int:
        """Return the request's place in the sticky state, fresh on admission."""
        index = self._index.get(request.id)
        if index is None:
            index = self._index[request.id] = self._free.pop()
        if request.admitted or self.rewinds(request.id, request.first):
            self.step.state[index].zero_()
            self._restore_sticky(request, index)
        self._end[request.id] = request.first + request.num_rows
        return index

    def rewinds(self, request_id: str, first: int) -> bool:
        """Whether a request goes on before its last row: drafts were rejected."""
        return first < self._end.get(request_id, 0)

    def _restore_sticky(self, request: StepRequest, index: int) -> None:
        if request.prefix_slots is None or self._kept_marks is None:
            return
        fired = self._kept_marks[self._on_device(request.prefix_slots), 1]
        bits = 1 << torch.arange(MAX_RULES, device=fired.device, dtype=torch.int32)
        met = (fired[:, None] & bits).ne(0).any(0)
        self.step.state[index] = met.to(self.step.state.dtype)

    def release(self, request_ids: Iterable[str]) -> None:
        """Free the places of requests that finished, or that were preempted.

        A request that comes back is admitted again, and its state restored.
        """
        for request_id in request_ids:
            index = self._index.pop(request_id, None)
            self._end.pop(request_id, None)
            if index is not None:
                self._free.append(index)

    def finish(self) -> StepReadings:
        """Return the step's readings and leave every row to nobody."""
        num_tokens = sum(request.num_rows for request in self._requests)
        scores, marks = self.step.scores[:num_tokens], self.step.marks[:num_tokens]
        if self._kv_slots is not None and self._kept_scores is not None:
            self._kept_scores[self._kv_slots] = scores
            self._kept_marks[self._kv_slots] = marks[:, :2]  # type: ignore[index]
        host_scores, host_marks = (
            scores.cpu().numpy().copy(),
            marks.cpu().numpy().copy(),
        )
        readings, row = {}, 0
        for request in self._requests:
            share = slice(row, row + request.num_rows)
            readings[request.id] = self._read(
                request, host_scores[share], host_marks[share]
            )
            row += request.num_rows
        self._forget(num_tokens)
        return readings

    def _read(
        self,
        request: StepRequest,
        scores: npt.NDArray[np.float32],
        marks: npt.NDArray[np.int32],
    ) -> RequestReadings:
        first, clamped = request.first, marks[:, 0]
        guarded = int((marks[:, 2] == self._num_hooks).sum())
        kept = request.prefix_slots if request.admitted else None
        if kept is not None and self._kept_scores is not None:
            # After the step: a neighbour may have computed this prefix within it.
            slots = self._on_device(kept)
            kept_marks = self._kept_marks[slots, 0]  # type: ignore[index]
            scores = np.concatenate([self._kept_scores[slots].cpu().numpy(), scores])
            clamped = np.concatenate([kept_marks.cpu().numpy(), clamped])
            first = 0
        return RequestReadings(first, scores, clamped, guarded)

    def _on_device(self, slots: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(slots).to(self.step.marks.device)

    def clear(self) -> None:
        """Leave every row to nobody, as a pass without requests must find it."""
        self._forget(0)
        self.step.clear()

    def _forget(self, num_tokens: int) -> None:
        self._requests = []
        self._kv_slots = None
        self.step.rows_in[:num_tokens].zero_()


def slot_of(params: Any, default: int) -> int:
    """Return the policy slot the engine core wrote into a request's sampling params."""
    slot = ((params and params.extra_args) or {}).get(SLOT_KEY, default)
    return slot if isinstance(slot, int) else default


def slots_of_positions(
    block_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], block_size: int
) -> npt.NDArray[np.int64]:
    """Return the KV slot of each position of a request that holds `block_ids`."""
    return block_ids[positions // block_size] * block_size + positions % block_size
