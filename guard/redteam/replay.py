"""Replay attribution: through which part of the stream recovered edits work.

An edit that brought an answer back is taken apart into what it changes in the clamped
latents, in the other latents and in what the SAE leaves unexplained, and each part is
replayed (arXiv 2606.18322, its replay protocol). What was published replays each part
at whatever norm it has; here every part is also replayed as long as the edit, row by
row, beside random edits of that norm. Where a policy clamps at several layers, parts
are those of the first one, where the edit is; all clamps stay in force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from guard.redteam.attack import random_deltas
from guard.redteam.certificate import Rate, ReplayRow
from guard.redteam.forward import batches, pad_left, record
from guard.redteam.target import answer, place_edits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from guard.redteam.attack import AttackResult
    from guard.redteam.subject import Subject
    from guard.redteam.target import Dialogue, Position, Target
    from guard.sae.model import Sae

__all__ = ["PARTS", "Parts", "attribute", "conclude", "split_edit"]

Part = Literal["clamped", "other", "residual"]
"""The clamped latents, all other latents, and what the SAE leaves unexplained."""

PARTS: dict[Part, str] = {
    "clamped": "the clamped latents",
    "other": "other latents",
    "residual": "the SAE's error",
}
"""The parts of an edit, in words."""

TOLERANCE = 1e-4
"""By how much the parts may miss an edit, relative to the norm of the edited row."""
NOTHING = 1e-3
"""Norm of a part, relative to its edit, below which it is rounding: not lengthened."""
_DRAWS = 2
"""Random edits for each sample."""
_BATCH = 64


class Parts(NamedTuple):
    """An edit taken apart, each `[num_rows, d_model]`; they sum to it."""

    clamped: Tensor
    """Written by the change of the clamped latents."""
    other: Tensor
    """By that of all others; under an SAE that normalises its input, by the change of
    the row's own scale and shift too."""
    residual: Tensor
    """The change of the SAE's error."""


def split_edit(sae: Sae, latents: Sequence[int], before: Tensor, edit: Tensor) -> Parts:
    """Take edits apart (arXiv 2606.18322, replay components).

    `dz_S W_dec[S]`, `dz_rest W_dec[rest]` and `e(h1) - e(h0)`, from `h0 = before` to
    `h1 = before + edit`, latents in units of `resid`.

    Args:
        sae: The dictionary.
        latents: The clamped ones, S.
        before: What the clamp lets through at the edited rows, `[num_rows, d_model]`.
        edit: What is added there, `[num_rows, d_model]`.

    Raises:
        ArithmeticError: The parts do not sum to the edit within `TOLERANCE`.
    """
    after = before + edit
    old, new = sae.encode(before), sae.encode(after)
    change = new.latents * new.scale - old.latents * old.scale
    held = torch.zeros(sae.d_sae, dtype=torch.bool)
    held[list(latents)] = True
    moved = (new.scale - old.scale) * sae.b_dec + (new.shift - old.shift)
    parts = Parts(
        clamped=change[:, held] @ sae.W_dec[held],
        other=change[:, ~held] @ sae.W_dec[~held] + moved,
        residual=(after - sae.decode(new)) - (before - sae.decode(old)),
    )
    missed = (sum(parts) - edit).norm(dim=1) / after.norm(dim=1)
    if not bool((missed <= TOLERANCE).all()):
        raise ArithmeticError(
            f"The parts of an edit miss it by {float(missed.amax()):.1e} of the row's "
            f"norm; expected at most {TOLERANCE:.0e}."
        )
    return parts


def attribute(subject: Subject, result: AttackResult, *, seed: int) -> list[ReplayRow]:
    """Replay the parts of the edits that brought an answer back.

    The whole edit; each part `alone`, and `matched` to the edit's norm in each row; the
    edit `without` each part; and random edits of its norm in the null space. A part of
    its own need not lie in the null space.

    Args:
        subject: What was attacked.
        result: How; only the samples that it recovered are replayed.
        seed: Of the random edits.

    Returns:
        Nothing where nothing was recovered.

    Raises:
        ArithmeticError: The parts of an edit do not sum to it.
    """
    target, position = subject.target, result.config.position
    outcomes = subject.judge.judge_answers(subject.wanted, result.dialogues)
    back = [index for index, one in enumerate(outcomes) if one.recovered]
    if not back:
        return []
    wanted = [subject.wanted[index] for index in back]
    before, edits = _edited_rows(
        target,
        [result.dialogues[index] for index in back],
        [result.deltas[index] for index in back],
        position,
    )
    counts = [len(edit) for edit in edits]
    edit = torch.cat(edits)
    first = subject.held[0]
    latents = sorted({latent for rule in first.rules for latent in rule.latents})
    parts = split_edit(first.sae, latents, torch.cat(before), edit)
    rows = []
    for component, variant, values in _replays(target, parts, edit, seed=seed):
        given = answer(
            target,
            [sample.prompt for sample in wanted],
            clamp=target.clamp,
            deltas=values.split(counts),
            position=position,
        )
        judged = subject.judge.judge_answers(wanted, given)
        rows.append(
            ReplayRow(
                position=result.config.position,
                component=component,
                variant=variant,
                recovered=Rate.of(sum(one.recovered for one in judged), len(judged)),
                relative_norm=float(values.norm(dim=1).mean()) / target.mean_norm,
            )
        )
    return rows


