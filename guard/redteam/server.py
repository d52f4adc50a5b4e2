"""A server in a process group of its own, of which nothing is left."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, NoReturn

from guard.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["find_free_port", "run_server", "wait_until_ready"]

_START_SECONDS = 600
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
_END_SECONDS = 20
_STANDING_PORTS = range(16_384, 32_768)
"""Below those that Linux gives to connections by itself."""


@contextlib.contextmanager
def run_server(
    command: Sequence[str],
    *,
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, and end all of it with the context, or with this process.

    Args:
        command: What `python -m` runs; takes the options of `vllm serve`.
        port: Where it listens, on this machine only.
        log: File for all it says.
        environment: Besides what this process has. Without a word on it the KV cache
            of a CPU is small.
    """
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                *command,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_ENVIRONMENT, **os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        with _unwinding():
            yield server
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=_END_SECONDS)


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, or what was started stays behind."""
    ours = []
    if threading.current_thread() is threading.main_thread():
        both = (signal.SIGTERM, signal.SIGHUP)
        ours = [n for n in both if signal.getsignal(n) is signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, _exit)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def find_free_port() -> int:
    """Return a port that nobody has, nor is given before the server binds it."""
    while True:
        port = secrets.choice(_STANDING_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until_ready(
    url: str,
    server: subprocess.Popen[bytes],
    log: Path,
    path: str = "/guard/ready",
) -> None:
    """Wait until a server serves.

    Args:
        url: Of the server.
        server: Its process.
        log: File for all it says.
        path: Answered as soon as it is ready.

    Raises:
        EngineError: It ended, or took too long; its last word is kept.
    """
    deadline = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}{path}", timeout=10).close()
            return
        time.sleep(0.5)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
    message = f"The server did not start: {' '.join(tail) or 'no word from it'}"
    raise EngineError(message)
