"""Requests under policies on two SAEs at two layers, and how their answers compare."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from e2e.serving import HOOK_POINT, TOY_POLICIES, Toy, calibrate_score
from e2e.stepped import Answer, Ask
from e2e.tripwires import LONG_PROMPT, LOOPING_PROMPT, Tripwires
from torch import Tensor

from guard.hook import HookPoint
from guard.monitor import column_of, list_columns
from guard.policy import load_policy
from guard.sae.load import save_sae, weights_digest
from guard.testing import toy_sae_parts

LATE = "layers.2.resid_post"
COMMON_WORDS = range(4, 44)
TRIGGER = 114
"""A word that prompts hold once, where sticky conditions are met."""
MOST_TOKENS = 512
"""No request of these tests is longer."""

POLICIES = """\
  both:
    hold_tokens: 6
    clamps:
      - {name: hold, sae: early, latents: [1, 2], law: ablate}
      - {name: lift, sae: early, latents: [5], law: set, value: 9.0,
         when: {latents: [0], above: 8.5, scope: request}}
      - {name: dim, sae: late, latents: [3, 4], law: scale, value: 0.5,
         when: {latents: [7, 8, 9, 10], above: 6.0, scope: token}}
      - {name: push, sae: late, latents: [5], law: set, value: 9.0,
         when: {latents: [0], above: 8.5, scope: request}}
    monitors:
      - {name: far, sae: s, score: density, calibration: density.safetensors,
         target_fpr: 0.01, on_alarm: flag}
      - {name: unexplained, sae: late, score: error_norm,
         calibration: late.safetensors, target_fpr: 0.05, on_alarm: flag}
  other:
    clamps:
      - {name: push, sae: late, latents: [1, 2, 3], law: floor, value: 7.0}
      - {name: hold, sae: s, latents: [9, 5], law: cap, value: 1.0}
    monitors:
      - {name: unexplained, sae: late, score: error_norm,
         calibration: late.safetensors, target_fpr: 0.3, on_alarm: flag}
"""
NEIGHBOUR_POLICIES = ("default", "held", "both", "open", "other", "cached-observed")


@dataclass(frozen=True)
class Traffic:
    """A policy file, and the requests whose answers must not change."""

    policy_file: Path
    subjects: tuple[Ask, ...]

    def column_numbers(self, policy: str) -> list[int]:
        """Return the numbers of the columns that a policy's monitors watch."""
        policy_file = load_policy(self.policy_file)
        columns = list_columns(policy_file)
        return [
            columns.index(column_of(policy_file, monitor))
            for monitor in policy_file.policies[policy].monitors
        ]

    def trigger_of(self, ask: Ask) -> int:
        """Return where a request holds the trigger."""
        return ask.prompt.index(TRIGGER)


