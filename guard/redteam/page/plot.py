"""Lines against a budget, and bars, as SVG whose colours the page's style gives.

Budgets are drawn on a logarithmic axis, shares from 0 to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from guard.redteam.page.markup import Markup, join, tag
from guard.redteam.page.wording import percent

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Line", "Look", "Point", "draw_bar", "draw_lines", "draw_sample"]

Shape = Literal["circle", "square", "triangle", "diamond", "cross", "ring"]

_SHAPES: dict[Shape, str] = {
    "circle": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "ring": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "square": "M-3.2 -3.2h6.4v6.4h-6.4z",
    "triangle": "M0 -4.2L4 3L-4 3z",
    "diamond": "M0 -4.6L4.2 0L0 4.6L-4.2 0z",
    "cross": "M-3 -3L3 3M-3 3L3 -3",
}
_WIDTH, _HEIGHT = 360.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 352.0, 10.0, 204.0
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Look(NamedTuple):
    """What tells a line from others, also without its colour."""

    css: str
    """Class that gives the colour."""
    shape: Shape
    dash: str = ""
    """As SVG's `stroke-dasharray`; empty is solid."""


class Point(NamedTuple):
    """A measured share."""

    budget: float
    share: float
    low: float
    high: float
    note: str
    """Shown where a pointer rests on it."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one attacker or monitor reached, by budget."""

    name: str
    look: Look
    points: tuple[Point, ...]
    band: bool = True
    """Whether the interval of its points is shaded."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """Budgets from left to right, at equal ratios equal distances."""

    low: float
    high: float

    def place(self, budget: float) -> float:
        span = math.log(self.high / self.low)
        return _LEFT + (_RIGHT - _LEFT) * math.log(budget / self.low) / span

    def ticks(self) -> list[float]:
        decades = range(
            math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        )
        round_ones = (m * 10.0**e for e in decades for m in (1, 2, 5, 10))
        found = sorted({t for t in round_ones if self.low <= t <= self.high})
        return found if len(found) > 1 else [self.low, self.high]


def draw_lines(
    lines: Sequence[Line], *, budgets: Sequence[float], summary: str, ordinate: str
) -> Markup:
    """Draw lines over a common axis.

    Args:
        lines: The last one is drawn on top.
        budgets: All that any plot beside this one shows, each above 0.
        summary: Read out in place of the plot.
        ordinate: What the shares are of.
    """
    axis = _Axis(min(budgets) / 1.12, max(budgets) * 1.12)
    return tag(
        "svg",
        _grid(axis, ordinate),
        *(_band(line, axis) for line in lines if line.band),
        *(_line(line, axis) for line in lines),
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=summary,
        class_="plot",
    )


def draw_sample(look: Look) -> Markup:
    """Draw what a legend shows of a line."""
    stroke = tag("path", d="M0 7H34", stroke_dasharray=look.dash, class_="stroke")
    mark = _mark(look, 17, 7)
    return tag(
        "svg",
        tag("g", stroke, mark, class_=look.css),
        viewBox="0 0 34 14",
        class_="sample",
        aria_hidden="true",
    )


def draw_bar(share: float, low: float, high: float, *, css: str) -> Markup:
    """Draw a share from 0 to 1, with its interval."""
    length = 120
    return tag(
        "svg",
        tag("rect", x=0, y=4, width=length, height=10, class_="rail"),
        tag("rect", x=0, y=4, width=length * share, height=10, class_="fill"),
        tag("path", d=f"M{length * low:.1f} 9H{length * high:.1f}", class_="whisker"),
        viewBox=f"0 0 {length} 18",
        class_=f"bar {css}",
        role="img",
        aria_label=percent(share),
    )


def _height(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * share


def _grid(axis: _Axis, ordinate: str) -> Markup:
    rows = [
        join(
            [
                tag("path", d=f"M{_LEFT} {y:.2f}H{_RIGHT}", class_="grid"),
                tag(
                    "text",
                    percent(share),
                    x=_LEFT - 6,
                    y=y + 3.5,
                    text_anchor="end",
                    data_at=y,
                ),
            ]
        )
        for share, y in ((share, _height(share)) for share in _SHARES)
    ]
    columns = [
        join(
            [
                tag("path", d=f"M{x:.2f} {_BOTTOM}v4", class_="tick"),
                tag("text", f"{budget:.2g}", x=x, y=_BOTTOM + 16, text_anchor="middle"),
            ]
        )
        for budget, x in ((budget, axis.place(budget)) for budget in axis.ticks())
    ]
    middle = (_LEFT + _RIGHT) / 2
    return join(
        [
            tag("g", *rows, class_="shares"),
            tag("path", d=f"M{_LEFT} {_BOTTOM}H{_RIGHT}", class_="tick"),
            tag("g", *columns, class_="budgets"),
            tag(
                "text",
                "budget, relative to the mean |resid| (log scale)",
                x=middle,
                y=_BOTTOM + 36,
                text_anchor="middle",
            ),
            tag(
                "text",
                ordinate,
                x=-(_TOP + _BOTTOM) / 2,
                y=12,
                text_anchor="middle",
                transform="rotate(-90)",
            ),
        ]
    )


def _line(line: Line, axis: _Axis) -> Markup:
    places = [(axis.place(p.budget), _height(p.share)) for p in line.points]
    path = "L".join(f"{x:.2f} {y:.2f}" for x, y in places)
    stroke = tag("path", d=f"M{path}", stroke_dasharray=line.look.dash, class_="stroke")
    marks = [
        _mark(line.look, x, y, note=f"{line.name}, budget {p.budget:.3g}: {p.note}")
        for (x, y), p in zip(places, line.points, strict=True)
    ]
    return tag("g", *([stroke] if places else []), *marks, class_=line.look.css)


def _mark(look: Look, x: float, y: float, *, note: str = "") -> Markup:
    kind = "mark open" if look.shape in ("cross", "ring") else "mark"
    title = [tag("title", note)] if note else []
    move = f"translate({x:.2f} {y:.2f})"
    return tag("path", *title, d=_SHAPES[look.shape], transform=move, class_=kind)


def _band(line: Line, axis: _Axis) -> Markup:
    if len(line.points) < 2:
        return Markup()
    above = [(axis.place(p.budget), _height(p.high)) for p in line.points]
    below = [(axis.place(p.budget), _height(p.low)) for p in reversed(line.points)]
    path = "L".join(f"{x:.2f} {y:.2f}" for x, y in above + below)
    return tag("path", d=f"M{path}z", class_=f"band {line.look.css}")
