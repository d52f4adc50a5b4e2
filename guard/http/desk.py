"""Who may use which policy, and where an answer's verdicts are found.

The middleware asks a desk; the plugin decides what stands behind it. Runs in
the API server, in the one event loop that also receives the verdicts.
"""

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from guard.constraint import constraint_error
from guard.errors import RequestError
from guard.http.keys import ADMIN_HEADER, ADMIN_VARIABLE, AdminToken, KeyRing
from guard.request import TICKET_SECONDS, GuardField, Ticket, sign_ticket
from guard.verdict import Verdict

if TYPE_CHECKING:
    from guard.policy import PolicyFile

__all__ = [
    "DRILLS_OFF",
    "NO_ADMIN",
    "NO_RELOAD",
    "RELOAD_OFF",
    "Admission",
    "Desk",
    "PolicyDesk",
]

logger = logging.getLogger(__name__)

DRILLS_OFF = (
    f"Drills are off on this server; expected {ADMIN_VARIABLE} where it starts."
)
"""What is said to whoever asks for a drill where there is no administrator."""
NO_ADMIN = f"Drills are an administrator's; expected the token in '{ADMIN_HEADER}'."
"""What is said to whoever asks for one and is none, whether or not it exists."""
RELOAD_OFF = (
    f"Reloads over HTTP are off on this server; expected {ADMIN_VARIABLE} where it "
    "starts."
)
NO_RELOAD = f"A reload is an administrator's; expected the token in '{ADMIN_HEADER}'."


@dataclass(frozen=True, slots=True)
class Admission:
    """A request let in: under which name and policy, and the proof of it."""

    guard_id: str
    """Names the request in headers and verdicts."""
    policy: str
    """Policy it runs under."""
    ticket: str
    """Signed ticket for the engine core."""


class Desk(Protocol):
    """What the middleware asks about a request."""

    admin: AdminToken
    """Who may ask for drills and reloads."""

    def lets_in(self, authorization: str | None) -> bool:
        """Whether the server accepts the key in the `Authorization` header."""

    def admit(
        self,
        field: GuardField,
        *,
        authorization: str | None,
        choices: int,
        admin_token: str | None = None,
        constraint: str | None = None,
    ) -> Admission:
        """Choose the policy of a request, and its drill.

        Args:
            field: What the client asked for.
            authorization: The request's `Authorization` header.
            choices: How many choices the answer should have.
            admin_token: The request's `x-guard-admin-token` header.
            constraint: Field of its body that constrains decoding, if any.

        Raises:
            RequestError: 400 for an unknown policy or drill and for a constraint that
                the policy refuses, 403 for a policy or drill not allowed.
        """

    def verdicts(self, guard_id: str) -> Mapping[int, Verdict]:
        """Return the latest verdict of each choice, by its index in the answer.

        It covers what the engine has handed over so far. With `n` choices for
        each of several prompts, choice `i` of prompt `p` has index `p * n + i`.
        """

    def close(self, guard_id: str) -> None:
        """Forget a request: its answer is over, or its client gone."""

    @property
    def num_open(self) -> int:
        """How many requests were let in, and are not closed."""


@dataclass(frozen=True, slots=True)
class _Terms:
    """What is offered to whom, since the last reload; swapped whole."""

    generation: int
    """Number of the generation of policies."""
    fingerprints: Mapping[str, str]
    """Of every policy there is, by name."""
    public: tuple[str, ...]
    """What a client without a tenant may name, its default first."""
    refusing: frozenset[str]
    """Policies under which no client constrains what is decoded."""
    drills: frozenset[str]
    keys: KeyRing


@dataclass(slots=True)
class _Visit:
    policy: str
    fingerprint: str
    """Of that policy, when the request was let in."""
    generation: int
    verdicts: dict[int, Verdict] = field(default_factory=dict)


