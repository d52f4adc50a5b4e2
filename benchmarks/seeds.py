"""Whether a certificate made with another seed says the same.

`python -m benchmarks.seeds FIRST OTHER FIRST OTHER`: certificates in pairs, both of one
policy, the first with more samples. Each rate of the first is held against the interval
of the other's.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from guard.errors import CertificateError
from guard.provenance import ROOT, describe_run
from guard.redteam.certificate import Certificate, Rate, load_certificate

RESULTS = ROOT / "benchmarks" / "results" / "seeds.json"
_Key = tuple[str, str | float, str]


def rates(certificate: Certificate) -> Iterator[tuple[_Key, Rate]]:
    """Yield every rate that an attacker reached: who, where or at what budget, what."""
    for cell in certificate.cells:
        for row in cell.rows:
            who = f"{cell.position}, {row.attacker}"
            yield (who, cell.budget, "recovered"), row.recovered
            yield (who, cell.budget, "undetected"), row.undetected
    for tried in certificate.prompts:
        who = f"{tried.search}, {tried.attacker}"
        yield (who, "prompt", "recovered"), tried.recovered
        yield (who, "prompt", "undetected"), tried.undetected
    for row in certificate.deployments:
        at = f"{row.max_tokens} tokens, temperature {row.temperature:g}"
        yield (f"clamp on {row.coverage}", at, "recovered"), row.recovered


def compare(first: Certificate, other: Certificate) -> dict[str, Any]:
    """Return the rates of both, and how many of `first` the other's interval misses.

    Raises:
        CertificateError: They are about different policies, or share a seed.
    """
    if first.subject.policy_fingerprint != other.subject.policy_fingerprint:
        raise CertificateError("Two policies; expected two certificates of one policy.")
    if first.protocol.seed == other.protocol.seed:
        raise CertificateError("One seed; expected certificates of two seeds.")
    others = dict(rates(other))
    rows = [
        {
            "attacker": key[0],
            "at": key[1],
            "rate": key[2],
            "first": f"{rate.hits}/{rate.count}",
            "other": f"{others[key].hits}/{others[key].count}",
            "low": others[key].low,
            "high": others[key].high,
            "inside": others[key].low <= rate.hits / rate.count <= others[key].high,
        }
        for key, rate in rates(first)
        if key in others
    ]
    return {
        "policy_fingerprint": first.subject.policy_fingerprint,
        "first": {"preset": first.protocol.preset, "seed": first.protocol.seed},
        "other": {"preset": other.protocol.preset, "seed": other.protocol.seed},
        "cells": len(rows),
        "outside": sum(not row["inside"] for row in rows),
        "rows": rows,
    }


def main(
    certificates: Annotated[list[Path], typer.Argument(help="FIRST OTHER, in pairs.")],
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
) -> None:
    """Hold certificates of one seed against those of another."""
    if len(certificates) % 2:
        raise typer.BadParameter("An odd number; expected FIRST OTHER, in pairs.")
    read = [load_certificate(path) for path in certificates]
    pairs = [compare(*pair) for pair in zip(read[::2], read[1::2], strict=True)]
    result = describe_run() | {"pairs": pairs}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for pair in pairs:
        said = (
            f"{pair['outside']} of {pair['cells']} rates outside the other's interval"
        )
        Console(stderr=True).print(said)


if __name__ == "__main__":
    typer.run(main)