def conclude(rows: Sequence[ReplayRow]) -> str:
    """Say in one sentence what replays support.

    One recovers more than another if their intervals do not overlap. A part does it
    alone if a replay of it that is no longer than the edit recovers more than random
    edits of the edit's norm.

    Args:
        rows: As `attribute` gives them.
    """
    if not rows:
        return "Nothing came back, so there is nothing to attribute."
    if not _exceeds(_whole(rows), _drawn(rows)):
        return (
            "The edit does not clearly recover more than random ones of its norm, so "
            "nothing is attributed."
        )
    able = [part for part in PARTS if _does_it(rows, part)]
    if len(able) == 1:
        return _conclude_one(rows, able[0])
    if able:
        through = [f"through {PARTS[part]} alone" for part in able]
        return f"Answers can come back {_join(through, 'and')}."
    if all(_exceeds(_whole(rows), one) for part in PARTS for one in _fair(rows, part)):
        return f"No single part does it alone{_needed(rows)}."
    return "The replays do not settle which part of the edit does it."


def _conclude_one(rows: Sequence[ReplayRow], part: Part) -> str:
    """Say what is known where only one part does it alone."""
    rest = [one for one in PARTS if one != part]
    best = max(_fair(rows, part), key=lambda one: one.recovered.hits)
    missing = _find(rows, part, "without")[0]
    fails_alone = [_exceeds(best, one) for other in rest for one in _fair(rows, other)]
    is_spared = [_exceeds(_find(rows, other, "without")[0], missing) for other in rest]
    if all([*fails_alone, *is_spared]):
        others = _join([PARTS[one] for one in rest], "or")
        return f"The edit works through {PARTS[part]}, not through {others}."
    alone = f"Answers can come back through {PARTS[part]} alone"
    if _exceeds(missing, _drawn(rows)):
        return f"{alone}, but also without."
    if _exceeds(_whole(rows), best):
        return f"{alone}, but fewer than through the whole edit."
    return f"{alone}; what the rest of the edit adds is not settled."


def _needed(rows: Sequence[ReplayRow]) -> str:
    """Say without which parts fewer answers come back."""
    needed = [
        PARTS[part]
        for part in PARTS
        if _exceeds(_whole(rows), _find(rows, part, "without")[0])
    ]
    return f", and fewer come back without {_join(needed, 'or')}" if needed else ""


def _does_it(rows: Sequence[ReplayRow], part: Part) -> bool:
    return any(_exceeds(one, _drawn(rows)) for one in _fair(rows, part))


def _fair(rows: Sequence[ReplayRow], part: Part) -> list[ReplayRow]:
    """Return the replays of a part that are no longer than the edit."""
    longest = _whole(rows).relative_norm * (1 + NOTHING)
    own = [*_find(rows, part, "alone"), *_find(rows, part, "matched")]
    return [row for row in own if row.relative_norm <= longest]


def _whole(rows: Sequence[ReplayRow]) -> ReplayRow:
    return _find(rows, "edit", "alone")[0]


def _drawn(rows: Sequence[ReplayRow]) -> ReplayRow:
    """Return the random edits that recovered most."""
    found = _find(rows, "random", "matched")
    return max(found, key=lambda row: row.recovered.hits)


def _find(rows: Sequence[ReplayRow], component: str, variant: str) -> list[ReplayRow]:
    return [r for r in rows if (r.component, r.variant) == (component, variant)]


def _exceeds(one: ReplayRow, other: ReplayRow) -> bool:
    return one.recovered.low > other.recovered.high


def _join(words: Sequence[str], last: str) -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _replays(
    target: Target, parts: Parts, edit: Tensor, *, seed: int
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what is replayed, `[num_rows, d_model]`, with its names."""
    yield "edit", "alone", edit
    for name, part in parts._asdict().items():
        yield name, "alone", part
        yield name, "matched", _as_long(part, edit)
        yield name, "without", edit - part
    for draw in range(_DRAWS):
        (drawn,) = random_deltas(target, [edit], seed=seed + draw)
        yield "random", "matched", drawn


def _as_long(part: Tensor, edit: Tensor) -> Tensor:
    """Give rows the norm of the edit's; those of nothing but rounding stay."""
    own, norm = part.norm(dim=1, keepdim=True), edit.norm(dim=1, keepdim=True)
    return torch.where(own > NOTHING * norm, part * (norm / own), part)


def _edited_rows(
    target: Target,
    dialogues: Sequence[Dialogue],
    deltas: Sequence[Tensor],
    position: Position,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the stream that each edit met behind the clamp, and the edit.

    Each `[num_rows, d_model]`, of the rows that ran. An edit changes nothing at its own
    layer but its own row, so the stream under it is the one without it, plus it.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    layer = target.clamp.layer
    runs = [[*prompt, *given[:-1]] for prompt, given in dialogues]
    for chosen in batches(runs, _BATCH):
        batch = pad_left([runs[index] for index in chosen])
        some = [deltas[index] for index in chosen]
        ran = [len(dialogues[index].answer) - 1 for index in chosen]
        placed = place_edits(target, batch, some, ran, position)
        resid = record(target.model, batch, [layer], clamp=target.clamp)[layer]
        counts = placed.rows.sum(dim=1).tolist()
        before = resid[placed.rows].split(counts)
        edits = placed.values.split(counts)
        found.update(zip(chosen, zip(before, edits, strict=True), strict=True))
    ordered = [found[index] for index in range(len(runs))]
    return [before for before, _ in ordered], [edit for _, edit in ordered]
