"""Faults of the guard itself, brought into a real server by a plugin of its own."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from e2e import guard_faults

NAME = "guard_faults"


@dataclass(frozen=True)
class Faults:
    """The switches of one server's faults; `e2e.guard_faults` says which there are."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a server that has the faults.

        It also is that of an operator who loads a plugin of his own, and forgot the
        guard's.
        """
        shutil.copy(guard_faults.__file__, self.folder / f"{NAME}.py")
        about = self.folder / f"{NAME}-1.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(f"Name: {NAME}\nVersion: 1\n")
        entry = f"[vllm.general_plugins]\n{NAME} = {NAME}:register\n"
        (about / "entry_points.txt").write_text(entry)
        return {"PYTHONPATH": str(self.folder), "VLLM_PLUGINS": NAME}

    def switch_on(self, fault: str, about: str = "") -> None:
        (self.folder / fault).write_text(about, encoding="utf-8")

    def switch_off(self, fault: str) -> None:
        (self.folder / fault).unlink(missing_ok=True)

    @contextlib.contextmanager
    def on(self, fault: str) -> Iterator[None]:
        """Have a fault for a while."""
        self.switch_on(fault)
        try:
            yield
        finally:
            self.switch_off(fault)
