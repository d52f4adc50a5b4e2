"""What happens in the engine core: tickets read, caches salted, blocks enforced.

Runs in the engine core process, around vLLM's own methods. It is the one place that
sees every request of every route, and every token before it leaves.
"""

import copy
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from guard.monitor import Column, Reading, Watch
from guard.policy import Policy
from guard.request import TICKET_KEY, Ticket, Trace, read_ticket
from guard.verdict import Verdict, decide, report
from vllm_guard import compat, context
from vllm_guard.patch import wrap
from vllm_guard.readings import CARRIER_KEY, Progress, RequestReadings, StepReadings
from vllm_guard.rows import SLOT_KEY

__all__ = ["BLOCK_REASON", "Watched", "admit", "install"]

logger = logging.getLogger(__name__)

BLOCK_REASON = "guard:block"
"""`stop_reason` of a request that the guard finished."""
_OWN_PREFIX = "guard_"
"""Keys of `extra_args` that only the guard may set."""


def install() -> None:
    """Wrap the engine core where requests enter and where tokens leave.

    vLLM has no plugin seam in the engine core. `preprocess_add_request` is the last
    moment before blocks are hashed, `update_from_output` the first at which sampled
    tokens and the worker's readings meet. Remove when vLLM lets a plugin veto tokens.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    wrap(EngineCore, "__init__", _init)
    wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    wrap(EngineCore, "collective_rpc", _collective_rpc)
    wrap(Scheduler, "update_from_output", _update_from_output)


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
        state = context.get()
        answers = [*answers, {"role": "engine_core", "fingerprint": state.fingerprint}]
    return answers


@dataclass(slots=True)
class Watched:
    """A request in the engine core, as the guard keeps it: `Request.guard`."""

    id: str
    """Guard id of the HTTP request, or of the ticket of an offline one."""
    name: str
    """Its policy."""
    watch: Watch
    trace: Trace
    """How much of its readings the client asked to see."""
    seen_columns: dict[str, int]
    """Columns without a threshold that the metrics show, by name."""
    observed: dict[str, float] = field(default_factory=dict)
    """Largest value of each of them so far."""
    fault: Literal["unguarded", "unscored"] | None = None
    """What was not seen of it: a token without its hooks, or a cached one's score."""

    def verdict(self, readings: Sequence[Reading]) -> Verdict:
        """Return what was decided so far, on what `watch` has read so far."""
        state, policy = context.get(), self.watch.policy
        action, stage, alarms = decide(policy, readings)
        if self.fault is not None:
            action = "block" if self.is_blocked else "flag"
        return Verdict(
            id=self.id,
            policy=self.name,
            fingerprint=state.fingerprints[self.name],
            mode=policy.mode,
            action=action,
            stage=stage,
            alarms=alarms,
            clamped_tokens={
                rule.name: count
                for rule, count in zip(
                    policy.clamps, self.watch.clamped_tokens, strict=True
                )
            },
            tokens_seen=self.watch.tokens_seen,
            readings=(
                tuple(report(policy, reading) for reading in readings)
                if self.trace == "summary"
                else ()
            ),
            reason=self.fault,
        )

    @property
    def is_blocked(self) -> bool:
        """Whether nothing more of it may leave."""
        policy_file = context.get().policy_file
        if self.fault == "unguarded" and policy_file.on_error == "closed":
            return True
        if self.fault == "unscored" and policy_file.unscored == "block":
            return True
        return self.watch.block_position is not None


def _preprocess_add_request(
    original: Callable[..., Any], core: Any, request: Any
) -> Any:
    watched = admit(request, max_model_len=core.vllm_config.model_config.max_model_len)
    added, wave = original(core, request)
    added.guard = watched
    return added, wave


def admit(request: Any, *, max_model_len: int) -> Watched:
    """Decide which policy a request runs under, and make it so.

    A ticket that this start did not sign, or none, means the default policy. The
    request's cache salt is set from the policy, so that no prefix is shared across
    policies; what the client wrote into either field decides nothing.

    Args:
        request: vLLM's `EngineCoreRequest`; changed in place, its params copied.
        max_model_len: Most tokens a request can have.
    """
    state = context.get()
    params = request.sampling_params
    ticket = None
    if params is not None:
        extra_args = dict(params.extra_args or {})
        ticket = read_ticket(extra_args.get(TICKET_KEY), state.secret, now=time.time())
    if ticket is None or ticket.policy not in state.policy_file.policies:
        ticket = Ticket(uuid.uuid4().hex, state.policy_file.default_policy)
    slot = state.slot(ticket.policy)
    if params is not None:
        # The children of one request share their params: a copy, never a change.
        request.sampling_params = params = copy.copy(params)
        params.extra_args = {
            key: value
            for key, value in extra_args.items()
            if not key.startswith(_OWN_PREFIX)
        } | {SLOT_KEY: slot}
        if _remembers(state.policy_file.policies[ticket.policy]):
            # A prefix that a neighbour computes in the same step is known only after
            # the op has clamped; until such admissions wait a step, none is shared.
            params.skip_reading_prefix_cache = True
    request.cache_salt = context.cache_salt(
        state.fingerprints[ticket.policy], request.cache_salt
    )
    prompt_length = _prompt_length(request)
    wanted = prompt_length + ((params and params.max_tokens) or max_model_len)
    return _watch(ticket, prompt_length, total=min(wanted, max_model_len))


