"""What others supplied is read where it is a file, and not waited for otherwise."""

import hashlib
import os
from pathlib import Path

import pytest

from guard.file import check_regular, hash_file, open_regular, read_file


def test_a_file_is_read_and_hashed_through_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"abc")
    link = tmp_path / "link"
    link.symlink_to("blob")
    check_regular(link)
    assert read_file(link, limit=3) == b"abc"
    assert hash_file(link) == hashlib.sha256(b"abc").hexdigest()


def test_a_larger_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="Larger than 1 MiB"):
        read_file(tmp_path / "sparse", limit=1 << 20)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Not a regular file") as caught:
        open_regular(path)
    assert caught.value.strerror
    assert len(os.listdir("/proc/self/fd")) == before
