"""What an attacker who can only write prompts minimises, on a clamped model.

The suppressed answer, taught token by token: how much it surprises, and what a guard
would see meanwhile. Nothing is edited behind the clamp; what changes is some tokens of
the prompt, or the vectors that stand for them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from guard.redteam.forward import Batch, edited, seen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import LlamaForCausalLM

    from guard.redteam.target import Dialogue, Target

__all__ = ["Judgement", "Objective", "Penalty", "spoken"]


class Penalty(Protocol):
    """What an adaptive attacker pays to stay unseen; 0 where no alarm would go off."""

    @property
    def layers(self) -> Sequence[int]:
        """At the output of which layers it looks."""

    def __call__(
        self, found: Mapping[int, Tensor], batch: Batch, behind: Sequence[int]
    ) -> Tensor:
        """Return what each sequence costs, `[batch]`, differentiable, never negative.

        Args:
            found: By layer resid `[batch, length, d_model]` behind the clamp.
            batch: The prompts, each with its answer up to the last token but one.
            behind: How many rows of each sequence belong to the answer.
        """


class Judgement(NamedTuple):
    """What attempts on one sample came to."""

    loss: Tensor
    """Mean cross-entropy of the answer's tokens, the penalty included, `[num]`."""
    penalty: Tensor
    """The penalty alone, zeros where there is none, `[num]`."""
    recovered: Tensor
    """Whether each token of the answer is the likeliest, bool `[num]`."""

    @property
    def succeeded(self) -> Tensor:
        """The answer comes, and nothing is paid: bool `[num]`."""
        return self.recovered & (self.penalty == 0)


class Objective:
    """One sample: a prompt with room for some tokens, and the answer wanted of it."""

    def __init__(
        self,
        target: Target,
        wanted: Dialogue,
        *,
        length: int,
        insert_at: int,
        penalty: Penalty | None = None,
    ) -> None:
        """Make room in the prompt.

        Args:
            target: The clamped model.
            wanted: The prompt, and the answer that the clamp suppressed.
            length: How many tokens are put into the prompt.
            insert_at: Before how many of its last tokens they stand.
            penalty: What an adaptive attacker pays to stay unseen.

        Raises:
            ValueError: There is no such place behind the BOS.
        """
        if not 0 <= insert_at < len(wanted.prompt):
            raise ValueError(
                f"No place before the last {insert_at} tokens of a prompt of "
                f"{len(wanted.prompt)}; expected one behind the BOS."
            )
        self._target, self._penalty = target, penalty
        self._answer = torch.tensor(wanted.answer)
        self.first = len(wanted.prompt) - insert_at
        """Position of the first token that is put in."""
        self._head = torch.tensor(wanted.prompt[: self.first])
        self._rest = torch.tensor(wanted.prompt[self.first :], dtype=torch.int64)
        self._length = length

    def prompt(self, tokens: Sequence[int]) -> list[int]:
        """Return the whole prompt with `tokens` put in."""
        return [*self._head.tolist(), *tokens, *self._rest.tolist()]

    @torch.inference_mode()
    def judge(self, tokens: Tensor, *, batch_size: int) -> Judgement:
        """Judge what is put in, int64 `[num, length]`, a batch after the other."""
        parts = [self._run(some) for some in tokens.split(batch_size)]
        return Judgement(*map(torch.cat, zip(*parts, strict=True)))

    def differentiate(self, tokens: Tensor) -> Tensor:
        """Return by how much each token of the vocabulary would change the loss.

        To first order, put in place of the one that stands there (arXiv 2307.15043,
        section 2.2).

        Args:
            tokens: `[num, length]`.

        Returns:
            `[num, length, vocab]`, up to a constant per position.
        """
        embedding = self._target.model.get_input_embeddings().weight
        vectors = embedding[tokens].requires_grad_()
        loss = self.judge_vectors(vectors).loss
        (gradient,) = torch.autograd.grad(loss.sum(), vectors)
        return gradient @ embedding.T

    def judge_vectors(self, vectors: Tensor) -> Judgement:
        """Judge vectors `[num, length, d_model]` that stand for tokens, with graph."""
        tokens = torch.zeros(vectors.shape[:2], dtype=torch.int64)
        with spoken(self._target.model, vectors, first=self.first):
            return self._run(tokens)

    def _run(self, tokens: Tensor) -> Judgement:
        """Teach the answer to all at once: they are equally long, so nothing is padded.

        What is put in by a hook, and what stands before it, is the same to the model.
        """
        num, model = len(tokens), self._target.model
        parts = (self._head, tokens, self._rest, self._answer[:-1])
        whole = torch.cat([part.expand(num, -1) for part in parts], dim=1)
        batch = Batch(whole, torch.ones_like(whole, dtype=torch.bool))
        layers = self._penalty.layers if self._penalty is not None else ()
        with (
            edited(model, self._target.clamp, lambda: batch.rows),
            seen(model, layers) as found,
        ):
            count = len(self._answer)
            out = model(**batch.inputs, use_cache=False, logits_to_keep=count)
        wanted = self._answer.expand(num, -1)
        surprise = functional.cross_entropy(
            out.logits.transpose(1, 2), wanted, reduction="none"
        ).mean(dim=1)
        recovered = (out.logits.argmax(dim=2) == wanted).all(dim=1)
        paid = torch.zeros_like(surprise)
        if self._penalty is not None:
            paid = self._penalty(found, batch, [count - 1] * num)
        return Judgement(surprise + paid, paid, recovered)


@contextlib.contextmanager
def spoken(model: LlamaForCausalLM, vectors: Tensor, *, first: int) -> Iterator[None]:
    """Put vectors in place of the embeddings of some tokens of a prompt, while open.

    Args:
        model: Called with sequences that all have those tokens at the same place.
        vectors: `[batch, length, d_model]`.
        first: Position of the first; behind the BOS, so that a decoding step, which has
            one row, is left alone.
    """

    def hook(module: object, args: object, embedded: Tensor) -> Tensor:
        if embedded.shape[1] <= first:
            return embedded
        end = first + vectors.shape[1]
        return torch.cat([embedded[:, :first], vectors, embedded[:, end:]], dim=1)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
