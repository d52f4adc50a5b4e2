"""A server of the organism in a process group of its own, of which nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["find_free_port", "run_server"]

_OPTIONS = (
    *("--host", "127.0.0.1", "--served-model-name", "organism"),
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16"),
)
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
_END_SECONDS = 20


@contextlib.contextmanager
def run_server(
    command: Sequence[str],
    *,
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server as small as the organism, and end all of it with the context.

    Args:
        command: What `python -m` runs; takes the options of `vllm serve`.
        port: Where it listens, on this machine only.
        log: File for all it says.
        environment: Besides what this process has.
    """
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port), *_OPTIONS],
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
    """Return a port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
