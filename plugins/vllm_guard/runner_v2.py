"""The V2 model runner: it drops sampling params early and resumes as a new request.

vLLM's CPU build cannot run it. On a GPU this adapter has passed with vLLM 0.26 alone
(benchmarks/gpu.py), so it is off until it has with one that is supported; a contract
test holds it against that one's source.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_guard import context, residue, runner_v1
from vllm_guard.patch import wrap
from vllm_guard.rows import (
    StepRequest,
    StepRows,
    drill_of,
    slot_of,
    slots_of_positions,
)

__all__ = ["install"]


@dataclass(slots=True)
class _Known:
    """What the runner forgets about a request after its admission."""

    slot: int
    starts_with_bos: bool
    num_prompt_tokens: int
    drill: int
    block_ids: list[int]
    admitted: bool = True


def install() -> None:
    """Wrap admission, input preparation and sampling, as for the V1 runner."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    wrap(GPUModelRunner, "add_requests", _add_requests)
    wrap(GPUModelRunner, "prepare_inputs", _prepare_inputs)
    wrap(GPUModelRunner, "initialize_kv_cache", runner_v1.initialize_kv_cache)
    wrap(GPUModelRunner, "sample_tokens", runner_v1.sample_tokens)
    wrap(GPUModelRunner, "_dummy_run", runner_v1.dummy_run)


def _add_requests(
    original: Callable[..., Any], runner: Any, scheduler_output: Any
) -> Any:
    rows = context.get().rows
    residue.prepare(runner, scheduler_output)
    if rows is not None:
        bos = runner.model_config.hf_text_config.bos_token_id
        # A step without tokens comes here too, though it prepares no inputs.
        rows.release(scheduler_output.finished_req_ids)
        rows.release(scheduler_output.preempted_req_ids or ())
        if not hasattr(runner, "guard_known"):
            runner.guard_known = {}
        _remember(runner.guard_known, scheduler_output, rows, bos)
        copies = scheduler_output.kv_cache_block_copies or ()
        rows.copy_blocks(copies, _block_size(runner, rows))
    return original(runner, scheduler_output)


def _remember(
    known: dict[str, _Known], scheduler_output: Any, rows: StepRows, bos: int | None
) -> None:
    for request_id in scheduler_output.finished_req_ids:
        known.pop(request_id, None)
    for data in scheduler_output.scheduled_new_reqs:
        known[data.req_id] = _Known(
            slot=slot_of(data.sampling_params, rows.default_slot),
            starts_with_bos=(
                data.prompt_embeds is None and data.prefill_token_ids[0] == bos
            ),
            # Of a resumed request too: its tokens so far are `prefill_token_ids`.
            num_prompt_tokens=data.prompt_len,
            drill=drill_of(data.sampling_params),
            block_ids=list(data.block_ids[rows.kv_group]),
        )
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, new_block_ids in zip(
        cached.req_ids, cached.new_block_ids, strict=True
    ):
        if new_block_ids is not None:
            known[request_id].block_ids += new_block_ids[rows.kv_group]


def _prepare_inputs(
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    batch = original(runner, scheduler_output, *args, **kwargs)
    rows = context.get().rows
    if rows is not None:
        requests, kv_slots = _list_requests(
            runner.guard_known, batch, _block_size(runner, rows), rows
        )
        rows.begin(
            requests,
            kv_slots=torch.from_numpy(kv_slots).to(runner.device),
        )
    return batch


def _block_size(runner: Any, rows: StepRows) -> int:
    group = runner.kv_cache_config.kv_cache_groups[rows.kv_group]
    return int(group.kv_cache_spec.block_size)


def _list_requests(
    known_requests: dict[str, _Known], batch: Any, block_size: int, rows: StepRows
) -> tuple[list[StepRequest], npt.NDArray[np.int64]]:
    """Read whose rows the step has, and their KV slots, from an `InputBatch`."""
    requests, kv_slots = [], []
    for index, request_id in enumerate(batch.req_ids):
        known = known_requests[request_id]
        first = int(batch.num_computed_tokens_np[index])
        num_rows = int(batch.num_scheduled_tokens[index])
        blocks = np.array(known.block_ids, dtype=np.int64)
        stands_on = known.admitted or rows.rewinds(request_id, first)
        begin = 0 if stands_on else first
        positions = np.arange(begin, first + num_rows)
        slots = slots_of_positions(blocks, positions, block_size)
        kv_slots.append(slots[first - begin :])
        requests.append(
            StepRequest(
                id=request_id,
                slot=known.slot,
                first=first,
                num_rows=num_rows,
                starts_with_bos=known.starts_with_bos,
                admitted=known.admitted,
                num_prompt_tokens=known.num_prompt_tokens,
                drill=known.drill,
                prefix_slots=slots[:first] if stands_on and first else None,
            )
        )
        known.admitted = False
    return requests, np.concatenate(kv_slots)
