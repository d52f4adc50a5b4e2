"""One reader per published SAE format: from a `cfg.json` to a `Published` SAE.

A reader says what the SAE computes in words this project understands, or refuses
with one line; it never guesses. The numbers are folded in `fold`, the same way for
every format.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from guard.errors import SaeError
from guard.file import read_file
from guard.sae.config import Format, SaeConfig
from guard.sae.model import SaeTensors

__all__ = ["WEIGHTS_FILES", "Published", "expected_shapes", "fold", "read_config"]

WEIGHTS_FILES: Mapping[Format, str] = {
    "guard": "sae.safetensors",
    "sae_lens": "sae_weights.safetensors",
}
"""Name of the weights file in a folder of each format."""

CONFIG_FILE = "cfg.json"
SCALER_FILE = "activation_scaler.json"
_MAX_JSON_BYTES = 1 << 20
_MAX_FACTOR = torch.finfo(torch.float32).max


class Published(NamedTuple):
    """What a published folder computes, before anything is folded."""

    config: SaeConfig
    """Sizes and conventions."""
    input_scale: float = 1.0
    """What `resid` is multiplied by first, one number for the whole data set."""
    rescale_by_decoder_norm: bool = False
    """TopK only: whether activations are ranked times the norm of their direction."""


def read_config(
    folder: Path, *, format: Format, hook_point: str | None = None
) -> Published:
    """Read what the SAE in a folder computes.

    Args:
        folder: Folder with `cfg.json`.
        format: Which reader to use.
        hook_point: Where the policy wants it, `layers.<n>.resid_post`; compared
            with what the folder says.

    Raises:
        SaeError: The folder is unreadable, trained elsewhere or of a kind that
            cannot be computed exactly.
    """
    reader = _READERS.get(format)
    if reader is None:
        raise SaeError(
            f"{format!r} is not an SAE format; expected one of {', '.join(_READERS)}"
        )
    published = reader(folder, hook_point)
    trained_at = published.config.hook_point
    if hook_point is not None and hook_point != trained_at:
        raise SaeError(
            f"{folder}: was trained at {trained_at}, but the policy hooks it at "
            f"{hook_point}; set hook_point: {trained_at}"
        )
    return published


def expected_shapes(config: SaeConfig) -> dict[str, tuple[int, ...]]:
    """Name the tensors a weights file must hold, with their shapes."""
    d_model, d_sae = config.d_model, config.d_sae
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_model, d_sae),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    if config.architecture == "gated":
        return shapes | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (d_sae,))
    shapes["b_enc"] = (d_sae,)
    if config.architecture == "jumprelu":
        shapes["threshold"] = (d_sae,)
    return shapes


def fold(published: Published, tensors: Mapping[str, Tensor]) -> SaeTensors:
    """Fold every constant into the four matrices of the canonical form.

    Latents keep the unit in which the file reports them. In this order: the gate
    (one threshold on the magnitude path), decoder norms, the input scale, and last
    the pre-bias, with the encoder as it will be used.

    Args:
        published: What `read_config` gave.
        tensors: Tensors of `expected_shapes`, fp32, and perhaps `latent_max`.
    """
    W_enc, W_dec, b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
    if published.config.architecture == "gated":
        gain = tensors["r_mag"].exp()
        W_enc = W_enc * gain
        b_enc = tensors["b_mag"]
        threshold = (b_enc - gain * tensors["b_gate"]).clamp_min(0)
    else:
        b_enc = tensors["b_enc"]
        # A latent is never negative, so a threshold below zero acts like zero.
        threshold = tensors.get("threshold", torch.zeros_like(b_enc)).clamp_min(0)
    if published.rescale_by_decoder_norm:
        norms = W_dec.norm(dim=-1)
        W_enc, b_enc = W_enc * norms, b_enc * norms
        W_dec = W_dec / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None]
    if published.input_scale != 1.0:
        W_enc = W_enc * published.input_scale
        W_dec = W_dec / published.input_scale
        b_dec = b_dec / published.input_scale
    if published.config.apply_b_dec_to_input:
        b_enc = b_enc - b_dec @ W_enc
    return SaeTensors(W_enc, b_enc, W_dec, b_dec, threshold, tensors.get("latent_max"))


def _read_guard(folder: Path, hook_point: str | None) -> Published:
    del hook_point  # our own format always says where it was trained
    return Published(_validate(folder, _read_json(folder / CONFIG_FILE)))


def _read_sae_lens(folder: Path, hook_point: str | None) -> Published:
    raw = _read_json(folder / CONFIG_FILE)
    metadata = raw.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    cfg = _SaeLensCfg(folder, {**metadata, **raw})
    cfg.refuse_unknown_steps()
    architecture = cfg.architecture()
    normalisation = cfg.normalisation()
    factor = 1.0
    if normalisation == "expected_average_only_in":
        factor, normalisation = _read_scaling_factor(folder), "none"
    config = {
        "architecture": architecture,
        "d_model": cfg.size("d_in"),
        "d_sae": cfg.size("d_sae"),
        "k": cfg.k() if architecture == "topk" else None,
        "apply_b_dec_to_input": cfg.values.get("apply_b_dec_to_input", True),
        "normalize_activations": normalisation,
        "hook_point": cfg.hook_point(hook_point),
        "model": cfg.values.get("model_name"),
    }
    rescale = architecture == "topk" and cfg.flag("rescale_acts_by_decoder_norm")
    return Published(_validate(folder, config), factor, rescale)


class _SaeLensCfg:
    """A SAELens `cfg.json`, v6 (nested metadata) or earlier (flat)."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.folder = folder
        self.values = values

    def flag(self, key: str) -> bool:
        return bool(self.values.get(key))

    def size(self, key: str) -> int:
        size = self.values.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise self.refusal(f"{key} is {size!r}; expected a whole number > 0")
        return size

    def refusal(self, message: str) -> SaeError:
        return SaeError(f"{self.folder / CONFIG_FILE}: {message}")

    def architecture(self) -> str:
        name = self.values.get("architecture", "standard")
        activation = self.values.get("activation_fn_str")
        activation = activation or self.values.get("activation_fn") or "relu"
        # Tuples, not sets: what a file says need not be hashable.
        if name in ("batchtopk", "matryoshka_batchtopk"):
            raise self.refusal(
                f"architecture {name} has no stored threshold, so a token's latents "
                "would depend on its neighbours; expected the inference model that "
                "SAELens saves for it, architecture jumprelu"
            )
        if name not in ("standard", "jumprelu", "topk", "gated"):
            raise self.refusal(
                f"architecture {name!r} cannot be read; expected one of standard, "
                "jumprelu, topk, gated"
            )
        if name == "standard" and activation == "topk":
            return "topk"  # how SAELens up to v5 wrote it
        if activation not in (("relu", "topk") if name == "topk" else ("relu",)):
            raise self.refusal(
                f"activation_fn {activation!r} cannot be computed; expected 'relu'"
            )
        return str(name)

    def normalisation(self) -> str:
        mode = self.values.get("normalize_activations")
        if isinstance(mode, bool):  # up to v3
            mode = "expected_average_only_in" if mode else "none"
        modes = (
            "none",
            "expected_average_only_in",
            "constant_norm_rescale",
            "layer_norm",
        )
        if mode is not None and mode not in modes:
            raise self.refusal(
                f"normalize_activations {mode!r} cannot be computed; expected one of "
                f"{', '.join(modes)}"
            )
        return mode or "none"

    def k(self) -> object:
        kwargs = self.values.get("activation_fn_kwargs")
        older = kwargs.get("k") if isinstance(kwargs, dict) else None
        return self.values.get("k", older)

    def hook_point(self, asked: str | None) -> str:
        name = self.values.get("hook_name") or self.values.get("hook_point")
        if name is None:
            if asked is None:
                raise self.refusal(
                    "does not say where the SAE was trained; name a hook_point"
                )
            return asked
        hook_point = _translate_hook_name(str(name))
        if hook_point is None:
            raise self.refusal(
                f"was trained at {str(name)!r}, which is not the residual stream after "
                "a layer; expected blocks.<n>.hook_resid_post or the like"
            )
        return hook_point

    def refuse_unknown_steps(self) -> None:
        head = self.values.get("hook_head_index")
        if head is not None:
            raise self.refusal(f"reads one attention head ({head}); expected a stream")
        if self.values.get("reshape_activations") not in (None, "none"):
            raise self.refusal(
                f"reshape_activations {self.values['reshape_activations']!r} reads "
                "attention heads; expected 'none'"
            )
        if self.flag("finetuning_scaling_factor"):
            raise self.refusal(
                "finetuning_scaling_factor is not supported; fold it into W_dec first"
            )
        kwargs = self.values.get("model_from_pretrained_kwargs")
        if isinstance(kwargs, dict) and kwargs.get("center_writing_weights"):
            raise self.refusal(
                "was trained on a stream with its mean removed "
                "(center_writing_weights); expected one trained on the plain model"
            )


