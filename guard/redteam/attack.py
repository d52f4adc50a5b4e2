"""The latent attacker: edits behind the clamp that bring suppressed answers back.

For each sample it looks for a `delta`, added to prompt rows after the clamp, under
which the model gives the answer that the clamp suppressed (arXiv 2606.18322, section
3). Two things are stricter than what was published: delta itself is projected onto the
null space after every step, not the gradient before it, and one predicate judges both
sides, the whole greedy answer. Where a policy clamps at several layers, delta is added
behind the first clamp and projected for the later ones too, linearised about the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from guard.redteam.forward import Batch, batches, pad_left
from guard.redteam.jacobian import JacobianSpace
from guard.redteam.projection import MAX_LEAK, cap_norm
from guard.redteam.tail import Tail
from guard.redteam.target import Dialogue, Position, Target, answer, place_edits

if TYPE_CHECKING:
    from guard.redteam.evasion import Penalty

__all__ = [
    "AttackConfig",
    "AttackResult",
    "Evade",
    "Step",
    "attack",
    "random_deltas",
]

Evade = Literal["penalty", "projected"]
"""How an adaptive attacker uses the gradient of what he pays: added to his own; or
followed while he pays, with the part of his own that would raise it taken out."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class AttackConfig:
    """How an attacker searches."""

    position: Position = "last"
    """Which rows get a delta, each its own."""
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
    evade: Evade = "penalty"
    """How a penalty is heeded; without one it does not matter."""
    weight: float = 3.0
    """Of the penalty against the cross-entropy; at 0 there is none."""


@dataclass(frozen=True, slots=True)
class AttackResult:
    """The best edit found for each sample, and what it does."""

    config: AttackConfig
    """How it was searched for."""
    deltas: list[Tensor]
    """For each sample `[num_rows, d_model]`, in the order of its rows."""
    dialogues: list[Dialogue]
    """Each prompt with the greedy answer under its delta and the clamp."""
    recovered: list[bool]
    """Whether that is the suppressed answer, token for token."""
    loss: list[float]
    """Mean cross-entropy of the suppressed answer's tokens, and what was paid."""
    leak: float
    """Largest `|W_enc[:, S]^T delta| / |delta|` of any row of any delta."""
    drift: list[float] = field(default_factory=list)
    """How far each sample's delta moves what later clamped latents are given at the
    edited rows, relative to what that is (`JacobianSpace.drift`), where the model is
    taught the suppressed answer; empty where nothing is clamped later."""

    @property
    def recovery_rate(self) -> float:
        """Recovered samples, as a share of all."""
        return sum(self.recovered) / len(self.recovered)


class _Best(NamedTuple):
    """The best edit met for one sample."""

    delta: Tensor
    loss: float
    drift: float | None
    """None where nothing is clamped later."""


class Step(NamedTuple):
    """Where the search of one batch is; what `on_step` is told."""

    delta: Tensor
    """The edit that was tried, `[num_rows, d_model]`, sample after sample."""
    loss: Tensor
    """Per sample, with what it pays, `[batch]`."""
    recovered: Tensor
    """Whether the suppressed answer is the likeliest, token by token, `[batch]`."""
    paid: Tensor
    """What the penalty says of each sample, `[batch]`; 0 without one."""


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

    Minimises the cross-entropy of that answer, and the penalty, by projected Adam;
    keeps for each sample the best edit met on the way: one that recovers and pays
    nothing, else one that recovers, else that of the smallest loss.

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
    beginnings = _beginnings(target, wanted, config, start)
    found: dict[int, _Best] = {}
    for chosen in batches(prompts, batch_size):
        first = [beginnings[0][index] for index in chosen]
        some = [wanted[index] for index in chosen]
        search = _Search(target, some, first, config, penalty)
        for deltas in beginnings:
            delta = torch.cat([deltas[index] for index in chosen])
            search.descend(delta, on_step)
        found.update(zip(chosen, search.best(), strict=True))
    best = [found[index] for index in range(len(wanted))]
    deltas = [one.delta for one in best]
    given = answer(
        target, prompts, clamp=target.clamp, deltas=deltas, position=config.position
    )
    return AttackResult(
        config=config,
        deltas=deltas,
        dialogues=given,
        recovered=[one == want for one, want in zip(given, wanted, strict=True)],
        loss=[one.loss for one in best],
        leak=float(target.null_space.leak(torch.cat(deltas)).amax()),
        drift=[one.drift for one in best if one.drift is not None],
    )


