"""All state the guard keeps in one process: enter, get, reset.

Every process of a server enters on its own and reads the same policy file; the first
one leaves its fingerprint and a secret in the environment, which the others inherit.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry

from guard.calibration import Calibration, policy_thresholds
from guard.certificate import Attestation, load_certificates
from guard.check import check_calibrations, load_calibrations
from guard.drill import RecoveryEdit, load_edits
from guard.errors import GuardError, PolicyError
from guard.fingerprint import file_fingerprint, fingerprint
from guard.hook import HookPoint
from guard.monitor import Column, list_columns
from guard.policy import PolicyFile, load_policy
from guard.request import (
    TICKET_KEY,
    TICKET_SECONDS,
    Ticket,
    TicketBook,
    Trace,
    sign_ticket,
)
from vllm_guard import compat
from vllm_guard.recorder import Recorder

if TYPE_CHECKING:
    from vllm_guard.board import Board
    from vllm_guard.rows import StepRows

__all__ = [
    "FAULT_VARIABLE",
    "POLICY_VARIABLE",
    "RECORD_VARIABLE",
    "Context",
    "cache_salt",
    "enter",
    "get",
    "get_board",
    "reporting",
    "reset",
    "sampling_args",
]

logger = logging.getLogger(__name__)

POLICY_VARIABLE = "GUARD_POLICY"
"""Path of the policy file; without it the plugin is inert."""
SECRET_VARIABLE = "GUARD_SECRET"
"""Hex secret of this start, with which tickets are signed."""
FINGERPRINT_VARIABLE = "GUARD_FINGERPRINT"
"""Fingerprint of the policy file as the first process read it."""
RECORD_VARIABLE = "GUARD_RECORD"
"""Set where monitors are not run but what they would see is recorded."""
FAULT_VARIABLE = "GUARD_FAULT_FILE"
"""File into which a process that cannot start writes its one line."""


@dataclass(slots=True)
class Context:
    """What this process knows."""

    policy_file: PolicyFile
    fingerprint: str
    """Of the whole policy file."""
    fingerprints: dict[str, str]
    """Of each policy, by name."""
    columns: tuple[Column, ...]
    calibrations: dict[str, Calibration]
    """By path, as the monitors name them."""
    certificates: dict[str, Attestation]
    """Of those policies that have one, by name."""
    edits: dict[str, RecoveryEdit]
    """Of the drills, by name, in their order."""
    secret: bytes
    hook_points: tuple[HookPoint, ...] = ()
    """Where the model is hooked."""
    recorder: Recorder | None = None
    """In a worker, where requests are recorded and not monitored."""
    holds: bool = False
    """Whether any policy keeps tokens back."""
    rows: "StepRows | None" = None
    """In a worker: the row map, once the model is loaded."""
    board: "Board | None" = None
    """Where outputs are processed: verdicts and metrics."""
    tickets: TicketBook = field(default_factory=TicketBook)
    """In the engine core: which tickets were used."""
    uncounted: Counter[str] = field(default_factory=Counter)
    """In the engine core: tokens and errors not yet told to an API server."""
    hook_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1024))
    """In the engine core: timed calls of hooks not yet told either."""
    _thresholds: dict[tuple[str, tuple[int, ...]], tuple[float, ...]] = field(
        default_factory=dict
    )
    """By policy and bucket of each calibration."""

    def slot(self, policy: str) -> int:
        """Return the slot of a policy; 0 is no policy at all."""
        return list(self.policy_file.policies).index(policy) + 1

    def thresholds(self, policy: str, total_length: int) -> tuple[float, ...]:
        """Return the threshold of each monitor of a policy, in their order.

        Args:
            policy: Its name.
            total_length: Most tokens the request can have, prompt and output.
        """
        # Asked for every request: what is shared how is worked out once.
        buckets = tuple(c.bucket(total_length) for c in self.calibrations.values())
        if (policy, buckets) not in self._thresholds:
            entry = self.policy_file.policies[policy]
            found = policy_thresholds(entry, self.calibrations, total_length)
            ordered = tuple(found[monitor.name] for monitor in entry.monitors)
            self._thresholds[policy, buckets] = ordered
        return self._thresholds[policy, buckets]

    def drill(self, name: str | None) -> int:
        """Return the number of a drill; 0 is no drill at all."""
        return 0 if name is None else list(self.edits).index(name) + 1


_context: Context | None = None
_told_inert = False


def enter() -> bool:
    """Read the policy file that `GUARD_POLICY` names, once.

    Returns:
        Whether this process is guarded.

    Raises:
        GuardError: The file or what it names is not usable, or changed while the
            server started.
    """
    global _context, _told_inert
    if _context is not None:
        return True
    path = os.environ.get(POLICY_VARIABLE)
    if not path:
        if not _told_inert:
            logger.info("vllm-guard is inert: %s is not set.", POLICY_VARIABLE)
            _told_inert = True
        return False
    compat.check_version()
    policy_file = load_policy(Path(path))
    recorder = None
    hook_points = policy_file.hook_points
    if os.environ.get(RECORD_VARIABLE):
        # Monitors that are not calibrated yet: only their places are of interest.
        policy_file = policy_file.without_monitors()
        recorder = Recorder()
    certificates = load_certificates(policy_file)
    found = file_fingerprint(policy_file)
    _check_unchanged(path, found)
    if not os.environ.get(SECRET_VARIABLE):
        os.environ[SECRET_VARIABLE] = secrets.token_hex(32)
    calibrations = load_calibrations(policy_file)
    # Now, and not at a request, where a calibration does not fit.
    check_calibrations(policy_file, calibrations)
    _context = Context(
        policy_file=policy_file,
        fingerprint=found,
        fingerprints={
            name: fingerprint(policy_file, name) for name in policy_file.policies
        },
        columns=list_columns(policy_file),
        calibrations=calibrations,
        certificates=certificates,
        edits=load_edits(policy_file),
        secret=bytes.fromhex(os.environ[SECRET_VARIABLE]),
        hook_points=tuple(map(HookPoint.parse, hook_points)),
        recorder=recorder,
        holds=any(policy.hold_tokens for policy in policy_file.policies.values()),
    )
    return True


def _check_unchanged(path: str, found: str) -> None:
    """Hold a file's fingerprint against the one the first process left."""
    if found != os.environ.setdefault(FINGERPRINT_VARIABLE, found):
        message = (
            f"{path}: the policy file changed while the server started; "
            "expected every process to read the same one. Start again."
        )
        raise PolicyError(message)


