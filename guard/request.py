"""What an engine must tell the guard about a request, and how it is told.

A client names a policy in the `guard` field of its request body. The API
server decides whether it may, and writes the decision into a signed ticket;
the engine core believes the ticket and nothing else. Runs in both processes.
"""

import base64
import hmac
import json
from dataclasses import astuple, dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import RequestError

__all__ = [
    "TICKET_KEY",
    "TICKET_SECONDS",
    "Fault",
    "GuardField",
    "Ticket",
    "TicketBook",
    "Trace",
    "read_field",
    "read_ticket",
    "sign_ticket",
]

TICKET_KEY = "guard_ticket"
"""Key of the ticket inside `vllm_xargs`, which the engine calls `extra_args`."""

TICKET_SECONDS = 600.0
"""How long a ticket lives: it is read when the engine takes the request in, long before
the request is scheduled. A leaked one must not last."""

MAX_TICKETS = 65536
"""Tickets that an engine remembers at once."""

Trace = Literal["none", "summary", "tokens"]
"""How much of the readings a client asks to see."""

Fault = Literal["unguarded", "unscored", "not_finite"]
"""Why nobody can vouch for a request: a token missed its hooks, a cached one's score is
not there, or what the model made of a token is not finite."""

_PREFIX = "g1"
_MIN_SECRET_BYTES = 16
_SHOWN_CHARS = 64


@dataclass(frozen=True, slots=True)
class Ticket:
    """The server's decision about one request, as the engine core receives it."""

    guard_id: str
    """Names the HTTP request, in verdicts and in the `x-guard-id` header."""
    policy: str
    """Name of the policy the request runs under."""
    trace: Trace = "none"
    """How much of the readings the client asked to see."""
    expires: float = 0.0
    """Unix time in seconds from which on the ticket is worthless."""
    choices: int | None = None
    """How many of the engine's requests it lets in: the answer's choices. None is any
    number, for an operator's own use offline."""
    drill: str | None = None
    """Name of the fire drill that each of them is; an administrator asked for it."""
    generation: int | None = None
    """Number of the generation of policies that was current when it was signed; None is
    whichever is when it is read."""


def sign_ticket(ticket: Ticket, secret: bytes) -> str:
    """Write a ticket as one url-safe string that only `secret` can produce.

    The string is flat because the engine refuses nested values in `vllm_xargs`.

    Raises:
        ValueError: The secret is too short to keep anybody out.
    """
    if len(secret) < _MIN_SECRET_BYTES:
        raise ValueError(
            f"The ticket secret has {len(secret)} bytes; "
            f"expected at least {_MIN_SECRET_BYTES}."
        )
    fields = list(astuple(ticket))
    payload = f"{_PREFIX}.{_encode(json.dumps(fields).encode())}"
    return f"{payload}.{_sign(payload, secret)}"


def read_ticket(text: object, secret: bytes, *, now: float) -> Ticket | None:
    """Return the ticket in `text`, or None for whatever was not signed here.

    Never raises: altered, expired, foreign and malformed are all the same
    answer, and the caller falls back on the default policy.

    Args:
        text: What a request carried under `TICKET_KEY`.
        secret: The per-start secret it must have been signed with.
        now: Unix time in seconds.
    """
    if not isinstance(text, str) or not text.isascii():
        return None
    payload, _, signature = text.rpartition(".")
    # The text is compared, not the bytes it decodes to: base64 has several
    # spellings of the same bytes, and only ours is ours.
    if not hmac.compare_digest(signature.encode(), _sign(payload, secret).encode()):
        return None
    try:
        fields = json.loads(base64.urlsafe_b64decode(payload.split(".")[1]))
        guard_id, policy, trace, expires, choices, drill, generation = fields
    except (ValueError, IndexError, TypeError):
        return None
    if not (isinstance(guard_id, str) and isinstance(policy, str)):
        return None
    if trace not in get_args(Trace) or not isinstance(expires, float):
        return None
    if not (isinstance(choices, int | None) and isinstance(drill, str | None)):
        return None
    if not isinstance(generation, int | None):
        return None
    # Written so that an expiry of NaN has expired.
    ticket = Ticket(guard_id, policy, trace, expires, choices, drill, generation)
    return ticket if now < expires else None


class TicketBook:
    """Which tickets were shown to this engine, and how often.

    A ticket lets in as many requests as its answer has choices; one that is shown
    again, copied from a log perhaps, lets in nobody. Each engine of a data-parallel
    server keeps its own book.
    """

    def __init__(self, *, max_tickets: int = MAX_TICKETS) -> None:
        """Open an empty book.

        Args:
            max_tickets: Remembered at once. Beyond it the oldest is forgotten, and
                whatever expires no later than it lets in nobody any more.
        """
        self._max_tickets = max_tickets
        self._shown: dict[str, tuple[float, int]] = {}
        self._void_until = 0.0

    def redeem(self, text: object, secret: bytes, *, now: float) -> Ticket | None:
        """Return the ticket in `text` if it was signed here and is not used up.

        Args:
            text: What a request carried under `TICKET_KEY`.
            secret: The per-start secret it must have been signed with.
            now: Unix time in seconds.
        """
        ticket = read_ticket(text, secret, now=now)
        if ticket is None or ticket.choices is None:
            return ticket
        self._forget(now)
        _, shown = self._shown.get(ticket.guard_id, (0.0, 0))
        if shown >= ticket.choices or ticket.expires <= self._void_until:
            return None
        if not shown and len(self._shown) >= self._max_tickets:
            expires, _ = self._shown.pop(next(iter(self._shown)))
            self._void_until = max(self._void_until, expires)
        self._shown[ticket.guard_id] = ticket.expires, shown + 1
        return ticket

    def _forget(self, now: float) -> None:
        """Drop tickets that have expired; they stand in about that order."""
        while self._shown:
            oldest = next(iter(self._shown))
            expires, _ = self._shown[oldest]
            if now < expires:
                return
            del self._shown[oldest]


class GuardField(BaseModel):
    """The `guard` object of a request body; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    policy: str | None = Field(default=None, min_length=1, max_length=128)
    """Name of the policy asked for; None leaves the choice to the server."""
    trace: Trace = "none"
    """How much of the readings the answer should show."""
    drill: str | None = Field(default=None, min_length=1, max_length=128)
    """Name of a fire drill; None, as for all but an administrator, is no drill."""


def read_field(value: object) -> GuardField:
    """Validate what a request body carries under `guard`; None means nothing asked.

    Raises:
        RequestError: 400 with the offending field as `param`.
    """
    if value is None:
        return GuardField()
    if not isinstance(value, dict):
        raise RequestError(
            '\'guard\' is not an object; expected e.g. {"policy": "NAME"}.',
            param="guard",
        )
    try:
        field = GuardField.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:_SHOWN_CHARS]
        raise RequestError(
            f"'guard.{name}' is not valid: {first['msg']}; expected an object with "
            "'policy' (a name), 'trace' ('none' or 'summary') and 'drill' (a name).",
            param=f"guard.{name}",
        ) from error
    if field.trace == "tokens":
        raise RequestError(
            "'guard.trace' of 'tokens' is not supported yet; expected 'none' or "
            "'summary'.",
            param="guard.trace",
        )
    return field


def _sign(payload: str, secret: bytes) -> str:
    return _encode(hmac.digest(secret, payload.encode(), "sha256"))


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode("ascii")
