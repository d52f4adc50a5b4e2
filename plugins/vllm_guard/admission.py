"""How a request enters the engine core: ticket read, policy chosen, cache salted.

It is the one place that every request of every route passes, before its blocks are
hashed and before anything is computed for it.
"""

import copy
import logging
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guard.constraint import constraint_error, find_param_constraint
from guard.generation import Generation
from guard.request import TICKET_KEY, Fault, Ticket, Trace, read_ticket
from guard.verdict import Verdict, decide, report
from guard.watch import Watch
from vllm_guard import context
from vllm_guard.holding import Holding
from vllm_guard.patch import wrap
from vllm_guard.rows import DRILL_KEY, SLOT_KEY

__all__ = ["Watched", "admit", "begin_verdict", "choose_policy", "install"]

logger = logging.getLogger(__name__)

_OWN_PREFIX = "guard_"
"""Keys of `extra_args` that only the guard may set."""


def install() -> None:
    """Wrap the last moment before a request's blocks are hashed.

    vLLM has no plugin seam in the engine core. Remove when a plugin can choose a
    request's cache salt there.
    """
    from vllm.v1.engine.core import EngineCore

    wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)


@dataclass(slots=True)
class Watched:
    """A request in the engine core, as the guard keeps it: `Request.guard`."""

    id: str
    """Guard id of the HTTP request, or of the ticket of an offline one."""
    name: str
    """Its policy."""
    generation: Generation
    """Of policies, under which it began and will end."""
    total_length: int
    """Most tokens it can have, prompt and output."""
    watch: Watch
    trace: Trace
    """How much of its readings the client asked to see."""
    held: Holding | None = None
    """Its last outputs, where its policy keeps any back."""
    drill: str | None = None
    """Name of the fire drill that it is."""
    fault: Fault | None = None
    """What is not known of it: a token without its hooks, a cached one's score, or what
    the model made of a token."""
    _told: dict[str, Any] | None = None
    """What `tell` returned last."""

    def tell(self) -> dict[str, Any]:
        """Return `Verdict.to_wire()` of what was decided so far.

        Token after token mostly nothing happens, and only the counts go on.
        """
        watch = self.watch
        if self.fault or self.trace != "none" or watch.is_alarmed or not self._told:
            self._told = self.verdict().to_wire()
        else:
            names = self._told["clamped_tokens"]
            # A new one: the last may still be on its way out in another thread.
            self._told = {
                **self._told,
                "clamped_tokens": dict(zip(names, watch.clamped_tokens, strict=True)),
                "tokens_seen": watch.tokens_seen,
            }
        return self._told

    def verdict(self) -> Verdict:
        """Return what was decided so far."""
        policy, readings = self.watch.policy, self.watch.readings()
        action, stage, alarms = decide(policy, readings)
        if self.fault is not None:
            action = "block" if self.is_blocked else "flag"
        counts = zip(policy.clamps, self.watch.clamped_tokens, strict=True)
        return Verdict(
            id=self.id,
            policy=self.name,
            fingerprint=self.generation.fingerprints[self.name],
            mode=policy.mode,
            action=action,
            stage=stage,
            alarms=alarms,
            clamped_tokens={rule.name: count for rule, count in counts},
            tokens_seen=self.watch.tokens_seen,
            readings=(
                tuple(report(policy, reading) for reading in readings)
                if self.trace == "summary"
                else ()
            ),
            reason=self.fault,
            drill=self.drill,
        )

    @property
    def is_blocked(self) -> bool:
        """Whether nothing more of it may leave."""
        policy_file = self.generation.policy_file
        if self.fault == "unguarded" and policy_file.on_error == "closed":
            return True
        if self.fault == "not_finite" and policy_file.on_error == "closed":
            # Its tokens did pass the guard, and who observes changes nothing.
            return self.watch.policy.mode == "enforce"
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

    A ticket that this start did not sign, one that is used up or of a generation that
    is gone, or none at all means the default policy. The request's cache salt is set
    from the policy, so that no prefix is shared across policies; what the client wrote
    into either field decides nothing. What a drill computes is shared with nobody, not
    even with the same drill.

    Args:
        request: vLLM's `EngineCoreRequest`; changed in place, its params copied.
        max_model_len: Most tokens a request can have.

    Raises:
        RequestError: It constrains decoding, and its policy refuses that.
    """
    state = context.get()
    params = request.sampling_params
    ticket = None
    if params is not None:
        extra_args = dict(params.extra_args or {})
        ticket = state.tickets.redeem(
            extra_args.get(TICKET_KEY), state.secret, now=time.time()
        )
        if ticket is None and TICKET_KEY in extra_args:
            logger.warning("A ticket was altered, expired or used up; it counts not.")
    ticket, generation = choose_policy(ticket)
    _check_constraint(ticket, generation, params)
    if params is not None:
        # The children of one request share their params: a copy, never a change.
        request.sampling_params = params = copy.copy(params)
        params.extra_args = {
            key: value
            for key, value in extra_args.items()
            if not key.startswith(_OWN_PREFIX)
        } | {SLOT_KEY: generation.slot(ticket.policy)}
        if ticket.drill is not None:
            params.extra_args[DRILL_KEY] = generation.drill(ticket.drill)
            request.cache_salt = secrets.token_hex(32)
    request.cache_salt = context.cache_salt(
        generation.identify(ticket.policy), request.cache_salt
    )
    prompt_length = _prompt_length(request)
    wanted = prompt_length + ((params and params.max_tokens) or max_model_len)
    total = min(wanted, max_model_len)
    return _watch(ticket, generation, prompt_length, total=total)


def choose_policy(ticket: Ticket | None) -> tuple[Ticket, Generation]:
    """Return what a ticket lets in under; the default policy where it does not count.

    Args:
        ticket: Signed here, or None.
    """
    state = context.get()
    generation = None if ticket is None else state.find(ticket.generation)
    if ticket is None or generation is None or not _is_known(ticket, generation):
        generation = state.current
        ticket = Ticket(uuid.uuid4().hex, generation.policy_file.default_policy)
    return ticket, generation


def begin_verdict(params: Any) -> Verdict:
    """Return what is decided of a request before the engine has said anything of it.

    Its policy is the one that `admit` will choose, elsewhere.

    Args:
        params: Its sampling params, as they are sent to the engine core.

    Raises:
        RequestError: They constrain decoding, and its policy refuses that.
    """
    text = ((params and params.extra_args) or {}).get(TICKET_KEY)
    ticket = read_ticket(text, context.get().secret, now=time.time())
    ticket, generation = choose_policy(ticket)
    _check_constraint(ticket, generation, params)
    return Verdict(
        id=ticket.guard_id,
        policy=ticket.policy,
        fingerprint=generation.fingerprints[ticket.policy],
        mode=generation.policy_file.policies[ticket.policy].mode,
        action="allow",
        drill=ticket.drill,
    )


def _check_constraint(ticket: Ticket, generation: Generation, params: Any) -> None:
    """Raise RequestError where params constrain what the policy wants free."""
    policy = generation.policy_file.policies[ticket.policy]
    if policy.constrained_decoding == "refuse":
        constraint = find_param_constraint(params)
        if constraint is not None:
            raise constraint_error(constraint)


def _is_known(ticket: Ticket, generation: Generation) -> bool:
    known = ticket.drill is None or ticket.drill in generation.edits
    return known and ticket.policy in generation.policy_file.policies


def _prompt_length(request: Any) -> int:
    prompt = request.prompt_token_ids
    return len(request.prompt_embeds if prompt is None else prompt)


def _watch(
    ticket: Ticket, generation: Generation, prompt_length: int, *, total: int
) -> Watched:
    policy = generation.policy_file.policies[ticket.policy]
    saes = {monitor.sae for monitor in policy.monitors}
    holds = policy.hold_tokens > 0 and policy.mode == "enforce"
    return Watched(
        id=ticket.guard_id,
        name=ticket.policy,
        generation=generation,
        total_length=total,
        trace=ticket.trace,
        held=Holding(policy.hold_tokens) if holds else None,
        drill=ticket.drill,
        watch=Watch(
            policy,
            columns=generation.column_numbers(ticket.policy),
            thresholds=generation.thresholds(ticket.policy, total),
            prompt_length=prompt_length,
            seen_columns={
                f"{column.score}:{column.sae}": number
                for number, column in enumerate(generation.layout)
                if column.entry is None and column.sae in saes
            },
        ),
    )
