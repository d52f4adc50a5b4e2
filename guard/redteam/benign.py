"""What benign users pay for a policy: exactness, false alarms, time."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from guard.client import ask_for
from guard.redteam.certificate import Benign, Rate
from guard.redteam.subject import encode
from guard.redteam.target import answer

if TYPE_CHECKING:
    from guard.client import Client
    from guard.prompt import Prompt
    from guard.redteam.subject import Subject

__all__ = ["measure_benign"]

TIMED = 30
"""Requests whose time is taken, under either policy, one after the other."""


def measure_benign(subject: Subject, client: Client | None) -> Benign:
    """Answer benign prompts with the guard and without.

    Args:
        subject: With the prompts.
        client: Of a server that runs the policy; None takes no time.

    Raises:
        EngineError: The server does not answer.
    """
    target, policy = subject.target, subject.policy
    prompts = [encode(subject.tokenizer, one) for one in subject.benign]
    free = answer(target, prompts, clamp=None)
    held = answer(target, prompts, clamp=target.clamp)
    runs = subject.record(held)
    receiver = subject.receiver(policy)
    stopped = [
        receiver.deliver(dialogue, run, eos=target.eos).blocked_at is not None
        for dialogue, run in zip(held, runs, strict=True)
    ]
    # Others may be what the policy is there to refuse.
    harmless = [one.label == 0 for one in subject.benign]
    answers = zip(free, held, harmless, strict=True)
    same = [
        one == other for one, other, counts in answers if counts or not any(harmless)
    ]
    seconds = _take_time(subject, client) if client is not None else (None, None)
    return Benign(
        exact=Rate.of(sum(same), len(same)),
        false_alarms=Rate.of(sum(stopped), len(stopped)),
        promised=subject.target_fpr,
        hold_tokens=policy.hold_tokens,
        seconds_guarded=seconds[0],
        seconds_open=seconds[1],
    )


def _take_time(subject: Subject, client: Client) -> tuple[float, float | None]:
    """Return median seconds of a request, under the policy and an idle one.

    None for an idle policy that there is not, or that this client may not name.
    """
    may_name = client.read_status().policies
    idle = next(
        (
            name
            for name, policy in subject.policy_file.policies.items()
            if name in may_name and not policy.clamps and not policy.monitors
        ),
        None,
    )
    taken: dict[str, list[float]] = {subject.name: []}
    if idle is not None:
        taken[idle] = []
    model = client.read_model().id
    for prompt in subject.benign[:TIMED]:
        for name, seconds in taken.items():
            seconds.append(_time_one(client, model, prompt, name))
    medians = [statistics.median(seconds) for seconds in taken.values()]
    return medians[0], medians[1] if idle is not None else None


def _time_one(client: Client, model: str, prompt: Prompt, policy: str) -> float:
    route, body = ask_for(model, prompt, guard={"policy": policy})
    began = time.monotonic()
    client.call(route, body)
    return time.monotonic() - began
