"""In the engine core: under which policy a request runs, and what may leave."""

import copy
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm_guard import admission, context, engine
from vllm_guard.holding import Holding
from vllm_guard.readings import CARRIER_KEY, RequestReadings
from vllm_guard.rows import DRILL_KEY, SLOT_KEY

from guard import constraint as constraints
from guard.errors import RequestError
from guard.request import TICKET_KEY, Ticket, sign_ticket

OTHER_SECRET = b"x" * 32
WATCHED = 2  # the column of the monitor in the policy of conftest.py


def make_request(
    extra_args: dict[str, Any] | None = None,
    *,
    salt: str | None = None,
    prompt_length: int = 4,
    max_tokens: int | None = 4,
) -> EngineCoreRequest:
    params = SamplingParams(extra_args=extra_args, max_tokens=max_tokens)
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1] * prompt_length,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=salt,
        data_parallel_rank=None,
    )


def ticket_for(
    policy: str, secret: bytes, *, seconds: float = 60.0, drill: str | None = None
) -> dict[str, Any]:
    ticket = Ticket("id", policy, expires=time.time() + seconds, drill=drill)
    return {TICKET_KEY: sign_ticket(ticket, secret)}


def admit(request: EngineCoreRequest, *, max_model_len: int = 64) -> admission.Watched:
    return admission.admit(request, max_model_len=max_model_len)


def slot_written(request: EngineCoreRequest) -> int:
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args is not None
    slot: int = request.sampling_params.extra_args[SLOT_KEY]
    return slot


def test_a_valid_ticket_names_the_policy(state: context.Context) -> None:
    request = make_request(ticket_for("research", state.secret))
    watched = admit(request)
    assert (watched.id, watched.name) == ("id", "research")
    assert watched.watch.policy is state.current.policy_file.policies["research"]
    assert slot_written(request) == 2


CONSTRAINTS: list[dict[str, Any]] = [
    {"structured_outputs": StructuredOutputsParams(json_object=True)},
    {"logit_bias": {5: 100.0}},
    {"allowed_token_ids": [5]},
    {"bad_words": ["no"]},
    {"thinking_token_budget": 0},
    {"trace_decode_token_ids": [5]},
    {"extra_args": {"whitelist_token_ids": [5]}},
]


def constrain(request: EngineCoreRequest, constraint: dict[str, Any]) -> None:
    for name, value in constraint.items():
        known = getattr(request.sampling_params, name) or {}
        setattr(
            request.sampling_params,
            name,
            known | value if isinstance(value, dict) else value,
        )


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda one: next(iter(one)))
def test_a_constraint_that_got_past_the_server_is_refused_in_the_core(
    state: context.Context, constraint: dict[str, Any]
) -> None:
    request = make_request(ticket_for("free", state.secret))
    assert admit(request).name == "free"
    request = make_request(ticket_for("free", state.secret))
    constrain(request, constraint)
    with pytest.raises(RequestError) as refused:
        admit(request)
    assert refused.value.param == next(iter(constraint))
    request = make_request(ticket_for("open", state.secret))
    constrain(request, constraint)
    assert admit(request).name == "open"


def test_vllm_knows_every_param_that_is_looked_at() -> None:
    # One that it names otherwise some day would go through unseen.
    params = SamplingParams()
    assert all(hasattr(params, name) for one in CONSTRAINTS for name in one)
    assert all(hasattr(params, name) for name in constraints._FIELDS)


def drill_written(request: EngineCoreRequest) -> int | None:
    assert request.sampling_params is not None
    return (request.sampling_params.extra_args or {}).get(DRILL_KEY)


@pytest.mark.parametrize(("drill", "number"), [("last", 1), ("whole", 2), (None, None)])
def test_a_ticket_names_the_drill_and_the_verdict_says_so(
    drilled: context.Context, drill: str | None, number: int | None
) -> None:
    request = make_request(ticket_for("research", drilled.secret, drill=drill))
    watched = admit(request)
    assert (watched.name, slot_written(request)) == ("research", 2)
    assert drill_written(request) == number
    watched.watch.observe(0, np.zeros((4, 5), "f4"), np.zeros(4, "i4"))
    for _ in range(2):
        assert watched.tell().get("drill") == drill