_STREAMS = (
    re.compile(r"blocks\.(?P<n>\d{1,5})\.hook_resid_(?P<side>pre|post)"),
    re.compile(r"layers\.(?P<n>\d{1,5})\.resid_(?P<side>pre|post)"),
    # The name of a decoder layer in Hugging Face's module tree: its output.
    re.compile(r"(?:\w+\.)*(?:layers|h|blocks|block)\.(?P<n>\d{1,5})"),
)


def _translate_hook_name(name: str) -> str | None:
    for pattern in _STREAMS:
        if found := pattern.fullmatch(name):
            side = found.groupdict().get("side", "post")
            layer = int(found["n"]) - (side == "pre")
            # What enters layer 0 are the embeddings, which no layer puts out.
            return f"layers.{layer}.resid_post" if layer >= 0 else None
    return None


def _read_scaling_factor(folder: Path) -> float:
    path = folder / SCALER_FILE
    if not path.is_file():
        raise SaeError(
            f"{folder}: normalize_activations is expected_average_only_in and there is "
            f"no {SCALER_FILE} with its factor; fold the factor in or add that file"
        )
    factor = _read_json(path).get("scaling_factor")
    if (
        not isinstance(factor, int | float)
        or isinstance(factor, bool)
        or not 0 < factor <= _MAX_FACTOR
    ):
        raise SaeError(f"{path}: scaling_factor is {factor!r}; expected a number > 0")
    return float(factor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_file(path, limit=_MAX_JSON_BYTES)
    except OSError as error:
        raise SaeError(
            f"{path}: cannot be read ({error.strerror}); expected a small JSON file"
        ) from error
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SaeError(f"{path}: is not JSON ({error}); expected an object") from error
    if not isinstance(value, dict):
        raise SaeError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def _validate(folder: Path, values: dict[str, Any]) -> SaeConfig:
    try:
        return SaeConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        message = f"{where}: {what}" if where else what
        raise SaeError(f"{folder / CONFIG_FILE}: {message}") from error


_READERS: Mapping[str, Callable[[Path, str | None], Published]] = {
    "guard": _read_guard,
    "sae_lens": _read_sae_lens,
}