def get() -> Context:
    """Return the state of this process.

    Raises:
        RuntimeError: Nothing was entered; the caller should not have been installed.
    """
    if _context is None:
        message = "vllm-guard is inert in this process; expected `enter()` before."
        raise RuntimeError(message)
    return _context


def get_board(registry: CollectorRegistry = REGISTRY) -> "Board":
    """Return the board of this process, opened when it is first asked for.

    Args:
        registry: Where its metrics are registered, if it is opened now.
    """
    # Only where answers are handed out: a worker needs neither HTTP nor metrics.
    from vllm_guard.board import Board

    state = get()
    if state.board is None:
        state.board = Board(
            state.policy_file,
            state.fingerprints,
            secret=state.secret,
            certificates={name: one.id for name, one in state.certificates.items()},
            registry=registry,
        )
    return state.board


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Leave a fault's one line where `guard serve` finds it, below the stack traces."""
    try:
        yield
    except GuardError as error:
        if path := os.environ.get(FAULT_VARIABLE):
            try:
                Path(path).write_text(str(error), encoding="utf-8")
            except OSError as full:  # the line still stands in the log
                logger.warning("%s (It could not be left for `guard serve`.)", full)
        raise


def reset() -> None:
    """Forget everything this process knows, the environment included."""
    global _context
    _context = None
    os.environ.pop(SECRET_VARIABLE, None)
    os.environ.pop(FINGERPRINT_VARIABLE, None)
    os.environ.pop(RECORD_VARIABLE, None)


def sampling_args(
    policy: str, *, trace: Trace, drill: str | None = None
) -> dict[str, Any]:
    """Return `extra_args` with a ticket for `policy`, and for a drill.

    Raises:
        PolicyError: The policy file has no such policy or drill.
    """
    context = get()
    if policy not in context.policy_file.policies:
        known = ", ".join(context.policy_file.policies)
        message = f"Unknown policy {policy!r}; expected one of {known}."
        raise PolicyError(message)
    if drill is not None and drill not in context.edits:
        known = ", ".join(context.edits) or "none"
        message = f"Unknown drill {drill!r}; expected one of {known}."
        raise PolicyError(message)
    ticket = Ticket(
        guard_id=uuid.uuid4().hex,
        policy=policy,
        trace=trace,
        expires=time.time() + TICKET_SECONDS,
        drill=drill,
    )
    return {TICKET_KEY: sign_ticket(ticket, context.secret)}


def cache_salt(policy_fingerprint: str, client_salt: str | None) -> str:
    """Return the salt under which a request's KV blocks are shared.

    Equal policies share a prefix, different ones never do; a client's own salt only
    ever narrows that.
    """
    parts = f"{compat.PLUGIN_VERSION}|{policy_fingerprint}|{client_salt or ''}"
    return hashlib.sha256(parts.encode()).hexdigest()
