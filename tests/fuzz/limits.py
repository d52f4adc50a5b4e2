"""What a parser may do with hostile input: refuse it in one line, soon and cheaply."""

import contextlib
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from guard.errors import GuardError

CASES = int(os.environ.get("GUARD_FUZZ_CASES", "80"))
"""Inputs per parser; `make fuzz` tries many more."""

MAX_CPU_SECONDS = 5.0
MAX_GROWTH = 256 << 20
"""Bytes of memory that reading a small file may take at once."""
MAX_MESSAGE = 1000
_STUCK_SECONDS = 120
"""Of the clock, which runs on while other programs have the machine."""
_ADDRESS_SPACE = 16 << 30
"""Above what is mapped: a wild allocation fails here, and not the machine."""

fuzz = settings(
    max_examples=CASES,
    database=None,
    # The same cases every time in the suite, others every time in `make fuzz`.
    derandomize="GUARD_FUZZ_CASES" not in os.environ,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    deadline=None,
)


def attempt(parse: Callable[[], Any]) -> GuardError | None:
    """Run a parser within limits and return the error it refused with, if it did.

    Fails on any other exception, on too much time or memory, and where the error is
    no line to read.
    """
    refused = None
    with _bounded():
        try:
            parse()
        except GuardError as error:
            refused = error
    if refused is not None:
        text = str(refused)
        assert 0 < len(text) <= MAX_MESSAGE, f"{len(text)} characters: {text[:200]}"
        assert text.isprintable(), repr(text)
    return refused


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    begin, before = time.process_time(), _reset_peak()
    with _alarm(), _address_space():
        yield
    grown, taken = _peak() - before, time.process_time() - begin
    assert grown < MAX_GROWTH, f"{grown >> 20} MiB"
    assert taken < MAX_CPU_SECONDS, f"{taken:.1f} s of CPU"


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        message = f"stuck for {_STUCK_SECONDS} s"
        raise AssertionError(message)

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _STUCK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@contextlib.contextmanager
def _address_space() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0])
    limit = mapped * resource.getpagesize() + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reset_peak() -> int:
    """Let the peak of resident memory begin anew; returns it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10
