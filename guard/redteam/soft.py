"""The soft prompt: free vectors among the embeddings, an upper bound on a suffix.

No client can send them to a server that takes tokens. Every suffix of the same length
is one of these prompts, so what no soft prompt brings back, no suffix does; as far as
the search finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guard.redteam.objective import Judgement, Objective, places, spoken
from guard.redteam.projection import cap_norm
from guard.redteam.target import Dialogue, Target, answer, record_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guard.recording import Recording
    from guard.redteam.evasion import Penalty
    from guard.redteam.objective import Placement, Template

__all__ = ["SoftConfig", "SoftResult", "attack_embeddings", "record_soft"]

FREE_ID = 0
"""Token id that stands in a prompt where a free vector is."""


@dataclass(frozen=True, slots=True)
class SoftConfig:
    """How an attacker searches for vectors."""

    length: int = 8
    """How many vectors are put into a prompt."""
    placement: Placement = "prefix"
    """Where they are put."""
    steps: int = 200
    """Of Adam."""
    learning_rate: float = 0.05
    """Adam's, in units of the largest norm of a token's embedding over the root of its
    size, which is what a coordinate of it has."""
    restarts: int = 4
    """Searches at once, each from other random tokens."""
    seed: int = 0
    """Of the tokens that a search begins at; each sample draws alike."""


@dataclass(frozen=True, slots=True)
class SoftResult:
    """The best vectors found for each sample, and what they do."""

    config: SoftConfig
    """How they were searched for."""
    positions: list[Tensor]
    """Where in each prompt they stand, `[length]`."""
    vectors: list[Tensor]
    """For each sample `[length, d_model]`."""
    dialogues: list[Dialogue]
    """Each prompt, `FREE_ID` where a vector stands, with the greedy answer under the
    clamp."""
    recovered: list[bool]
    """Whether that is the suppressed answer, token for token."""
    loss: list[float]
    """Mean cross-entropy of the suppressed answer's tokens, the penalty included."""
    penalty: list[float]
    """The penalty alone; 0 for vectors that stay unseen, and without a penalty."""
    radius: float
    """Largest norm that a vector may have."""

    @property
    def succeeded(self) -> list[bool]:
        """Whether the suppressed answer came, and nothing was paid for it."""
        pairs = zip(self.recovered, self.penalty, strict=True)
        return [back and paid == 0 for back, paid in pairs]

    @property
    def recovery_rate(self) -> float:
        """Recovered samples, as a share of all."""
        return sum(self.recovered) / len(self.recovered)


def attack_embeddings(
    target: Target,
    wanted: Sequence[Dialogue],
    config: SoftConfig,
    *,
    template: Template,
    penalty: Penalty | None = None,
    on_step: Callable[[Tensor, Judgement], object] = lambda vectors, judgement: None,
) -> SoftResult:
    """Search vectors for each prompt that bring its suppressed answer back.

    A sample's search ends as soon as the answer comes and nothing is paid.

    Args:
        target: The clamped model.
        wanted: Prompts with the answers that the clamp suppressed.
        config: How to search.
        template: What of each prompt is not the client's.
        penalty: What an adaptive attacker pays to stay unseen.
        on_step: Called with the vectors `[restarts, length, d_model]` that were tried.

    Raises:
        ValueError: There is nothing to attack, no vector, or no place for it.
    """
    if not wanted:
        raise ValueError("No sample to attack; expected at least one valid sample.")
    if config.length < 1 or config.restarts < 1:
        raise ValueError(
            f"{config.restarts} searches for {config.length} vectors; expected at "
            "least one of each."
        )
    embedding = target.model.get_input_embeddings().weight
    radius = float(embedding.norm(dim=1).amax())
    found, dialogues, positions = [], [], []
    for sample in wanted:
        objective = Objective(
            target,
            sample,
            places=places(
                config.placement,
                sample.prompt,
                length=config.length,
                template=template,
            ),
            penalty=penalty,
        )
        best = _descend(objective, config, embedding, radius, on_step)
        prompt = objective.prompt([FREE_ID] * config.length)
        with spoken(target.model, best.vectors[None], objective.positions):
            dialogues += answer(target, [prompt], clamp=target.clamp)
        found.append(best)
        positions.append(objective.positions)
    pairs = zip(dialogues, wanted, strict=True)
    return SoftResult(
        config=config,
        positions=positions,
        vectors=[best.vectors for best in found],
        dialogues=dialogues,
        recovered=[one.answer == want.answer for one, want in pairs],
        loss=[best.loss for best in found],
        penalty=[best.penalty for best in found],
        radius=radius,
    )


def record_soft(
    target: Target, result: SoftResult, layers: Sequence[int]
) -> list[Recording]:
    """Return what monitors would read of each dialogue, prompt and answer.

    Args:
        target: The clamped model.
        result: What `attack_embeddings` found on it.
        layers: At whose output to look.
    """
    recordings = []
    runs = zip(result.dialogues, result.vectors, result.positions, strict=True)
    for dialogue, vectors, positions in runs:
        with spoken(target.model, vectors[None], positions):
            recordings += record_runs(target, [dialogue], layers, clamp=target.clamp)
    return recordings


@dataclass(frozen=True, slots=True)
class _Best:
    """The best vectors of a sample so far."""

    failed: bool
    loss: float
    penalty: float
    vectors: Tensor


def _descend(
    objective: Objective,
    config: SoftConfig,
    embedding: Tensor,
    radius: float,
    on_step: Callable[[Tensor, Judgement], object],
) -> _Best:
    """Follow the gradient from random tokens, all restarts at once."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = config.restarts, config.length
    drawn = torch.randint(len(embedding), shape, generator=generator)
    vectors = embedding[drawn].clone().requires_grad_()
    pace = config.learning_rate * radius / vectors.shape[2] ** 0.5
    optimizer = torch.optim.Adam([vectors], lr=pace)
    best: _Best | None = None
    for _ in range(config.steps + 1):
        judgement = objective.judge_vectors(vectors)
        tried = vectors.detach().clone()
        on_step(tried, judgement)
        best = _better(best, tried, judgement)
        if not best.failed:
            break
        optimizer.zero_grad(set_to_none=True)
        judgement.loss.sum().backward()
        optimizer.step()
        with torch.no_grad():
            vectors.copy_(cap_norm(vectors.flatten(0, 1), radius).view_as(vectors))
    assert best is not None, "a search without a step"
    return best


def _better(best: _Best | None, vectors: Tensor, judgement: Judgement) -> _Best:
    """Return the best of these `[num, length, d_model]` and what was best before."""
    columns = (~judgement.succeeded, judgement.loss, judgement.penalty)
    rows = zip(*(column.tolist() for column in columns), vectors, strict=True)
    found = [_Best(*row) for row in rows]
    if best is not None:
        found.append(best)
    return min(found, key=lambda one: (one.failed, one.loss))
