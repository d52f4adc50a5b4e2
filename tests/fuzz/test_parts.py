"""Whatever is left of a run that was broken off: gone on with, or refused in a line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz.limits import attempt, fuzz
from fuzz.mutation import changed_safetensors, damaged
from fuzz.test_files import Kind, trees
from hypothesis import given
from redteam.paper import make_certificate
from specimens import fit_everything, watch_everything

from guard.redteam.certificate import Cell
from guard.redteam.certify import _Store
from guard.traffic import _Progress

SEEN = [(7, torch.ones(3)), (10, torch.zeros(3))]


def make_fit(folder: Path) -> Kind:
    progress = _Progress(folder, {})
    entries = fit_everything(watch_everything()[0])["calibration"].entries
    progress.save_fit(entries, [(7, torch.ones(len(entries)))] * 2)
    path = folder / "fit.safetensors"
    return Kind(path, progress.load_fit, changed_safetensors(path.read_bytes()))


def make_chunk(folder: Path) -> Kind:
    progress = _Progress(folder, {})
    progress.save_chunk(0, SEEN)
    path = folder / "chunk-0.safetensors"
    changes = changed_safetensors(path.read_bytes())
    return Kind(path, lambda: progress.load_chunk(0), changes)


def make_run(folder: Path) -> Kind:
    _Progress(folder, {"model": "toy"})
    path = folder / "run.json"
    parse = lambda: _Progress(folder, {"model": "toy"})  # noqa: E731
    return Kind(path, parse, damaged(path.read_bytes()))


def make_cell(folder: Path) -> Kind:
    store, cell = _Store(folder, "subject"), make_certificate().cells[0]
    store.keep(Cell, lambda: cell)
    (path,) = folder.glob("*.json")
    return Kind(
        path,
        lambda: store.keep(Cell, lambda: cell),
        trees(cell.model_dump(mode="json")),
    )


KINDS: dict[str, Callable[[Path], Kind]] = {
    "fit of a calibration": make_fit,
    "chunk of a calibration": make_chunk,
    "run of a calibration": make_run,
    "part of a certificate": make_cell,
}


@pytest.mark.parametrize("name", KINDS)
def test_what_was_left_is_gone_on_with_or_refused_in_one_line(
    name: str, tmp_path: Path
) -> None:
    kind = KINDS[name](tmp_path)
    assert attempt(kind.parse) is None

    @fuzz
    @given(kind.changes)
    def read(content: bytes) -> None:
        kind.path.write_bytes(content)
        attempt(kind.parse)

    read()
