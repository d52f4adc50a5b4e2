"""A Dockerfile as its instructions, as far as those here use the language."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "docker"

Instruction = tuple[str, str]
"""A keyword and what follows it, on one line."""


def read_stages(path: Path) -> list[list[Instruction]]:
    """Return the instructions of each stage, comments left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    stages: list[list[Instruction]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            stages.append([])
        stages[-1].append((keyword, rest.strip()))
    return stages


def find(stage: list[Instruction], keyword: str) -> list[str]:
    """Return what follows each instruction of one kind."""
    return [rest for found, rest in stage if found == keyword]


def read_environment(stage: list[Instruction]) -> dict[str, str]:
    """Return the variables that a stage sets."""
    words = shlex.split(" ".join(find(stage, "ENV")))
    return dict(word.split("=", 1) for word in words)
