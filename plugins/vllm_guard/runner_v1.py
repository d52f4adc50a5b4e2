"""The V1 model runner: its rows are known once `_prepare_inputs` has returned.

One step earlier, in `execute_model`, the batch is still the one of the step before.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from guard.errors import EngineError
from vllm_guard import context, ops, ranks, residue
from vllm_guard.patch import wrap
from vllm_guard.readings import attach
from vllm_guard.rows import (
    StepRequest,
    StepRows,
    drill_of,
    slot_of,
    slots_of_positions,
)

__all__ = ["install", "list_requests"]


def install() -> None:
    """Wrap what the runner does before and after its forward pass.

    vLLM tells no plugin whose tokens a step's rows are. Remove when forward contexts
    carry request ids.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_update_states", _update_states)
    wrap(GPUModelRunner, "_prepare_inputs", _prepare_inputs)
    wrap(GPUModelRunner, "initialize_kv_cache", initialize_kv_cache)
    wrap(GPUModelRunner, "sample_tokens", sample_tokens)
    wrap(GPUModelRunner, "_dummy_run", dummy_run)


def _update_states(
    original: Callable[..., Any], runner: Any, scheduler_output: Any
) -> Any:
    """Free the places of those who left; a step without tokens says so too.

    A hybrid model's partial prefix hits are copied to blocks of their own.
    """
    rows = context.get().rows
    residue.prepare(runner, scheduler_output)
    if rows is not None:
        rows.release(scheduler_output.finished_req_ids)
        rows.release(scheduler_output.preempted_req_ids or ())
        table = runner.input_batch.block_table.block_tables[rows.kv_group]
        rows.copy_blocks(scheduler_output.kv_cache_block_copies or (), table.block_size)
    return original(runner, scheduler_output)


def _prepare_inputs(
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    num_scheduled_tokens: npt.NDArray[np.int32],
) -> Any:
    result = original(runner, scheduler_output, num_scheduled_tokens)
    rows = context.get().rows
    if rows is not None:
        table = runner.input_batch.block_table.block_tables[rows.kv_group]
        num_tokens = int(num_scheduled_tokens.sum())
        rows.begin(
            list_requests(runner, scheduler_output, num_scheduled_tokens, rows),
            kv_slots=table.slot_mapping.gpu[:num_tokens],
        )
    return result


def list_requests(
    runner: Any,
    scheduler_output: Any,
    num_scheduled_tokens: npt.NDArray[np.int32],
    rows: StepRows,
) -> list[StepRequest]:
    """Read whose rows the coming step has, in their order."""
    batch = runner.input_batch
    table = batch.block_table.block_tables[rows.kv_group]
    admitted = {data.req_id for data in scheduler_output.scheduled_new_reqs}
    admitted |= set(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
    bos = runner.model_config.hf_text_config.bos_token_id
    requests = []
    for index, request_id in enumerate(batch.req_ids):
        first = int(batch.num_computed_tokens_cpu[index])
        is_admitted = request_id in admitted
        prefix = None
        if first > 0 and (is_admitted or rows.rewinds(request_id, first)):
            blocks = table.block_table.np[index].astype(np.int64)
            prefix = slots_of_positions(blocks, np.arange(first), table.block_size)
        params = runner.requests[request_id].sampling_params
        requests.append(
            StepRequest(
                id=request_id,
                slot=slot_of(params, rows.default_slot),
                first=first,
                num_rows=int(num_scheduled_tokens[index]),
                starts_with_bos=(
                    # A prompt of embeddings has no tokens; old ones may lie there.
                    bool(batch.is_token_ids[index, 0])
                    and int(batch.token_ids_cpu[index, 0]) == bos
                ),
                admitted=is_admitted,
                num_prompt_tokens=int(batch.num_prompt_tokens[index]),
                drill=drill_of(params),
                prefix_slots=prefix,
            )
        )
    return requests


def initialize_kv_cache(
    original: Callable[..., Any], runner: Any, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Allocate the readings that are kept beside the KV cache, once it is sized."""
    result = original(runner, config, *args, **kwargs)
    rows = context.get().rows
    if rows is not None and config.kv_cache_groups:
        with context.reporting():
            rows.kv_group = find_kv_group(config)
        block_size = config.kv_cache_groups[rows.kv_group].kv_cache_spec.block_size
        rows.allocate_column(config.num_blocks * block_size)
    return result


def find_kv_group(config: Any) -> int:
    """Return the first group of KV blocks that keeps every position of a request.

    A sliding window gives blocks back, and a prefix found in the cache has none there:
    its readings would be those of nobody.

    Raises:
        EngineError: There is no such group.
    """
    from vllm.v1.kv_cache_interface import KVCacheSpecKind as Kind
    from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind

    whole = Kind.FULL_ATTENTION, Kind.MLA_ATTENTION, Kind.SINK_FULL_ATTENTION
    kinds = [get_kv_cache_spec_kind(g.kv_cache_spec) for g in config.kv_cache_groups]
    for index, kind in enumerate(kinds):
        if kind in whole:
            return index
    message = (
        f"The KV cache of this model keeps {', '.join(kinds)} only; expected full "
        "attention somewhere, beside which readings can be kept."
    )
    raise EngineError(message)


def dummy_run(
    original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any
) -> Any:
    """Leave no row to anybody in a pass that no request is part of."""
    rows = context.get().rows
    if rows is not None:
        rows.clear()
    return original(runner, *args, **kwargs)


def sample_tokens(
    original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any
) -> Any:
    """Send the step's readings along with its tokens."""
    state, rows = runner.execute_model_state, context.get().rows
    if state is None or rows is None:
        return original(runner, *args, **kwargs)
    if state.hidden_states is not None:  # as V2 has it in a pipeline, but for its end
        # Before drafts are made, which may take the memory it lies in.
        rows.mark_broken(state.hidden_states)
    output = original(runner, *args, **kwargs)
    ranks.agree(rows)
    if (recorder := context.get().recorder) is not None:
        recorder.close_step(rows.requests)
    attach(output, rows.finish(), ops.take_seconds())
    return output
