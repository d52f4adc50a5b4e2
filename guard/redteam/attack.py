"""The latent attacker: edits behind the clamp that bring suppressed answers back.

For each sample it looks for a `delta`, added to prompt rows after the clamp, under
which the model gives the answer that the clamp suppressed (arXiv 2606.18322, section
3). Two things are stricter than what was published: delta itself is projected onto the
null space after every step, not the gradient before it, and one predicate judges both
sides, the whole greedy answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from guard.redteam.forward import Batch, batches, pad_left, place
from guard.redteam.projection import MAX_LEAK, cap_norm
from guard.redteam.tail import Tail
from guard.redteam.target import Dialogue, Target, answer

__all__ = [
    "AttackConfig",
    "AttackResult",
    "Penalty",
    "Position",
    "Step",
    "attack",
    "random_deltas",
]

Position = Literal["last", "all"]
"""Which prompt rows are edited: that of the last token, or all but the BOS."""

Penalty = Callable[[Mapping[int, Tensor], Batch], Tensor]
"""What an adaptive attacker pays, per sample `[batch]`: a differentiable function of
resid `[batch, length, d_model]` at the clamped layer and all behind it, under the edit,
and of the batch, whose `rows` say which of them a guard reads."""


@dataclass(frozen=True, slots=True)
class AttackConfig:
    """How an attacker searches."""

    position: Position = "last"
    """Which rows of a prompt get a delta, each its own."""
    budget: float = 0.4
    """Largest norm of the delta of a row, in units of the mean `|resid|`."""
    steps: int = 60
    """Of Adam, per restart."""
    learning_rate: float = 0.1
    """Adam's, in units of the budget."""
    restarts: int = 1
    """Searches: from `start` if given, then from no edit, then from random ones."""
    seed: int = 0
    """Of the random beginnings."""


@dataclass(frozen=True, slots=True)
class AttackResult:
    """The best edit found for each sample, and what it does."""

    config: AttackConfig
    """How it was searched for."""
    deltas: list[Tensor]
    """For each sample `[num_rows, d_model]`, of the last rows of its prompt."""
    dialogues: list[Dialogue]
    """Each prompt with the greedy answer under its delta and the clamp."""
    recovered: list[bool]
    """Whether that is the suppressed answer, token for token."""
    loss: list[float]
    """Mean cross-entropy of the suppressed answer's tokens, the penalty included."""
    leak: float
    """Largest `|W_enc[:, S]^T delta| / |delta|` of any row of any delta."""

    @property
    def recovery_rate(self) -> float:
        """Recovered samples, as a share of all."""
        return sum(self.recovered) / len(self.recovered)


class Step(NamedTuple):
    """Where the search of one batch is; what `on_step` is told."""

    delta: Tensor
    """The edit that was tried, `[num_rows, d_model]`, sample after sample."""
    loss: Tensor
    """Per sample, the penalty included, `[batch]`."""
    recovered: Tensor
    """Whether the suppressed answer is the likeliest, token by token, `[batch]`."""


def attack(
    target: Target,
    wanted: Sequence[Dialogue],
    config: AttackConfig,
    *,
    start: Sequence[Tensor] | None = None,
    penalty: Penalty | None = None,
    on_step: Callable[[Step], object] = lambda step: None,
    batch_size: int = 32,
) -> AttackResult:
    """Search an edit for each sample that brings its suppressed answer back.

    Minimises the cross-entropy of that answer, plus the penalty, by projected Adam;
    keeps for each sample the best edit met on the way.

    Args:
        target: The clamped model.
        wanted: Valid samples: prompts with the answers that the clamp suppressed.
        config: How to search.
        start: Where to begin first, as at the deltas of a smaller budget.
        penalty: What an adaptive attacker pays to stay unseen.
        on_step: Called for every edit that is tried, batch after batch.
        batch_size: Samples searched for at once, of similar length.

    Raises:
        ValueError: There is nothing to attack.
        ArithmeticError: An edit left the null space by more than rounding does.
    """
    if not wanted:
        raise ValueError("No sample to attack; expected at least one valid sample.")
    prompts = [sample.prompt for sample in wanted]
    beginnings = _beginnings(target, prompts, config, start)
    best: dict[int, tuple[Tensor, float]] = {}
    for chosen in batches(prompts, batch_size):
        first = [beginnings[0][index] for index in chosen]
        search = _Search(target, [wanted[index] for index in chosen], first, penalty)
        for deltas in beginnings:
            delta = torch.cat([deltas[index] for index in chosen])
            search.descend(delta, config, on_step)
        best.update(zip(chosen, search.best(), strict=True))
    deltas = [best[index][0] for index in range(len(wanted))]
    given = answer(target, prompts, clamp=target.clamp, deltas=deltas)
    return AttackResult(
        config=config,
        deltas=deltas,
        dialogues=given,
        recovered=[one == want for one, want in zip(given, wanted, strict=True)],
        loss=[best[index][1] for index in range(len(wanted))],
        leak=float(target.null_space.leak(torch.cat(deltas)).amax()),
    )


def random_deltas(
    target: Target, deltas: Sequence[Tensor], *, seed: int
) -> list[Tensor]:
    """Draw the control of an attack: in the same null space, as long row by row."""
    generator = torch.Generator().manual_seed(seed)
    return [target.null_space.random_like(delta, generator) for delta in deltas]


