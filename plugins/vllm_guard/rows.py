"""Which token row of a step belongs to which request, and under which policy.

Runs in the worker, on the host. This is the core; `runner_v1` and `runner_v2` are small
adapters to vLLM's two model runners, which know the rows at different moments.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guard.pipeline import Marks, StepBuffers
from guard.policy import MAX_RULES
from vllm_guard.readings import Span, StepReadings

__all__ = [
    "DRILL_KEY",
    "SLOT_KEY",
    "StepRequest",
    "StepRows",
    "drill_of",
    "slot_of",
    "slots_of_positions",
]

SLOT_KEY = "guard_slot"
"""Key of the policy slot in `extra_args`, set by the engine core and by nobody else."""
DRILL_KEY = "guard_drill"
"""Key of the number of a drill there, set alike."""
_FIRED = Marks._fields.index("fired") - len(Marks._fields)
_VISITS = Marks._fields.index("visits") - len(Marks._fields)
_BROKEN = Marks._fields.index("broken") - len(Marks._fields)


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
    num_prompt_tokens: int
    """Its prompt's, whatever of it was computed or generated so far."""
    drill: int = 0
    """Number of the drill that it is; 0 is none."""
    prefix_slots: npt.NDArray[np.int64] | None = None
    """KV slots of the positions before `first`, where it was admitted with some, or
    lost some: rejected drafts leave nothing behind."""


