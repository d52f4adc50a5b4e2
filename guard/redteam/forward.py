"""Forward passes of a transformers model whose residual stream is edited.

A forward hook is the plain way to run a clamped model, and the twin that the serving
engine is compared with. Models are those that keep their decoder layers in
`model.model.layers`, as Llama does.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import LlamaForCausalLM

__all__ = [
    "Batch",
    "Covers",
    "Delta",
    "Edit",
    "added",
    "batches",
    "edited",
    "generate",
    "pad_left",
    "place",
    "quiet_transformers",
    "record",
    "seen",
]


class Batch(NamedTuple):
    """Token sequences of one forward pass, padded on the left."""

    tokens: torch.Tensor
    """[batch, length] token ids."""
    mask: torch.Tensor
    """[batch, length] false at padding."""

    @property
    def positions(self) -> torch.Tensor:
        """[batch, length] position of each token in its own sequence."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def rows(self) -> torch.Tensor:
        """[batch, length] true where a guard acts: not padding, not the BOS."""
        return self.mask & (self.positions > 0)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a transformers model is called with."""
        return {
            "input_ids": self.tokens,
            "attention_mask": self.mask.long(),
            "position_ids": self.positions,
        }


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of the residual stream at a decoder layer, and at later ones with it."""

    layer: int
    """Index of the decoder layer whose output is changed."""
    apply: Callable[[torch.Tensor], torch.Tensor]
    """Maps resid [num_tokens, d_model] to what the next layer reads."""
    later: tuple[Edit, ...] = ()
    """What is changed on the same rows at later layers, as by a policy that clamps at
    several."""

    def change(self, resid: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return resid `[batch, length, d_model]`, changed here on some rows.

        Args:
            resid: What the layer writes; left as it is.
            rows: Which, bool `[batch, length]`.
        """
        if not rows.any():
            return resid
        resid = resid.clone()
        resid[rows] = self.apply(resid[rows])
        return resid


class Delta(NamedTuple):
    """What is added to some rows of a batch at one decoder layer."""

    layer: int
    """Index of the decoder layer to whose output it is added."""
    values: torch.Tensor
    """[num_rows, d_model], sequence after sequence."""
    rows: torch.Tensor
    """[batch, length], true at those rows."""


class Covers(Protocol):
    """Which rows of an answer a clamp acts on; asked once for each forward pass."""

    def __call__(self, rows: torch.Tensor, *, prompt: bool) -> torch.Tensor:
        """Return those among `rows` `[batch, length]` that are clamped.

        Args:
            rows: Where a guard would act.
            prompt: Whether they are the prompts', or the newest generated tokens'.
        """


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> Batch:
    """Put sequences of different length into one batch, ends aligned.

    Args:
        sequences: Token ids.
        pad_id: What fills up; masked, so that any id does.
    """
    length = max(map(len, sequences))
    tokens = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, length - len(sequence) :] = torch.tensor(sequence)
        mask[row, length - len(sequence) :] = True
    return Batch(tokens, mask)


def batches(sequences: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield the indices of `size` sequences at a time, the shortest first."""
    by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for first in range(0, len(by_length), size):
        yield by_length[first : first + size]


def place(
    deltas: Sequence[torch.Tensor],
    batch: Batch,
    *,
    layer: int,
    behind: Sequence[int] | None = None,
) -> Delta:
    """Put a delta on the last prompt rows of each sequence.

    Args:
        deltas: One for each sequence, `[num_rows, d_model]`.
        batch: The sequences.
        layer: At whose output it is added.
        behind: How many tokens of each sequence come after its prompt; 0 if left out.
    """
    length = batch.tokens.shape[1]
    end = length - torch.tensor(behind or [0] * len(deltas))[:, None]
    start = end - torch.tensor([len(delta) for delta in deltas])[:, None]
    column = torch.arange(length)
    return Delta(layer, torch.cat(list(deltas)), (start <= column) & (column < end))


@contextlib.contextmanager
def edited(
    model: LlamaForCausalLM, edit: Edit | None, rows: Callable[[], torch.Tensor]
) -> Iterator[None]:
    """Apply `edit`, and its later ones, to the rows that `rows()` names, while open.

    Args:
        model: The model.
        edit: What is changed, if anything is.
        rows: Asked in every pass and at every edited layer, bool `[batch, length]`.
    """

    def keep_to(one: Edit) -> Callable[[object, object, torch.Tensor], torch.Tensor]:
        return lambda module, args, resid: one.change(resid, rows())

    with contextlib.ExitStack() as hooks:
        for one in () if edit is None else (edit, *edit.later):
            layer = model.model.layers[one.layer]
            hooks.callback(layer.register_forward_hook(keep_to(one)).remove)
        yield


@contextlib.contextmanager
def added(model: LlamaForCausalLM, delta: Delta | None) -> Iterator[None]:
    """Add `delta` while open; behind every edit that was opened before."""
    if delta is None:
        yield
        return
    edit = Edit(delta.layer, lambda resid: resid + delta.values)
    with edited(model, edit, lambda: delta.rows):
        yield


@contextlib.contextmanager
def seen(
    model: LlamaForCausalLM, layers: Sequence[int]
) -> Iterator[dict[int, torch.Tensor]]:
    """Fill the dict with the newest resid [batch, length, d_model] of each layer.

    What the next layer reads: behind every edit that was opened before. Layer -1 is
    what the first one reads.
    """
    found: dict[int, torch.Tensor] = {}
    places = model.model.layers

    def keep(layer: int) -> Callable[[object, object, torch.Tensor], None]:
        def hook(module: object, args: object, resid: torch.Tensor) -> None:
            found[layer] = resid

        return hook

    def keep_first(module: object, args: tuple[torch.Tensor, ...]) -> None:
        found[-1] = args[0]

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            if layer < 0:
                handle = places[0].register_forward_pre_hook(keep_first)
            else:
                handle = places[layer].register_forward_hook(keep(layer))
            hooks.callback(handle.remove)
        yield found


@torch.no_grad()
def record(
    model: LlamaForCausalLM,
    batch: Batch,
    layers: Sequence[int],
    *,
    clamp: Edit | None,
    delta: Delta | None = None,
) -> dict[int, torch.Tensor]:
    """Return resid [batch, length, d_model] of some layers, behind clamp and delta."""
    with (
        edited(model, clamp, lambda: batch.rows),
        added(model, delta),
        seen(model, layers) as found,
    ):
        model(**batch.inputs, use_cache=False, logits_to_keep=1)
    return found


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    batch: Batch,
    *,
    clamp: Edit | None,
    eos: int,
    max_tokens: int,
    delta: Delta | None = None,
    later: torch.Tensor | None = None,
    covers: Covers | None = None,
    sample: torch.Generator | None = None,
    ban_eos: bool = False,
) -> list[list[int]]:
    """Answer prompts: greedily and the clamp on all tokens, unless told otherwise.

    Args:
        model: The model.
        batch: The prompts.
        clamp: What holds it, if anything does.
        eos: Token id that ends an answer.
        max_tokens: Where an answer without an EOS is cut.
        delta: Added to rows of the prompts.
        later: `[batch, num_rows, d_model]`, added to the first generated tokens at
            the layer of `delta`, a row each.
        covers: Which tokens are clamped.
        sample: What tokens are drawn with, at temperature 1.
        ban_eos: Whether an answer goes on up to `max_tokens`.

    Returns:
        For each prompt the generated token ids, up to and with the EOS if one came.
    """
    rows, mask, positions = batch.rows, batch.mask, batch.positions
    covered = rows if covers is None else covers(rows, prompt=True)
    generated: list[torch.Tensor] = []

    def edit_of(step: int) -> Delta | None:
        if delta is None or later is None or step >= later.shape[1]:
            return None
        return Delta(delta.layer, later[:, step], rows)

    def decode(**inputs: Any) -> Any:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1]
        if ban_eos:
            logits[:, eos] = -torch.inf
        generated.append(_choose(logits, sample))
        return out.past_key_values

    with edited(model, clamp, lambda: covered):
        with added(model, delta):
            cache = decode(**batch.inputs)
        rows = torch.ones_like(generated[0], dtype=torch.bool)
        while len(generated) < max_tokens:
            if bool((torch.cat(generated, dim=1) == eos).any(dim=1).all()):
                break
            mask = torch.cat([mask, rows], dim=1)
            positions = positions[:, -1:] + 1
            covered = rows if covers is None else covers(rows, prompt=False)
            with added(model, edit_of(len(generated) - 1)):
                cache = decode(
                    input_ids=generated[-1],
                    attention_mask=mask.long(),
                    position_ids=positions,
                    past_key_values=cache,
                )
    return [_until(eos, ids) for ids in torch.cat(generated, dim=1).tolist()]


def _choose(logits: torch.Tensor, sample: torch.Generator | None) -> torch.Tensor:
    """Return the likeliest token of each row, or one drawn, `[batch, 1]`."""
    if sample is None:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=sample)


def _until(eos: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def quiet_transformers() -> None:
    """Keep transformers from drawing bars, and from warning of what is meant so.

    The generation configs of models have a temperature, for vLLM.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
