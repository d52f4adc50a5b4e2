"""What happens in the engine core: readings held against policies, blocks enforced.

Runs in the engine core process, around vLLM's own methods. It is the one place that
sees every token of every route before it leaves.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm_guard import compat, context, residue
from vllm_guard.admission import Watched
from vllm_guard.patch import wrap
from vllm_guard.readings import CARRIER_KEY, Progress, RequestReadings

__all__ = ["BLOCK_REASON", "install"]

logger = logging.getLogger(__name__)

BLOCK_REASON = "guard:block"
"""`stop_reason` of a request that the guard finished."""


def install() -> None:
    """Wrap the engine core where tokens leave.

    vLLM has no plugin seam in the engine core. `update_from_output` is the first moment
    at which sampled tokens and the worker's readings meet. Remove when vLLM lets a
    plugin veto tokens.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    wrap(EngineCore, "__init__", _init)
    wrap(EngineCore, "collective_rpc", _collective_rpc)
    wrap(Scheduler, "update_from_output", _update_from_output)
    residue.install()


def _init(
    original: Callable[..., None], core: Any, config: Any, *args: Any, **kwargs: Any
) -> None:
    with context.reporting():
        compat.check_engine(config)
    original(core, config, *args, **kwargs)


def _collective_rpc(
    original: Callable[..., list[Any]],
    core: Any,
    method: Any,
    *args: Any,
    **kwargs: Any,
) -> list[Any]:
    """Add the engine core's own word to what its workers say of themselves."""
    answers = original(core, method, *args, **kwargs)
    if method == "guard_status":
        own = {
            "role": "engine_core",
            "fingerprint": context.get().current.fingerprint,
            "generation": context.get().current.number,
            "world_size": core.vllm_config.parallel_config.world_size,
            "requests": len(core.scheduler.requests),
        }
        answers = [*answers, own]
    return answers


def _update_from_output(
    original: Callable[..., Any],
    scheduler: Any,
    scheduler_output: Any,
    model_runner_output: Any,
) -> Any:
    """Take in the readings of a step, and let no token past an alarm."""
    sent: Mapping[str, RequestReadings] = getattr(model_runner_output, "guard", {})
    readings = _match(sent, scheduler_output)
    requests = {
        request_id: request
        for request_id in scheduler_output.num_scheduled_tokens
        if (request := scheduler.requests.get(request_id)) is not None
        and not request.is_finished()
    }
    _count_step(scheduler, scheduler_output, readings)
    seconds = getattr(model_runner_output, "guard_seconds", [])
    context.get().hook_seconds.extend(seconds)
    for request_id, request in requests.items():
        reading = readings[request_id]
        if not _observe(request, reading, scheduler_output, model_runner_output):
            # Nobody else may stand on what was computed without the guard.
            cache = scheduler.kv_cache_manager
            blocks = {i for ids in cache.get_block_ids(request_id) for i in ids}
            cache.evict_blocks(blocks)
            if reading is not None and reading.broken:
                residue.leave(cache.block_pool, blocks)
    holders = _list_holders(scheduler)
    outputs = original(scheduler, scheduler_output, model_runner_output)
    _finish_blocked(scheduler, requests.values(), outputs)
    for client_outputs in outputs.values():
        for output in client_outputs.outputs:
            request = requests.get(output.request_id)
            if request is not None:
                _tell(output, request.guard)
    if holders:
        _hold_back(outputs, holders)
    _report(outputs)
    return outputs


def _match(
    sent: Mapping[str, RequestReadings], scheduler_output: Any
) -> dict[str, RequestReadings | None]:
    """Return each request's readings of this step; those of another step are none.

    A reading that came late would vouch for tokens that nobody looked at.
    """
    cached = scheduler_output.scheduled_cached_reqs
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for new in scheduler_output.scheduled_new_reqs:
        starts[new.req_id] = new.num_computed_tokens
    found: dict[str, RequestReadings | None] = {}
    for name, num_rows in scheduler_output.num_scheduled_tokens.items():
        reading = sent.get(name)
        if reading is not None:
            end = reading.first + len(reading.scores)
            reading = reading if end == starts[name] + num_rows else None
        found[name] = reading
    return found


def _count_step(
    scheduler: Any,
    scheduler_output: Any,
    readings: Mapping[str, RequestReadings | None],
) -> None:
    """Count the rows that passed every hook, by phase, and those that did not."""
    counted = context.get().uncounted
    for request_id, num_rows in scheduler_output.num_scheduled_tokens.items():
        reading = readings[request_id]
        if reading is None:
            counted["unguarded"] += num_rows
            continue
        request = scheduler.requests.get(request_id)
        prompt_length = num_rows if request is None else request.num_prompt_tokens
        first = reading.first + len(reading.scores) - num_rows
        prefill = min(max(prompt_length - first, 0), reading.guarded)
        counted["prefill"] += prefill
        counted["decode"] += reading.guarded - prefill
        counted["unguarded"] += num_rows - reading.guarded
        counted["not_finite"] += reading.broken


