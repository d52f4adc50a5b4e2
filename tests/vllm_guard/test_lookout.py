"""Which changes of which files are seen, without a server that watches them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_guard.lookout import Lookout

from guard.fingerprint import list_files
from guard.policy import load_policy


def replace(path: Path, content: bytes) -> None:
    """Put another file in a file's place, in one step."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").rename(path)


@pytest.fixture
def path(write_policy: Callable[..., Path]) -> Path:
    return write_policy()


def test_nothing_is_seen_where_nothing_changes(path: Path) -> None:
    lookout = Lookout(path)
    first = lookout.look()
    assert lookout.look() == first
    path.with_name("unrelated.safetensors").write_bytes(b"x")
    path.with_name("sae").joinpath("weights-of-another.bin").write_bytes(b"x")
    assert lookout.look() == first


def test_every_file_that_decides_is_seen(path: Path) -> None:
    files = [path, *list_files(load_policy(path))]
    suffixes = {file.name for file in files}
    assert suffixes == {"policy.yaml", "c.safetensors", "cfg.json"}
    lookout = Lookout(path)
    for file in files:
        before = lookout.look()
        replace(file, file.read_bytes())
        assert lookout.look() != before, file


def test_a_calibration_that_comes_after_the_file_that_names_it_is_seen(
    path: Path,
) -> None:
    lookout = Lookout(path)
    lookout.look()
    replace(path, path.read_bytes().replace(b"c.safetensors", b"d.safetensors"))
    named = lookout.look()
    os.link(path.with_name("c.safetensors"), path.with_name("d.safetensors"))
    assert lookout.look() != named


def test_a_file_is_watched_on_while_the_policy_file_is_none(path: Path) -> None:
    lookout = Lookout(path)
    lookout.look()
    replace(path, b"version: 2\n")
    broken = lookout.look()
    calibration = path.with_name("c.safetensors")
    replace(calibration, calibration.read_bytes())
    assert lookout.look() != broken
    path.unlink()
    gone = lookout.look()
    replace(calibration, calibration.read_bytes())
    assert lookout.look() != gone


def test_what_a_link_leads_to_is_seen(path: Path, tmp_path: Path) -> None:
    for name in ("..one", "..two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.yaml").write_bytes(path.read_bytes())
    (tmp_path / "..data").symlink_to("..one")
    link = tmp_path / "link.yaml"
    link.symlink_to("..data/policy.yaml")
    lookout = Lookout(link)
    before = lookout.look()
    (tmp_path / "..next").symlink_to("..two")
    (tmp_path / "..next").rename(tmp_path / "..data")
    assert lookout.look() != before
