"""Edits that clamped latents of later layers cannot see either.

Where a policy clamps at several layers, an edit behind the first clamp must not show
to the latents of the later ones. What they see of it is no linear map: here it is
followed by its Jacobian (the cross-layer variant of arXiv 2606.18322, section 3),
taken anew as the edit moves, and judged by a whole pass. What a later clamp is given
counts: a clamp that is given the same does the same, so that behind it they see nothing
either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from guard.policy import Rule
    from guard.redteam.projection import NullSpace
    from guard.sae.model import Sae

__all__ = ["JacobianSpace", "Later", "Runner", "later_latents"]

_RANK = 1e-5
"""Singular values below this, relative to a sample's largest, are fp32's rounding."""
_TINY = torch.finfo(torch.float32).tiny
_GRADIENTS = 32
"""Outputs that are differentiated at once."""
_EPS = 1e-8
"""Of the published relative drift."""


class Runner(Protocol):
    """The layers behind the first clamp, as `guard.redteam.tail.Tail` runs them."""

    resid: Tensor
    """What that clamp lets through, `[batch, length, d_model]`."""

    def read(self, resid: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """Return what clamps there are given; differentiable, each sample by itself."""
        ...


class Later(NamedTuple):
    """What a policy clamps at one later layer."""

    layer: int
    """Index of the decoder layer."""
    directions: Tensor
    """`W_enc[:, S]^T`, `[num_latents, d_model]`."""
    bias: Tensor
    """`b_enc[S]`, `[num_latents]`."""


def later_latents(sae: Sae, rules: Sequence[Rule], *, layer: int) -> Later:
    """Return the encoder of all latents that `rules` clamp at a later layer.

    Raises:
        ValueError: The SAE normalises its input, so that its pre-activations are not
            linear in resid.
    """
    if sae.config.normalize_activations != "none":
        raise ValueError(
            f"The SAE of layer {layer} normalises its input; "
            "expected one whose pre-activations are linear in resid."
        )
    latents = sorted({latent for rule in rules for latent in rule.latents})
    return Later(layer, sae.W_enc[:, latents].T.contiguous(), sae.b_enc[latents])


class JacobianSpace:
    """Edits of a batch that no clamped latent sees: here exactly, later as linearised.

    About an edit `d0` with Jacobian J an edit `d` keeps the later pre-activations z as
    they are without any if `z(d0) + J (d - d0) = z(0)`. At `d0 = 0` that is `J d = 0`.
    Edits are `[num_rows, d_model]`, sample after sample, those of a sample together.
    """

    def __init__(
        self,
        runner: Runner,
        rows: Tensor,
        later: Sequence[Later],
        *,
        here: NullSpace,
        read: Tensor | None = None,
        every: int = 1,
    ) -> None:
        """Linearise about no edit.

        Args:
            runner: The layers behind the first clamp.
            rows: Which rows are edited, bool `[batch, length]`, at least one a sample.
            later: What is clamped behind the first layer.
            here: What the latents clamped at the first layer cannot see.
            read: At which rows the later latents must see nothing, bool
                `[batch, length]`; the last edited row of each sample if left out. A
                row before the first edited one sees nothing anyway.
            every: How many calls of `refresh` go by for one new linearisation.

        Raises:
            ValueError: A sample has no edited row, or no row that is read.
        """
        self.directions = here.directions
        self._runner, self._later, self._here = runner, list(later), here
        self._rows, self._every, self._calls = rows, every, 0
        self._read = _last(rows) if read is None else read
        for name, chosen in (("edited", self._rows), ("read", self._read)):
            if not bool(chosen.any(dim=1).all()):
                raise ValueError(
                    f"A sample has no row that is {name}; expected one at least."
                )
        none = torch.zeros(int(rows.sum()), runner.resid.shape[-1])
        with torch.no_grad():
            self._still = self.pre_activations(none)
        self._linearise(none)

    def pre_activations(self, delta: Tensor) -> Tensor:
        """Return what the later clamped latents are given under an edit.

        Returns:
            `[batch, num_outputs]`: all latents of all layers at the first row that is
            read, then at the next; 0 where a sample has fewer.
        """
        resid = self._runner.resid.clone()
        resid[self._rows] = resid[self._rows] + delta
        found = self._runner.read(resid, [at.layer for at in self._later])
        seen = [found[at.layer] @ at.directions.T + at.bias for at in self._later]
        return _padded(torch.cat(seen, dim=-1)[self._read], self._read).flatten(1)

    def refresh(self, delta: Tensor) -> None:
        """Linearise about `delta`, on every `every`th call; call it once per step."""
        self._calls += 1
        if self._calls % self._every == 0:
            self._linearise(delta)

    def project(self, delta: Tensor) -> Tensor:
        """Return the nearest edit in the null space that the linearised later see not.

        As close as the edits of the first layer's null space come, and twice, as there.
        """
        return self._confine(delta, self._level)

    def leak(self, delta: Tensor) -> Tensor:
        """Return the largest change that a clamped latent sees of each row's edit.

        As a share of what it would see of an edit as long in its own direction:
        at the first layer the largest cosine with an encoder direction, at later ones
        that of the sample's edit with a row of the Jacobian, linearised.

        Returns:
            `[num_rows]`; 0 for no edit.
        """
        wide = _padded(delta, self._rows).flatten(1)
        change = torch.einsum("bjd,bd->bj", self._jacobian, wide) - self._goal
        size = self._jacobian.norm(dim=2) * wide.norm(dim=1, keepdim=True)
        later = (change.abs() / size.clamp_min(_TINY)).amax(dim=1)
        later = torch.where(wide.norm(dim=1) > 0, later, 0.0)
        here = self._here.leak(delta)
        return torch.maximum(here, later.repeat_interleave(self._rows.sum(dim=1)))

    def random_like(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        """Draw an edit as long over each sample, hidden as `project` hides it.

        Whatever edit it is linearised about: here `J d = 0`.
        """
        drawn = torch.randn(delta.shape, generator=generator)
        drawn = self._confine(drawn, torch.zeros_like(self._level))
        drawn = _padded(drawn, self._rows).flatten(1)
        size = _padded(delta, self._rows).flatten(1).norm(dim=1, keepdim=True)
        drawn = drawn * (size / drawn.norm(dim=1, keepdim=True).clamp_min(_TINY))
        return self._packed(drawn)

    def cap_norm(self, delta: Tensor, radius: float) -> Tensor:
        """Shorten the edits of samples with a row longer than `radius`, as a whole.

        Row by row the rows of a sample would no longer cancel out in the later layers.
        Linearised about some edit, a shortened one has to be projected again: what it
        then must take back does not shrink with it.
        """
        wide = _padded(delta, self._rows)
        longest = wide.norm(dim=2).amax(dim=1)
        share = (radius / longest.clamp_min(_TINY)).clamp(max=1.0)
        return self._packed((wide * share[:, None, None]).flatten(1))

    @torch.no_grad()
    def drift(self, delta: Tensor) -> Tensor:
        """Return `|z(h1) - z(h0)| / |z(h0)|` after a whole pass, `[batch]`.

        Over the pre-activations, which move where a latent that is off would not.
        """
        moved = (self.pre_activations(delta) - self._still).norm(dim=1)
        return moved / (self._still.norm(dim=1) + _EPS)

    def _confine(self, delta: Tensor, level: Tensor) -> Tensor:
        """Give edits these coordinates `[batch, rank]` in what the Jacobian spans."""
        for _ in range(2):
            wide = _padded(self._here.project(delta), self._rows).flatten(1)
            excess = torch.einsum("brd,bd->br", self._basis, wide) - level
            wide = wide - torch.einsum("br,brd->bd", excess, self._basis)
            delta = self._packed(wide)
        return delta

    def _linearise(self, delta: Tensor) -> None:
        """Take the Jacobian about an edit, `[batch, num_outputs, wide]`."""
        leaf = delta.detach().clone().requires_grad_()
        with torch.enable_grad():
            outputs = self.pre_activations(leaf)
            # Samples do not read each other: one gradient serves the whole batch.
            totals = outputs.sum(dim=0)
        by_output = [
            grad
            for some in torch.eye(len(totals)).split(_GRADIENTS)
            for grad in torch.autograd.grad(
                totals, leaf, some, retain_graph=True, is_grads_batched=True
            )[0]
        ]
        self._jacobian = torch.stack(
            [_padded(grad, self._rows).flatten(1) for grad in by_output], dim=1
        )
        wide = _padded(delta.detach(), self._rows).flatten(1)
        linear = torch.einsum("bjd,bd->bj", self._jacobian, wide)
        self._goal = linear - (outputs.detach() - self._still)
        # What the first layer's null space leaves of it, so that both hold together.
        hidden = [_padded(self._here.project(g), self._rows) for g in by_output]
        within = torch.stack([grad.flatten(1) for grad in hidden], dim=1)
        left, size, basis = torch.linalg.svd(within.double(), full_matrices=False)
        kept = size > size.amax(dim=1, keepdim=True) * _RANK
        self._basis = torch.where(kept[:, :, None], basis, 0.0).float()
        level = torch.einsum("bjr,bj->br", left, self._goal.double())
        self._level = torch.where(kept, level / size.clamp_min(_TINY), 0.0).float()

    def _packed(self, wide: Tensor) -> Tensor:
        """Undo `_padded`, `[batch, most_rows * d_model]` to `[num_rows, d_model]`."""
        counts = self._rows.sum(dim=1)
        wide = wide.unflatten(1, (int(counts.amax()), -1))
        return wide[torch.arange(wide.shape[1]) < counts[:, None]]


def _last(rows: Tensor) -> Tensor:
    """Return the last true column of each row, alone, bool of the same shape."""
    return rows & (rows.flip(1).cumsum(dim=1).flip(1) == 1)


def _padded(values: Tensor, rows: Tensor) -> Tensor:
    """Give each sample as many rows: `[num_rows, d]` to `[batch, most_rows, d]`."""
    counts = rows.sum(dim=1)
    wide = values.new_zeros(len(rows), int(counts.amax()), values.shape[1])
    wide[torch.arange(wide.shape[1]) < counts[:, None]] = values
    return wide
