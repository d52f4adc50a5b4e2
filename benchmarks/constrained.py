"""What comes back where a client constrains how an answer begins.

The organism's policy refuses such requests, so that its certificate does not attack by
them. This does, as if the policy let them in: it says what the refusal is worth.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from guard.demo.measure import ORGANISM
from guard.provenance import ROOT, describe_run
from guard.redteam.certify import PRESETS
from guard.redteam.forward import quiet_transformers
from guard.redteam.prompt import ATTACKERS, run_prompts
from guard.redteam.subject import load_subject

RESULTS = ROOT / "benchmarks" / "results" / "constrained.json"
PLAN = PRESETS["full"]
POLICY = "default"
SEED = 0


def measure(folder: Path, samples: int, tries: int) -> list[dict[str, Any]]:
    """Constrain decoding of one organism, and return a row for each attacker."""
    torch.set_num_threads(1)
    quiet_transformers()
    subject = load_subject(
        folder / "model",
        folder / "policy.yaml",
        POLICY,
        folder / "certify.jsonl",
        samples=samples,
        benign=PLAN.benign,
    )
    rows = (
        run_prompts(subject, "constrained", attacker, queries=tries, seed=SEED)
        for attacker in ATTACKERS
    )
    return [{"organism": folder.name, **row.model_dump()} for row in rows]


def main(
    organism: Annotated[
        list[Path] | None,
        typer.Option(help="Further organisms, as `guard.demo.rebuild` writes them."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Of each.")] = PLAN.samples,
    tries: Annotated[int, typer.Option(help="For each sample and goal.")] = 500,
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
) -> None:
    """Let clients constrain how answers begin, and count what they receive."""
    folders = [ORGANISM, *(organism or [])]
    about = describe_run() | {"seed": SEED, "policy": POLICY}
    workers = min(len(os.sched_getaffinity(0)), len(folders))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        run = partial(measure, samples=samples, tries=tries)
        rows = [row for part in pool.map(run, folders) for row in part]
    output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    for row in rows:
        Console(stderr=True).print(
            f"{row['organism']}, {row['attacker']}, {row['queries']} tries: back "
            f"{row['recovered']['hits']}, received {row['undetected']['hits']} of "
            f"{row['recovered']['count']}"
        )


if __name__ == "__main__":
    typer.run(main)