class StepRows:
    """Fills the step's buffers before the forward pass, empties them after it.

    Raw readings of every token are kept beside its KV, under the same slot, so that
    they are valid exactly where the KV is: a prefix found in the cache brings its
    readings along, and no eviction, reuse or preemption needs any bookkeeping.
    """

    def __init__(
        self,
        step: StepBuffers,
        *,
        num_hooks: int,
        default_slot: int,
        whole_prompt: Iterable[int] = (),
    ) -> None:
        """Serve the given buffers.

        Args:
            step: What the hooks read and write.
            num_hooks: Hooks every row must pass.
            default_slot: Slot of a request that names none.
            whole_prompt: Drills that go to every row of a prompt, not only to its last.
        """
        self.step = step
        self.default_slot = default_slot
        self.kv_group = 0
        """Group of KV blocks beside which readings are kept; holds every position."""
        self.num_hooks = num_hooks
        """Hooks every row must pass."""
        self.whole_prompt = set(whole_prompt)
        """Drills that go to every row of a prompt, not only to its last."""
        self._requests: list[StepRequest] = []
        self._kv_slots: Tensor | None = None
        self._index: dict[str, int] = {}
        self._end: dict[str, int] = {}
        self._free = list(range(len(step.state) - 1, 0, -1))
        pinned = step.rows_in.is_cuda
        self._host = torch.zeros(
            step.rows_in.shape, dtype=step.rows_in.dtype, pin_memory=pinned
        )
        self._kept: Tensor | None = None

    def allocate_column(self, num_kv_slots: int) -> None:
        """Allocate the readings that are kept beside `num_kv_slots` KV slots."""
        width = self.step.readings.shape[1]
        self._kept = self.step.readings.new_zeros(num_kv_slots, width)

    def copy_blocks(self, copies: Sequence[tuple[int, int]], block_size: int) -> None:
        """Take the readings along where vLLM copies KV blocks, as it does on a write.

        Args:
            copies: Block that is read and block that is written, of each copy.
            block_size: KV slots of a block.
        """
        if self._kept is None or not copies:
            return
        source, target = torch.tensor(copies, device=self._kept.device).T
        blocks = self._kept.unflatten(0, (-1, block_size))
        blocks[target] = blocks[source]

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
        self._requests = requests = list(requests)
        self._kv_slots = kv_slots
        indices = self._claim(requests)
        counts = np.array([request.num_rows for request in requests], dtype=np.int64)
        starts = counts.cumsum() - counts
        slots = [request.slot for request in requests]
        self.step.banks = tuple({self.step.bank_of(slot) for slot in slots}) or (0,)
        none = np.zeros_like(counts)
        whose = np.array([slots, indices, starts, none], dtype=np.int64).T
        num_rows, host = int(counts.sum()), self._host.numpy()
        host[:num_rows] = np.repeat(whose, counts, axis=0)
        for request, start in zip(requests, starts, strict=True):
            if request.starts_with_bos and request.first == 0:
                host[start, 0] = 0
            if request.drill:
                share = host[start : start + request.num_rows, 3]
                share[self._find_drilled(request)] = request.drill
        # A dummy pass, between the steps of idle data-parallel ranks, leaves visits.
        self.step.marks[:num_rows].zero_()
        self.step.rows_in[:num_rows].copy_(self._host[:num_rows], non_blocking=True)

    def _find_drilled(self, request: StepRequest) -> slice:
        """Return which of a request's rows in this step its drill is added to.

        Those of its prompt, or the last of them, wherever the step begins and however
        often it comes by; a BOS at position 0 is left alone, as it is by the clamp.
        """
        end = request.num_prompt_tokens
        begin = 0 if request.drill in self.whole_prompt else end - 1
        begin = max(begin, int(request.starts_with_bos))
        return slice(max(begin - request.first, 0), max(end - request.first, 0))

    def _claim(self, requests: Sequence[StepRequest]) -> list[int]:
        """Return each request's place in the sticky state, fresh on admission."""
        indices, fresh = [], []
        for request in requests:
            index = self._index.get(request.id)
            if index is None:
                index = self._index[request.id] = self._free.pop()
            if request.admitted or self.rewinds(request.id, request.first):
                fresh.append((request, index))
            self._end[request.id] = request.first + request.num_rows
            indices.append(index)
        if fresh:
            self._restore_sticky(fresh)
        return indices

    def rewinds(self, request_id: str, first: int) -> bool:
        """Whether a request goes on before its last row: drafts were rejected."""
        return first < self._end.get(request_id, 0)

    def _restore_sticky(self, fresh: Sequence[tuple[StepRequest, int]]) -> None:
        """Let those who begin anew remember what their cached prefix showed."""
        state = self.step.state
        indices = np.array([index for _, index in fresh], dtype=np.int64)
        state.index_fill_(0, self._on_device(indices), 0)
        prefixes = [(r.prefix_slots, i) for r, i in fresh if r.prefix_slots is not None]
        if not prefixes or self._kept is None:
            return
        slots = np.concatenate([slots for slots, _ in prefixes])
        owners = np.repeat([i for _, i in prefixes], [len(s) for s, _ in prefixes])
        fired = self._kept[self._on_device(slots), _FIRED]
        bits = 1 << torch.arange(MAX_RULES, device=fired.device, dtype=torch.int32)
        met = (fired[:, None] & bits).ne(0).to(state.dtype)
        owner = self._on_device(owners)[:, None].expand_as(met)
        state.scatter_reduce_(0, owner, met, "amax")

    def release(self, request_ids: Iterable[str]) -> None:
        """Free the places of requests that finished, or that were preempted.

        A request that comes back is admitted again, and its state restored.
        """
        for request_id in request_ids:
            index = self._index.pop(request_id, None)
            self._end.pop(request_id, None)
            if index is not None:
                self._free.append(index)

    @property
    def num_places(self) -> int:
        """Places taken; that of a request which is over, until the next step."""
        return len(self._index)

    @property
    def requests(self) -> Sequence[StepRequest]:
        """Whose rows the step has, in their order."""
        return self._requests

    @property
    def num_rows(self) -> int:
        """Rows of the step that belong to a request."""
        return sum(request.num_rows for request in self._requests)

    def mark_broken(self, hidden_states: Tensor) -> None:
        """Mark the rows that the model could not make sense of.

        What is not finite anywhere in a row's stream is so at its end; a sum tells it
        in one pass.

        Args:
            hidden_states: What the model returned, `[num_tokens, d_model]`, or more
                rows than the step has.
        """
        sums = hidden_states[: self.num_rows].sum(1, dtype=torch.float32)
        self.step.marks_of(self.num_rows).broken.copy_(~sums.isfinite())

    def finish(self) -> StepReadings:
        """Return the step's readings and leave every row to nobody."""
        num_rows = self.num_rows
        read = self.step.readings[:num_rows]
        if self._kv_slots is not None and self._kept is not None:
            self._kept[self._kv_slots] = read
        own = read.to("cpu", copy=True).numpy()
        prefixes = self._read_prefixes()
        spans, pieces, row, end = {}, [], 0, 0
        guarded = self._count(own[:, _VISITS] == self.num_hooks)
        broken = self._count(own[:, _BROKEN] != 0)
        for index, request in enumerate(self._requests):
            share = slice(row, row + request.num_rows)
            prefix = prefixes.get(request.id)
            if prefix is not None:
                pieces.append(prefix)
            pieces.append(own[share])
            length = request.num_rows + (0 if prefix is None else len(prefix))
            spans[request.id] = Span(
                first=request.first - (0 if prefix is None else len(prefix)),
                start=end,
                end=end + length,
                guarded=guarded[index],
                broken=broken[index],
            )
            row, end = share.stop, end + length
        self._forget(num_rows)
        return StepReadings(np.concatenate(pieces) if prefixes else own, spans)

    def _count(self, rows: npt.NDArray[np.bool_]) -> list[int]:
        """Return how many of some rows of the step are each request's."""
        if not rows.any():
            return [0] * len(self._requests)
        ends = np.cumsum([request.num_rows for request in self._requests])
        starts = [0, *ends[:-1]]
        counts: list[int] = np.add.reduceat(rows.astype(np.int64), starts).tolist()
        return counts

    def _read_prefixes(self) -> dict[str, npt.NDArray[np.int32]]:
        """Return the readings kept for the prefix of each request just admitted.

        After the step: a neighbour may have computed this prefix within it. What
        precedes a position that missed a hook, or is broken, is left out with it, so
        that the request stands on tokens whose scores are not known.
        """
        if self._kept is None:
            return {}
        found = {
            request.id: request.prefix_slots
            for request in self._requests
            if request.admitted and request.prefix_slots is not None
        }
        if not found:
            return {}
        slots = self._on_device(np.concatenate(list(found.values())))
        kept = self._kept[slots].cpu().numpy()
        ends = np.cumsum([len(slots) for slots in found.values()])
        prefixes = np.split(kept, ends[:-1])
        return {
            request_id: prefix[self._find_guarded_tail(prefix) :]
            for request_id, prefix in zip(found, prefixes, strict=True)
        }

    def _find_guarded_tail(self, prefix: npt.NDArray[np.int32]) -> int:
        """Return the first position from which on every row is whole."""
        missed = (prefix[:, _VISITS] != self.num_hooks) | (prefix[:, _BROKEN] != 0)
        found = np.flatnonzero(missed)
        return int(found[-1]) + 1 if len(found) else 0

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


def drill_of(params: Any) -> int:
    """Return the number of the drill that the engine core wrote there, 0 for none."""
    drill = ((params and params.extra_args) or {}).get(DRILL_KEY, 0)
    return drill if isinstance(drill, int) else 0


def slots_of_positions(
    block_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], block_size: int
) -> npt.NDArray[np.int64]:
    """Return the KV slot of each position of a request that holds `block_ids`."""
    return block_ids[positions // block_size] * block_size + positions % block_size
