"""Verdicts taken from the engine's outputs, before any of them is text.

Runs wherever outputs are processed: in each API server, or in the process of an
offline `LLM`.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from guard.errors import RequestError
from vllm_guard import context
from vllm_guard.admission import begin_verdict
from vllm_guard.engine import BLOCK_REASON
from vllm_guard.patch import wrap
from vllm_guard.readings import CARRIER_KEY, Progress

__all__ = ["install"]

logger = logging.getLogger(__name__)


def install() -> None:
    """Wrap the processing of outputs, the last stop before text exists.

    `stat_logger` plugins get no data of a plugin's own, and the serving classes only
    see merged outputs. Remove when vLLM hands engine outputs to plugins.
    """
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    wrap(OutputProcessor, "add_request", _add_request)
    wrap(OutputProcessor, "process_outputs", _process_outputs)
    wrap(OutputProcessor, "abort_requests", _abort_requests)
    wrap(OutputProcessor, "propagate_error", _propagate_error)
    wrap(RequestState, "_new_completion_output", _new_completion_output)


def _add_request(
    original: Callable[..., None],
    processor: Any,
    request: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Know under which policy a request begins, should its client leave at once.

    The engine core refuses what a policy refuses too, but as a failure of the server:
    here vLLM still tells a client, or the caller of `LLM.generate`, what is wrong.
    """
    try:
        begun = begin_verdict(request.sampling_params)
    except RequestError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(error.message, parameter=error.param) from error
    original(processor, request, *args, **kwargs)
    state = processor.request_states.get(request.request_id)
    if state is not None:
        context.get_board().begin(state, begun)


def _process_outputs(
    original: Callable[..., Any],
    processor: Any,
    outputs: list[Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    first, *others = _cut_up(outputs)
    result = _process_piece(original, processor, first, *args, **kwargs)
    for piece in others:
        more = _process_piece(original, processor, piece, *args, **kwargs)
        result.request_outputs.extend(more.request_outputs)
        result.reqs_to_abort.extend(more.reqs_to_abort)
    return result


def _cut_up(outputs: list[Any]) -> list[list[Any]]:
    """Return outputs in pieces in which no request has two.

    Held outputs leave together at the end of a request. A stop string may lie in the
    first of them, and then its verdict is the last.
    """
    if len({output.request_id for output in outputs}) == len(outputs):
        return [outputs]
    pieces: list[list[Any]] = [[]]
    names: set[str] = set()
    for output in outputs:
        if output.request_id in names:
            pieces.append([])
            names.clear()
        pieces[-1].append(output)
        names.add(output.request_id)
    return pieces


def _process_piece(
    original: Callable[..., Any],
    processor: Any,
    outputs: list[Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Take the verdicts off outputs, one of each request, and let vLLM go on."""
    board = context.get_board()
    present = {}
    refused: list[str] = []
    for output in outputs:
        progress = _detach(output)
        request = processor.request_states.get(output.request_id)
        if progress is not None:
            board.count(progress.counted)
            for seconds in progress.hook_seconds:
                board.metrics.observe_hook(seconds)
        if request is None:
            continue
        present[output.request_id] = request
        if progress is not None and _covers(progress, request, output):
            board.take(request, progress)
        elif output.new_token_ids or output.finish_reason is None:
            _refuse(output)
            refused.append(output.request_id)
            board.metrics.count_error("engine")
        if output.stop_reason == BLOCK_REASON:
            _fill_prompt_logprobs(request)
    failed = [o.request_id for o in outputs if _has_failed(o)]
    result = original(processor, outputs, *args, **kwargs)
    # The engine core knows nothing of it, and would go on.
    result.reqs_to_abort.extend(refused)
    for request_id, request in present.items():
        if request_id not in processor.request_states:
            board.finish(request, cut_short=request_id in failed)
    return result


def _covers(progress: Progress, request: Any, output: Any) -> bool:
    """Whether a verdict is as far as the tokens that it comes with.

    Each but the last token of a request was a row that somebody looked at.
    """
    if not output.new_token_ids:
        return True
    delivered = request.detokenizer.num_output_tokens() + len(output.new_token_ids)
    seen: int = progress.verdict["tokens_seen"]
    return seen >= request.prompt_len + delivered - 1


def _detach(output: Any) -> Progress | None:
    """Take the guard's part off an output; a real KV connector's part stays."""
    carried = output.kv_transfer_params
    if not carried or CARRIER_KEY not in carried:
        return None
    progress = Progress(**carried.pop(CARRIER_KEY))
    output.kv_transfer_params = carried or None
    return progress


def _refuse(output: Any) -> None:
    """End a request whose tokens nobody vouches for, before any of them is text."""
    from vllm.v1.engine import FinishReason

    logger.error("Tokens came without a verdict on them; the request fails.")
    output.new_token_ids = []
    output.new_logprobs = None
    output.new_prompt_logprobs_tensors = None
    output.finish_reason = FinishReason.ERROR


def _has_failed(output: Any) -> bool:
    """Whether a request ends here although neither model nor guard ended it."""
    from vllm.v1.engine import FinishReason

    return output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)


def _fill_prompt_logprobs(request: Any) -> None:
    """Say "none" for each prompt token whose logprob a block held back.

    Where a client asks for `echo`, vLLM expects one entry per token.
    """
    processor = request.logprobs_processor
    known = processor.prompt_logprobs if processor is not None else None
    if known:  # otherwise not asked for, or already sent
        for _ in range(len(known), request.prompt_len):
            known.append(None)


def _abort_requests(
    original: Callable[..., list[str]],
    processor: Any,
    request_ids: Iterable[str],
    *args: Any,
    **kwargs: Any,
) -> list[str]:
    before = dict(processor.request_states)
    aborted = original(processor, request_ids, *args, **kwargs)
    for request_id in aborted:
        if request_id in before:
            context.get_board().finish(before[request_id], cut_short=True)
    return aborted


def _propagate_error(
    original: Callable[..., None], processor: Any, error: Exception
) -> None:
    """Count the end of an engine; vLLM tells it to every request in flight."""
    context.get_board().metrics.count_error("engine")
    original(processor, error)


def _new_completion_output(
    original: Callable[..., Any],
    request: Any,
    token_ids: list[int],
    finish_reason: Any,
    stop_reason: Any,
) -> Any:
    """Name a block as OpenAI does, and let an offline caller read the verdict."""
    completion = original(request, token_ids, finish_reason, stop_reason)
    if stop_reason == BLOCK_REASON:
        completion.finish_reason = "content_filter"
    known = getattr(request, "guard_progress", None)
    completion.guard = known[0].to_json() if known is not None else None
    return completion
