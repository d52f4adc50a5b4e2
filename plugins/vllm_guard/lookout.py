"""What of a policy file, and of the files that it names, is another one by now.

Runs in the API server that watches for `guard serve --watch`.
"""

from pathlib import Path

from guard.errors import GuardError
from guard.fingerprint import list_files
from guard.policy import load_policy

__all__ = ["Lookout", "Sight"]

_Stat = tuple[int, ...] | None
Sight = tuple[_Stat, ...]
"""Equal to another one as long as nothing has changed in between."""


class Lookout:
    """A policy file and what it names, looked at again and again.

    A calibration may come before the policy file that names it, or after: what a file
    names is watched even where it is missing, or the policy file itself is refused.
    """

    def __init__(self, path: Path) -> None:
        """Look nowhere yet.

        Args:
            path: Of the policy file; a link stays one.
        """
        self._path = path
        self._read: _Stat = None
        self._named: list[Path] = []

    def look(self) -> Sight:
        """Return what changes with any of the files, be it replaced behind a link."""
        found = _look_at(self._path)
        if found != self._read:
            self._read = found
            self._named = self._list_named()
        return (found, *map(_look_at, self._named))

    def _list_named(self) -> list[Path]:
        try:
            return list_files(load_policy(self._path))
        except GuardError:  # a reload says what is wrong with it
            return self._named


def _look_at(path: Path) -> _Stat:
    """Return what changes with a file; None if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
