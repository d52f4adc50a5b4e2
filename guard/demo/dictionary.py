"""Trains the organism's sparse autoencoders: TopK, on topics of the train split.

A small one on purpose. What it leaves unexplained is where behaviour can come
back through, which is what the organism is there to show. Encoder and decoder are
tied: an ablation is then an orthogonal projection, which does not magnify the rounding
of a stream in bf16.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from guard.demo.grammar import KINDS, sample
from guard.demo.tokenizer import encode_prompt
from guard.hook import HookPoint
from guard.redteam.forward import pad_left
from guard.sae.config import SaeConfig
from guard.sae.load import build_sae

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from guard.sae.model import Sae


@dataclass(frozen=True, slots=True)
class Shape:
    """Which activations an SAE reads, and its size."""

    layer: int
    """Index of the decoder layer whose output it reads."""
    d_sae: int
    """Number of latents."""
    k: int
    """Latents that may be active on a token."""


@dataclass(frozen=True, slots=True)
class DictionaryRecipe:
    """How an SAE is trained."""

    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 1024
    """Token rows per step."""
    learning_rate: float = 2e-3
    """Adam's."""


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A trained TopK SAE: `latents = topk((resid - b_dec) @ W_dec.T + b_enc)`."""

    shape: Shape
    """Where it reads and how large it is."""
    config: SaeConfig
    """What is saved beside the numbers."""
    tensors: dict[str, torch.Tensor]
    """W_enc, b_enc, W_dec, b_dec and latent_max, as they are saved."""
    sae: Sae
    """The same SAE, ready to encode."""
    fvu: float
    """Share of the variance of resid that it leaves unexplained."""


def collect_resid(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: tuple[int, ...],
    seed: int,
    num_dialogues: int = 2000,
) -> dict[int, torch.Tensor]:
    """Record resid [num_tokens, d_model] per layer on dialogues of train topics.

    Answers included; the BOS at position 0 left out, because no clamp or monitor
    ever reads it.
    """
    rng = random.Random(f"resid/{seed}")
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for _ in range(0, num_dialogues, 100):
        dialogues = []
        for _ in range(100):
            prompt = sample(rng, rng.choice(KINDS), splits=("train",))
            answer = tokenizer.convert_tokens_to_ids(prompt.gold.split())
            dialogues.append([*encode_prompt(tokenizer, prompt.text), *answer])
        batch = pad_left(dialogues, tokenizer.pad_token_id)
        with torch.no_grad():
            out = model.model(
                input_ids=batch.tokens,
                attention_mask=batch.mask.long(),
                position_ids=batch.positions,
                output_hidden_states=True,
                use_cache=False,
            )
        for layer in layers:
            found[layer].append(out.hidden_states[layer + 1][batch.rows])
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def train_dictionary(
    resid: torch.Tensor,
    shape: Shape,
    recipe: DictionaryRecipe,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Dictionary:
    """Train a TopK SAE on resid [num_tokens, d_model]."""
    generator = torch.Generator().manual_seed(seed)
    size = resid.norm(dim=-1).mean()
    rows = resid / size
    weights = _initial(rows, shape.d_sae, generator)
    optimizer = torch.optim.Adam(weights.values(), lr=recipe.learning_rate)
    for _ in range(recipe.steps):
        chosen = torch.randint(len(rows), (recipe.batch_size,), generator=generator)
        loss = _squared_error(weights, rows[chosen], shape.k).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights["W_dec"].copy_(functional.normalize(weights["W_dec"], dim=1))
        on_step()
    return _finish(weights, resid, shape, size)


def _initial(
    rows: torch.Tensor, d_sae: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    W_dec = functional.normalize(
        torch.randn(d_sae, rows.shape[1], generator=generator), dim=1
    )
    weights = {
        "b_enc": torch.zeros(d_sae),
        "W_dec": W_dec,
        "b_dec": rows.mean(dim=0),
    }
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def _encode(
    weights: dict[str, torch.Tensor], resid: torch.Tensor, k: int
) -> torch.Tensor:
    pre = (resid - weights["b_dec"]) @ weights["W_dec"].T + weights["b_enc"]
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def _squared_error(
    weights: dict[str, torch.Tensor], resid: torch.Tensor, k: int
) -> torch.Tensor:
    decoded = _encode(weights, resid, k) @ weights["W_dec"] + weights["b_dec"]
    return (resid - decoded).square().sum(dim=-1)


@torch.no_grad()
def _finish(
    weights: dict[str, torch.Tensor],
    resid: torch.Tensor,
    shape: Shape,
    size: torch.Tensor,
) -> Dictionary:
    """Fold the training scale into the biases, so that raw resid can be read."""
    folded = {name: weight.detach().clone() for name, weight in weights.items()}
    folded["W_enc"] = folded["W_dec"].T.contiguous()
    folded["b_enc"] *= size
    folded["b_dec"] *= size
    folded["latent_max"] = _encode(folded, resid, shape.k).amax(dim=0)
    variance = (resid - resid.mean(dim=0)).square().sum(dim=-1).mean()
    fvu = float(_squared_error(folded, resid, shape.k).mean() / variance)
    config = SaeConfig(
        architecture="topk",
        d_model=resid.shape[1],
        d_sae=shape.d_sae,
        k=shape.k,
        hook_point=str(HookPoint(shape.layer)),
        apply_b_dec_to_input=True,
        model="organism",
        metadata={"fvu": round(fvu, 4), "num_tokens": len(resid)},
    )
    return Dictionary(shape, config, folded, build_sae(config, folded), fvu)
