"""Load an SAE folder: digest first, then shapes, then numbers. Safetensors only."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guard.errors import SaeError
from guard.file import hash_file
from guard.sae.config import Format, SaeConfig
from guard.sae.formats import (
    CONFIG_FILE,
    WEIGHTS_FILES,
    Published,
    expected_shapes,
    fold,
    read_config,
)
from guard.sae.model import Sae

__all__ = ["build_sae", "load_sae", "save_sae", "weights_digest"]

_UNUSED: Mapping[Format, frozenset[str]] = {
    "guard": frozenset(),
    "sae_lens": frozenset({"scaling_factor"}),
}
"""Tensors that older writers left in the file; all ones, or the file is refused."""


def load_sae(
    path: str | Path,
    *,
    format: Format,
    hook_point: str | None = None,
    sha256: str | None = None,
) -> Sae:
    """Load an SAE from its folder onto the CPU.

    Args:
        path: Folder in the given format.
        format: `guard` (our own) or `sae_lens`.
        hook_point: Where it will be hooked; compared with where it was trained.
        sha256: Digest the weights file must have; checked before it is parsed.

    Raises:
        SaeError: A missing or changed file, a wrong shape, a number that is not
            finite, or an SAE that cannot be computed exactly.
    """
    folder = Path(path)
    weights = _find_weights(folder, format)
    if sha256 is not None:
        digest = _hash_file(weights)
        if digest != sha256.lower():
            raise SaeError(
                f"{weights}: sha256 is {digest}; expected {sha256} as the policy says"
            )
    published = read_config(folder, format=format, hook_point=hook_point)
    tensors = _read_tensors(weights, published.config, format)
    return _build(published, tensors, str(weights))


def build_sae(config: SaeConfig, tensors: Mapping[str, Tensor]) -> Sae:
    """Make an SAE from tensors in memory, as `load_sae` would from a file of ours.

    Args:
        config: Sizes and conventions.
        tensors: What `save_sae` would write, by name.

    Raises:
        SaeError: A tensor is missing, unknown, of another shape or not finite.
    """
    _check_shapes("tensors", config, {n: tuple(t.shape) for n, t in tensors.items()})
    numbers = {name: _to_fp32("tensors", name, t) for name, t in tensors.items()}
    _check_threshold("tensors", numbers)
    return _build(Published(config), numbers, "tensors")


def save_sae(
    folder: str | Path, config: SaeConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Write an SAE in our own format.

    Args:
        folder: Made if it is missing; files of that name are replaced.
        config: Written to `cfg.json`.
        tensors: `W_enc [d_model, d_sae]`, `W_dec [d_sae, d_model]`, `b_dec [d_model]`
            and `b_enc [d_sae]`; jumprelu also `threshold [d_sae]`; gated has
            `b_gate`, `b_mag`, `r_mag [d_sae]` instead of `b_enc`; `latent_max
            [d_sae]` if it is known. As trained: nothing folded.

    Raises:
        SaeError: The tensors do not fit the config, so they could not be loaded.
    """
    build_sae(config, tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = config.model_dump(exclude_none=True)
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS_FILES["guard"],
    )


def weights_digest(path: str | Path, format: Format) -> str:
    """Hash the weights file of an SAE folder, for `sha256` in a policy file.

    Raises:
        SaeError: The folder has no weights file of this format.
    """
    return _hash_file(_find_weights(Path(path), format))


def _find_weights(folder: Path, format: Format) -> Path:
    if format not in WEIGHTS_FILES:
        raise SaeError(
            f"{format!r} is not an SAE format; expected one of "
            f"{', '.join(WEIGHTS_FILES)}"
        )
    weights = folder / WEIGHTS_FILES[format]
    if not folder.is_dir():
        raise SaeError(f"{folder}: is not a folder; expected one with {weights.name}")
    if not weights.is_file():
        raise SaeError(
            f"{folder}: has no {weights.name}; expected an SAE in the {format} format "
            "(pickles are never read)"
        )
    return weights


def _hash_file(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise SaeError(
            f"{path}: cannot be read ({error.strerror}); expected a weights file"
        ) from error


def _read_tensors(path: Path, config: SaeConfig, format: Format) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            for name in _UNUSED[format] & shapes.keys():
                del shapes[name]
                unused = _to_fp32(str(path), name, file.get_tensor(name))
                if not bool((unused == 1).all()):
                    raise SaeError(
                        f"{path}: {name} is not all ones; fold it into W_dec first"
                    )
            _check_shapes(str(path), config, shapes)
            tensors = {n: _to_fp32(str(path), n, file.get_tensor(n)) for n in shapes}
    except (SafetensorError, OSError) as error:
        raise SaeError(f"{path}: is not a safetensors file ({error})") from error
    if format == "guard":
        _check_threshold(str(path), tensors)
    return tensors


def _check_shapes(
    source: str, config: SaeConfig, found: Mapping[str, tuple[int, ...]]
) -> None:
    required = expected_shapes(config)
    known = required | {"latent_max": (config.d_sae,)}
    if missing := sorted(required.keys() - found.keys()):
        raise SaeError(
            f"{source}: {missing[0]} is missing; a {config.architecture} SAE holds "
            f"{', '.join(required)}"
        )
    if unknown := sorted(found.keys() - known.keys()):
        raise SaeError(
            f"{source}: {unknown[0]!r} is unknown; a {config.architecture} SAE holds "
            f"{', '.join(required)}"
        )
    for name, shape in found.items():
        if shape != known[name]:
            hint = " (transposed)" if shape == known[name][::-1] else ""
            raise SaeError(
                f"{source}: {name} has shape {list(shape)}{hint}; expected "
                f"{list(known[name])}"
            )


def _check_threshold(source: str, tensors: Mapping[str, Tensor]) -> None:
    # SAELens applies relu first, so there a negative one acts like zero; in a file of
    # ours it can only be a mistake.
    if "threshold" in tensors and bool((tensors["threshold"] < 0).any()):
        raise SaeError(f"{source}: threshold holds a negative number; expected >= 0")


def _to_fp32(source: str, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in {
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
    }:
        raise SaeError(
            f"{source}: {name} holds {tensor.dtype}; expected floats of >= 16 bits"
        )
    tensor = tensor.detach().to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise SaeError(f"{source}: {name} holds NaN or Inf; expected finite numbers")
    return tensor


def _build(published: Published, tensors: Mapping[str, Tensor], source: str) -> Sae:
    sae = Sae(published.config, fold(published, tensors))
    for name, tensor in sae.named_buffers():
        # Folding can overflow, a gate's exp(r_mag) above all.
        if not bool(torch.isfinite(tensor).all()):
            raise SaeError(
                f"{source}: {name} overflows when folded; expected fp32 range"
            )
    return sae
