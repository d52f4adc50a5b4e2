"""A record of all that an engine was given and did, that the plugin has no part in.

The folder it writes goes onto the PYTHONPATH of a server: Python imports
`sitecustomize` first in each of its processes, and that one wraps the scheduler as
soon as vLLM imports it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["StepRecord"]

_SITECUSTOMIZE = '''\
"""Writes one line per step, how many tokens it holds, and one per request, `+`."""

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
    schedule, add_request = scheduler.schedule, scheduler.add_request
    file = open(RECORD, "a", encoding="ascii", buffering=1)

    def recorded(self, *args, **kwargs):
        output = schedule(self, *args, **kwargs)
        file.write(f"{{sum(output.num_scheduled_tokens.values())}}\\n")
        return output

    def added(self, request):
        file.write("+\\n")
        return add_request(self, request)

    scheduler.schedule, scheduler.add_request = recorded, added


sys.meta_path.insert(0, Recorder())
'''


@dataclass(frozen=True)
class StepRecord:
    """Where the steps of a server with one engine are written down."""

    folder: Path
    """Goes onto the server's PYTHONPATH."""

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
        return sum(int(line) for line in self._read() if line != "+")

    def count_requests(self) -> int:
        """Return how many requests its scheduler was given, each choice for itself."""
        return self._read().count("+")

    def _read(self) -> Sequence[str]:
        return (self.folder / "steps").read_text(encoding="ascii").split()