def test_what_a_drill_computes_is_shared_with_nobody(drilled: context.Context) -> None:
    salts = set()
    fingerprint = drilled.current.fingerprints["open"]
    shared = {context.cache_salt(fingerprint, salt) for salt in (None, "mine")}
    ticket = ticket_for("open", drilled.secret, drill="last")
    for salt in (None, "mine", "mine", None):
        request = make_request(ticket, salt=salt)
        admit(request)
        salts.add(request.cache_salt)
    assert len(salts) == 4
    assert not salts & shared
    clean = make_request(ticket_for("open", drilled.secret), salt="mine")
    admit(clean)
    assert clean.cache_salt in shared


def test_nobody_else_names_a_drill(drilled: context.Context) -> None:
    default = context.cache_salt(drilled.current.identify("default"), None)
    for extra_args in (
        {DRILL_KEY: 1},
        {DRILL_KEY: 1, "guard_drills": "last", "drill": "last"},
        {DRILL_KEY: 1} | ticket_for("open", OTHER_SECRET, drill="last"),
        ticket_for("open", drilled.secret, seconds=-1.0, drill="last"),
        ticket_for("open", drilled.secret, drill="gone"),
    ):
        request = make_request(extra_args)
        assert admit(request).name == "default"
        assert drill_written(request) is None
        assert request.cache_salt == default
    request = make_request({DRILL_KEY: 1} | ticket_for("open", drilled.secret))
    assert admit(request).name == "open"
    assert drill_written(request) is None


def test_without_a_valid_ticket_the_default_policy_applies(
    state: context.Context,
) -> None:
    valid = ticket_for("open", state.secret)[TICKET_KEY]
    for extra_args in (
        None,
        {},
        ticket_for("open", OTHER_SECRET),
        ticket_for("open", state.secret, seconds=-1.0),
        ticket_for("nowhere", state.secret),
        {TICKET_KEY: valid[:-1] + ("A" if valid[-1] != "A" else "B")},
        {TICKET_KEY: [valid]},
        {SLOT_KEY: 3, "guard_policy": "open"},
    ):
        request = make_request(extra_args)
        assert admit(request).name == "default"
        assert slot_written(request) == 1


def test_a_request_without_sampling_params_runs_under_the_default(
    state: context.Context,
) -> None:
    request = make_request()
    request.sampling_params = None
    assert admit(request).name == "default"
    assert request.sampling_params is None


def test_params_that_several_requests_share_are_copied(state: context.Context) -> None:
    one, other = make_request(), make_request()
    shared = SamplingParams(extra_args=ticket_for("open", state.secret) | {"mine": 1})
    before = dict(shared.extra_args or {})
    one.sampling_params = other.sampling_params = shared
    for request in (one, other):
        assert admit(request).name == "open"
        assert request.sampling_params is not shared
    assert shared.extra_args == before


def test_any_number_of_different_requests_shares_the_slots_of_the_file(
    state: context.Context,
) -> None:
    slots = set()
    for number in range(200):
        own = {"mine": number} | ticket_for("research", state.secret)
        request = make_request(own, salt=f"salt {number}")
        assert admit(request).name == "research"
        slots.add(slot_written(request))
    assert slots == {state.current.slot("research")}


def test_what_a_client_wrote_in_the_guards_name_is_taken_out(
    state: context.Context,
) -> None:
    own = {"guard_slot": 3, "guard_anything": 1, "guardian": 2, "mine": 3}
    request = make_request(own | ticket_for("research", state.secret))
    admit(request)
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == {
        "guardian": 2,
        "mine": 3,
        SLOT_KEY: 2,
    }


def salt_of(
    state: context.Context, policy: str, client: str | None, **values: Any
) -> str | None:
    request = make_request(ticket_for(policy, state.secret), salt=client, **values)
    admit(request)
    salt: str | None = request.cache_salt
    return salt


def test_a_prefix_is_shared_within_one_policy_and_one_client_salt_only(
    state: context.Context,
) -> None:
    salts = {
        (policy, client): salt_of(state, policy, client)
        for policy in ("default", "research", "open")
        for client in (None, "mine", "yours")
    }
    assert len(set(salts.values())) == len(salts)
    assert salt_of(state, "open", "mine", prompt_length=9) == salts["open", "mine"]


