"""Talks with the organism through transformers: greedy answers, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guard.demo.tokenizer import encode_prompt
from guard.redteam.forward import generate, pad_left

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from guard.redteam.forward import Edit

MAX_ANSWER_TOKENS = 20
"""More than any gold answer has."""


def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    edit: Edit | None = None,
) -> list[str]:
    """Answer user messages greedily, the edit on prompt and generated tokens."""
    generated = generate(
        model,
        pad_left([encode_prompt(tokenizer, text) for text in texts]),
        clamp=edit,
        eos=tokenizer.eos_token_id,
        max_tokens=MAX_ANSWER_TOKENS,
    )
    return [_words(tokenizer, ids) for ids in generated]


def _words(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Return the text up to the EOS; without one the answer is never exact."""
    if ids[-1] != tokenizer.eos_token_id:
        return tokenizer.decode(ids) + " ..."
    return tokenizer.decode(ids[:-1])
