"""What clients bring back by writing, on more samples than a certificate has.

A certificate attacks the first prompts of its file with everything; this is its
strongest attacker who can be a client, alone, on the prompts behind those.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from guard.demo.measure import ORGANISM
from guard.prompt import Prompt, read_prompts
from guard.provenance import ROOT, describe_run
from guard.redteam.certificate import Rate
from guard.redteam.certify import PRESETS
from guard.redteam.forward import quiet_transformers
from guard.redteam.prompt import run_prompts
from guard.redteam.subject import Subject, load_subject

RESULTS = ROOT / "benchmarks" / "results" / "prompts.json"
PLAN = PRESETS["full"]
SEED = 0
PART = 8
"""Samples after which what was found is written down."""
POLICY = "default"


@dataclass(frozen=True, slots=True)
class Sample:
    """One suppressed answer, and whether words brought it back."""

    organism: str
    group: str
    recovered: bool
    """Behind the clamp alone."""
    undetected: bool
    """Received by a client under the policy."""
    prompt: str


def load_unseen(folder: Path, samples: int) -> Subject:
    """Load an organism with the samples that its certificate did not draw."""
    file = folder / "certify.jsonl"
    subject = load_subject(
        folder / "model",
        folder / "policy.yaml",
        POLICY,
        file,
        samples=PLAN.samples + samples,
        benign=PLAN.benign,
    )
    attacked = [line for line in read_prompts(file) if line.label == 1]
    drawn = {_text(line) for line in attacked[: PLAN.samples]}
    fresh = [one for one in subject.samples if _text(one.prompt) not in drawn]
    return replace(subject, samples=tuple(fresh))


def _text(prompt: Prompt) -> str:
    return str(prompt.conversation[0]["content"])


def attack_part(folder: Path, samples: int, number: int) -> list[Sample]:
    """Attack a part of the samples, one by one, with an adaptive client's words."""
    torch.set_num_threads(1)
    quiet_transformers()
    subject = load_unseen(folder, samples)
    found = []
    for one in subject.samples[number * PART :][:PART]:
        alone = replace(subject, samples=(one,))
        row = run_prompts(alone, "suffix", "adaptive", queries=PLAN.queries, seed=SEED)
        sample = Sample(
            organism=folder.name,
            group=one.group,
            recovered=row.recovered.hits == 1,
            undetected=row.undetected.hits == 1,
            prompt=row.prompts[0],
        )
        found.append(sample)
    return found


def describe(organism: str, found: list[Sample]) -> dict[str, Any]:
    """Return what the results file says of an organism."""
    own = [one for one in found if one.organism == organism]
    unseen = [one.group for one in own if one.undetected]
    return {
        "organism": organism,
        "topics": len({one.group for one in own}),
        "recovered": _rate(sum(one.recovered for one in own), len(own)),
        "undetected": _rate(len(unseen), len(own)),
        "undetected_topics": sorted(set(unseen)),
        "samples": [asdict(one) for one in own],
    }


def _rate(hits: int, count: int) -> dict[str, Any]:
    return Rate.of(hits, count).model_dump()


def main(
    organism: Annotated[
        list[Path] | None,
        typer.Option(help="Further organisms, as `guard.demo.rebuild` writes them."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Of each, that were not drawn.")] = 80,
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
) -> None:
    """Let clients write, and count what they receive that they should not."""
    folders = [ORGANISM, *(organism or [])]
    about = describe_run() | {
        "queries": 3 * PLAN.queries,
        "seed": SEED,
        "policy": POLICY,
    }
    parts = [
        (folder, samples, number)
        for number in range(-(-samples // PART))
        for folder in folders
    ]
    found: list[Sample] = []
    workers = min(len(os.sched_getaffinity(0)), len(folders))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for part in pool.map(attack_part, *zip(*parts, strict=True)):
            found += part
            names = dict.fromkeys(one.organism for one in found)
            rows = [describe(name, found) for name in names]
            output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
            told = {row["organism"]: row["undetected"] for row in rows}
            Console(stderr=True).print_json(data=told)


if __name__ == "__main__":
    typer.run(main)
