"""A record of every scheduled token that the plugin has no part in.

The folder it writes goes onto the PYTHONPATH of a server: Python imports
`sitecustomize` first in each of its processes, and that one wraps the scheduler as
soon as vLLM imports it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_SITECUSTOMIZE = '''\
"""Writes how many tokens each scheduler step holds, one line per step."""

import importlib.abc
import importlib.machinery
import sys

MODULE = "vllm.v1.core.sched.scheduler"
RECORD = {record!r}


class Recorder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            record_steps(module.Scheduler)

        spec.loader.exec_module = exec_module
        return spec


def record_steps(scheduler):
    schedule = scheduler.schedule

    def recorded(self, *args, **kwargs):
        output = schedule(self, *args, **kwargs)
        tokens = sum(output.num_scheduled_tokens.values())
        with open(RECORD, "a", encoding="ascii") as file:
            file.write(f"{{tokens}}\\n")
        return output

    scheduler.schedule = recorded


sys.meta_path.insert(0, Recorder())
'''


@dataclass(frozen=True)
class StepRecord:
    """Where the steps of a server are written down."""

    folder: Path

    def begin(self) -> dict[str, str]:
        """Write the recorder; return the environment of a server that it records."""
        source = _SITECUSTOMIZE.format(record=str(self.folder / "steps"))
        (self.folder / "sitecustomize.py").write_text(source, encoding="utf-8")
        (self.folder / "steps").write_text("", encoding="ascii")
        inherited = os.environ.get("PYTHONPATH")
        paths = filter(None, [str(self.folder), inherited])
        return {"PYTHONPATH": os.pathsep.join(paths)}

    def count_tokens(self) -> int:
        """Return how many tokens the server has scheduled since it began."""
        lines = (self.folder / "steps").read_text(encoding="ascii").split()
        return sum(int(line) for line in lines)
