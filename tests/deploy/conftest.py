"""Tools that judge what is deployed."""

import inspect
import subprocess
from collections.abc import Callable

import pytest
from tools import find_tool
from vllm_guard.pulse import Pulse

ASK_SECONDS: float = inspect.signature(Pulse).parameters["ask_seconds"].default
"""Between two questions of a server to its engines."""
Tool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def tool() -> Tool:
    """Run a tool by its name, and return what it said."""

    def run(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [find_tool(name), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run
