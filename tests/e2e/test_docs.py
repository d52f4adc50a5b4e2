"""The examples of README and docs, typed at the organism's own server."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.drills import ADMIN_TOKEN
from e2e.serving import Server, ServerFactory
from pages import Block, list_blocks

from guard.demo.show import OPTIONS, ORGANISM

BLOCKS = [block for block in list_blocks("sh", "python") if block.needs_server]
HERE = "http://localhost:8000"


@pytest.fixture(scope="module")
def organism(
    start_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    """Serve the organism as `guard demo` does, from a folder that examples stand in."""
    folder = tmp_path_factory.mktemp("docs") / "organism"
    shutil.copytree(ORGANISM, folder)
    return start_server(
        folder / "model",
        folder / "policy.yaml",
        *OPTIONS,
        environment={"GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
    )


def skip_unless_installed(block: Block) -> None:
    """Libraries that only an example needs are no dependency of the suite."""
    for name in re.findall(r"^(?:from|import) (\w+)", block.text, re.M):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_an_example_does_what_it_says(
    block: Block, organism: Server, tmp_path: Path
) -> None:
    if block.language == "python":
        skip_unless_installed(block)
    text = block.text.replace(HERE, organism.url)
    text = text.replace(HERE.removeprefix("http://"), organism.url)
    # Commands that name no server mean the default one.
    text = text.replace("guard status ", f"guard status --url {organism.url} ")
    shell = ["bash", "-euo", "pipefail", "-c", text.replace("curl ", "curl --fail ")]
    folder = tmp_path / "organism"
    shutil.copytree(ORGANISM, folder)
    done = subprocess.run(
        shell if block.language == "sh" else [sys.executable, "-c", text],
        cwd=folder,
        env={**os.environ, "GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if promised := re.findall(r"^print\(.+\)  # (.+)$", block.text, re.M):
        assert done.stdout.splitlines() == promised
