"""The organism as something to attack: its clamp, its unit of length, its samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guard.check import load_saes
from guard.demo.dialogue import MAX_ANSWER_TOKENS
from guard.demo.grammar import Kind, prompts
from guard.demo.measure import load_model
from guard.demo.tokenizer import encode_prompt
from guard.policy import load_policy
from guard.redteam.held import held_layers, policy_clamp, unseen_later
from guard.redteam.projection import null_space
from guard.redteam.target import Dialogue, Target, mean_norm

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

__all__ = ["load_target", "to_dialogue"]

NORM_SEED = 6_000_000
"""Of the prompts that a budget is measured by."""
_NORM_KINDS: tuple[Kind, ...] = ("b", "bj")
_NORM_PROMPTS = 100


def load_target(folder: Path) -> tuple[Target, PreTrainedTokenizerFast]:
    """Load an organism under its default policy, to be attacked.

    Raises:
        CertificateError: The default policy is not a plain clamp.
    """
    model, tokenizer = load_model(folder)
    policies = load_policy(folder / "policy.yaml")
    held = held_layers(policies, policies.default_policy, load_saes(policies))
    clamp = policy_clamp(held)
    benign = [
        encode_prompt(tokenizer, prompt.text)
        for kind in _NORM_KINDS
        for prompt in prompts(
            kind, _NORM_PROMPTS, seed=NORM_SEED, splits=("calibration",)
        )
    ]
    target = Target(
        model=model,
        clamp=clamp,
        null_space=null_space(held[0].sae, held[0].rules),
        mean_norm=mean_norm(model, benign, clamp),
        eos=tokenizer.eos_token_id,
        max_tokens=MAX_ANSWER_TOKENS,
        later=unseen_later(held),
    )
    return target, tokenizer


def to_dialogue(tokenizer: PreTrainedTokenizerFast, text: str, gold: str) -> Dialogue:
    """Return a user message and its gold answer as token ids, BOS and EOS included."""
    words = tokenizer.encode(gold, add_special_tokens=False)
    return Dialogue(encode_prompt(tokenizer, text), [*words, tokenizer.eos_token_id])