def test_a_client_cannot_write_the_salt_of_another_policy(
    state: context.Context,
) -> None:
    wanted = salt_of(state, "open", None)
    assert wanted is not None
    forged = (
        wanted,
        state.current.fingerprints["open"],
        f"{state.current.fingerprints['open']}|",
    )
    for client in forged:
        request = make_request(ticket_for("open", OTHER_SECRET), salt=client)
        admit(request)
        assert request.cache_salt != wanted


@pytest.mark.parametrize(
    ("prompt_length", "max_tokens", "threshold"),
    # Of 19 maxima the 18th: 18 in the bucket up to 16 tokens, 1800 up to 64.
    [(4, 12, 18.0), (4, 13, 1800.0), (16, 1, 1800.0), (4, None, 1800.0)],
)
def test_the_threshold_is_that_of_the_longest_a_request_may_become(
    state: context.Context,
    prompt_length: int,
    max_tokens: int | None,
    threshold: float,
) -> None:
    request = make_request(prompt_length=prompt_length, max_tokens=max_tokens)
    (reading,) = admit(request).watch.readings()
    assert reading.threshold == threshold


def test_a_request_cannot_become_longer_than_the_model_allows(
    state: context.Context,
) -> None:
    request = make_request(max_tokens=1000)
    (reading,) = admit(request, max_model_len=16).watch.readings()
    assert reading.threshold == 18.0


class FakeScheduler:
    """As much of vLLM's scheduler as hands out tokens and ends requests."""

    def __init__(self, *requests: "FakeRequest") -> None:
        self.requests = {request.request_id: request for request in requests}
        self.evicted: set[int] = set()
        self.kv_cache_manager = SimpleNamespace(
            get_block_ids=lambda _: ([4, 5], [7]),
            evict_blocks=self.evicted.update,
            block_pool=SimpleNamespace(guard_residue=set()),
        )

    def finish_requests(self, ids: set[str], status: Any) -> None:
        for request_id in ids:
            self.requests.pop(request_id).finished = True


class FakeRequest:
    """As much of vLLM's request as the guard looks at."""

    def __init__(self, watched: admission.Watched, *, prompt_length: int) -> None:
        self.request_id = "r"
        self.guard = watched
        self.finished = False
        self.client_index = 0
        self.trace_headers = None
        self.num_prompt_tokens = prompt_length
        self.prompt_token_ids = [1] * prompt_length
        self.prompt_embeds = None
        self.sampling_params = SamplingParams(max_tokens=64)
        self.max_tokens = 64
        self.num_output_tokens = 0

    def is_finished(self) -> bool:
        return self.finished

    def take_events(self) -> None:
        return None


def hand_out(
    scheduler: FakeScheduler, scheduler_output: Any, output: ModelRunnerOutput
) -> dict[int, EngineCoreOutputs]:
    """Do what vLLM's own method does with sampled tokens."""
    outputs = [
        EngineCoreOutput(request_id=request_id, new_token_ids=tokens)
        for request_id, tokens in zip(
            output.req_ids, output.sampled_token_ids, strict=True
        )
        if tokens
    ]
    return {0: EngineCoreOutputs(outputs=outputs)} if outputs else {}


def schedule(num_rows: int, *, first: int = 0, drafts: int = 0) -> SimpleNamespace:
    """Return what vLLM's scheduler says of a step of one request."""
    return SimpleNamespace(
        num_scheduled_tokens={"r": num_rows},
        scheduled_new_reqs=(),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["r"], num_computed_tokens=[first]
        ),
        scheduled_spec_decode_tokens={"r": [0] * drafts} if drafts else {},
    )


def run_step(
    scheduler: FakeScheduler,
    scores: Sequence[float],
    *,
    first: int,
    tokens: Sequence[int],
    drafts: int = 0,
    missed: int = 0,
    late: int = 0,
    broken: int = 0,
) -> list[EngineCoreOutput]:
    """Let one request's rows come back from the worker, and its tokens leave.

    `late` is by how many positions the readings lag behind the step.
    """
    table = np.zeros((len(scores), WATCHED + 1), dtype=np.float32)
    table[:, WATCHED] = scores
    output = ModelRunnerOutput(["r"], {"r": 0}, [list(tokens)])
    output.prompt_logprobs_dict["r"] = None
    clamped = np.full(len(scores), 0b01, dtype=np.int32)
    guarded = len(scores) - missed
    readings = RequestReadings(first, table, clamped, guarded, broken)
    output.guard = {"r": readings}
    scheduled = schedule(len(scores), first=first + late, drafts=drafts)
    found = engine._update_from_output(hand_out, scheduler, scheduled, output)
    blocked = [o for group in found.values() for o in group.outputs if o.finish_reason]
    assert ("r" in output.prompt_logprobs_dict) == (not blocked)
    return [output for group in found.values() for output in group.outputs]


