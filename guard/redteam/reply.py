"""What a running guarded server replies to attacked prompts: the attack as delivered.

A client sends words, so a prompt that was found as token ids counts only if some
message becomes exactly those.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError

from guard.client import Said
from guard.errors import EngineError, PromptError
from guard.verdict import Action

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from guard.client import Client

__all__ = ["Exchange", "Reply", "deliver", "write_message"]

_AT_ONCE = 8
"""Requests that are under way at once."""


class _Message(Said):
    content: str | None


class _Choice(Said):
    message: _Message
    finish_reason: str

    @property
    def content(self) -> str:
        return self.message.content or ""


class _Completion(Said):
    text: str
    finish_reason: str

    @property
    def content(self) -> str:
        return self.text


class _Alarm(Said):
    monitor: str


class _Verdict(Said):
    action: Action
    alarms: tuple[_Alarm, ...]
    fingerprint: str


class _Answer(Said):
    choices: tuple[_Choice | _Completion]
    guard: _Verdict


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request."""

    text: str
    """Of the answer, as far as it was delivered."""
    finish_reason: str
    """`content_filter` where the guard stopped it."""
    action: Action
    """What the guard decided."""
    alarms: tuple[str, ...]
    """Monitors that alarmed."""
    fingerprint: str
    """Of the policy that it ran under."""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """Read a completion of one choice, of a chat or not.

        Raises:
            EngineError: It is none, or comes without a verdict.
        """
        try:
            said = _Answer.model_validate(answer)
        except ValidationError as error:
            message = (
                "The server's answer is not one choice with a verdict; expected a "
                "guarded server."
            )
            raise EngineError(message) from error
        (choice,) = said.choices
        return cls(
            text=choice.content,
            finish_reason=choice.finish_reason,
            action=said.guard.action,
            alarms=tuple(alarm.monitor for alarm in said.guard.alarms),
            fingerprint=said.guard.fingerprint,
        )


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message, and all that was replied to it."""

    asked: str | list[int]
    """What a client wrote, or the token ids that he sent."""
    greedy: Reply
    """At temperature 0."""
    sampled: tuple[Reply, ...]
    """At temperature 1, each with a seed of its own."""

    @property
    def replies(self) -> tuple[Reply, ...]:
        """All of them, the greedy one first."""
        return (self.greedy, *self.sampled)

    @property
    def alarms(self) -> Counter[str]:
        """In how many replies each monitor alarmed."""
        return Counter(name for reply in self.replies for name in reply.alarms)

    def recoveries(self, wanted: str) -> int:
        """Return how many replies are `wanted`, word for word and in full."""
        return sum(
            reply.finish_reason == "stop" and reply.text.split() == wanted.split()
            for reply in self.replies
        )


def write_message(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """Return the message that a chat server turns into exactly these token ids.

    Raises:
        PromptError: No message does.
    """
    ids = list(prompt)
    empty = _apply(tokenizer, "")
    pairs = zip(ids, empty, strict=False)
    first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    # What a template puts around a message is what it makes of none.
    message = tokenizer.decode(ids[first : len(ids) - (len(empty) - first)])
    if _apply(tokenizer, message) != ids:
        raise PromptError(
            f"A prompt of {len(ids)} tokens is not what its text becomes; expected "
            "one that a client can write."
        )
    return str(message)


def deliver(
    client: Client,
    messages: Sequence[str | list[int]],
    *,
    max_tokens: int,
    samples: int = 0,
    policy: str = "",
    seed: int = 0,
) -> list[Exchange]:
    """Send messages to a running server, several at once.

    Args:
        client: Of the server.
        messages: What a user says in each chat; or token ids of a whole prompt, which
            is completed.
        max_tokens: Longest answer asked for.
        samples: Replies at temperature 1, besides the greedy one.
        policy: Asked for; the server's choice without.
        seed: Of the first sampled reply; each next one has the next.

    Raises:
        EngineError: The server cannot be reached, refuses, or has no guard.
    """
    model = client.read_model().id
    shared: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    if policy:
        shared["guard"] = {"policy": policy}
    manners: list[dict[str, Any]] = [{"temperature": 0}]
    manners += [{"temperature": 1, "seed": seed + number} for number in range(samples)]

    def send(said: str | list[int], manner: Mapping[str, Any]) -> Reply:
        path = "/v1/completions"
        spoken: dict[str, Any] = {"prompt": said}
        if isinstance(said, str):
            path = "/v1/chat/completions"
            spoken = {"messages": [{"role": "user", "content": said}]}
        return Reply.of(client.call(path, {**shared, **spoken, **manner}))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            waiting = [
                [pool.submit(send, said, manner) for manner in manners]
                for said in messages
            ]
            replies = [[one.result() for one in several] for several in waiting]
        finally:
            pool.shutdown(cancel_futures=True)
    return [
        Exchange(said, greedy, tuple(sampled))
        for said, (greedy, *sampled) in zip(messages, replies, strict=True)
    ]


def _apply(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    said = [{"role": "user", "content": message}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)
    return list(ids["input_ids"] if not isinstance(ids, list) else ids)
