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

from guard.errors import GuardError, PolicyError
from guard.generation import Generation, load_generation
from guard.hook import HookPoint
from guard.policy import load_policy
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
    from vllm_guard.reload import ReloadBook
    from vllm_guard.rows import StepRows

__all__ = [
    "AUDIT_VARIABLE",
    "FAULT_VARIABLE",
    "POLICY_VARIABLE",
    "RECORD_VARIABLE",
    "SERVE_VARIABLE",
    "WATCH_VARIABLE",
    "Context",
    "cache_salt",
    "enter",
    "get",
    "get_board",
    "keep_warnings",
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
SERVE_VARIABLE = "GUARD_SERVE"
"""Set under `guard serve`, where a hangup means a reload and ends no process."""
WATCH_VARIABLE = "GUARD_WATCH"
"""Set where the policy file is watched, and reloaded when it changes."""
AUDIT_VARIABLE = "GUARD_AUDIT_LOG"
"""File into which API servers write what was flagged or blocked; none without it."""
FAULT_VARIABLE = "GUARD_FAULT_FILE"
"""File into which a process that cannot start writes its one line."""


@dataclass(slots=True)
class Context:
    """What this process knows."""

    start: Generation
    """What this process began with, for which everything was laid out."""
    current: Generation
    """What a request runs under that begins now."""
    secret: bytes
    hook_points: tuple[HookPoint, ...] = ()
    """Where the model is hooked."""
    recorder: Recorder | None = None
    """In a worker, where requests are recorded and not monitored."""
    previous: Generation | None = None
    """What requests may still run under that began before the last reload."""
    staged: Generation | None = None
    """What a reload has prepared, and not yet made current."""
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
    reloads: "ReloadBook | None" = None
    """In the engine core: what it knows of reloads."""

    def find(self, number: int | None) -> Generation | None:
        """Return a generation that lives, by its number; None is the current one."""
        if number is None:
            return self.current
        alive = (self.current, self.previous)
        return next((one for one in alive if one and one.number == number), None)

    def commit(self) -> None:
        """Let new requests run under what was staged."""
        if self.staged is not None:
            # In this order: another thread may look for either between the two.
            self.previous = self.current
            self.current, self.staged = self.staged, None


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
        policy_file = policy_file.for_recording()
        recorder = Recorder()
    generation = load_generation(policy_file)
    _check_unchanged(path, generation.fingerprint)
    if not os.environ.get(SECRET_VARIABLE):
        os.environ[SECRET_VARIABLE] = secrets.token_hex(32)
    _context = Context(
        start=generation,
        current=generation,
        secret=bytes.fromhex(os.environ[SECRET_VARIABLE]),
        hook_points=tuple(map(HookPoint.parse, hook_points)),
        recorder=recorder,
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
        state.board = Board(state.current, secret=state.secret, registry=registry)
    return state.board


def keep_warnings() -> None:
    """Let the guard's warnings be seen, whatever becomes of the root logger.

    vLLM's SageMaker routes, of which every API server has some, set that one to ERROR
    when they are imported. A level that an operator has set stays. Remove when they
    leave it alone.
    """
    for name in ("guard", "vllm_guard"):
        own = logging.getLogger(name)
        if own.level == logging.NOTSET:
            own.setLevel(logging.WARNING)


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
    current = context.current
    if policy not in current.policy_file.policies:
        known = ", ".join(current.policy_file.policies)
        message = f"Unknown policy {policy!r}; expected one of {known}."
        raise PolicyError(message)
    if drill is not None and drill not in current.edits:
        known = ", ".join(current.edits) or "none"
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


def cache_salt(policy: str, client_salt: str | None) -> str:
    """Return the salt under which a request's KV blocks are shared.

    Equal policies share a prefix, different ones never do; a client's own salt only
    ever narrows that.

    Args:
        policy: `Generation.identify` of it.
        client_salt: What the request brought along.
    """
    parts = f"{compat.PLUGIN_VERSION}|{policy}|{client_salt or ''}"
    return hashlib.sha256(parts.encode()).hexdigest()
