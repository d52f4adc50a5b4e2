"""A server in a process group of its own, of which nothing is left."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

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
    """Run a server, and end all of it with the context.

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
        yield server
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=_END_SECONDS)


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