class PolicyDesk:
    """The desk of a policy file: a tenant's policies, or what is public."""

    def __init__(
        self,
        policy_file: "PolicyFile",
        fingerprints: Mapping[str, str],
        *,
        secret: bytes,
        max_open: int = 65536,
    ) -> None:
        """Open the desk.

        Args:
            policy_file: Which policies there are, and which are public.
            fingerprints: Policy name to fingerprint; a verdict must match.
            secret: Per-start secret shared with the engine core.
            max_open: Requests open at once; one more is refused.
        """
        self.admin = AdminToken(None)
        """Who may ask for drills and reloads; whoever serves sets it, and `keys`."""
        self._secret = secret
        self._max_open = max_open
        self._visits: dict[str, _Visit] = {}
        self.offer_terms(policy_file, fingerprints, keys=KeyRing((), accepted=()))

    def offer_terms(
        self,
        policy_file: "PolicyFile",
        fingerprints: Mapping[str, str],
        *,
        keys: KeyRing,
        generation: int = 1,
    ) -> None:
        """Let requests in under another policy file from now on.

        Those that were let in before are still held to the terms of then.

        Args:
            policy_file: Which policies there are, and which are public.
            fingerprints: Policy name to fingerprint; a verdict must match.
            keys: Whose API key is whose.
            generation: Number of this generation of policies.
        """
        default = policy_file.default_policy
        others = [p for p in policy_file.public_policies if p != default]
        self._terms = _Terms(
            generation=generation,
            fingerprints=dict(fingerprints),
            public=(default, *others),
            refusing=frozenset(
                name
                for name, policy in policy_file.policies.items()
                if policy.constrained_decoding == "refuse"
            ),
            drills=frozenset(drill.name for drill in policy_file.drills),
            keys=keys,
        )

    @property
    def keys(self) -> KeyRing:
        """Whose key is whose; whoever serves sets it before the first request."""
        return self._terms.keys

    @keys.setter
    def keys(self, keys: KeyRing) -> None:
        self._terms = replace(self._terms, keys=keys)

    @property
    def oldest_generation(self) -> int:
        """Number of the oldest generation that a request in flight began under."""
        begun = (visit.generation for visit in self._visits.values())
        return min(begun, default=self._terms.generation)

    @property
    def num_open(self) -> int:
        """How many requests were let in, and are not closed."""
        return len(self._visits)

    def lets_in(self, authorization: str | None) -> bool:
        """Whether the server accepts the key in the `Authorization` header."""
        return self.keys.lets_in(authorization)

    def offer(self, authorization: str | None) -> tuple[str, ...]:
        """Return the policies that a client may name, its default first."""
        tenant = self.keys.tenant(authorization)
        return self._terms.public if tenant is None else tenant.policies

    def admit(
        self,
        field: GuardField,
        *,
        authorization: str | None,
        choices: int,
        admin_token: str | None = None,
        constraint: str | None = None,
    ) -> Admission:
        """Let a request in under a policy that its client may use.

        Raises:
            RequestError: 400 for an unknown policy or drill and for a constraint that
                the policy refuses, 403 for a policy not offered to it and for a drill
                without the administrator's token, 503 where too many requests are
                open.
        """
        terms = self._terms
        offer = self.offer(authorization)
        policy = offer[0] if field.policy is None else field.policy
        if policy not in terms.fingerprints:
            raise RequestError(
                "The policy in 'guard.policy' does not exist; expected one that "
                "the operator offers, or none for the default.",
                param="guard.policy",
            )
        if policy not in offer:
            raise RequestError(
                "The policy in 'guard.policy' is not open to this client; expected "
                "one that the operator offers, or none for the default.",
                param="guard.policy",
                status=403,
            )
        if field.drill is not None:
            self._check_drill(field.drill, admin_token)
        if constraint is not None and policy in terms.refusing:
            raise constraint_error(constraint)
        if len(self._visits) >= self._max_open:
            raise RequestError(
                f"The server has {self._max_open} requests open; expected fewer. Try "
                "again later.",
                status=503,
            )
        guard_id = f"guard-{secrets.token_hex(16)}"
        expires = time.time() + TICKET_SECONDS
        ticket = Ticket(
            guard_id=guard_id,
            policy=policy,
            trace=field.trace,
            expires=expires,
            choices=choices,
            drill=field.drill,
            generation=terms.generation,
        )
        admission = Admission(guard_id, policy, sign_ticket(ticket, self._secret))
        known = terms.fingerprints[policy]
        self._visits[guard_id] = _Visit(policy, known, terms.generation)
        return admission

    def _check_drill(self, drill: str, admin_token: str | None) -> None:
        # The token first: whoever has none learns nothing of which drills there are.
        if not self.admin.admits(admin_token):
            message = NO_ADMIN if self.admin.is_set else DRILLS_OFF
            raise RequestError(message, param="guard.drill", status=403)
        if drill not in self._terms.drills:
            raise RequestError(
                "The drill in 'guard.drill' does not exist; expected one that GET "
                "/guard/drills lists.",
                param="guard.drill",
            )

    def record(self, guard_id: str, choice: int, verdict: Verdict) -> None:
        """Keep the latest verdict of a choice, until the request is closed.

        A verdict of another policy than the admitted one is not kept, so the
        answer fails closed.

        Args:
            guard_id: From the ticket that the engine core read.
            choice: Index in the answer, as in `Desk.verdicts`.
            verdict: Its running total.
        """
        visit = self._visits.get(guard_id)
        if visit is None:
            return
        found = verdict.policy, verdict.fingerprint
        if found != (visit.policy, visit.fingerprint):
            logger.error("Request %s was judged under another policy.", guard_id)
            visit.verdicts.pop(choice, None)
            return
        visit.verdicts[choice] = verdict

    def verdicts(self, guard_id: str) -> Mapping[int, Verdict]:
        """Return the latest verdict of each choice."""
        visit = self._visits.get(guard_id)
        return {} if visit is None else visit.verdicts

    def close(self, guard_id: str) -> None:
        """Forget a request."""
        self._visits.pop(guard_id, None)
