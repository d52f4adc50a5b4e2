"""Fire drills: edits that bring a suppressed behaviour back, stored one to a file.

Found by an attack, kept with the prompt they were found for. Every process reads them
at its start: the worker adds the delta, the API server tells an administrator the rest.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guard.errors import DrillError
from guard.file import check_regular
from guard.policy import PolicyFile, Position, Sha256

__all__ = ["RecoveryEdit", "load_edit", "load_edits", "save_edit"]

FORMAT = 1
_DELTA = "delta"


@dataclass(frozen=True, slots=True)
class RecoveryEdit:
    """What is added to the stream behind the clamp, and what it should bring back."""

    delta: Tensor
    """fp32 `[d_model]`."""
    prompt: str
    """What the user says for whom it was found."""
    gold: str
    """What the model answers when the suppressed behaviour is back."""
    budget: float
    """Norm of the delta relative to the mean |resid|."""
    position: Position
    """Which tokens it was found for."""
    sae_sha256: str
    """Of the weights of the SAE behind whose clamps it was found."""


class _About(BaseModel):
    """What stands beside the tensor, as JSON; keys it does not know are let be."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: Literal[1]
    prompt: Annotated[str, Field(min_length=1)]
    gold: Annotated[str, Field(min_length=1)]
    budget: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    position: Position
    sae_sha256: Sha256


def load_edit(path: Path) -> RecoveryEdit:
    """Read what `save_edit` wrote.

    Raises:
        DrillError: The file is missing, damaged or not such an edit.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if names != [_DELTA]:
                message = (
                    f"{path}: holds {', '.join(names) or 'no tensor'}; "
                    f"expected {_DELTA!r} alone."
                )
                raise DrillError(message)
            about = json.loads((file.metadata() or {})["guard"])
            return _make(str(path), about, file.get_tensor(_DELTA))
    except FileNotFoundError as error:
        message = f"{path}: no such file; expected the stored edit of a drill."
        raise DrillError(message) from error
    except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        message = f"{path}: is not the stored edit of a drill ({error})."
        raise DrillError(message) from error


def load_edits(policy_file: PolicyFile) -> dict[str, RecoveryEdit]:
    """Load the edits of a policy file's drills, by the name of the drill.

    Raises:
        DrillError: One cannot be read, or was found for another SAE or other tokens.
    """
    edits = {}
    for drill in policy_file.drills:
        edit = load_edit(drill.delta)
        wanted = policy_file.saes[drill.sae].sha256
        if edit.sae_sha256 != wanted:
            message = (
                f"{drill.delta}: was found for an SAE of sha256 {edit.sae_sha256}; "
                f"expected {wanted}, which is {drill.sae!r}."
            )
            raise DrillError(message)
        if edit.position != drill.position:
            message = (
                f"{drill.delta}: was found for position {edit.position}; expected "
                f"{drill.position}, as drill {drill.name!r} says."
            )
            raise DrillError(message)
        edits[drill.name] = edit
    return edits


def save_edit(path: Path, edit: RecoveryEdit) -> None:
    """Write one safetensors file; what is not a tensor goes into its metadata.

    Raises:
        DrillError: The edit is one that could not be loaded again.
    """
    about = {
        "format": FORMAT,
        "prompt": edit.prompt,
        "gold": edit.gold,
        "budget": edit.budget,
        "position": edit.position,
        "sae_sha256": edit.sae_sha256,
    }
    delta = _make(str(path), about, edit.delta).delta.cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"guard": json.dumps(about, sort_keys=True)}
    save_file({_DELTA: delta}, path, metadata=metadata)


def _make(source: str, about: Mapping[str, Any], delta: Tensor) -> RecoveryEdit:
    """Return an edit whose every part was looked at."""
    try:
        known = _About.model_validate(about)
    except ValidationError as error:
        # Never the value: a prompt is nobody's to read in a log.
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "description"
        message = f"{source}: its {name} is not valid: {first['msg']}."
        raise DrillError(message) from None
    if delta.dim() != 1 or not delta.is_floating_point():
        message = (
            f"{source}: its delta is {delta.dtype} of shape {list(delta.shape)}; "
            "expected floats of shape [d_model]."
        )
        raise DrillError(message)
    delta = delta.detach().to(torch.float32)
    if not bool(delta.isfinite().all()):
        message = f"{source}: its delta holds NaN or Inf; expected finite numbers."
        raise DrillError(message)
    return RecoveryEdit(delta=delta, **known.model_dump(exclude={"format"}))