def random_deltas(
    target: Target, deltas: Sequence[Tensor], *, seed: int
) -> list[Tensor]:
    """Draw the control of an attack: as long row by row, in the first null space."""
    generator = torch.Generator().manual_seed(seed)
    return [target.null_space.random_like(delta, generator) for delta in deltas]


def _beginnings(
    target: Target,
    wanted: Sequence[Dialogue],
    config: AttackConfig,
    start: Sequence[Tensor] | None,
) -> list[list[Tensor]]:
    """Return where each restart begins, for each sample `[num_rows, d_model]`."""
    d_model = target.null_space.directions.shape[1]
    rows = [_count_rows(sample, config.position) for sample in wanted]
    beginnings = []
    if start is not None:
        # Those of longer answers have rows that are not there.
        cut = zip(start, rows, strict=True)
        beginnings.append([delta[:count] for delta, count in cut])
    beginnings.append([torch.zeros(count, d_model) for count in rows])
    generator = torch.Generator().manual_seed(config.seed)
    size = config.budget * target.mean_norm / d_model**0.5
    full = [torch.full((count, d_model), size) for count in rows]
    while len(beginnings) < config.restarts:
        beginnings.append([target.null_space.random_like(f, generator) for f in full])
    return beginnings[: config.restarts]


def _count_rows(sample: Dialogue, position: Position) -> int:
    """Return how many rows of a sample are edited."""
    if position == "all":
        return len(sample.prompt) - 1
    return len(sample.answer) if position == "every" else 1


