"""The audit log: a line of JSON for each request that was flagged or blocked.

Runs in each API server. A thread writes, so that no request waits for a disk: what
the disk does not take in time, or at all, is counted and left out. No text of a
request and no activation is in it.
"""

import contextlib
import fcntl
import json
import logging
import os
import queue
import threading
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from guard.errors import EngineError
from guard.metrics import Metrics
from guard.verdict import Verdict

__all__ = ["MAX_BYTES", "MAX_FILES", "MAX_WAITING", "AuditLog", "check_audit_log"]

logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
"""Largest file; the next event begins a new one."""
MAX_FILES = 5
"""The one that is written and those before it, FILE.1 the youngest."""
MAX_WAITING = 10_000
"""Events that wait for the disk; one more is dropped."""


class AuditLog:
    """Writes verdicts to a file that is its own, and never keeps anybody waiting."""

    def __init__(
        self,
        path: Path,
        metrics: Metrics,
        *,
        rank: int = 0,
        max_bytes: int = MAX_BYTES,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Open the file, behind what it has, and begin to write.

        Args:
            path: Of the first API server; the others put their number before its
                suffix.
            metrics: Count what becomes of events.
            rank: Number of this API server.
            max_bytes: Of a file.
            max_waiting: Events that wait for the disk.

        Raises:
            EngineError: The file cannot be opened, or is another server's.
        """
        self.path = path.with_stem(f"{path.stem}-{rank}") if rank else path
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._waiting: queue.Queue[bytes] = queue.Queue(max_waiting)
        self._failing = False
        self._lock = _claim(self.path)
        try:
            self._descriptor = _open(self.path)
        except OSError as error:
            raise _unusable(self.path, error) from error
        threading.Thread(target=self._write, name="guard-audit", daemon=True).start()

    def record(self, verdict: Verdict, choice: int) -> None:
        """Take the last verdict of a choice, if there is anything to report.

        Args:
            verdict: As it was when the request was over.
            choice: Its index in the answer.
        """
        if verdict.action == "allow":
            return
        try:
            self._waiting.put_nowait(_write_line(verdict, choice))
        except queue.Full:
            self._metrics.count_audit("dropped")

    def _write(self) -> None:
        while True:
            line = self._waiting.get()
            try:
                self._append(line)
            except OSError as error:
                self._metrics.count_audit("failed")
                if not self._failing:  # once, not for every event
                    logger.warning("The audit log cannot be written: %s", error)
                self._failing = True
            else:
                self._metrics.count_audit("written")
                self._failing = False

    def _append(self, line: bytes) -> None:
        """Write a whole line, or nothing of it.

        Raises:
            OSError: The disk did not take it.
        """
        size = os.fstat(self._descriptor).st_size
        if size and size + len(line) > self._max_bytes:
            self._rotate()
        if not self.path.exists():  # moved away, by us or by the operator
            fresh = _open(self.path)
            os.close(self._descriptor)
            self._descriptor = fresh
        size = os.fstat(self._descriptor).st_size
        if os.write(self._descriptor, line) != len(line):
            os.ftruncate(self._descriptor, size)
            raise OSError("the disk took part of a line")

    def _rotate(self) -> None:
        if not self.path.exists():  # the last time it could not be opened anew
            return
        kept = [f"{self.path.name}.{number}" for number in range(1, MAX_FILES)]
        names = [self.path.name, *kept]
        for newer, older in reversed(list(pairwise(names))):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path.with_name(newer), self.path.with_name(older))


def check_audit_log(path: Path) -> None:
    """Check that an audit log can be written, before anything is started.

    Raises:
        EngineError: It cannot be, or another server writes it.
    """
    lock = _claim(path)
    try:
        os.close(_open(path))
    except OSError as error:
        raise _unusable(path, error) from error
    finally:
        os.close(lock)


def _claim(path: Path) -> int:
    """Return the descriptor of a lock: whoever rotates a file must be alone with it.

    Raises:
        EngineError: Another server has it.
    """
    try:
        lock = os.open(f"{path}.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        message = (
            f"{path}: another server writes this audit log; expected one of its own."
        )
        raise EngineError(message) from error
    return lock


def _open(path: Path) -> int:
    """Open a file to append to, for its owner alone; wait for nobody at a pipe.

    Raises:
        OSError: It cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(path, flags, 0o600)


def _unusable(path: Path, error: OSError) -> EngineError:
    return EngineError(
        f"{path}: not usable as an audit log ({error.strerror}); expected a file in a "
        "folder that exists and can be written."
    )


def _write_line(verdict: Verdict, choice: int) -> bytes:
    event: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "choice": choice,
        **verdict.to_wire(),
    }
    return json.dumps(event, allow_nan=False).encode() + b"\n"
