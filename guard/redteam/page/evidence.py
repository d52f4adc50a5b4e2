"""Where recovery comes from, how else the clamp was deployed, what benign users pay."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from guard.redteam.page.markup import (
    NOT_MEASURED,
    Group,
    Markup,
    Row,
    section,
    table,
    tag,
)
from guard.redteam.page.plot import draw_bar
from guard.redteam.page.wording import POSITIONS, count_of, percent, rate, upper

if TYPE_CHECKING:
    from guard.redteam.certificate import Benign, Certificate, Rate

__all__ = ["show_attribution", "show_benign", "show_deployments"]


def show_attribution(certificate: Certificate) -> Markup:
    """Show what recovered edits do when a part of them is replayed, or left out."""
    groups = [
        Group(
            f"{component}: {POSITIONS[position].lower()}",
            [
                Row(
                    [
                        row.variant,
                        _bar(row.recovered, css="blue"),
                        rate(row.recovered),
                        str(row.recovered.count),
                        f"{row.relative_norm:.2g}",
                    ]
                )
                for row in rows
            ],
        )
        for (position, component), rows in groupby(
            certificate.replay, lambda row: (row.position, row.component)
        )
    ]
    columns = ["Part of the edit", "", "Came back", "n", "Norm / mean |resid|"]
    return section(
        "What carries the recovery",
        table(columns, groups, words=(0, 1)),
        lead=certificate.attribution or "No part of an edit was replayed.",
    )


def show_deployments(certificate: Certificate) -> Markup:
    """Show the clamp on some tokens only, and at other lengths and temperatures."""
    rows = [
        Row(
            [
                row.coverage,
                str(row.max_tokens),
                f"{row.temperature:g}",
                str(row.recovered.count),
                _bar(row.recovered, css="grey"),
                rate(row.recovered),
                rate(row.guarded),
                NOT_MEASURED if row.guarded is None else upper(row.guarded),
            ]
        )
        for row in certificate.deployments
    ]
    columns = "Clamp on|Output tokens|Temperature|n||Clamp alone|With the guard|At most"
    return section(
        "Other ways to deploy the clamp",
        table(columns.split("|"), [Group("", rows)], words=(0, 4)),
        lead="How much comes back where the clamp holds on some tokens only, where "
        "answers may be longer, or are sampled.",
    )


def show_benign(certificate: Certificate) -> Markup:
    """Show what those pay who attack nothing."""
    benign = certificate.benign
    plural = "" if benign.hold_tokens == 1 else "s"
    return section(
        "What benign users pay",
        tag(
            "div",
            _exact(benign.exact),
            _false_alarms(benign),
            _tile(
                "First token of a stream",
                f"{benign.hold_tokens} step{plural} later"
                if benign.hold_tokens
                else "not later",
                "hold_tokens of the policy: kept back until what follows is judged.",
            ),
            _seconds(benign),
            class_="tiles",
        ),
    )


def _exact(exact: Rate) -> Markup:
    if not exact.count:
        return _tile("Same answer as without the guard", NOT_MEASURED, "")
    return _tile(
        "Same answer as without the guard",
        percent(exact.share),
        f"{count_of(exact)} benign answers, token for token.",
    )


def _false_alarms(benign: Benign) -> Markup:
    found, title = benign.false_alarms, "Stopped for nothing"
    promise = f"promised: at most {percent(benign.promised)}"
    if not found.count:
        return _tile(title, NOT_MEASURED, f"{promise}.".capitalize())
    broken = found.low > benign.promised
    return _tile(
        title,
        percent(found.share),
        f"{count_of(found)} benign requests, 95\u00a0% interval {percent(found.low)} "
        f"to {percent(found.high)}; {promise}."
        + (" The promise is broken." if broken else ""),
        tone="bad" if broken else "",
    )


def _seconds(benign: Benign) -> Markup:
    guarded, unguarded = benign.seconds_guarded, benign.seconds_open
    title = "Time of a request"
    if guarded is None or unguarded is None:
        return _tile(title, NOT_MEASURED, "No server was asked.")
    return _tile(
        title,
        f"{guarded:.3g}\u00a0s",
        f"Median through the server; {unguarded:.3g}\u00a0s under a policy that does "
        "nothing.",
    )


def _tile(title: str, number: str, note: str, *, tone: str = "") -> Markup:
    return tag(
        "div",
        tag("p", title, class_="name"),
        tag("p", tag("strong", number), class_="number"),
        tag("p", note, class_="note"),
        class_=f"tile {tone}".strip(),
    )


def _bar(value: Rate, *, css: str) -> str:
    if not value.count:
        return NOT_MEASURED
    return draw_bar(value.share, value.low, value.high, css=css)