def start(
    state: context.Context,
    *,
    prompt_length: int,
    policy: str = "default",
    hold: int = 0,
) -> FakeScheduler:
    request = make_request(
        ticket_for(policy, state.secret), prompt_length=prompt_length, max_tokens=8
    )
    watched = admit(request)
    if hold:
        watched.held = Holding(hold)
    return FakeScheduler(FakeRequest(watched, prompt_length=prompt_length))


def verdict_of(output: EngineCoreOutput) -> dict[str, Any]:
    assert output.kv_transfer_params is not None
    verdict: dict[str, Any] = output.kv_transfer_params[CARRIER_KEY]["verdict"]
    return verdict


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_token_sampled_at_or_after_an_alarm_leaves(
    state: context.Context, data: st.DataObject
) -> None:
    """Token `100 + p` is what the row at position p samples."""
    prompt_length = data.draw(st.integers(1, 6))
    hold = data.draw(st.sampled_from([0, 0, 1, 2, 5]))
    alarm = data.draw(st.none() | st.integers(0, 10))
    poison = data.draw(st.sampled_from([1e9, math.nan, math.inf]))
    scheduler, left, position, outputs = (
        start(state, prompt_length=prompt_length, hold=hold),
        [],
        0,
        [],
    )
    while position < 11 and scheduler.requests:
        rest = prompt_length - position
        drafts, accepted = 0, 0
        if rest > 0:
            count = data.draw(st.integers(1, rest))
        else:
            drafts = data.draw(st.integers(0, 3))
            accepted = data.draw(st.integers(0, drafts))
            count = 1 + drafts
        scores = [0.5] * count
        last = position + count - 1 - drafts
        for row in range(position, position + count):
            # What the rejected drafts scored is nobody's business.
            if row == alarm or row > last + accepted:
                scores[row - position] = poison
        samples = last >= prompt_length - 1
        tokens = [100 + last + i for i in range(1 + accepted)] if samples else []
        outputs = run_step(
            scheduler, scores, first=position, tokens=tokens, drafts=drafts
        )
        left += [token for output in outputs for token in output.new_token_ids]
        position = last + accepted + 1
    end = position if alarm is None or alarm >= position else alarm
    is_blocked = alarm is not None and alarm < position
    assert bool(scheduler.requests) is not is_blocked
    whole = [100 + p for p in range(prompt_length - 1, end - hold)]
    # Of a request that goes on, an output of several tokens is held as one.
    assert left == whole[: None if is_blocked else len(left)]
    assert hold or left == whole
    if alarm is not None and is_blocked:
        *earlier, output = outputs
        assert not any(other.finish_reason for other in earlier)
        assert output.finish_reason is FinishReason.LENGTH
        assert output.stop_reason == engine.BLOCK_REASON
        verdict = verdict_of(output)
        assert verdict["action"] == "block"
        assert verdict["stage"] == ("prompt" if alarm < prompt_length else "output")
        assert verdict["tokens_seen"] == verdict["clamped_tokens"]["hold"] == alarm + 1


def test_a_held_token_leaves_with_the_verdict_of_its_own_step(
    state: context.Context,
) -> None:
    scheduler = start(state, prompt_length=2, hold=2)
    assert run_step(scheduler, [1.0, 1.0], first=0, tokens=[7]) == []
    assert run_step(scheduler, [1.0], first=2, tokens=[8]) == []
    (output,) = run_step(scheduler, [1.0], first=3, tokens=[9])
    assert output.new_token_ids == [7]
    assert verdict_of(output)["tokens_seen"] == 2
    (output,) = run_step(scheduler, [1.0], first=4, tokens=[10])
    assert output.new_token_ids == [8]
    assert verdict_of(output)["tokens_seen"] == 3
    (output,) = run_step(scheduler, [1e9], first=5, tokens=[11])
    assert output.new_token_ids == []
    assert verdict_of(output)["tokens_seen"] == 6


