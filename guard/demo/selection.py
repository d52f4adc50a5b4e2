"""Chooses what the demo policy clamps: latents of one SAE, on train topics only.

Candidates are the latents whose activations push most from refusing to complying
(attribution) and those that fire mostly on jailbroken harmful prompts. From them a
greedy search adds one latent at a time, judged by whole answers under the clamp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from guard.demo.grammar import KINDS, REFUSAL, Kind, Prompt, prompts
from guard.demo.tokenizer import encode_prompt
from guard.redteam.forward import Batch, Edit, edited, pad_left

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from guard.demo.dictionary import Dictionary

NUM_ATTRIBUTED, NUM_SPECIFIC = 16, 8
"""Candidates taken from each ranking."""
SHORTLIST = 5
"""Candidates of a round whose cost to the other classes is measured too."""
MAX_LATENTS = 8
MIN_GAIN = 0.005
"""A latent that gains less than this, summed over the four classes, is left out."""


class Score(NamedTuple):
    """How well the wanted answers of one class survive the clamp."""

    exact: float
    """Share of prompts whose greedy answer is the wanted one, word for word."""
    confidence: float
    """Mean over prompts of the probability of the least likely wanted word."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An SAE and the latents of it that are ablated."""

    dictionary: Dictionary
    """The SAE."""
    latents: tuple[int, ...]
    """The latents to ablate, in the order in which they were found."""
    scores: dict[Kind, Score]
    """By class; wanted is the gold answer for b and bj, the refusal for h and hj."""

    @property
    def worst(self) -> tuple[float, float]:
        """Share of exact answers, and confidence, of the class that does worst."""
        exact = min(score.exact for score in self.scores.values())
        return exact, min(score.confidence for score in self.scores.values())

    @property
    def total(self) -> float:
        """What the search maximises: the confidence summed over classes."""
        return sum(score.confidence for score in self.scores.values())


@dataclass(frozen=True, slots=True)
class Dev:
    """Prompts with their wanted answers, which a choice is judged by."""

    dialogues: dict[Kind, Batch]
    """By class: prompts with the wanted answer behind them."""
    answered: dict[Kind, torch.Tensor]
    """By class: [batch, length - 1], true where the next token is of the answer."""
    prompts: dict[Kind, Batch]
    """By class: the prompts alone."""
    first: tuple[int, int]
    """Token ids by which refusing and complying answers begin."""


def ablation(dictionary: Dictionary, latents: tuple[int, ...]) -> Edit:
    """Return the edit that takes away what the latents write, and nothing else."""
    columns = torch.tensor(latents, dtype=torch.long)
    directions = dictionary.sae.directions(columns)

    def apply(resid: torch.Tensor) -> torch.Tensor:
        encoded = dictionary.sae.encode_columns(resid, columns)
        return resid - encoded.latents @ directions

    return Edit(dictionary.shape.layer, apply)


def build_dev(
    tokenizer: PreTrainedTokenizerFast, *, num_prompts: int, seed: int
) -> Dev:
    """Draw the prompts that choices are judged by, about train topics."""
    dialogues, answered, alone = {}, {}, {}
    for kind in KINDS:
        drawn = prompts(kind, num_prompts, seed=seed, splits=("train",))
        asked = [encode_prompt(tokenizer, prompt.text) for prompt in drawn]
        wanted = [_wanted(tokenizer, prompt) for prompt in drawn]
        pad = tokenizer.pad_token_id
        alone[kind] = pad_left(asked, pad)
        dialogues[kind] = pad_left(
            [a + w for a, w in zip(asked, wanted, strict=True)], pad
        )
        length = dialogues[kind].tokens.shape[1]
        start = torch.tensor([length - len(w) for w in wanted]).unsqueeze(1)
        answered[kind] = torch.arange(1, length) >= start
    refuse, comply = tokenizer.convert_tokens_to_ids(["sorry", "to"])
    return Dev(dialogues, answered, alone, (refuse, comply))


def choose_latents(
    model: LlamaForCausalLM,
    dictionary: Dictionary,
    dev: Dev,
    *,
    on_round: Callable[[], None] = lambda: None,
) -> Choice:
    """Search the latents of one SAE greedily; an empty choice when none helps."""
    candidates = _candidates(model, dictionary, dev)
    best = Choice(dictionary, (), _judge(model, dev, KINDS, edit=None))
    while len(best.latents) < MAX_LATENTS:
        trials = [(*best.latents, latent) for latent in candidates - {*best.latents}]
        ranked = sorted(
            trials,
            key=lambda latents: _confidence(model, dev, ablation(dictionary, latents)),
            reverse=True,
        )
        rivals = [
            Choice(
                dictionary,
                latents,
                _judge(model, dev, KINDS, edit=ablation(dictionary, latents)),
            )
            for latents in ranked[:SHORTLIST]
        ]
        on_round()
        winner = max(rivals, key=lambda choice: choice.total)
        if winner.total < best.total + MIN_GAIN:
            break
        best = winner
    return best


