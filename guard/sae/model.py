"""The SAE in its one canonical form; runs in the worker, inside the graph.

`a = norm(resid) @ W_enc + b_enc`. The latents are the `a` above a threshold that is
never negative (ReLU, JumpReLU, gated), or the positive ones among the k largest
(TopK). Then `latents @ W_dec + b_dec`, taken back to the units of `resid`.
All arithmetic is fp32; shapes depend on shapes only, never on values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from guard.sae.config import SaeConfig

__all__ = ["Encoded", "Sae", "SaeTensors"]

_LAYER_NORM_EPS = 1e-5
"""Added to the deviation on the way in only, as SAELens does."""
_SPARSE_FACTOR = 8
"""How much rarer than all latents the active ones must be to be gathered."""
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
_TINY = torch.finfo(torch.float32).tiny


class Encoded(NamedTuple):
    """Latents together with what takes a reconstruction back to `resid`."""

    latents: Tensor
    """`[num_tokens, m]`, activations of the asked latents, never negative."""
    scale: Tensor
    """`[num_tokens, 1]`, units of `resid` in one unit of SAE output (else ones)."""
    shift: Tensor
    """`[num_tokens, 1]`, the mean that was taken off (zeros without layer_norm)."""


class SaeTensors(NamedTuple):
    """The numbers of an SAE in canonical form: everything foldable is folded."""

    W_enc: Tensor
    """`[d_model, d_sae]`"""
    b_enc: Tensor
    """`[d_sae]`, with the pre-bias folded in."""
    W_dec: Tensor
    """`[d_sae, d_model]`"""
    b_dec: Tensor
    """`[d_model]`"""
    threshold: Tensor
    """`[d_sae]`, >= 0; a latent is active strictly above it (zeros for topk)."""
    latent_max: Tensor | None
    """`[d_sae]`, largest activation on training data, where the file has it."""


class Sae(nn.Module):
    """Encode and decode rows of `resid` at one hook point.

    Values that are not finite are passed on, never hidden: a NaN pre-activation
    is a NaN latent, so whatever scores the row sees it.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    latent_max: Tensor | None

    def __init__(self, config: SaeConfig, tensors: SaeTensors) -> None:
        """Register canonical tensors as fp32 buffers, kept out of `state_dict`.

        Args:
            config: Sizes and conventions; shapes were checked by the loader.
            tensors: Folded tensors, on any device and of any float dtype.
        """
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        self.d_sae = config.d_sae
        for name, tensor in tensors._asdict().items():
            value = None if tensor is None else tensor.detach().to(torch.float32)
            if name == "W_enc":
                # Latent-major in memory (the shape stays): picking a few columns
                # then reads a few contiguous rows.
                value = tensor.detach().to(torch.float32).t().contiguous().t()
            self.register_buffer(name, value, persistent=False)

    def encode(self, resid: Tensor) -> Encoded:
        """Encode rows to all latents.

        Args:
            resid: `[num_tokens, d_model]`, any float dtype.

        Returns:
            Latents `[num_tokens, d_sae]` in fp32, in the unit the file reports.
        """
        rows, scale, shift = self._normalise(resid)
        acts = _project(rows, self.W_enc, self.b_enc)
        if self.config.k is not None:
            return Encoded(_keep(acts, _kth_largest(acts, self.config.k)), scale, shift)
        # In place: at a prefill's size another copy costs more than the comparison.
        return Encoded(acts.masked_fill_(acts <= self.threshold, 0.0), scale, shift)

    def encode_columns(self, resid: Tensor, columns: Tensor) -> Encoded:
        """Encode rows to a few latents, exactly as `encode` would.

        A threshold SAE reads only those columns of the encoder; TopK membership
        depends on all latents, so it computes every pre-activation first.

        Args:
            resid: `[num_tokens, d_model]`, any float dtype.
            columns: `[m]`, int64 latent indices, repeats allowed.

        Returns:
            Latents `[num_tokens, m]` in fp32, in the order of `columns`.
        """
        rows, scale, shift = self._normalise(resid)
        if self.config.k is not None:
            acts = _project(rows, self.W_enc, self.b_enc)
            floor = _kth_largest(acts, self.config.k)
            return Encoded(_keep(acts.index_select(1, columns), floor), scale, shift)
        acts = torch.addmm(
            self.b_enc.index_select(0, columns),
            rows,
            # W_enc lies latent-major: through its transpose only these rows are read.
            self.W_enc.t().index_select(0, columns).t(),
        )
        floor = self.threshold.index_select(0, columns)
        return Encoded(torch.where(acts <= floor, 0.0, acts), scale, shift)

    def decode(self, encoded: Encoded) -> Tensor:
        """Reconstruct rows from all latents.

        Args:
            encoded: What `encode` gave, its latents `[num_tokens, d_sae]` possibly
                clamped in between.

        Returns:
            `[num_tokens, d_model]` in fp32, in the units of `resid`.
        """
        latents = encoded.latents
        if latents.is_cpu and not torch.compiler.is_compiling():
            rows = self._decode_active(latents)
        else:
            rows = self._decode_all(latents)
        return rows * encoded.scale + encoded.shift

    def _decode_all(self, latents: Tensor) -> Tensor:
        return torch.addmm(self.b_dec, latents, self.W_dec)

    def _decode_active(self, latents: Tensor) -> Tensor:
        """Decode rows from their active latents alone, where those are few.

        Each row by itself: a choice for the batch would let its neighbours decide how
        a row is rounded. Only on a CPU and untraced, where nothing is captured: the
        shapes follow values.
        """
        token, latent = latents.nonzero(as_tuple=True)
        counts = torch.bincount(token, minlength=len(latents))
        is_dense = counts * _SPARSE_FACTOR > self.d_sae
        if is_dense.all():
            return self._decode_all(latents)
        if is_dense.any():
            is_few = ~is_dense[token]
            token, latent = token[is_few], latent[is_few]
            counts = counts.masked_fill(is_dense, 0)
        rows = self.b_dec + F.embedding_bag(
            latent,
            self.W_dec,
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=latents[token, latent],
        )
        if is_dense.any():
            rows = torch.where(is_dense[:, None], self._decode_all(latents), rows)
        return rows

    def directions(self, columns: Tensor) -> Tensor:
        """Return what each latent writes, `W_dec[columns]`.

        A change `dz` of these latents changes `resid` by `scale * dz @ directions`.

        Args:
            columns: `[m]`, int64 latent indices.

        Returns:
            `[m, d_model]` in fp32.
        """
        return self.W_dec.index_select(0, columns)

    def _normalise(self, resid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = resid.to(torch.float32)
        ones = rows.new_ones(rows.shape[0], 1)
        mode = self.config.normalize_activations
        if mode == "constant_norm_rescale":
            # An all-zero row (padding) stays zero instead of becoming NaN.
            norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            scale = (norm / self.d_model**0.5).clamp_min(_TINY)
            return rows / scale, scale, torch.zeros_like(ones)
        if mode == "layer_norm":
            shift = rows.mean(dim=-1, keepdim=True)
            rows = rows - shift
            scale = rows.std(dim=-1, keepdim=True)
            return rows / (scale + _LAYER_NORM_EPS), scale, shift
        return rows, ones, torch.zeros_like(ones)


def _project(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `rows @ weight + bias`, the costly part of an encode.

    The BLAS behind `addmm` can be several times slower than oneDNN at a few rows and a
    wide matrix, on AMD's CPUs above all. oneDNN is reached through the operator that
    PyTorch's own compiler emits for a linear layer; where that is missing, or something
    is differentiated or traced, `addmm` does the same.
    """
    if (
        _HAS_ONEDNN
        and rows.is_cpu
        and len(rows) > 1
        and not rows.requires_grad
        and not torch.compiler.is_compiling()
    ):
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(rows.contiguous(), weight.t(), bias, "none", [], "")
    return torch.addmm(bias, rows, weight)


def _kth_largest(acts: Tensor, k: int) -> Tensor:
    return torch.topk(acts, k, dim=-1).values[:, -1:]


def _keep(acts: Tensor, floor: Tensor) -> Tensor:
    # Active iff positive and fewer than k values exceed it. Ties at the k-th value
    # all stay, so that no result depends on the order a sort happens to choose.
    return torch.where((acts <= 0) | (acts < floor), 0.0, acts)