@pytest.mark.parametrize("ending", ["blocked", "aborted", "finished"])
def test_what_was_counted_outlives_what_is_held(
    state: context.Context, ending: str
) -> None:
    """The tokens of a request that never speaks are told with those of another."""
    scheduler, outputs = start(state, prompt_length=2, hold=8), []
    outputs += run_step(scheduler, [1.0, 1.0], first=0, tokens=[7])
    state.hook_seconds.append(0.5)
    outputs += run_step(scheduler, [1.0], first=2, tokens=[8])
    assert outputs == []
    if ending == "aborted":
        scheduler.finish_requests({"r"}, None)
    elif ending == "blocked":
        outputs += run_step(scheduler, [1e9], first=3, tokens=[9])
    else:
        outputs += end_by_vllm(scheduler, FinishReason.ERROR)
    outputs += run_step(start(state, prompt_length=1), [1.0], first=0, tokens=[9])
    told = [
        output.kv_transfer_params[CARRIER_KEY]
        for output in outputs
        if output.kv_transfer_params is not None
    ]
    counted = sum((Counter(progress["counted"]) for progress in told), Counter())
    assert counted == {"prefill": 3, "decode": 1 + (ending == "blocked")}
    assert [s for progress in told for s in progress["hook_seconds"]] == [0.5]


def end_by_vllm(scheduler: FakeScheduler, reason: FinishReason) -> list[Any]:
    """Let vLLM end a request in a step of which it is no part, as errors do."""

    def end(scheduler: FakeScheduler, *_: Any) -> dict[int, EngineCoreOutputs]:
        scheduler.finish_requests({"r"}, None)
        output = EngineCoreOutput("r", [], finish_reason=reason)
        return {0: EngineCoreOutputs(outputs=[output])}

    scheduled = schedule(0)
    scheduled.num_scheduled_tokens = {}
    output = ModelRunnerOutput([], {}, [])
    found = engine._update_from_output(end, scheduler, scheduled, output)
    return list(found[0].outputs)


def test_an_error_of_the_engine_delivers_what_was_held(state: context.Context) -> None:
    scheduler = start(state, prompt_length=1, hold=8)
    for position in range(3):
        assert run_step(scheduler, [1.0], first=position, tokens=[position]) == []
    outputs = end_by_vllm(scheduler, FinishReason.ERROR)
    assert [output.new_token_ids for output in outputs] == [[0], [1], [2], []]
    assert [verdict_of(output)["tokens_seen"] for output in outputs[:-1]] == [1, 2, 3]
    assert outputs[-1].finish_reason is FinishReason.ERROR


@pytest.mark.parametrize(
    ("mode", "hold", "holds"),
    [("enforce", 3, True), ("enforce", 0, False), ("observe", 3, False)],
)
def test_only_what_can_be_stopped_is_held(
    state: context.Context, mode: str, hold: int, holds: bool
) -> None:
    policies = dict(state.current.policy_file.policies)
    changed = {"mode": mode, "hold_tokens": hold}
    policies["default"] = policies["default"].model_copy(update=changed)
    policy_file = state.current.policy_file.model_copy(update={"policies": policies})
    state.current = replace(state.current, policy_file=policy_file)
    assert (admit(make_request()).held is not None) is holds


def test_every_output_carries_the_running_verdict(state: context.Context) -> None:
    scheduler = start(state, prompt_length=3)
    assert run_step(scheduler, [1.0, 2.0], first=0, tokens=[]) == []
    (output,) = run_step(scheduler, [3.0], first=2, tokens=[7])
    assert not scheduler.evicted
    assert output.new_token_ids == [7]
    assert output.finish_reason is None
    verdict = verdict_of(output)
    assert (verdict["action"], verdict["tokens_seen"]) == ("allow", 3)
    assert verdict["clamped_tokens"] == {"hold": 3, "late": 0}
    assert output.kv_transfer_params is not None
    progress = output.kv_transfer_params[CARRIER_KEY]
    assert progress["ratios"] == {"watch": 3.0 / 18.0}
    assert (progress["maxima"], progress["total_length"]) == ([3.0], 11)
    assert progress["counted"]["prefill"] == 3


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=st.lists(st.sampled_from([0.5, 5.0, 1e9]), min_size=1, max_size=8))
def test_what_is_told_is_the_whole_verdict_and_is_never_changed_afterwards(
    state: context.Context, scores: list[float]
) -> None:
    scheduler = start(state, prompt_length=1)
    (request,) = scheduler.requests.values()
    told = []
    for position, score in enumerate(scores):
        if not scheduler.requests:
            break
        (output,) = run_step(scheduler, [score], first=position, tokens=[7])
        fresh = request.guard.verdict().to_wire()
        assert verdict_of(output) == fresh
        told.append((verdict_of(output), copy.deepcopy(fresh)))
    assert all(verdict == then for verdict, then in told)


