"""The guard in front of an OpenAI-compatible application, as pure ASGI.

`GuardMiddleware` lets requests in and sends tickets along; one `Responder`
per request writes the verdicts into the answer. An answer that nobody vouches
for becomes an error. Runs in the API server, outermost.
"""

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.constraint import find_constraint
from guard.errors import RequestError
from guard.http.desk import Admission, Desk
from guard.http.keys import ADMIN_HEADER
from guard.http.openai import (
    check_sendable,
    count_choices,
    error_body,
    parse_body,
    refuse_unsupported,
    seal_body,
)
from guard.http.responder import Responder
from guard.http.route import Decision, Kind, decide_route, route_path
from guard.metrics import Metrics
from guard.request import read_field

__all__ = ["MAX_BODY_BYTES", "GuardMiddleware", "send_error"]

MAX_BODY_BYTES = 64 << 20
"""Largest request body that is read; images travel in it."""

UNAUTHORIZED = "Unauthorized"
"""What the engine's own server says to a key that it does not know."""


class GuardMiddleware:
    """Guards two routes of an application and refuses those it cannot guard."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        desk: Desk,
        metrics: Metrics | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """Stand in front of `app`.

        Args:
            app: The application; its router sees the request that goes on.
            desk: Decides about requests and knows their verdicts.
            metrics: Count the answers that failed closed; None where nobody scrapes.
            max_body_bytes: Above it a guarded request is answered 413.
        """
        self.app = app
        self._desk = desk
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refused or guarded request; pass everything else on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        path = route_path(scope["path"], scope.get("root_path", ""))
        decision = decide_route(path, scope.get("method", "GET"))
        if decision == "pass":
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and not self._lets_in(scope, decision):
            # Before anything else is said: an unknown key learns nothing.
            await send_error(send, UNAUTHORIZED, status=401)
        elif decision == "private":
            await self.app(scope, receive, send)
        elif decision == "refuse":
            await _refuse_route(scope, receive, send)
        else:
            await self._guard(scope, receive, send, kind=decision)

    def _lets_in(self, scope: Scope, decision: Decision) -> bool:
        """Whether a key opens this route, or the administrator's token the guard's."""
        if self._desk.lets_in(_authorization(scope)):
            return True
        token = Headers(scope=scope).get(ADMIN_HEADER)
        return decision == "private" and self._desk.admin.admits(token)

    async def _guard(
        self, scope: Scope, receive: Receive, send: Send, *, kind: Kind
    ) -> None:
        headers = Headers(scope=scope)
        try:
            raw = await self._read_body(headers, receive)
            if raw is None:
                return
            body = parse_body(raw)
            admission = None if body is None else self._admit(scope, body, kind)
        except _TooLargeError as error:
            await send_error(send, str(error), status=413)
            return
        except RequestError as error:
            await send_error(
                send, error.message, status=error.status, param=error.param
            )
            return
        if body is None or admission is None:
            await self.app(scope, _replay(raw, receive), send)
            return
        self._show_open()
        responder = Responder(
            send, desk=self._desk, admission=admission, kind=kind, body=body
        )
        try:
            sealed = seal_body(body, admission.ticket)
            client = _Client(receive, responder.send)
            resealed = _reseal(scope, len(sealed)), _replay(sealed, client.receive)
            del raw, body, sealed
            await self.app(*resealed, client.send)
        except Exception:
            # Ended by the responder: the application only learnt it this way.
            if not responder.failed:
                raise
        finally:
            if responder.failed and self._metrics is not None:
                self._metrics.count_error("http")
            self._desk.close(admission.guard_id)
            self._show_open()

    def _show_open(self) -> None:
        if self._metrics is not None:
            self._metrics.show_open(self._desk.num_open)

    def _admit(self, scope: Scope, body: Mapping[str, Any], kind: Kind) -> Admission:
        refuse_unsupported(body)
        field = read_field(body.get("guard"))
        check_sendable(body)
        return self._desk.admit(
            field,
            authorization=_authorization(scope),
            choices=count_choices(body, kind),
            admin_token=Headers(scope=scope).get(ADMIN_HEADER),
            constraint=find_constraint(body),
        )

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the whole body, or None when the client is gone.

        Raises:
            _TooLargeError: There is more of it than allowed, or it says so.
        """
        too_large = _TooLargeError(
            f"The body is too large; expected at most {self._max_body_bytes} bytes."
        )
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_body_bytes:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


def _authorization(scope: Scope) -> str | None:
    return Headers(scope=scope).get("authorization")


class _Client:
    """Who waits for an answer, until he leaves.

    What the application says then is no answer: `null` in place of a whole one.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._has_left = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._has_left |= message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if not self._has_left:
            await self._send(message)


class _TooLargeError(Exception):
    """A body above the limit."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives this body once, then what the client does."""
    unread = [body]

    async def replay() -> Message:
        if unread:
            # Not kept: an answer may take long, and a body be large.
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay


def _reseal(scope: Scope, length: int) -> Scope:
    """Return the scope for a body that was written anew, to be answered in plain.

    The administrator's token has done its work, and nobody behind needs to see it.
    """
    headers = MutableHeaders(raw=list(scope["headers"]))
    hop = ("transfer-encoding", "content-encoding", "accept-encoding")
    for name in (*hop, ADMIN_HEADER):
        del headers[name]
    headers["content-length"] = str(length)
    return {**scope, "headers": headers.raw}


async def _refuse_route(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    text = (
        "This route is not supported by guard yet; expected /v1/chat/completions "
        "or /v1/completions."
    )
    await send_error(send, text, status=400)


async def send_error(
    send: Send, message: str, *, status: int, param: str | None = None
) -> None:
    """Answer with an error body as OpenAI shapes it."""
    body = error_body(message, status=status, param=param)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
