"""What is attacked: a clamped model, its valid samples, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch.nn.utils.rnn import pad_sequence

from guard.hook import HookPoint
from guard.recording import Recording
from guard.redteam.forward import batches, generate, pad_left, place, record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor
    from transformers import LlamaForCausalLM

    from guard.redteam.forward import Batch, Covers, Delta, Edit
    from guard.redteam.jacobian import Later
    from guard.redteam.projection import NullSpace

__all__ = [
    "Dialogue",
    "Position",
    "Target",
    "answer",
    "find_valid",
    "mean_norm",
    "place_edits",
    "record_runs",
]


Position = Literal["last", "all", "every"]
"""Which rows an edit is added to: that of the last prompt token; those of all prompt
tokens but the BOS; or that of the last prompt token and those of all generated ones."""


class Dialogue(NamedTuple):
    """A prompt and an answer, as token ids."""

    prompt: list[int]
    """From the BOS to the last token before the answer."""
    answer: list[int]
    """Up to and with the EOS, if it came to one."""


@dataclass(frozen=True, slots=True)
class Target:
    """A clamped model, and what an edit of it must keep to."""

    model: LlamaForCausalLM
    """Its parameters take no gradient."""
    clamp: Edit
    """What holds the latents; a delta is added behind the first clamp, at its layer."""
    null_space: NullSpace
    """Of all latents that the policy clamps there."""
    mean_norm: float
    """Mean `|resid|` of benign prompt rows (`mean_norm`): the unit of a budget."""
    eos: int
    """Token id that ends an answer."""
    max_tokens: int = 20
    """Where an answer without an EOS is cut."""
    later: tuple[Later, ...] = ()
    """What the policy clamps behind that layer, where `clamp.later` holds it: an edit
    must not show there either."""


_BATCH = 64


def mean_norm(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], clamp: Edit
) -> float:
    """Return the mean `|resid|` behind the first clamp, over prompt rows but the BOS.

    Args:
        model: The model.
        prompts: Token ids of benign prompts, from the BOS.
        clamp: Also says at which layer.
    """
    batch = pad_left(prompts)
    resid = record(model, batch, [clamp.layer], clamp=clamp)[clamp.layer]
    return float(resid[batch.rows].norm(dim=-1).mean())


def answer(
    target: Target,
    prompts: Sequence[list[int]],
    *,
    clamp: Edit | None,
    deltas: Sequence[Tensor] | None = None,
    position: Position = "last",
    covers: Covers | None = None,
    sample: Generator | None = None,
    ban_eos: bool = False,
) -> list[Dialogue]:
    """Answer prompts, greedily if nothing else is asked for.

    Args:
        target: The model, and the layer of the deltas.
        prompts: Token ids, from the BOS.
        clamp: `target.clamp`, or None for the model as it was.
        deltas: One `[num_rows, d_model]` for each prompt, added to its last rows; or
            to the last one and to the first generated ones.
        position: Which of the two.
        covers: As for `generate`.
        sample: As for `generate`.
        ban_eos: As for `generate`.
    """
    answers: dict[int, list[int]] = {}
    for chosen in batches(prompts, _BATCH):
        batch = pad_left([prompts[index] for index in chosen])
        first = later = None
        if deltas is not None:
            some = [deltas[index] for index in chosen]
            asked = [delta[:1] if position == "every" else delta for delta in some]
            first = place(asked, batch, layer=target.clamp.layer)
            if position == "every":
                later = pad_sequence([delta[1:] for delta in some], batch_first=True)
        generated = generate(
            target.model,
            batch,
            clamp=clamp,
            delta=first,
            later=later,
            eos=target.eos,
            max_tokens=target.max_tokens,
            covers=covers,
            sample=sample,
            ban_eos=ban_eos,
        )
        answers.update(zip(chosen, generated, strict=True))
    return [Dialogue(prompt, answers[index]) for index, prompt in enumerate(prompts)]


def find_valid(target: Target, wanted: Sequence[Dialogue]) -> list[Dialogue]:
    """Return the samples that the model answers as wanted, and the clamped one not.

    Both sides are judged by the whole greedy answer, token for token.
    """
    prompts = [sample.prompt for sample in wanted]
    free = answer(target, prompts, clamp=None)
    held = answer(target, prompts, clamp=target.clamp)
    judged = zip(wanted, free, held, strict=True)
    return [want for want, base, clamped in judged if base == want != clamped]


def record_runs(
    target: Target,
    dialogues: Sequence[Dialogue],
    layers: Sequence[int],
    *,
    clamp: Edit | None,
    deltas: Sequence[Tensor] | None = None,
    position: Position = "last",
) -> list[Recording]:
    """Return what a serving engine would see of dialogues, prompt and answer.

    The delta itself shows at the clamped layer, on the rows it edits; its consequences
    show behind that layer, on all later rows. At the clamped layer and before, nothing
    but the text of the answer tells of it.

    Args:
        target: The model, and the layer of the deltas.
        dialogues: As `answer` gives them, under the same clamp and deltas.
        layers: At whose output to look.
        clamp: As for `answer`.
        deltas: As for `answer`.
        position: As for `answer`.
    """
    recorded: dict[int, Recording] = {}
    runs = [[*prompt, *given[:-1]] for prompt, given in dialogues]
    for chosen in batches(runs, _BATCH):
        batch = pad_left([runs[index] for index in chosen])
        delta = None
        if deltas is not None:
            ran = [len(dialogues[index].answer) - 1 for index in chosen]
            some = [deltas[index] for index in chosen]
            delta = place_edits(target, batch, some, ran, position)
        found = record(target.model, batch, layers, clamp=clamp, delta=delta)
        for row, index in enumerate(chosen):
            rows = batch.rows[row]
            resid = {str(HookPoint(n)): found[n][row][rows] for n in layers}
            asked = len(dialogues[index].prompt)
            recorded[index] = Recording(resid, asked - 1, asked + target.max_tokens)
    return [recorded[index] for index in range(len(runs))]


def place_edits(
    target: Target,
    batch: Batch,
    deltas: Sequence[Tensor],
    ran: Sequence[int],
    position: Position,
) -> Delta:
    """Put the edit of each dialogue on its rows.

    Args:
        target: Says at which layer.
        batch: Prompts, each with the tokens of its answer that the model reads.
        deltas: One `[num_rows, d_model]` for each; rows behind the end are left out.
        ran: How many tokens of each answer the model reads.
        position: Which rows.
    """
    layer = target.clamp.layer
    if position != "every":
        return place(deltas, batch, layer=layer, behind=ran)
    cut = [delta[: count + 1] for delta, count in zip(deltas, ran, strict=True)]
    behind = [count + 1 - len(delta) for delta, count in zip(cut, ran, strict=True)]
    return place(cut, batch, layer=layer, behind=behind)