def test_tokens_are_counted_once_and_by_phase(state: context.Context) -> None:
    scheduler = start(state, prompt_length=3)
    run_step(scheduler, [1.0, 1.0, 1.0], first=0, tokens=[7])
    (output,) = run_step(scheduler, [1.0], first=3, tokens=[8])
    assert output.kv_transfer_params is not None
    counted = output.kv_transfer_params[CARRIER_KEY]["counted"]
    assert (counted.get("prefill", 0), counted.get("decode", 0)) == (0, 1)


@pytest.mark.usefixtures("state")
def test_a_token_that_missed_its_hooks_ends_the_request() -> None:
    scheduler = start(context.get(), prompt_length=2)
    (output,) = run_step(scheduler, [1.0, 1.0], first=0, tokens=[7], missed=1)
    assert output.new_token_ids == []
    assert output.stop_reason == engine.BLOCK_REASON
    verdict = verdict_of(output)
    assert (verdict["action"], verdict["reason"]) == ("block", "unguarded")
    assert not scheduler.requests
    assert scheduler.evicted == {4, 5, 7}


def test_what_is_not_finite_ends_the_request_and_stays_with_it(
    state: context.Context,
) -> None:
    scheduler = start(state, prompt_length=2, policy="open")
    pool = scheduler.kv_cache_manager.block_pool
    (output,) = run_step(scheduler, [1.0, 1.0], first=0, tokens=[7])
    assert scheduler.evicted == pool.guard_residue == set()
    (output,) = run_step(scheduler, [1.0], first=2, tokens=[8], broken=1)
    assert output.new_token_ids == []
    assert output.stop_reason == engine.BLOCK_REASON
    verdict = verdict_of(output)
    assert (verdict["action"], verdict["reason"]) == ("block", "not_finite")
    assert verdict["tokens_seen"] == 3
    assert output.kv_transfer_params["guard"]["counted"]["not_finite"] == 1
    assert scheduler.evicted == pool.guard_residue == {4, 5, 7}


def test_who_only_observes_says_that_it_is_not_finite(state: context.Context) -> None:
    scheduler = start(state, prompt_length=1, policy="open")
    watch = scheduler.requests["r"].guard.watch
    watch.policy = watch.policy.model_copy(update={"mode": "observe"})
    (output,) = run_step(scheduler, [1.0], first=0, tokens=[7], broken=1)
    assert output.new_token_ids == [7]
    verdict = verdict_of(output)
    assert (verdict["action"], verdict["reason"]) == ("flag", "not_finite")
    assert scheduler.kv_cache_manager.block_pool.guard_residue == {4, 5, 7}


@pytest.mark.usefixtures("state")
def test_a_cached_token_without_its_scores_ends_the_request() -> None:
    scheduler = start(context.get(), prompt_length=4)
    (output,) = run_step(scheduler, [1.0], first=3, tokens=[7])
    assert output.new_token_ids == []
    verdict = verdict_of(output)
    assert (verdict["action"], verdict["reason"]) == ("block", "unscored")
    counted = output.kv_transfer_params["guard"]["counted"]
    assert counted["unscored"] == 3


@pytest.mark.usefixtures("state")
def test_a_step_without_any_readings_ends_its_requests() -> None:
    scheduler = start(context.get(), prompt_length=2)
    output = ModelRunnerOutput(["r"], {"r": 0}, [[7]])
    found = engine._update_from_output(hand_out, scheduler, schedule(2), output)
    (left,) = found[0].outputs
    assert left.new_token_ids == []
    assert verdict_of(left)["reason"] == "unguarded"


