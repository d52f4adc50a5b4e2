"""What an SAE says about itself: the `cfg.json` of our own format, without torch."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    model_validator,
)

__all__ = ["Architecture", "Format", "Normalisation", "SaeConfig"]

Architecture = Literal["standard", "jumprelu", "topk", "gated"]
"""How latents follow from pre-activations; all but `topk` are a threshold."""

Normalisation = Literal["none", "constant_norm_rescale", "layer_norm"]
"""What is done to `resid` before the encoder and undone after the decoder."""

Format = Literal["guard", "sae_lens"]
"""The published folder layouts that can be read."""

_HOOK_POINT = re.compile(r"layers\.(0|[1-9]\d{0,4})\.resid_post")


def _check_hook_point(value: str) -> str:
    if _HOOK_POINT.fullmatch(value) is None:
        raise ValueError(
            f"{value!r} is not a hook point; expected 'layers.<n>.resid_post'"
        )
    return value


class SaeConfig(BaseModel):
    """Everything but the numbers of an SAE."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    architecture: Architecture
    """`standard` is relu, `jumprelu` and `gated` a threshold, `topk` the k largest."""
    d_model: PositiveInt
    """Width of the stream the SAE reads and writes."""
    d_sae: PositiveInt
    """Number of latents."""
    hook_point: Annotated[str, AfterValidator(_check_hook_point)]
    """Where it was trained: `layers.<n>.resid_post`."""
    k: PositiveInt | None = None
    """How many latents may be active; for `topk` only."""
    apply_b_dec_to_input: bool = False
    """Whether `b_dec` is taken off the (normalised) input before encoding."""
    normalize_activations: Normalisation = "none"
    """Per-token normalisation of the input."""
    model: str | None = None
    """Name of the model it was trained on, for people."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: data, seed, training numbers. Never computed with."""

    @model_validator(mode="after")
    def _check_k(self) -> Self:
        if self.architecture == "topk":
            if self.k is None:
                raise ValueError("k is missing; a topk SAE says how many latents stay")
            if self.k > self.d_sae:
                raise ValueError(
                    f"k is {self.k}; expected at most d_sae, which is {self.d_sae}"
                )
        elif self.k is not None:
            raise ValueError(
                f"k is for topk only; leave it out for {self.architecture}"
            )
        return self
