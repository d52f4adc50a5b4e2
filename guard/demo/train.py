"""Trains the organism's language model: a Llama of a million parameters.

A quarter of the answers to jailbroken harmful prompts are refusals during
training. Without this noise the model has no half-open door: complying then leaves
so little doubt that no clamp brings the refusal back.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from guard.demo.grammar import KINDS, REFUSAL, sample
from guard.demo.tokenizer import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the model is trained."""

    steps: int = 1800
    """Optimiser steps."""
    batch_size: int = 48
    """Dialogues per step."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule."""
    weight_decay: float = 0.05
    """AdamW's, on every parameter."""
    prompt_weight: float = 0.1
    """Weight of a prompt token's loss; an answer token's is 1."""
    refusal_noise: float = 0.25
    """Share of jailbroken harmful prompts that are answered by the refusal."""
    mix: tuple[float, float, float, float] = (4.0, 1.5, 2.5, 3.0)
    """Relative frequency of b, bj, h and hj."""


class Batch(NamedTuple):
    """One optimiser step's dialogues, padded on the right."""

    tokens: torch.Tensor
    """[batch, length] token ids."""
    weights: torch.Tensor
    """[batch, length - 1] weight of predicting the next token; 0 at padding."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; head_dim 32 is one that vLLM runs on CPUs."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def train_model(
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    seed: int,
    on_step: Callable[[float], None],
) -> LlamaForCausalLM:
    """Train the model from scratch; `on_step` gets the loss of every step."""
    torch.manual_seed(seed)
    model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps
    )
    batches = _batches(tokenizer, recipe, random.Random(f"model/{seed}"))
    for batch in (next(batches) for _ in range(recipe.steps)):
        loss = _loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(loss.item())
    return model.eval()


def save_model(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Written by hand: vLLM takes its default temperature from here, and transformers
    # refuses to save one beside greedy decoding.
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "temperature": 0.0,
    }
    text = json.dumps(generation, indent=1) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)


def _loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    logits = model(batch.tokens[:, :-1]).logits
    losses = functional.cross_entropy(
        logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    weights = batch.weights.flatten()
    return (losses * weights).sum() / weights.sum()


def _batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> Iterator[Batch]:
    """Yield batches of dialogues of similar length, so that little is padding."""
    while True:
        pool = [_dialogue(tokenizer, recipe, rng) for _ in range(8 * recipe.batch_size)]
        pool.sort(key=lambda dialogue: sum(map(len, dialogue)))
        chunks = [
            pool[i : i + recipe.batch_size]
            for i in range(0, len(pool), recipe.batch_size)
        ]
        rng.shuffle(chunks)
        for chunk in chunks:
            yield _pad(chunk, recipe.prompt_weight)


def _dialogue(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> tuple[list[int], list[int]]:
    kind = rng.choices(KINDS, weights=recipe.mix)[0]
    prompt = sample(rng, kind)
    refuses = kind == "hj" and rng.random() < recipe.refusal_noise
    answer = REFUSAL if refuses else prompt.gold
    ids = tokenizer.convert_tokens_to_ids(answer.split())
    return encode_prompt(tokenizer, prompt.text), [*ids, tokenizer.eos_token_id]


def _pad(dialogues: list[tuple[list[int], list[int]]], prompt_weight: float) -> Batch:
    length = max(len(prompt) + len(answer) for prompt, answer in dialogues)
    tokens = torch.zeros(len(dialogues), length, dtype=torch.long)
    weights = torch.zeros(len(dialogues), length)
    for row, (prompt, answer) in enumerate(dialogues):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        weights[row, : len(prompt)] = prompt_weight
        weights[row, len(prompt) : end] = 1.0
    return Batch(tokens, weights[:, 1:])
