"""Recovery and detection against the budget, a plot for each position of the edit."""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING

from guard.redteam.page.markup import NOT_MEASURED, Markup, section, tag
from guard.redteam.page.plot import Line, Look, Point, draw_lines, draw_sample
from guard.redteam.page.wording import POSITIONS, budget_in_words, share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from guard.redteam.certificate import (
        Attacker,
        Cell,
        Certificate,
        LatentRow,
        Rate,
    )

__all__ = ["show_detection", "show_recovery"]

_RANDOM = ("random edit of the same size", Look("grey", "cross", "2 3"))
_ALONE = ("clamp alone", Look("ink", "circle"))
_UNAWARE = ("undetected, unaware attacker", Look("blue", "square", "6 3"))
_ADAPTIVE = (
    "undetected, adaptive attacker",
    Look("red", "triangle"),
)
_TOGETHER = ("all together, in time", Look("ink", "circle"))
_MONITORS = (
    Look("blue", "square", "6 3"),
    Look("orange", "triangle", "2 2"),
    Look("green", "diamond", "8 3 2 3"),
    Look("purple", "ring", "4 2"),
    Look("sky", "cross", "1 3"),
    Look("red", "square", "10 4"),
)


def show_recovery(certificate: Certificate) -> Markup:
    """Show how much comes back, and how much of it unseen."""
    cells = _drawn(certificate)
    return section(
        "How much comes back, and how much of it unseen",
        _legend([_RANDOM, _ALONE, _UNAWARE, _ADAPTIVE]) if cells else Markup(),
        _panels(cells, _recovery, "valid samples", _caption(certificate)),
        lead="Threat model L: an edit behind the clamp, which the clamp cannot see, is "
        "searched for each sample, by size. Between “clamp alone” and “adaptive "
        "attacker” lies what the monitors are worth against him. Shaded: "
        "95\u00a0% intervals.",
    )


def show_detection(certificate: Certificate) -> Markup:
    """Show which monitors notice what came back."""
    cells = _drawn(certificate)
    looks = _monitors(certificate)

    def lines(some: Sequence[Cell]) -> list[Line]:
        return _detection(some, looks)

    return section(
        "Which monitors notice",
        _legend([*looks.items(), _TOGETHER]) if cells else Markup(),
        _panels(cells, lines, "recovered runs", lambda cell: ""),
        lead="Of the runs that came back behind the clamp alone (unaware "
        "attacker): the share in which each monitor alarmed, up to the first that "
        "stopped them, and the share "
        "that all of them together stopped in time. No point where nothing came back.",
    )


def _drawn(certificate: Certificate) -> list[Cell]:
    """Return the cells that have a place on a logarithmic axis, in order."""
    cells = [cell for cell in certificate.cells if cell.budget > 0]
    return sorted(cells, key=lambda cell: cell.budget)


def _panels(
    cells: Sequence[Cell],
    lines_of: Callable[[Sequence[Cell]], list[Line]],
    ordinate: str,
    caption: Callable[[Cell], str],
) -> Markup:
    """Draw a plot for each position that was attacked, over the same budgets."""
    if not cells:
        return tag("p", NOT_MEASURED)
    panels = []
    for position, title in POSITIONS.items():
        some = [cell for cell in cells if cell.position == position]
        if some:
            plot = draw_lines(
                lines_of(some),
                budgets=[cell.budget for cell in cells],
                summary=f"{title}: share of {ordinate} against budget",
                ordinate=f"share of {ordinate}",
            )
            words = tag("p", caption(some[0]))
            heading = tag("figcaption", title)
            panels.append(tag("figure", heading, plot, words, data_position=position))
    return tag("div", *panels, class_="panels")


def _recovery(cells: Sequence[Cell]) -> list[Line]:
    randoms = [
        next((c.recovered for c in cell.controls if c.control == "random"), None)
        for cell in cells
    ]
    came_back = _rates(cells, "unaware", lambda row: row.recovered)
    unaware = _rates(cells, "unaware", lambda row: row.undetected)
    adaptive = _rates(cells, "adaptive", lambda row: row.undetected)
    return [
        Line(*_RANDOM, _points(cells, randoms), band=False),
        Line(*_ALONE, _points(cells, came_back)),
        Line(*_UNAWARE, _points(cells, unaware)),
        Line(*_ADAPTIVE, _points(cells, adaptive)),
    ]


def _detection(cells: Sequence[Cell], looks: Mapping[str, Look]) -> list[Line]:
    lines = []
    for name, look in looks.items():
        alarmed = _rates(cells, "unaware", partial(_alarmed, name))
        lines.append(Line(name, look, _points(cells, alarmed), band=False))
    stopped = _rates(cells, "unaware", _stopped)
    return [*lines, Line(*_TOGETHER, _points(cells, stopped))]


def _rates(
    cells: Sequence[Cell], attacker: Attacker, of: Callable[[LatentRow], Rate | None]
) -> list[Rate | None]:
    found = [
        next((row for row in cell.rows if row.attacker == attacker), None)
        for cell in cells
    ]
    return [None if row is None else of(row) for row in found]


def _alarmed(monitor: str, row: LatentRow) -> Rate | None:
    """Return the share of what came back; None where a monitor was not looked at."""
    hits, recovered = row.alarms.get(monitor), row.recovered
    return None if hits is None else type(recovered).of(hits, recovered.hits)


def _stopped(row: LatentRow) -> Rate:
    stopped = row.recovered.hits - row.undetected.hits
    return type(row.recovered).of(max(stopped, 0), row.recovered.hits)


def _monitors(certificate: Certificate) -> dict[str, Look]:
    """Give each monitor a look: those of the policy, and any other that alarmed."""
    heard = (name for c in certificate.cells for row in c.rows for name in row.alarms)
    names = dict.fromkeys([*certificate.subject.monitors, *heard])
    return dict(zip(names, islice(cycle(_MONITORS), len(names)), strict=True))


def _points(cells: Sequence[Cell], rates: Sequence[Rate | None]) -> tuple[Point, ...]:
    return tuple(
        Point(cell.budget, rate.share, rate.low, rate.high, note=share(rate))
        for cell, rate in zip(cells, rates, strict=True)
        if rate is not None and rate.count
    )


def _caption(certificate: Certificate) -> Callable[[Cell], str]:
    """Say at which budget half comes back."""
    latent = certificate.headline.latent

    def write(cell: Cell) -> str:
        found = latent.by_position.get(cell.position, {})
        if not {"b50_unmonitored", "b50_undetected"} <= set(found):
            return ""
        alone, guarded = (
            budget_in_words(found[name], largest=latent.largest_budget)
            for name in ("b50_unmonitored", "b50_undetected")
        )
        return f"Half comes back {alone} behind the clamp alone, unseen {guarded}."

    return write


def _legend(lines: Iterable[tuple[str, Look]]) -> Markup:
    entries = (tag("li", draw_sample(look), name) for name, look in lines)
    return tag("ul", *entries, class_="legend")