def _remembers(policy: Policy) -> bool:
    """Whether a clamp depends on what an earlier token of the request showed."""
    return any(rule.when and rule.when.scope == "request" for rule in policy.clamps)


def _prompt_length(request: Any) -> int:
    prompt = request.prompt_token_ids
    return len(request.prompt_embeds if prompt is None else prompt)


def _watch(ticket: Ticket, prompt_length: int, *, total: int) -> Watched:
    state = context.get()
    policy = state.policy_file.policies[ticket.policy]
    columns, thresholds = [], []
    for monitor in policy.monitors:
        path = str(monitor.calibration)
        columns.append(state.columns.index(Column(monitor.sae, monitor.score, path)))
        thresholds.append(
            state.calibrations[path].threshold(total, target_fpr=monitor.target_fpr)
        )
    saes = {monitor.sae for monitor in policy.monitors}
    return Watched(
        id=ticket.guard_id,
        name=ticket.policy,
        trace=ticket.trace,
        watch=Watch(
            policy,
            columns=columns,
            thresholds=thresholds,
            prompt_length=prompt_length,
        ),
        seen_columns={
            f"{column.score}:{column.sae}": number
            for number, column in enumerate(state.columns)
            if column.calibration is None and column.sae in saes
        },
    )


def _update_from_output(
    original: Callable[..., Any],
    scheduler: Any,
    scheduler_output: Any,
    model_runner_output: Any,
) -> Any:
    """Take in the readings of a step, and let no token past an alarm."""
    readings: StepReadings = getattr(model_runner_output, "guard", {})
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
        _observe(
            request, readings.get(request_id), scheduler_output, model_runner_output
        )
    outputs = original(scheduler, scheduler_output, model_runner_output)
    _finish_blocked(scheduler, requests.values(), outputs)
    for client_outputs in outputs.values():
        for output in client_outputs.outputs:
            request = requests.get(output.request_id)
            if request is not None:
                _tell(output, request.guard)
    return outputs


def _count_step(scheduler: Any, scheduler_output: Any, readings: StepReadings) -> None:
    """Count the rows that passed every hook, by phase, and those that did not."""
    counted = context.get().uncounted
    for request_id, num_rows in scheduler_output.num_scheduled_tokens.items():
        reading = readings.get(request_id)
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


def _observe(
    request: Any,
    readings: RequestReadings | None,
    scheduler_output: Any,
    model_runner_output: Any,
) -> None:
    """Hold a request's rows of this step against its policy; cut what may not leave."""
    watched: Watched = request.guard
    num_rows = scheduler_output.num_scheduled_tokens[request.request_id]
    index = model_runner_output.req_id_to_index[request.request_id]
    sampled = model_runner_output.sampled_token_ids
    tokens = list(sampled[index]) if sampled else []
    drafts = len(
        scheduler_output.scheduled_spec_decode_tokens.get(request.request_id, ())
    )
    if readings is None or readings.guarded < num_rows:
        watched.fault = "unguarded"
        logger.error("A token passed the model without its hooks.")
    elif readings.first > watched.watch.tokens_seen:
        watched.fault = "unscored"
        gap = readings.first - watched.watch.tokens_seen
        context.get().uncounted["unscored"] += gap
        logger.error("A token was found in the cache without its scores.")
    else:
        rejected = 0
        if tokens and drafts:
            rejected = max(drafts + 1 - _count_until_end(request, tokens), 0)
        accepted = len(readings.scores) - rejected
        _take_in(watched, readings, accepted)
    if not watched.is_blocked:
        return
    # Row r of the step's own rows samples token r - (num_rows - 1 - drafts).
    position = watched.watch.block_position
    kept = 0
    if position is not None and watched.fault is None and readings is not None:
        first_sampling = readings.first + len(readings.scores) - 1 - drafts
        kept = max(position - first_sampling, 0)
    if sampled:
        sampled[index] = tokens[:kept]
    model_runner_output.prompt_logprobs_dict.pop(request.request_id, None)
    model_runner_output.prompt_token_id_logprobs_dict.pop(request.request_id, None)


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


def _take_in(watched: Watched, readings: RequestReadings, accepted: int) -> None:
    scores = readings.scores[:accepted]
    before = watched.watch.tokens_seen
    watched.watch.observe(readings.first, scores, readings.clamped[:accepted])
    new = scores[before - readings.first : watched.watch.tokens_seen - readings.first]
    for name, column in watched.seen_columns.items():
        largest = float(np.nan_to_num(new[:, column], nan=np.inf).max(initial=0.0))
        watched.observed[name] = max(watched.observed.get(name, 0.0), largest)


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


def _tell(output: Any, watched: Watched) -> None:
    """Let an output carry the request's verdict and what was not yet counted."""
    state, readings = context.get(), watched.watch.readings()
    progress = Progress(
        verdict=watched.verdict(readings).to_wire(),
        ratios={reading.monitor: reading.ratio for reading in readings},
        observed=watched.observed,
        counted=dict(state.uncounted),
        hook_seconds=list(state.hook_seconds),
    )
    state.uncounted.clear()
    state.hook_seconds.clear()
    output.kv_transfer_params = {
        **(output.kv_transfer_params or {}),
        CARRIER_KEY: progress._asdict(),
    }
