"""Talks with the organism through transformers: batches, edits, greedy answers.

This is the plain way to run a clamped model, a forward hook, and the twin that the
serving engine is compared with.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import DynamicCache

from guard.demo.tokenizer import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MAX_ANSWER_TOKENS = 20
"""More than any gold answer has."""


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


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of the residual stream at one decoder layer."""

    layer: int
    """Index of the decoder layer whose output is changed."""
    apply: Callable[[torch.Tensor], torch.Tensor]
    """Maps resid [num_tokens, d_model] to what the next layer reads."""


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Put sequences of different length into one batch, ends aligned."""
    length = max(map(len, sequences))
    tokens = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, length - len(sequence) :] = torch.tensor(sequence)
        mask[row, length - len(sequence) :] = True
    return Batch(tokens, mask)


@contextlib.contextmanager
def edited(
    model: LlamaForCausalLM, edit: Edit | None, rows: Callable[[], torch.Tensor]
) -> Iterator[None]:
    """Apply `edit` to the rows [batch, length] that `rows()` names, while open."""
    if edit is None:
        yield
        return

    def hook(module: object, args: object, resid: torch.Tensor) -> torch.Tensor:
        chosen = rows()
        resid = resid.clone()
        resid[chosen] = edit.apply(resid[chosen])
        return resid

    handle = model.model.layers[edit.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def first_logits(
    model: LlamaForCausalLM, batch: Batch, *, edit: Edit | None = None
) -> torch.Tensor:
    """Return the logits [batch, vocab] of the first answer token."""
    with torch.no_grad(), edited(model, edit, lambda: batch.rows):
        out = model(
            input_ids=batch.tokens,
            attention_mask=batch.mask.long(),
            position_ids=batch.positions,
            logits_to_keep=1,
            use_cache=False,
        )
    return out.logits[:, -1]


def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    edit: Edit | None = None,
) -> list[str]:
    """Answer user messages greedily, the edit on prompt and generated tokens."""
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    batch = pad_left(prompts, tokenizer.pad_token_id)
    generated = _greedy(model, batch, edit, eos=tokenizer.eos_token_id)
    return [_words(tokenizer, row) for row in generated.tolist()]


@torch.no_grad()
def _greedy(
    model: LlamaForCausalLM, batch: Batch, edit: Edit | None, *, eos: int
) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    tokens, mask, rows = batch.tokens, batch.mask, batch.rows
    positions = batch.positions
    generated: list[torch.Tensor] = []
    with edited(model, edit, lambda: rows):
        for _ in range(MAX_ANSWER_TOKENS):
            out = model(
                input_ids=tokens,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            )
            tokens = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            generated.append(tokens)
            if bool((torch.cat(generated, dim=1) == eos).any(dim=1).all()):
                break
            rows = torch.ones_like(tokens, dtype=torch.bool)
            mask = torch.cat([mask, rows], dim=1)
            positions = positions[:, -1:] + 1
    return torch.cat(generated, dim=1)


def _words(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Return the text up to the EOS; without one the answer is never exact."""
    if tokenizer.eos_token_id not in ids:
        return tokenizer.decode(ids) + " ..."
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)])