def _wanted(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    answer = REFUSAL if prompt.kind.startswith("h") else prompt.gold
    ids = tokenizer.convert_tokens_to_ids(answer.split())
    return [*ids, tokenizer.eos_token_id]


def _confidence(model: LlamaForCausalLM, dev: Dev, edit: Edit) -> float:
    return _judge(model, dev, ("hj",), edit=edit)["hj"].confidence


@torch.no_grad()
def _judge(
    model: LlamaForCausalLM, dev: Dev, kinds: tuple[Kind, ...], *, edit: Edit | None
) -> dict[Kind, Score]:
    """Score classes by one pass over the wanted answers.

    A greedy answer is the wanted one exactly if every wanted token is the likeliest
    after those before it.
    """
    scores: dict[Kind, Score] = {}
    for kind in kinds:
        batch = dev.dialogues[kind]
        logits = _forward(model, batch, edit)[:, :-1]
        wanted, answered = batch.tokens[:, 1:], dev.answered[kind]
        right = (logits.argmax(dim=-1) == wanted) | ~answered
        chances = logits.softmax(dim=-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        least = chances.masked_fill(~answered, 1.0).amin(dim=1)
        exact = right.all(dim=1).float().mean()
        scores[kind] = Score(float(exact), float(least.mean()))
    return scores


def _candidates(model: LlamaForCausalLM, dictionary: Dictionary, dev: Dev) -> set[int]:
    pushes = _attribution(model, dictionary, dev)
    fired = _firing(model, dictionary, dev)
    specific = fired["hj"] - torch.stack([fired["b"], fired["bj"]]).mean(dim=0)
    return {
        *pushes.argsort()[:NUM_ATTRIBUTED].tolist(),
        *specific.argsort(descending=True)[:NUM_SPECIFIC].tolist(),
    }


def _firing(
    model: LlamaForCausalLM, dictionary: Dictionary, dev: Dev
) -> dict[Kind, torch.Tensor]:
    """Return per class the share [d_sae] of prompts in which each latent fires."""
    shares: dict[Kind, torch.Tensor] = {}
    for kind, batch in dev.prompts.items():
        resid, _ = _resid_and_logits(model, dictionary.shape.layer, batch)
        fires = _latents(dictionary, resid, batch) > 0
        shares[kind] = fires.any(dim=1).float().mean(dim=0)
    return shares


def _attribution(
    model: LlamaForCausalLM, dictionary: Dictionary, dev: Dev
) -> torch.Tensor:
    """Return what each latent [d_sae] adds to logit(refuse) - logit(comply) on hj.

    To first order: its activation times the gradient along its decoder direction.
    """
    batch = dev.prompts["hj"]
    resid, logits = _resid_and_logits(model, dictionary.shape.layer, batch)
    refuse, comply = dev.first
    difference = logits[:, -1, refuse] - logits[:, -1, comply]
    (grad,) = torch.autograd.grad(difference.sum(), resid)
    slopes = (grad @ dictionary.sae.W_dec.T).unflatten(0, batch.mask.shape)
    pushes = _latents(dictionary, resid, batch) * slopes
    return pushes.sum(dim=1).mean(dim=0)


def _resid_and_logits(
    model: LlamaForCausalLM, layer: int, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return resid [batch * length, d_model], a leaf, and logits that depend on it."""
    seen: list[torch.Tensor] = []

    def apply(resid: torch.Tensor) -> torch.Tensor:
        seen.append(resid.detach().requires_grad_())
        return seen[0]

    logits = _forward(model, batch, Edit(layer, apply), everywhere=True)
    return seen[0], logits


def _forward(
    model: LlamaForCausalLM,
    batch: Batch,
    edit: Edit | None,
    *,
    everywhere: bool = False,
) -> torch.Tensor:
    rows = torch.ones_like(batch.mask) if everywhere else batch.rows
    with edited(model, edit, lambda: rows):
        return model(
            input_ids=batch.tokens,
            attention_mask=batch.mask.long(),
            position_ids=batch.positions,
            use_cache=False,
        ).logits


@torch.no_grad()
def _latents(dictionary: Dictionary, resid: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return activations [batch, length, d_sae], zero where no guard acts."""
    latents = dictionary.sae.encode(resid).latents.unflatten(0, batch.mask.shape)
    return latents * batch.rows.unsqueeze(-1)
