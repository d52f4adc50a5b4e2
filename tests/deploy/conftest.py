"""Tools that judge what is deployed; only CI may not do without them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Tool = Callable[..., "subprocess.CompletedProcess[str]"]


def find_tool(name: str) -> str:
    """Return the path of a program that `make test` brings along."""
    binary = shutil.which(name) or shutil.which(str(Path(sys.executable).parent / name))
    if binary is None:
        reason = f"no {name} on the PATH; `make test` installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return binary


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
