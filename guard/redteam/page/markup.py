"""HTML and SVG as strings that are escaped unless they say that they are markup."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["NOT_MEASURED", "Group", "Markup", "Row", "join", "section", "table", "tag"]


class Markup(str):
    """Markup as it is; any other string is text, and escaped where it is put in."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float) -> Markup:
    """Write an element.

    Args:
        name: Of the element.
        children: Markup, and text that is escaped.
        attributes: By name; a trailing underscore is dropped (`class_`), others become
            hyphens (`stroke_width`). An empty one is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value != ""
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Put markup and escaped text side by side."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(child) for child in children
        )
    )


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


NOT_MEASURED = tag("span", "not measured", class_="missing")


def section(title: str, *children: str, lead: str = "") -> Markup:
    """Write a chapter of the page, with what it says in one sentence."""
    first = tag("p", lead, class_="lead") if lead else Markup()
    return tag("section", tag("h2", title), first, *children)


class Row(NamedTuple):
    """A row of a table."""

    cells: Sequence[str]
    css: str = ""
    """Class of the row."""


class Group(NamedTuple):
    """Rows under one heading."""

    title: str
    rows: Sequence[Row]


def table(
    columns: Sequence[str], groups: Sequence[Group], *, words: Sequence[int] = (0,)
) -> Markup:
    """Write a table, or that nothing was measured.

    Args:
        columns: Their headings.
        groups: Rows under a heading each; one without a title has no heading.
        words: Which columns are words; the others are numbers.
    """
    if not any(group.rows for group in groups):
        return tag("p", NOT_MEASURED)

    def css(place: int) -> str:
        return "word" if place in words else "number"

    def write(row: Row) -> Markup:
        cells = (
            tag("td", cell, class_=css(place)) for place, cell in enumerate(row.cells)
        )
        return tag("tr", *cells, class_=row.css)

    head = tag("tr", *(tag("th", c, class_=css(n)) for n, c in enumerate(columns)))
    bodies = []
    for group in groups:
        title = tag("th", group.title, colspan=len(columns), scope="rowgroup")
        heading = [tag("tr", title, class_="group")] if group.title else []
        bodies.append(tag("tbody", *heading, *map(write, group.rows)))
    return tag("div", tag("table", tag("thead", head), *bodies), class_="wide")
