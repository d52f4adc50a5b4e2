"""What the guard makes and reads again: tensors with a note in JSON, one file.

A safetensors file, so that reading one never runs anything; the note stands in its
metadata.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from guard.errors import CalibrationError
from guard.file import check_regular

__all__ = ["explaining", "read_artefact", "write_artefact"]

_NOTE = "guard"
_FLOATS = (torch.float32, torch.float64)
"""What is written; many other types of a safetensors file cannot be compared."""


def write_artefact(
    path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]
) -> None:
    """Write tensors and a note, which must be JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={_NOTE: json.dumps(note)})


def read_artefact(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors and the note of a file.

    Raises:
        Exception: Of several kinds, which `explaining` knows.
    """
    # At once, for a server that reads one at each reload: `safe_open` keeps some memory
    # for every tensor that is got from it.
    check_regular(path)
    content = path.read_bytes()
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            message = f"{name!r} holds {tensor.dtype}; expected floats"
            raise ValueError(message)
    return tensors, json.loads(header["__metadata__"][_NOTE])


@contextlib.contextmanager
def explaining(path: Path, *, kind: str, command: str) -> Iterator[None]:
    """Turn whatever a missing or damaged file leads to into one clear line.

    Args:
        path: The file that is read.
        kind: What it should be.
        command: What writes one.

    Raises:
        CalibrationError: It is none.
    """
    try:
        yield
    except FileNotFoundError as error:
        message = f"{path}: no such {kind}; `{command}` writes one."
        raise CalibrationError(message) from error
    except (
        SafetensorError,
        AttributeError,
        KeyError,
        RecursionError,
        TypeError,
        ValueError,
        OSError,
    ) as error:
        message = f"{path}: not a {kind} that `{command}` wrote ({error})."
        raise CalibrationError(message) from error
