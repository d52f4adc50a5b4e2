"""The null space of a clamp: edits that the clamped latents' encoder cannot see.

An edit `delta` with `W_enc[:, S]^T delta = 0` leaves the pre-activation of every
clamped latent in S as the clamp left it (C1 of arXiv 2606.18322). Under TopK another
latent may still push a clamped one out of the k largest, or let it in: what the null
space holds is its pre-activation, not its membership. An SAE that normalises its
input moves all pre-activations with the norm of the row, so there C1 is not exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guard.policy import Rule
    from guard.sae.model import Sae

__all__ = ["MAX_LEAK", "NullSpace", "cap_norm", "null_space"]

MAX_LEAK = 1e-5
"""What fp32 may leave of an edit in the held directions, relative to its norm."""
_TINY = torch.finfo(torch.float32).tiny


class NullSpace:
    """Everything orthogonal to some encoder directions."""

    def __init__(self, directions: Tensor) -> None:
        """Find a basis of what the directions span.

        Args:
            directions: fp32 `[num_latents, d_model]`, repeats allowed.
        """
        self.directions = directions
        # In fp64, and cut at rank: of directions that nearly coincide, the small
        # difference is a direction too.
        _, size, basis = torch.linalg.svd(directions.double(), full_matrices=False)
        self.basis = basis[size > size.amax() * 1e-12].float()

    def project(self, delta: Tensor) -> Tensor:
        """Take out of each row `[num_rows, d_model]` what the encoder would see.

        Twice: once leaves a rounding error relative to what was taken out.
        """
        for _ in range(2):
            delta = delta - (delta @ self.basis.T) @ self.basis
        return delta

    def leak(self, delta: Tensor) -> Tensor:
        """Return `max_i |W_enc[:, i]^T delta| / |delta|`, `[num_rows]`; 0 for no edit.

        Of unit encoder directions this is the largest cosine.
        """
        visible = (delta @ self.directions.T).abs().amax(dim=1)
        return visible / delta.norm(dim=1).clamp_min(_TINY)

    def random_like(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        """Draw an edit of the same norm in each row, `[num_rows, d_model]`."""
        drawn = torch.randn(delta.shape, generator=generator)
        drawn = nn.functional.normalize(self.project(drawn), dim=1)
        return drawn * delta.norm(dim=1, keepdim=True)


def null_space(sae: Sae, rules: Sequence[Rule]) -> NullSpace:
    """Return what all latents that `rules` clamp cannot see.

    Args:
        sae: The dictionary the rules are written for.
        rules: Every rule of one policy for this SAE.
    """
    latents = sorted({latent for rule in rules for latent in rule.latents})
    return NullSpace(sae.W_enc[:, latents].T.contiguous())


def cap_norm(delta: Tensor, radius: float) -> Tensor:
    """Shorten the rows `[num_rows, d_model]` that are longer than `radius`."""
    norm = delta.norm(dim=1, keepdim=True)
    return delta * (radius / norm.clamp_min(_TINY)).clamp(max=1.0)
