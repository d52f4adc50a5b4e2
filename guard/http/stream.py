"""The verdict written into a stream of events, without holding one back.

A state machine over bytes, with no I/O: feed it what the application sends,
send on what it returns. Events that say nothing about a finish leave as they
came.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from guard.http.openai import (
    carries_text,
    dump_json,
    error_body,
    guard_object,
    withhold,
)
from guard.http.route import Kind
from guard.http.sse import DONE, Event, EventReader, write_event
from guard.verdict import Verdict

__all__ = ["MAX_EVENT_BYTES", "NO_VERDICT", "GuardedStream"]

NO_VERDICT = "guard: no verdict for this response"
"""What a client reads where the guard cannot vouch for an answer."""

MAX_EVENT_BYTES = 64 << 20
"""Largest event of a stream that is put together."""

_OBJECTS: dict[Kind, str] = {
    "chat": "chat.completion.chunk",
    "completion": "text_completion",
}

logger = logging.getLogger(__name__)


class GuardedStream:
    """One streamed answer on its way to the client.

    The chunk that finishes the last open choice gets the `guard` object. A
    choice that was blocked before its first token is finished here, since the
    engine's server says nothing about a choice without tokens.
    """

    def __init__(
        self,
        verdicts: Callable[[], Mapping[int, Verdict]],
        *,
        kind: Kind,
        choices: int,
        guard_id: str,
        model: str,
    ) -> None:
        """Start an answer.

        Args:
            verdicts: Asks for the latest verdict of each choice.
            kind: Which of the two shapes the chunks have.
            choices: How many choices the request asked for.
            guard_id: Names the request.
            model: Model name, for chunks that are written here.
        """
        self.failed = False
        """Whether the stream was ended because a verdict was missing."""
        self._verdicts = verdicts
        self._kind = kind
        self._choices = choices
        self._guard_id = guard_id
        self._reader = EventReader()
        self._vouched: set[int] = set()
        self._settled = False
        self._seen: set[int] = set()
        self._finished: set[int] = set()
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._head = {
            "id": f"{prefix}-{guard_id}",
            "object": _OBJECTS[kind],
            "created": int(time.time()),
            "model": model,
        }

    def feed(self, chunk: bytes) -> bytes:
        """Return what to send for these bytes of the application."""
        passed = b"".join([self._pass(event) for event in self._reader.feed(chunk)])
        if self._reader.pending > MAX_EVENT_BYTES and not self.failed:
            return passed + self._fail("an event without an end")
        return passed

    def close(self) -> bytes:
        """Return what to send when the application has sent everything."""
        return b"".join([self._pass(event) for event in self._reader.close()])

    def _pass(self, event: Event) -> bytes:
        if self.failed:
            return b""
        if event.data is None:
            return event.raw
        if event.data.strip() == DONE:
            return self._settle(event.raw)
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            return self._fail("an event that is no JSON")
        if not isinstance(chunk, dict):
            return self._fail("an event that is no object")
        if "error" in chunk:
            self._settled = True
            return event.raw
        choices = chunk.get("choices")
        if not choices:
            # The usage chunk, which comes after every choice.
            return self._settle(event.raw)
        return self._rewrite(chunk, choices, event.raw)

    def _rewrite(
        self, chunk: dict[str, Any], choices: list[dict[str, Any]], raw: bytes
    ) -> bytes:
        """Return a chunk with choices, changed where it finishes one."""
        self._head = {key: chunk.get(key, value) for key, value in self._head.items()}
        self._seen.update(choice["index"] for choice in choices)
        said = {choice["index"] for choice in choices if carries_text(choice)}
        if said - self._vouched:
            # Not one word leaves for a choice that nobody judged.
            if not said <= self._verdicts().keys():
                return self._fail("text without a verdict")
            self._vouched |= said
        done = [choice for choice in choices if choice.get("finish_reason")]
        if not done:
            return raw
        verdicts = self._verdicts()
        for choice in done:
            verdict = verdicts.get(choice["index"])
            if verdict is None:
                return self._fail("a finished choice without a verdict")
            if verdict.action == "block":
                withhold(choice, self._kind)
            self._finished.add(choice["index"])
        if len(self._finished) >= self._choices:
            self._settled = True
            chunk["guard"] = guard_object(
                {index: verdicts[index] for index in self._finished}
            )
        return _write(chunk)

    def _settle(self, raw: bytes) -> bytes:
        """Return what is still owed before the usage chunk or the end, and `raw`."""
        if self._settled:
            return raw
        self._settled = True
        verdicts = self._verdicts()
        blocked = [
            index
            for index in sorted(verdicts)
            if index not in self._finished and verdicts[index].action == "block"
        ]
        covered = self._seen | set(blocked)
        if not covered or not covered <= verdicts.keys():
            return self._fail("an answer without a verdict")
        chunks = [{**self._head, "choices": [self._refuse(i)]} for i in blocked]
        if not chunks:
            chunks = [{**self._head, "choices": []}]
        chunks[-1]["guard"] = guard_object({i: verdicts[i] for i in covered})
        return b"".join([_write(chunk) for chunk in chunks]) + raw

    def _refuse(self, index: int) -> dict[str, Any]:
        """Return the only chunk of a choice that was blocked before its first token."""
        choice: dict[str, Any] = {"index": index}
        if self._kind == "chat":
            choice["delta"] = {}
        else:
            choice["text"] = ""
        choice |= {"logprobs": None, "stop_reason": "guard:block"}
        withhold(choice, self._kind)
        return choice

    def _fail(self, what: str) -> bytes:
        """End the stream with an error, for `what` came without a verdict."""
        self.failed = True
        logger.error("Request %s ended: %s.", self._guard_id, what)
        error = error_body(NO_VERDICT, status=500).decode()
        return write_event(error) + write_event(DONE)


def _write(chunk: Mapping[str, Any]) -> bytes:
    return write_event(dump_json(chunk).decode())