def make_traffic(toy: Toy, tripwires: Tripwires) -> Traffic:
    """Add two SAEs to the toy that know the trigger, and policies that use them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy.model)
    draw = random.Random(3)
    prompts = [draw_prompt(draw, 400, trigger=trigger) for trigger in (150, 40, 300)]
    subjects = (
        Ask(prompts[0], "both", 40),
        Ask(draw_prompt(draw, 70, trigger=66), "both", 60),
        Ask(draw_prompt(draw, 200), "other", 40),
        Ask(tripwires.encode(LOOPING_PROMPT), "drafted", 24),
        Ask(tripwires.encode(LONG_PROMPT), "cached", 24),
    )
    prompts += [subjects[1].prompt]
    saes = ""
    for name, at in (("early", HOOK_POINT), ("late", LATE)):
        resids = [read_resid(model, at, prompt) for prompt in prompts]
        save_telling_sae(toy.folder / name, at, resids, prompts)
        digest = weights_digest(toy.folder / name, format="guard")
        saes += (
            f"  {name}: {{path: {name}, format: guard, hook_point: {at}, "
            f'sha256: "{digest}"}}\n'
        )
    # Of the error norm, on short benign prompts.
    resids = [read_resid(model, LATE, draw_prompt(draw, 25)) for _ in range(60)]
    calibrate_score(
        toy,
        "error_norm",
        sae="late",
        fitting=resids,
        held=resids,
        path="late.safetensors",
    )
    policies = TOY_POLICIES.replace("policies:\n", "policies:\n" + POLICIES)
    body = saes + tripwires.add_to(policies)
    return Traffic(toy.write_policy("traffic", body), subjects)


def draw_prompt(
    draw: random.Random,
    length: int,
    *,
    trigger: int | None = None,
    words: Sequence[int] = COMMON_WORDS,
) -> list[int]:
    """Return a prompt of common words behind a BOS, and the trigger at a position."""
    prompt = [1, *(draw.choice(words) for _ in range(length - 1))]
    if trigger is not None:
        prompt[trigger] = TRIGGER
    return prompt


def read_resid(model: Any, at: str, prompt: Sequence[int]) -> Tensor:
    """Return the free stream of transformers on a prompt, without its BOS."""
    with torch.no_grad():
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    return states[HookPoint.parse(at).layer + 1][0, 1:]


def save_telling_sae(
    folder: Path, at: str, resids: Sequence[Tensor], prompts: Sequence[Sequence[int]]
) -> None:
    """Write an SAE of sparse latents; latent 0 reads about 10 on the trigger alone."""
    rows = torch.cat(list(resids)).double()
    words = torch.tensor([word for prompt in prompts for word in prompt[1:]])
    wanted = (words == TRIGGER).double()[:, None]
    weight = 1 + 30 * wanted
    solve: Callable[..., Any] = torch.linalg.lstsq
    direction = solve(rows * weight, wanted * weight, driver="gelsd").solution
    config, tensors = toy_sae_parts(hook_point=at, seed=1)
    tensors["threshold"] += 8.0
    tensors["W_enc"][:, 0] = 10 * direction[:, 0].float()
    tensors["b_enc"][0] = 0.0
    save_sae(folder, config, tensors)


def draw_neighbours(
    count: int,
    *,
    policies: Sequence[str] = NEIGHBOUR_POLICIES,
    words: Sequence[int] = COMMON_WORDS,
) -> list[Ask]:
    """Return requests of many lengths: the same ones, whatever they say and under."""
    lengths, draw = random.Random(4), random.Random(5)
    return [
        Ask(
            draw_prompt(draw, lengths.randrange(20, 300), words=words),
            policies[index % len(policies)],
            max_tokens=lengths.randrange(10, 60),
        )
        for index in range(count)
    ]


def salted(asks: Sequence[Ask], salt: str) -> list[Ask]:
    """Return the requests under a salt of their own: nothing of them is cached."""
    return [replace(ask, salt=f"{salt}-{index}") for index, ask in enumerate(asks)]


def rounding(context: int = MOST_TOKENS) -> float:
    """Return how far rounding can take a score apart, relative to its size.

    A sum of n products differs by at most 2 n u of its terms' sizes when it is summed
    in another order, u = 2**-24 in fp32 (Higham, "Accuracy and Stability of Numerical
    Algorithms", section 3.1); along a path of sums the bounds add up, to first order
    and for well-conditioned sums. The path to a score at layer 2 of the toy (d_model
    64, heads of 32, d_ff 128, d_sae 96) leads through three layers and the SAE.
    """
    norms, projections, down = 2 * 64, 3 * 64, 128
    attention = 32 + 2 * context  # a query's score, the softmax, the weighted values
    sae = 64 + 96 + 64  # encode, decode, norm or ellipsoid
    return 2 * (3 * (norms + projections + attention + down) + sae) * 2.0**-24


def expect_same_answer(answer: Answer, alone: Answer) -> None:
    """Check what a client reads."""
    assert answer.tokens == alone.tokens
    assert answer.finish_reason == alone.finish_reason


def expect_same_verdict(
    answer: Answer, alone: Answer, *, tolerance: float = 0.0
) -> None:
    """Check everything that a verdict says, its scores up to the tolerance."""
    found, expected = answer.guard, alone.guard
    assert found is not None
    assert expected is not None
    for key in expected.keys() - {"id", "alarms", "readings"}:
        assert found[key] == expected[key], key
    for kind in ("alarms", "readings"):
        for one, other in zip(found.get(kind, ()), expected.get(kind, ()), strict=True):
            assert one.keys() == other.keys()
            for key in other.keys() - {"score", "ratio"}:
                assert one[key] == other[key], (kind, key)
            for key in ("score", "ratio"):
                assert abs(one[key] - other[key]) <= tolerance * abs(other[key])


def expect_same_rows(
    answer: Answer, alone: Answer, columns: Sequence[int], *, tolerance: float = 0.0
) -> None:
    """Check what was read of each token: which rules changed it, and its scores.

    Rounding is relative to what is summed: where a score is small because its terms
    cancel, the request's largest one says how large they are.
    """
    assert answer.clamped.tolist() == alone.clamped.tolist()
    assert len(answer.scores) == len(alone.scores)
    for column in columns:
        one, other = answer.scores[:, column], alone.scores[:, column]
        assert np.abs(one - other).max() <= tolerance * other.max()