def _beginnings(
    target: Target,
    prompts: Sequence[list[int]],
    config: AttackConfig,
    start: Sequence[Tensor] | None,
) -> list[list[Tensor]]:
    """Return where each restart begins, for each sample `[num_rows, d_model]`."""
    d_model = target.null_space.directions.shape[1]
    rows = [len(prompt) - 1 if config.position == "all" else 1 for prompt in prompts]
    beginnings = [list(start)] if start is not None else []
    beginnings.append([torch.zeros(count, d_model) for count in rows])
    generator = torch.Generator().manual_seed(config.seed)
    size = config.budget * target.mean_norm / d_model**0.5
    full = [torch.full((count, d_model), size) for count in rows]
    while len(beginnings) < config.restarts:
        beginnings.append([target.null_space.random_like(f, generator) for f in full])
    return beginnings[: config.restarts]


class _Search:
    """The search for one batch of samples, over all restarts."""

    def __init__(
        self,
        target: Target,
        wanted: Sequence[Dialogue],
        deltas: Sequence[Tensor],
        penalty: Penalty | None,
    ) -> None:
        """Run what does not depend on an edit, once.

        Args:
            target: The clamped model.
            wanted: The samples of the batch.
            deltas: Tell how many rows of each prompt are edited.
            penalty: As for `attack`.
        """
        self._target, self._penalty = target, penalty
        whole = pad_left([[*prompt, *suppressed] for prompt, suppressed in wanted])
        self._batch = Batch(whole.tokens[:, :-1], whole.mask[:, :-1])
        layer = target.clamp.layer
        behind = [len(suppressed) - 1 for _, suppressed in wanted]
        self._rows = place(deltas, self._batch, layer=layer, behind=behind).rows
        self._tail = Tail(target.model, self._batch, target.clamp)
        column = torch.arange(self._batch.tokens.shape[1])
        # The row before the answer's first token is where that token is predicted.
        self._predicts = column >= len(column) - 1 - torch.tensor(behind)[:, None]
        self._labels = whole.tokens[:, 1:][self._predicts]
        self._best = torch.zeros_like(torch.cat(list(deltas)))
        self._best_loss = torch.full((len(wanted),), torch.inf)
        self._best_recovered = torch.zeros(len(wanted), dtype=torch.bool)

    def best(self) -> list[tuple[Tensor, float]]:
        """Return the best edit met so far and its loss, for each sample."""
        deltas = self._best.split(self._rows.sum(dim=1).tolist())
        return list(zip(deltas, self._best_loss.tolist(), strict=True))

    def descend(
        self, delta: Tensor, config: AttackConfig, on_step: Callable[[Step], object]
    ) -> None:
        """Follow the gradient from `delta` `[num_rows, d_model]`."""
        radius = config.budget * self._target.mean_norm
        delta = self._confine(delta, radius).requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=config.learning_rate * radius)
        for _ in range(config.steps):
            loss = self._try(delta, on_step)
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimizer.step()
            with torch.no_grad():
                delta.copy_(self._confine(delta, radius))
        with torch.no_grad():
            self._try(delta, on_step)

    def _confine(self, delta: Tensor, radius: float) -> Tensor:
        null_space = self._target.null_space
        confined = cap_norm(null_space.project(delta.detach()), radius)
        leak = float(null_space.leak(confined).amax())
        if not leak < MAX_LEAK:
            raise ArithmeticError(
                f"An edit shows to the clamped latents by {leak:.1e} of its norm; "
                f"expected less than {MAX_LEAK:.0e}."
            )
        return confined

    def _try(self, delta: Tensor, on_step: Callable[[Step], object]) -> Tensor:
        """Judge an edit by one pass over the suppressed answers; return the loss.

        A greedy answer is the suppressed one exactly if each of its tokens is the
        likeliest after those before it.
        """
        resid = self._tail.resid.clone()
        resid[self._rows] += delta
        found = self._tail.run(resid)
        logits = self._tail.logits(found[max(found)][self._predicts])
        surprise = functional.cross_entropy(logits, self._labels, reduction="none")
        wrong = (logits.argmax(dim=-1) != self._labels).float()
        loss = self._per_sample(surprise) / self._predicts.sum(dim=1)
        if self._penalty is not None:
            loss = loss + self._penalty(found, self._batch)
        recovered = self._per_sample(wrong) == 0
        step = Step(delta.detach().clone(), loss.detach(), recovered)
        self._keep(step)
        on_step(step)
        return loss

    def _per_sample(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each answer, `[num_tokens]` to `[batch]`."""
        sample = self._predicts.nonzero()[:, 0]
        return values.new_zeros(len(self._predicts)).index_add(0, sample, values)

    def _keep(self, step: Step) -> None:
        """Keep a sample's edit if it recovers and the best does not, or costs less."""
        _, loss, recovered = step
        better = torch.where(
            recovered == self._best_recovered, loss < self._best_loss, recovered
        )
        self._best_loss = torch.where(better, loss, self._best_loss)
        self._best_recovered = self._best_recovered | recovered
        rows = better[self._rows.nonzero()[:, 0], None]
        self._best = torch.where(rows, step.delta, self._best)
