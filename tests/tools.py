"""Programs that judge or watch what is tested."""

import os
import shutil
import sys
from pathlib import Path

import pytest

__all__ = ["find_tool"]


def find_tool(name: str) -> str:
    """Return the path of a program; only CI may not do without one."""
    beside_python = str(Path(sys.executable).parent / name)
    path = shutil.which(name) or shutil.which(beside_python)
    if path is None:
        reason = f"no {name} on the PATH; `make test` brings it where apt or pip has it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