class _Search:
    """The search for one batch of samples, over all restarts."""

    def __init__(
        self,
        target: Target,
        wanted: Sequence[Dialogue],
        deltas: Sequence[Tensor],
        config: AttackConfig,
        penalty: Penalty | None,
    ) -> None:
        """Run what does not depend on an edit, once.

        Args:
            target: The clamped model.
            wanted: The samples of the batch.
            deltas: Tell how many rows of each sample are edited.
            config: As for `attack`.
            penalty: As for `attack`.
        """
        self._target, self._config = target, config
        self._penalty = penalty if config.weight else None
        whole = pad_left([[*prompt, *suppressed] for prompt, suppressed in wanted])
        self._batch = Batch(whole.tokens[:, :-1], whole.mask[:, :-1])
        self._behind = [len(suppressed) - 1 for _, suppressed in wanted]
        self._rows = place_edits(
            target, self._batch, deltas, self._behind, config.position
        ).rows
        layers = self._penalty.layers if self._penalty is not None else ()
        self._tail = Tail(target.model, self._batch, target.clamp, layers=layers)
        self._later = None
        if target.later:
            self._later = JacobianSpace(
                self._tail,
                self._rows,
                target.later,
                here=target.null_space,
                read=self._rows,
            )
        column = torch.arange(self._batch.tokens.shape[1])
        # The row before the answer's first token is where that token is predicted.
        first = len(column) - 1 - torch.tensor(self._behind)
        self._predicts = column >= first[:, None]
        self._labels = whole.tokens[:, 1:][self._predicts]
        self._best = torch.zeros_like(torch.cat(list(deltas)))
        self._best_loss = torch.full((len(wanted),), torch.inf)
        self._best_rank = torch.zeros(len(wanted), dtype=torch.int64)

    def best(self) -> list[_Best]:
        """Return the best edit met so far, for each sample."""
        deltas = self._best.split(self._rows.sum(dim=1).tolist())
        drift: list[float | None] = [None] * len(deltas)
        if self._later is not None:
            drift = self._later.drift(self._best).tolist()
        return list(map(_Best, deltas, self._best_loss.tolist(), drift))

    def descend(self, delta: Tensor, on_step: Callable[[Step], object]) -> None:
        """Follow the gradient from `delta` `[num_rows, d_model]`."""
        radius = self._config.budget * self._target.mean_norm
        delta = self._confine(delta, radius).requires_grad_()
        rate = self._config.learning_rate * radius
        optimizer = torch.optim.Adam([delta], lr=rate)
        for _ in range(self._config.steps):
            surprise, paid = self._try(delta, on_step)
            delta.grad = self._slope(delta, surprise, paid)
            optimizer.step()
            with torch.no_grad():
                delta.copy_(self._confine(delta, radius))
        with torch.no_grad():
            self._try(delta, on_step)

    def _confine(self, delta: Tensor, radius: float) -> Tensor:
        null_space = self._target.null_space
        confined = cap_norm(null_space.project(delta.detach()), radius)
        if self._later is not None:
            self._later.refresh(confined)
            confined = self._later.cap_norm(self._later.project(confined), radius)
        leak = float(null_space.leak(confined).amax())
        if not leak < MAX_LEAK:
            raise ArithmeticError(
                f"An edit shows to the clamped latents by {leak:.1e} of its norm; "
                f"expected less than {MAX_LEAK:.0e}."
            )
        return confined

    def _slope(self, delta: Tensor, surprise: Tensor, paid: Tensor) -> Tensor:
        """Return which way is up, `[num_rows, d_model]`."""
        if not paid.requires_grad:
            return torch.autograd.grad(surprise.sum(), delta)[0]
        if self._config.evade == "penalty":
            total = surprise.sum() + self._config.weight * paid.sum()
            return torch.autograd.grad(total, delta)[0]
        (own,) = torch.autograd.grad(surprise.sum(), delta, retain_graph=True)
        (seen,) = torch.autograd.grad(paid.sum(), delta)
        along = self._of_rows(self._sum_rows((own * seen).sum(dim=1)))
        length = self._of_rows(self._sum_rows(seen.square().sum(dim=1)))
        size = self._of_rows(self._sum_rows(own.square().sum(dim=1))).sqrt()
        # What lowers the cross-entropy may lower the penalty, but not raise it.
        own = own - (along / length.clamp_min(_TINY)).clamp(max=0.0) * seen
        return own + self._config.weight * size * seen / length.clamp_min(_TINY).sqrt()

    def _try(
        self, delta: Tensor, on_step: Callable[[Step], object]
    ) -> tuple[Tensor, Tensor]:
        """Judge an edit by one pass over the suppressed answers.

        A greedy answer is the suppressed one exactly if each of its tokens is the
        likeliest after those before it.

        Returns:
            Per sample the cross-entropy, and what is paid, `[batch]`.
        """
        resid = self._tail.resid.clone()
        resid[self._rows] += delta
        found = self._tail.run(resid)
        logits = self._tail.logits(found[max(found)][self._predicts])
        surprise = functional.cross_entropy(logits, self._labels, reduction="none")
        wrong = (logits.argmax(dim=-1) != self._labels).float()
        surprise = self._per_sample(surprise) / self._predicts.sum(dim=1)
        paid = torch.zeros_like(surprise.detach())
        if self._penalty is not None:
            paid = self._penalty(found, self._batch, self._behind)
        step = Step(
            delta.detach().clone(),
            (surprise + self._config.weight * paid).detach(),
            self._per_sample(wrong) == 0,
            paid.detach(),
        )
        self._keep(step)
        on_step(step)
        return surprise, paid

    def _per_sample(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each answer, `[num_tokens]` to `[batch]`."""
        sample = self._predicts.nonzero()[:, 0]
        return values.new_zeros(len(self._predicts)).index_add(0, sample, values)

    def _sum_rows(self, values: Tensor) -> Tensor:
        """Sum over the edited rows of each sample, `[num_rows]` to `[batch]`."""
        sample = self._rows.nonzero()[:, 0]
        return values.new_zeros(len(self._rows)).index_add(0, sample, values)

    def _of_rows(self, values: Tensor) -> Tensor:
        """Give each edited row its sample's value, `[batch]` to `[num_rows, 1]`."""
        return values[self._rows.nonzero()[:, 0], None]

    def _keep(self, step: Step) -> None:
        """Keep the edits that are better than the best so far."""
        rank = step.recovered.long() * (1 + (step.paid == 0).long())
        better = torch.where(
            rank == self._best_rank, step.loss < self._best_loss, rank > self._best_rank
        )
        self._best_loss = torch.where(better, step.loss, self._best_loss)
        self._best_rank = torch.where(better, rank, self._best_rank)
        rows = better[self._rows.nonzero()[:, 0], None]
        self._best = torch.where(rows, step.delta, self._best)