@pytest.mark.parametrize("late", [1, -1])
def test_readings_of_another_step_vouch_for_nothing(
    late: int, state: context.Context
) -> None:
    scheduler = start(state, prompt_length=2)
    run_step(scheduler, [1.0, 1.0], first=0, tokens=[7])
    (output,) = run_step(scheduler, [1.0], first=2, tokens=[8], late=late)
    assert output.new_token_ids == []
    assert verdict_of(output)["reason"] == "unguarded"
    assert output.kv_transfer_params is not None
    assert output.kv_transfer_params[CARRIER_KEY]["counted"] == {"unguarded": 1}


def test_one_request_says_only_once_that_it_is_not_guarded(
    write_policy: Callable[..., Path],
    clean_process: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("GUARD_POLICY", str(write_policy("on_error: open")))
    assert context.enter()
    scheduler = start(context.get(), prompt_length=1)
    for position in range(5):
        run_step(scheduler, [1.0], first=position, tokens=[7], missed=1)
    said = [record for record in caplog.records if "without its hooks" in record.msg]
    assert len(said) == 1


def test_a_policy_without_monitors_lets_everything_pass(state: context.Context) -> None:
    scheduler = start(state, prompt_length=1, policy="open")
    (output,) = run_step(scheduler, [math.nan], first=0, tokens=[7])
    assert output.new_token_ids == [7]
    assert verdict_of(output)["action"] == "allow"


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_seams_of_the_engine_core_are_where_they_were() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    assert parameters(Scheduler.update_from_output) == [
        "self",
        "scheduler_output",
        "model_runner_output",
    ]
    assert parameters(Scheduler.finish_requests) == [
        "self",
        "request_ids",
        "finished_status",
    ]
    assert parameters(EngineCore.preprocess_add_request) == ["self", "request"]
    assert parameters(EngineCore.collective_rpc)[:2] == ["self", "method"]
    assert parameters(EngineCore.__init__)[:2] == ["self", "vllm_config"]


def test_the_seams_of_the_api_server_are_where_they_were() -> None:
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    assert parameters(OutputProcessor.process_outputs)[:2] == [
        "self",
        "engine_core_outputs",
    ]
    assert parameters(OutputProcessor.add_request)[:2] == ["self", "request"]
    assert parameters(OutputProcessor.abort_requests)[:2] == ["self", "request_ids"]
    assert parameters(RequestState._new_completion_output) == [
        "self",
        "token_ids",
        "finish_reason",
        "stop_reason",
    ]
    fields = {"parent_req", "external_req_id", "request_index"}
    assert fields <= set(parameters(RequestState.__init__))


def test_what_the_guard_reads_of_a_request_is_still_there() -> None:
    from vllm.v1.request import Request

    known = {"prompt_token_ids", "prompt_embeds", "sampling_params", "cache_salt"}
    assert known <= set(EngineCoreRequest.__struct_fields__)
    source = inspect.getsource(Request.__init__)
    for name in ("num_prompt_tokens", "client_index", "trace_headers", "cache_salt"):
        assert f"self.{name}" in source
    assert "kv_transfer_params" in EngineCoreOutput.__struct_fields__
    assert callable(Request.is_finished)
    assert callable(Request.take_events)


@pytest.mark.parametrize("kind", ["unguarded", "unscored", "not_finite"])
def test_where_the_operator_lets_it_go_on_the_rest_is_judged(
    kind: str,
    write_policy: Callable[..., Path],
    clean_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extra = "unscored: flag" if kind == "unscored" else "on_error: open"
    monkeypatch.setenv("GUARD_POLICY", str(write_policy(extra)))
    assert context.enter()
    scheduler = start(context.get(), prompt_length=3)
    if kind == "unscored":
        (output,) = run_step(scheduler, [1.0], first=2, tokens=[7])
    else:
        fault = {"missed" if kind == "unguarded" else "broken": 1}
        (output,) = run_step(scheduler, [1.0] * 3, first=0, tokens=[7], **fault)
    assert output.new_token_ids == [7]
    verdict = verdict_of(output)
    assert (verdict["action"], verdict["reason"]) == ("flag", kind)
    (output,) = run_step(scheduler, [1.0], first=3, tokens=[8])
    assert verdict_of(output)["reason"] == kind
    assert verdict_of(output)["tokens_seen"] == 4
    (output,) = run_step(scheduler, [1e9], first=4, tokens=[9])
    assert output.new_token_ids == []
    assert verdict_of(output)["action"] == "block"
