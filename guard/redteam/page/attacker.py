"""Every attacker in figures: edits behind the clamp, their controls, and prompts."""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import TYPE_CHECKING

from guard.redteam.page.markup import NOT_MEASURED, Group, Markup, Row, join, table, tag
from guard.redteam.page.markup import section as write_section
from guard.redteam.page.wording import (
    CONTROLS,
    POSITIONS,
    SEARCHES,
    count_of,
    percent,
    rate,
    upper,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guard.redteam.certificate import (
        Cell,
        Certificate,
        ControlRow,
        LatentRow,
        PromptRow,
        Rate,
    )

__all__ = ["show_attackers"]


def show_attackers(certificate: Certificate) -> Markup:
    """Show a row for each attacker, prompts first."""
    return write_section(
        "Every attacker",
        tag("h3", "Prompts (threat model P)"),
        _prompts(certificate.prompts),
        tag("h3", "Edits behind the clamp (threat model L)"),
        _edits(certificate.cells),
        tag("h3", "Edits that nobody searched for"),
        _controls(certificate),
        lead="“Came back” is what a client would receive behind the clamp alone, "
        "“undetected” what a client did receive under the policy, “at most” the upper "
        "95\u00a0% bound of that. Samples of one topic are not independent: “topics” "
        "says how many topics the undetected ones are of.",
    )


def _by_position(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    found = []
    for position, title in POSITIONS.items():
        some = [cell for cell in cells if cell.position == position]
        if some:
            found.append((title, sorted(some, key=lambda cell: cell.budget)))
    return found


def _edits(cells: Sequence[Cell]) -> Markup:
    groups = [
        Group(title, [_edit(cell, row) for cell in some for row in cell.rows])
        for title, some in _by_position(cells)
    ]
    columns = (
        "Attacker|Budget|n|Came back|Undetected|At most|Topics|Blocked at all|"
        "Time to alarm|Delivered|Undetected without probes"
    )
    leak = max((cell.leak for cell in cells), default=None)
    drift = max((c.drift for c in cells if c.drift is not None), default=None)
    return join(
        [
            table(columns.split("|"), groups),
            tag(
                "p",
                "Time to alarm: where the median blocked run was blocked, in the "
                "prompt or at which output token. Delivered: mean share of the wanted "
                "answer that a client received.",
                ""
                if leak is None
                else f" The clamp sees at most {leak:.1g} of any edit.",
                ""
                if drift is None
                else f" What later clamps are given moves by at most {drift:.1g}.",
                class_="note",
            ),
        ]
    )


def _edit(cell: Cell, row: LatentRow) -> Row:
    cells = [
        row.attacker,
        f"{cell.budget:.3g}",
        str(row.recovered.count),
        rate(row.recovered),
        rate(row.undetected),
        upper(row.undetected),
        str(row.undetected_groups),
        rate(row.flagged),
        _time(row.blocked_at),
        percent(row.delivered_share),
        rate(row.without_probes),
    ]
    return Row(cells, row.attacker)


def _time(blocked_at: float | None) -> str:
    if blocked_at is None:
        return "never"
    return "prompt" if blocked_at < 0 else f"token {blocked_at:g}"


def _controls(certificate: Certificate) -> Markup:
    groups = [
        Group(title, [_control(cell) for cell in some if cell.controls])
        for title, some in _by_position(certificate.cells)
    ]
    pairs = ([f"{name}: came back", "blocked at all"] for name in CONTROLS.values())
    worst = certificate.controls
    known = {
        "delta_zero": "without any edit",
        "random": "under the worst random edit",
    }
    said = "; ".join(
        f"{percent(worst[name])} {words}"
        for name, words in known.items()
        if name in worst
    )
    return join(
        [
            tag("p", "Came back: ", said or NOT_MEASURED, ". ", _MEANING),
            table(["Budget", *chain.from_iterable(pairs)], groups),
        ]
    )


def _control(cell: Cell) -> Row:
    found: dict[str, ControlRow] = {row.control: row for row in cell.controls}
    cells = [f"{cell.budget:.3g}"]
    for name in CONTROLS:
        row = found.get(name)
        cells += (
            [NOT_MEASURED, NOT_MEASURED]
            if row is None
            else [_of(row.recovered), _of(row.flagged)]
        )
    return Row(cells)


def _of(value: Rate) -> str:
    if not value.count:
        return NOT_MEASURED
    return f"{percent(value.share)} ({count_of(value)})"


_MEANING = (
    "An attack counts for what it brings back beyond these. A monitor that blocks them "
    "as often as attacks sees that something is unusual, not what comes back."
)


def _prompts(rows: Sequence[PromptRow]) -> Markup:
    columns = (
        "Search|Attacker|Prompts tried|n|Came back|Undetected|At most|Topics|"
        "Alarms|Sent to a server"
    )
    written = [
        Row(
            [
                SEARCHES[row.search],
                "–" if row.search == "none" else row.attacker,
                str(row.queries),
                str(row.recovered.count),
                rate(row.recovered),
                rate(row.undetected),
                upper(row.undetected),
                str(row.undetected_groups),
                ", ".join(f"{name} {hits}" for name, hits in row.alarms.items()) or "–",
                _served(row),
            ],
            row.attacker,
        )
        for row in rows
    ]
    sent = [_sent(row) for row in rows if row.prompts]
    return join(
        [table(columns.split("|"), [Group("", written)], words=(0, 1, 8, 9)), *sent]
    )


def _served(row: PromptRow) -> str:
    served = row.served
    if served is None:
        return NOT_MEASURED
    return (
        f"{served.attempts} sent: {served.recovered} came back, "
        f"{served.blocked} blocked, {served.flagged} flagged"
    )


def _sent(row: PromptRow) -> Markup:
    title = f"{SEARCHES[row.search]}, {row.attacker}: prompts as sent"
    pairs = zip_longest(row.prompts, row.beginnings, fillvalue="")
    return tag(
        "details",
        tag("summary", f"{title} ({len(row.prompts)})"),
        tag("ol", *(tag("li", *_write(*pair)) for pair in pairs)),
    )


def _write(prompt: str, beginning: str) -> list[Markup]:
    written = [tag("code", prompt)]
    return (
        [*written, tag("span", " → "), tag("code", beginning)] if beginning else written
    )