def _observe(
    request: Any,
    readings: RequestReadings | None,
    scheduler_output: Any,
    model_runner_output: Any,
) -> bool:
    """Hold a request's rows of this step against its policy; cut what may not leave.

    Returns:
        Whether no reading was missing, and all of it was finite.
    """
    name, watched = request.request_id, request.guard
    num_rows = scheduler_output.num_scheduled_tokens[name]
    index = model_runner_output.req_id_to_index[name]
    sampled = model_runner_output.sampled_token_ids
    tokens = list(sampled[index]) if sampled else []
    drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(name, ()))
    rejected = 0
    if tokens and drafts:
        rejected = max(drafts + 1 - _count_until_end(request, tokens), 0)
    is_whole = _take_in(watched, readings, num_rows, rejected=rejected)
    if not watched.is_blocked:
        return is_whole
    # Row r of the step's own rows samples token r - (num_rows - 1 - drafts).
    position = watched.watch.block_position
    kept = 0
    if position is not None and watched.fault is None and readings is not None:
        first_sampling = readings.first + len(readings.scores) - 1 - drafts
        kept = max(position - first_sampling, 0)
    if sampled:
        sampled[index] = tokens[:kept]
    model_runner_output.prompt_logprobs_dict.pop(name, None)
    model_runner_output.prompt_token_id_logprobs_dict.pop(name, None)
    return is_whole


def _take_in(
    watched: Watched, readings: RequestReadings | None, num_rows: int, *, rejected: int
) -> bool:
    """Let a request's watch see its readings; return whether all is well with them."""
    watch = watched.watch
    if readings is None or readings.guarded < num_rows:
        if watched.fault is None:  # once a request: there may be thousands of steps
            logger.error("A token passed the model without its hooks.")
        watched.fault = "unguarded"
        if not watched.is_blocked:
            watch.skip(num_rows - rejected)
        return False
    gap = max(readings.first - watch.tokens_seen, 0)
    if gap:
        if watched.fault is None:
            logger.error("A token was found in the cache without its scores.")
        if not watched.is_blocked:
            watched.fault = "unscored"
        context.get().uncounted["unscored"] += gap
        watch.skip(gap)
    accepted = len(readings.scores) - rejected
    scores, clamped = readings.scores[:accepted], readings.clamped[:accepted]
    watch.observe(readings.first, scores, clamped)
    if readings.broken:
        if watched.fault is None:
            logger.error("The model computed what is not finite.")
        watched.fault = watched.fault or "not_finite"
    return not gap and not readings.broken


def _count_until_end(request: Any, tokens: list[int]) -> int:
    """Count sampled tokens up to the one with which vLLM ends the request.

    Drafts may run past it: nobody receives those tokens, so no verdict covers them.
    """
    params = request.sampling_params
    ends = {params.eos_token_id, *(params.stop_token_ids or ())}
    room = request.max_tokens - request.num_output_tokens
    for count, token in enumerate(tokens[:room], 1):
        if token in ends:
            return count
    return min(len(tokens), room)


def _finish_blocked(
    scheduler: Any, requests: Iterable[Any], outputs: dict[int, Any]
) -> None:
    """End blocked requests that vLLM would go on with, and say so to their clients."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.request import RequestStatus

    blocked = [r for r in requests if r.guard.is_blocked]
    if not blocked:
        return
    running = {r.request_id for r in blocked if not r.is_finished()}
    # Not STOPPED: that would let the detokenizer drop the last token it may deliver.
    scheduler.finish_requests(running, RequestStatus.FINISHED_LENGTH_CAPPED)
    said = {
        output.request_id: output
        for client_outputs in outputs.values()
        for output in client_outputs.outputs
    }
    for request in blocked:
        output = said.get(request.request_id)
        if output is None:
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            share = outputs.setdefault(request.client_index, EngineCoreOutputs())
            share.outputs = [*share.outputs, output]
        if output.finish_reason is None:
            output.finish_reason = FinishReason.LENGTH
            output.stop_reason = BLOCK_REASON


def _list_holders(scheduler: Any) -> dict[str, Watched]:
    """Return whose outputs may be held, by request id.

    All requests: an error of vLLM's may end one that is not part of the step.
    """
    return {
        request_id: request.guard
        for request_id, request in scheduler.requests.items()
        if request.guard.held is not None
    }


def _hold_back(outputs: Mapping[int, Any], holders: Mapping[str, Watched]) -> None:
    """Put what may leave now in the place of what was made now."""
    for client_outputs in outputs.values():
        leaving = []
        for output in client_outputs.outputs:
            watched = holders.get(output.request_id)
            if watched is None or watched.held is None:
                leaving.append(output)
            else:
                leaving += watched.held.take(output, is_blocked=watched.is_blocked)
        client_outputs.outputs = leaving


def _tell(output: Any, watched: Watched) -> None:
    """Let an output carry the verdict on its request so far."""
    progress = Progress(
        verdict=watched.tell(),
        ratios=watched.watch.ratios,
        maxima=watched.watch.maxima,
        total_length=watched.total_length,
        observed=watched.watch.observed,
        counted={},
        hook_seconds=[],
    )
    output.kv_transfer_params = {
        **(output.kv_transfer_params or {}),
        CARRIER_KEY: progress._asdict(),
    }


def _report(outputs: Mapping[int, Any]) -> None:
    """Let the first output that leaves carry what was not yet counted.

    No earlier: one that is held may never leave.
    """
    state = context.get()
    for client_outputs in outputs.values():
        for output in client_outputs.outputs:
            told = (output.kv_transfer_params or {}).get(CARRIER_KEY)
            if told is not None:
                told["counted"] = dict(state.uncounted)
                told["hook_seconds"] = list(state.hook_seconds)
                state.uncounted.clear()
                state.hook_seconds.clear()
                return
