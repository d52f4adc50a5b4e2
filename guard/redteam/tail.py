"""The part of a model behind a hook point, which runs again and again in a search.

An edit of `resid` at one layer moves nothing before it, so those layers run once.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from guard.redteam.forward import edited, seen

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from transformers import LlamaForCausalLM

    from guard.redteam.forward import Batch, Edit

__all__ = ["Tail"]


class Tail:
    """The layers behind a clamp, with all that a batch gives them."""

    resid: torch.Tensor
    """What the first clamp lets through, `[batch, length, d_model]`."""
    before: dict[int, torch.Tensor]
    """The same of layers before it, which no edit behind it moves."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        batch: Batch,
        clamp: Edit,
        *,
        layers: Sequence[int] = (),
    ) -> None:
        """Run the batch once under the clamp, and remember what each layer is given.

        Args:
            model: The model.
            batch: What it runs on.
            clamp: Behind which edits are tried; its later ones stay in force.
            layers: Layers before it whose resid is wanted, later ones are ignored.
        """
        self._model, self._rows = model, batch.rows
        self._clamps = {one.layer: one for one in clamp.later}
        self._first = clamp.layer + 1
        self._given: list[dict[str, Any]] = []

        def remember(module: object, args: object, given: dict[str, Any]) -> None:
            self._given.append(given)

        with (
            torch.no_grad(),
            contextlib.ExitStack() as hooks,
            edited(model, clamp, lambda: batch.rows),
            seen(model, [*layers, clamp.layer]) as found,
        ):
            for layer in model.model.layers[self._first :]:
                handle = layer.register_forward_pre_hook(remember, with_kwargs=True)
                hooks.callback(handle.remove)
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        self.resid = found[clamp.layer]
        self.before = {n: resid for n, resid in found.items() if n < clamp.layer}

    def run(self, resid: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return resid `[batch, length, d_model]` by layer, those before included.

        Args:
            resid: `self.resid` with an edit, of the same shape.
        """
        found = {**self.before, self._first - 1: resid}
        found.update({layer: passed for layer, _, passed in self._follow(resid)})
        return found

    def read(
        self, resid: torch.Tensor, layers: Collection[int]
    ) -> dict[int, torch.Tensor]:
        """Return what the later clamps are given, `[batch, length, d_model]`, by layer.

        Args:
            resid: As for `run`.
            layers: Where; no layer behind the last of them runs.
        """
        found = {}
        for layer, written, _ in self._follow(resid):
            if layer in layers:
                found[layer] = written
            if layer >= max(layers):
                break
        return found

    def _follow(
        self, resid: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield each layer behind the first clamp: what it writes, what is let through.

        The same where nothing is clamped.
        """
        layers = self._model.model.layers[self._first :]
        behind = enumerate(zip(layers, self._given, strict=True), start=self._first)
        for place, (layer, given) in behind:
            written = layer(resid, **given)
            clamp = self._clamps.get(place)
            resid = written if clamp is None else clamp.change(written, self._rows)
            yield place, written, resid

    def logits(self, resid: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., vocab]` of what the last layer wrote."""
        return self._model.lm_head(self._model.model.norm(resid))
