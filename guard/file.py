"""Files that somebody else supplied: regular ones, of a size that can be read.

A name may lead to a pipe without a writer or a device without an end; whoever opens it
like a file waits for ever, or reads until memory is gone. Everything here raises
`OSError` with a `strerror` that stands in a message.
"""

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

__all__ = ["check_regular", "hash_file", "open_regular", "read_file"]


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read; links are followed, as caches of models need.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    # Without waiting: to open a pipe is to wait for whoever writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def check_regular(path: Path) -> None:
    """Look before a library opens a path by itself.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    open_regular(path).close()


def read_file(path: Path, *, limit: int) -> bytes:
    """Return what a regular file holds.

    Args:
        path: Of the file.
        limit: Most bytes it may have.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"Larger than {limit >> 20} MiB", str(path))
    return content


def hash_file(path: Path) -> str:
    """Return the sha256 of a regular file, 64 hexadecimal digits.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
