"""What a server's memory does under requests, with the plugin and without it.

The same clients ask both servers, one after the other, in turns: what grows in vLLM
itself is no leak of the guard.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, get_args

import httpx
import typer
from rich.console import Console

from benchmarks.crowd import KINDS, Check, Crowd, Request, check_verdicts
from benchmarks.deployment import STRANGER, Deployment
from benchmarks.operator import Operator
from benchmarks.series import Sample, describe_memory
from benchmarks.soak import CLIENTS, MAKERS, SAMPLE_SECONDS
from benchmarks.steps import StepRecord
from guard.provenance import ROOT, describe_run
from guard.redteam.server import find_free_port, run_server, wait_until_ready

__all__ = ["compare"]

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
Variant = Literal["guarded", "unguarded"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_KINDS = {kind: KINDS[kind] for kind in ("ask", "hang up")}
"""What both servers understand alike."""


def _count_answer(request: Request, events: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {"answers": 1, "choices": request.choices}


_CHECKS: dict[Variant, Check] = {
    "guarded": check_verdicts,
    "unguarded": _count_answer,
}


def measure(
    variant: Variant, deployment: Deployment, folder: Path, *, tokens: int, seed: int
) -> dict[str, Any]:
    """Serve to a crowd until so many tokens were computed; return what memory did."""
    folder.mkdir(parents=True)
    steps, log, port = StepRecord(folder), folder / "log", find_free_port()
    model, policy = str(deployment.model), str(deployment.policies.path)
    command = {
        "guarded": ["guard", "serve", model, "--policy", policy],
        "unguarded": ["vllm.entrypoints.openai.api_server", "--model", model],
    }[variant]
    url = f"http://127.0.0.1:{port}"
    key = {"authorization": f"Bearer {STRANGER}"}
    samples: list[Sample] = []
    with (
        run_server(
            [*command, *deployment.options],
            port=port,
            log=log,
            environment=steps.begin(),
        ) as server,
        httpx.Client(base_url=url, headers=key, timeout=120) as client,
    ):
        wait_until_ready(url, server, log, "/health")
        operator = Operator(client, server.pid)
        crowd = Crowd(
            *(url, deployment, seed, CLIENTS), kinds=_KINDS, check=_CHECKS[variant]
        )
        began, computed = time.monotonic(), 0
        with crowd.asking():
            while computed < tokens:
                computed = steps.count_tokens()
                memory = operator.read_memory()
                samples.append(Sample(time.monotonic() - began, computed, memory))
                crowd.ended.wait(SAMPLE_SECONDS)
    return {
        "variant": variant,
        "tokens_computed": computed,
        "crowd": dict(crowd.counts),
        **describe_memory(samples),
    }


def compare(
    deployment: Deployment, folder: Path, *, tokens: int, rounds: int
) -> dict[str, Any]:
    """Measure both in turns; return what the results file says of a deployment."""
    runs = [
        measure(
            variant,
            deployment,
            folder / f"{variant}-{number}",
            tokens=tokens,
            seed=number,
        )
        for number in range(rounds)
        for variant in VARIANTS
    ]
    return {
        "model": deployment.name,
        "about": deployment.about,
        "grown_mb": {variant: _grown(runs, variant) for variant in VARIANTS},
        "runs": runs,
    }


def _grown(runs: Sequence[dict[str, Any]], variant: Variant) -> float:
    """Return by how much all processes grew after warm-up, the median of the runs."""
    return round(
        median(
            run["rss_end_mb"] - run["rss_start_mb"]
            for run in runs
            if run["variant"] == variant
        ),
        1,
    )


def main(
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
    tokens: Annotated[int, typer.Option(help="Of each run, at least.")] = 150_000,
    rounds: Annotated[int, typer.Option(help="Of both variants.")] = 3,
    model: Annotated[list[str], typer.Option(help="Only these.")] = [*MAKERS],  # noqa: B006
) -> None:
    """Compare what memory does under requests with the plugin and without it."""
    result: dict[str, Any] = describe_run() | {"parts": []}
    console = Console(stderr=True)
    for name in model:
        with tempfile.TemporaryDirectory() as folder:
            deployment = MAKERS[name](Path(folder, "deployment"))
            part = compare(deployment, Path(folder), tokens=tokens, rounds=rounds)
        console.print_json(data={name: part["grown_mb"]})
        result["parts"].append(part)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
