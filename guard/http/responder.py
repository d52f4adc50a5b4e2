"""One answer on its way to the client, with its verdicts written in.

A whole answer is held until it can be judged as one; a stream is passed event
by event. An answer that nobody vouches for becomes an error.
"""

import json
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from guard.http.desk import Admission, Desk
from guard.http.openai import (
    count_choices,
    dump_json,
    error_body,
    guard_object,
    withhold,
)
from guard.http.route import Kind
from guard.http.stream import NO_VERDICT, GuardedStream
from guard.verdict import Verdict

__all__ = ["MAX_ANSWER_BYTES", "Responder"]

logger = logging.getLogger(__name__)


MAX_ANSWER_BYTES = 256 << 20
"""Largest answer in one piece that is put together."""


class _EndedError(OSError):
    """The answer is over. An OSError, as if the client had hung up."""


class Responder:
    """Writes the verdicts of one request into its answer, as the answer passes."""

    def __init__(
        self,
        send: Send,
        *,
        desk: Desk,
        admission: Admission,
        kind: Kind,
        body: Mapping[str, Any],
    ) -> None:
        """Start an answer.

        Args:
            send: Where the answer goes.
            desk: Knows the verdicts.
            admission: Names the request and its policy.
            kind: Which of the two shapes the answer has.
            body: The request's body, for what the answer must contain.
        """
        self.failed = False
        """Whether the answer was replaced or cut because a verdict was missing."""
        self.client_is_gone = False
        """Whether nobody reads the answer; whoever listens to the client sets it."""
        self._send = send
        self._desk = desk
        self._admission = admission
        self._kind = kind
        self._mode: Literal["pass", "whole", "stream"] = "pass"
        self._start: Message = {}
        self._body = bytearray()
        self._stream = GuardedStream(
            self._verdicts,
            kind=kind,
            choices=count_choices(body, kind),
            guard_id=admission.guard_id,
            model=str(body.get("model") or ""),
        )

    async def send(self, message: Message) -> None:
        """Take a message of the application and send on what may leave."""
        if self.failed:
            raise _EndedError("The answer was ended by the guard.")
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._mode == "pass":
            await self._send(message)
        elif message["type"] != "http.response.body":
            # File paths, trailers and the like could carry text past the guard.
            logger.warning("Dropped a message of type %s.", message["type"])
        elif self._mode == "stream":
            await self._send_chunk(message)
        else:
            self._body += message.get("body", b"")
            if len(self._body) > MAX_ANSWER_BYTES:
                # No JSON any more: what is sent is that there is no verdict.
                self._body.clear()
                await self._send_whole()
            elif not message.get("more_body", False):
                await self._send_whole()

    async def _begin(self, message: Message) -> None:
        headers = MutableHeaders(raw=list(message.get("headers", [])))
        headers["x-guard-id"] = self._admission.guard_id
        headers["x-guard-policy"] = self._admission.policy
        self._start = {**message, "headers": headers.raw}
        if not 200 <= message["status"] < 300:
            await self._send(self._start)
            return
        self._mode = "whole"
        # A compressed answer cannot be judged; as a whole body it fails to parse.
        if headers.get("content-encoding", "identity") != "identity":
            return
        if headers.get("content-type", "").lower().startswith("text/event-stream"):
            self._mode = "stream"
            del headers["content-length"]
            await self._send(self._start)

    def _verdicts(self) -> Mapping[int, Verdict]:
        return self._desk.verdicts(self._admission.guard_id)

    async def _send_chunk(self, message: Message) -> None:
        more = message.get("more_body", False)
        chunk = self._stream.feed(message.get("body", b""))
        if not more:
            chunk += self._stream.close()
        self.failed = self._stream.failed
        if chunk or not more or self.failed:
            await self._send(
                {
                    "type": "http.response.body",
                    "body": chunk,
                    "more_body": more and not self.failed,
                }
            )

    async def _send_whole(self) -> None:
        """Send a complete answer with its verdict, or an error in its place."""
        headers = MutableHeaders(raw=self._start["headers"])
        try:
            answer = json.loads(self._body)
            action = _write_verdicts(answer, self._verdicts(), self._kind)
            body = dump_json(answer)
        except (ValueError, KeyError, TypeError, RecursionError):
            if self.client_is_gone:
                return  # vLLM writes `null` then, which is no failure of the guard
            logger.exception("Request %s has no verdict.", self._admission.guard_id)
            self.failed = True
            self._start["status"] = 500
            body = error_body(NO_VERDICT, status=500)
            headers["content-type"] = "application/json"
            del headers["content-encoding"]
        else:
            headers["x-guard-action"] = action
        headers["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})


def _write_verdicts(
    answer: MutableMapping[str, Any], verdicts: Mapping[int, Verdict], kind: Kind
) -> str:
    """Write the verdict of each choice into a whole answer.

    Returns:
        The worst action.

    Raises:
        KeyError: A choice has no verdict, or the answer no choices.
        ValueError: The answer has no choice at all.
    """
    covered = {}
    for choice in answer["choices"]:
        verdict = covered[choice["index"]] = verdicts[choice["index"]]
        if verdict.action == "block":
            withhold(choice, kind)
    answer["guard"] = guard_object(covered)
    return str(answer["guard"]["action"])
