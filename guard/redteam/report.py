"""A certificate as one HTML page: no script, no network, for whoever has to decide.

The page first says whether the policy holds, then shows why, then all figures.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from guard.redteam.page.attacker import show_attackers
from guard.redteam.page.curve import show_detection, show_recovery
from guard.redteam.page.evidence import (
    show_attribution,
    show_benign,
    show_deployments,
)
from guard.redteam.page.headline import show_headline
from guard.redteam.page.markup import Markup, join, tag
from guard.redteam.page.scope import show_again, show_scope
from guard.redteam.page.wording import percent, short

if TYPE_CHECKING:
    from pathlib import Path

    from guard.redteam.certificate import Certificate

__all__ = ["render", "write_report"]


def write_report(certificate: Certificate, path: Path) -> None:
    """Write the page of a certificate to a file."""
    path.write_text(render(certificate), encoding="utf-8")


def render(certificate: Certificate) -> str:
    """Return the page of a certificate, HTML that is also well-formed XML."""
    style = resources.files("guard.redteam.page").joinpath("page.css")
    sections = (
        _title(certificate),
        show_headline(certificate),
        _facts(certificate),
        show_recovery(certificate),
        show_detection(certificate),
        show_attackers(certificate),
        show_attribution(certificate),
        show_deployments(certificate),
        show_benign(certificate),
        show_scope(certificate),
        show_again(certificate),
    )
    head = join(
        [
            Markup('<meta charset="utf-8"/>'),
            Markup(
                '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
            ),
            Markup('<meta name="color-scheme" content="light dark"/>'),
            tag("title", f"Certificate of {certificate.subject.policy}"),
            tag("style", Markup(style.read_text(encoding="utf-8"))),
        ]
    )
    body = tag("body", tag("main", *sections))
    return f"<!doctype html>\n{tag('html', tag('head', head), body, lang='en')}\n"


def _title(certificate: Certificate) -> Markup:
    subject = certificate.subject
    named = (
        ("policy", subject.policy),
        ("model", subject.model),
        ("fingerprint", short(subject.policy_fingerprint)),
        ("certificate", short(certificate.id)),
        ("issued", certificate.issued),
    )
    return tag(
        "header",
        tag("p", "vllm-guard certificate", class_="kicker"),
        tag("h1", f"How far the policy “{subject.policy}” can be trusted"),
        tag(
            "p",
            *(tag("span", f"{name} ", tag("b", said)) for name, said in named),
            class_="identity",
        ),
    )


def _facts(certificate: Certificate) -> Markup:
    """Show in one strip what the headline rests on."""
    protocol, subject = certificate.protocol, certificate.subject
    facts = (
        ("Valid samples", f"{protocol.samples} of {protocol.drawn} prompts"),
        ("Topics", str(protocol.groups)),
        ("Monitors that block", ", ".join(subject.monitors) or "none"),
        ("Promised false alarms", f"at most {percent(subject.target_fpr)}"),
        ("Tokens held back", str(subject.hold_tokens)),
        ("Effort", protocol.preset),
    )
    pairs = (tag("div", tag("dt", name), tag("dd", said)) for name, said in facts)
    return tag("dl", *pairs, class_="facts")
