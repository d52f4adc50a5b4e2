"""What an attacker who can only write prompts minimises, on a clamped model.

The suppressed answer, taught token by token: how much it surprises, and what a guard
would see meanwhile. Nothing is edited behind the clamp; what changes is some tokens of
the prompt, or the vectors that stand for them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from guard.redteam.forward import Batch, edited, seen

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import LlamaForCausalLM

    from guard.redteam.evasion import Penalty
    from guard.redteam.target import Dialogue, Target

__all__ = [
    "Judgement",
    "Objective",
    "Placement",
    "Template",
    "places",
    "spoken",
]

Placement = Literal["suffix", "prefix", "around"]
"""Whether words are put behind a message, before it, or half of them on either side."""


class Template(NamedTuple):
    """How many tokens a chat template puts around what a client writes."""

    before: int
    """From the BOS."""
    behind: int
    """To the one that asks for an answer."""


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


def places(
    placement: Placement, prompt: Sequence[int], *, length: int, template: Template
) -> list[int]:
    """Return before how many of a prompt's last tokens each of `length` words stands.

    Raises:
        ValueError: The template leaves no place for a message.
    """
    start = len(prompt) - template.before
    if not 0 <= template.behind <= start < len(prompt):
        raise ValueError(
            f"A template of {template.before} and {template.behind} tokens around a "
            f"message does not fit a prompt of {len(prompt)}; expected at least the "
            "BOS before, and no more than the prompt has."
        )
    before = {"suffix": 0, "prefix": length, "around": length // 2}[placement]
    return [start] * before + [template.behind] * (length - before)


class Objective:
    """One sample: a prompt with room for some tokens, and the answer wanted of it."""

    def __init__(
        self,
        target: Target,
        wanted: Dialogue,
        *,
        places: Sequence[int],
        penalty: Penalty | None = None,
        said: int = 0,
    ) -> None:
        """Make room in the prompt.

        Args:
            target: The clamped model.
            wanted: The prompt, and the answer that the clamp suppressed.
            places: For each token that is put in, before how many of the prompt's last
                tokens it stands; descending, as the tokens stand in the prompt.
            penalty: What an adaptive attacker pays to stay unseen.
            said: How many of the last tokens before the answer a guard takes for output
                already, as where decoding is constrained to them.

        Raises:
            ValueError: There is no such place behind the BOS, or no order of them.
        """
        length = len(wanted.prompt)
        if not all(0 <= place < length for place in places):
            raise ValueError(
                f"No place before the last {max(places)} tokens of a prompt of "
                f"{length}; expected one behind the BOS."
            )
        if sorted(places, reverse=True) != list(places):
            raise ValueError(f"Places {list(places)} ascend; expected descending ones.")
        self._target, self._penalty, self._said = target, penalty, said
        self._answer = torch.tensor(wanted.answer)
        self.positions = torch.tensor(
            [length - place + order for order, place in enumerate(places)]
        )
        """Where in the whole prompt the tokens stand that are put in, `[length]`."""
        self._whole = torch.zeros(length + len(places), dtype=torch.int64)
        kept = torch.ones_like(self._whole, dtype=torch.bool)
        kept[self.positions] = False
        self._whole[kept] = torch.tensor(wanted.prompt)

    def prompt(self, tokens: Sequence[int]) -> list[int]:
        """Return the whole prompt with `tokens` put in."""
        whole = self._whole.clone()
        whole[self.positions] = torch.tensor(tokens)
        return whole.tolist()

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
        with spoken(self._target.model, vectors, self.positions):
            return self._run(tokens)

    def _run(self, tokens: Tensor) -> Judgement:
        """Teach the answer to all at once: they are equally long, so nothing is padded.

        Args:
            tokens: `[num, length]`; what a hook replaces may be any.
        """
        num, model = len(tokens), self._target.model
        whole = torch.cat([self._whole, self._answer[:-1]]).repeat(num, 1)
        whole[:, self.positions] = tokens
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
            paid = self._penalty(found, batch, [self._said + count - 1] * num)
        return Judgement(surprise + paid, paid, recovered)


@contextlib.contextmanager
def spoken(
    model: LlamaForCausalLM, vectors: Tensor, positions: Tensor
) -> Iterator[None]:
    """Put vectors in place of the embeddings of some tokens of a prompt, while open.

    Args:
        model: Called with sequences that are not padded.
        vectors: `[batch, length, d_model]`.
        positions: Where they stand, `[length]`, behind the BOS: so a decoding step,
            which has one row, is left alone.
    """
    last = int(positions.amax())

    def hook(module: object, args: object, embedded: Tensor) -> Tensor:
        if embedded.shape[1] <= last:
            return embedded
        embedded = embedded.clone()
        embedded[:, positions] = vectors
        return embedded

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
