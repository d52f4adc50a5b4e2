"""Hundreds of thousands of tokens of a random mix, and everything adds up afterwards.

Clients of every kind ask a server that has room for too few of them, while its
policies are reloaded, from good files and bad ones. At the end each token that the
scheduler gave out was counted, each request that it was given has its verdict, nobody
holds anything, and memory was flat.
"""

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from benchmarks.crowd import KINDS, Crowd
from benchmarks.deployment import STRANGER, Deployment, make_organism, make_toy
from benchmarks.operator import TOKEN, Operator, total
from benchmarks.series import (
    FEW_PRIMITIVES,
    Sample,
    describe_memory,
    describe_reloads,
    is_flat,
)
from benchmarks.steps import StepRecord
from guard.provenance import ROOT, describe_run
from guard.redteam.server import find_free_port, run_server, wait_until_ready

__all__ = ["MAKERS", "Soak", "find_faults", "soak"]

RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
MAKERS: dict[str, Callable[[Path], Deployment]] = {
    "random": make_toy,
    "organism": make_organism,
}
CLIENTS = 24
"""More than the server runs at once: the others wait."""
RELOAD_SECONDS = 3.0
SAMPLE_SECONDS = 5.0


@dataclass
class Soak:
    """What is seen of a server while the crowd is at it."""

    operator: Operator
    deployment: Deployment
    steps: StepRecord
    reloads: Counter[str] = field(default_factory=Counter)
    """By kind of file and status of the answer."""
    samples: list[Sample] = field(default_factory=list)

    def run(self, crowd: Crowd, *, tokens: int) -> None:
        """Let the crowd ask until so many tokens were computed, and files reloaded."""
        began, computed = time.monotonic(), 0
        with crowd.asking():
            reloading = threading.Thread(target=self._reload, args=(crowd.ended,))
            reloading.start()
            while computed < tokens or len(self.reloads) < 2:
                computed = self.steps.count_tokens()
                memory = self.operator.read_memory()
                self.samples.append(Sample(time.monotonic() - began, computed, memory))
                crowd.ended.wait(SAMPLE_SECONDS)
            crowd.ended.set()
            reloading.join()

    def _reload(self, ended: threading.Event) -> None:
        """Be the operator, until the end: of four files the second is a bad one."""
        policies, number = self.deployment.policies, 0
        while not ended.wait(RELOAD_SECONDS):
            number += 1
            is_bad = number % 4 == 2
            text = policies.bad(number // 4) if is_bad else policies.good(number)
            policies.write(text)
            status, _ = self.operator.reload()
            self.reloads[f"{'bad' if is_bad else 'good'} {status}"] += 1

    def reload_alone(self, reloads: int) -> dict[str, Any]:
        """Reload new files while nobody asks anything; return what memory did."""
        points = []
        for number in range(1, reloads + 1):
            self.deployment.policies.write(self.deployment.policies.new(number))
            status, _ = self.operator.reload()
            self.reloads[f"good {status}"] += 1
            memory = self.operator.read_memory()
            points.append((number / 100, sum(memory.rss.values())))
        return describe_reloads(points)

    def count(self) -> dict[str, Any]:
        """Return all that must add up, once nobody asks any more."""
        self.operator.wait_until_idle()
        # What the last step computed for those who left is told with the next output.
        body = {"model": self.deployment.name, "prompt": "w1", "max_tokens": 1}
        self.operator.client.post("/v1/completions", json=body).raise_for_status()
        self.operator.wait_until_idle()
        metrics = self.operator.read_metrics()
        held = {
            f"{part['role']} {part.get('rank', '')}".strip(): part["requests"]
            for part in self.operator.read_engines()
        }
        return {
            "tokens_computed": self.steps.count_tokens(),
            "tokens_counted": int(total(metrics, "guard_tokens_total")),
            "requests": self.steps.count_requests(),
            "verdicts": int(total(metrics, "guard_requests_total")),
            "actions": _by_label(metrics, "guard_requests_total", "action"),
            "alarms": int(total(metrics, "guard_alarms_total")),
            "errors": _by_label(metrics, "guard_errors_total", "component"),
            "unscored": _by_label(metrics, "guard_unscored_tokens_total", "reason"),
            "preemptions": int(total(metrics, "vllm:num_preemptions_total")),
            "cached_tokens": int(total(metrics, "vllm:prefix_cache_hits_total")),
            "reloads": dict(self.reloads),
            "generation": int(total(metrics, "guard_policy_generation")),
            "held_afterwards": {
                **held,
                "open": total(metrics, "guard_open_requests"),
                "kv_cache": total(metrics, "vllm:kv_cache_usage_perc"),
            },
        }


def _by_label(metrics: Mapping[str, float], name: str, label: str) -> dict[str, int]:
    """Return a metric's sums by the values of one of its labels."""
    sums: Counter[str] = Counter()
    for key, value in metrics.items():
        if key.startswith(f"{name}{{"):
            sums[key.partition(f'{label}="')[2].partition('"')[0]] += int(value)
    return dict(sums)


def soak(
    deployment: Deployment,
    folder: Path,
    *,
    tokens: int,
    reloads: int = 0,
    seed: int = 0,
    clients: int = CLIENTS,
) -> dict[str, Any]:
    """Serve a deployment to a crowd; return what came of it, as in the results file.

    Args:
        deployment: What is served.
        folder: For the server's log and the record of its steps.
        tokens: Computed at least.
        reloads: More of them afterwards, while nobody asks anything.
        seed: Of all that the clients draw.
        clients: At the same time.
    """
    folder.mkdir(parents=True)
    steps, log, port = StepRecord(folder), folder / "log", find_free_port()
    command = ["guard", "serve", str(deployment.model)]
    command += ["--policy", str(deployment.policies.path), *deployment.options]
    environment = {"GUARD_ADMIN_TOKEN": TOKEN, **FEW_PRIMITIVES, **steps.begin()}
    url = f"http://127.0.0.1:{port}"
    key = {"authorization": f"Bearer {STRANGER}"}
    began = time.monotonic()
    with (
        run_server(command, port=port, log=log, environment=environment) as server,
        httpx.Client(base_url=url, headers=key, timeout=120) as client,
    ):
        wait_until_ready(url, server, log)
        found = Soak(Operator(client, server.pid), deployment, steps)
        crowd = Crowd(url, deployment, seed=seed, clients=clients)
        found.run(crowd, tokens=tokens)
        counts = found.count()
        alone = found.reload_alone(reloads)
    return {
        "model": deployment.name,
        "about": deployment.about,
        "seed": seed,
        "clients": clients,
        "seconds": round(time.monotonic() - began),
        **counts,
        "crowd": dict(crowd.counts),
        "memory": describe_memory(found.samples),
        "reloads_alone": alone,
    }


def find_faults(part: Mapping[str, Any]) -> list[str]:
    """Return in what a part of the results falls short, one line each."""
    crowd, reloads, memory = part["crowd"], part["reloads"], part["memory"]
    wanted = {"good 200", "bad 422"}
    checks = {
        "tokens were computed that were not counted, or the other way round": (
            part["tokens_computed"] == part["tokens_counted"]
        ),
        "a request has no verdict, or two": part["requests"] == part["verdicts"],
        "a client lost an answer": not crowd.get("lost"),
        "a request is held that is over": not any(part["held_afterwards"].values()),
        "a token has no reading or no score": not any(part["unscored"].values()),
        "the guard noticed an error": not any(part["errors"].values()),
        "nobody was preempted": part["preemptions"] > 0,
        "the prefix cache was never hit": part["cached_tokens"] > 0,
        "a kind of client never came": all(crowd.get(kind) for kind in KINDS),
        "reloads ended otherwise than they should": (
            wanted <= reloads.keys() and reloads.keys() <= wanted | {"good 409"}
        ),
        "memory grew until the end": is_flat(
            memory["rss_half_mb"], memory["rss_end_mb"]
        ),
    }
    return [f"{part['model']}: {text}" for text, holds in checks.items() if not holds]


def main(
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
    random: Annotated[int, typer.Option(help="Tokens of the random model.")] = 200_000,
    organism: Annotated[int, typer.Option(help="Tokens of the organism.")] = 120_000,
    reloads: Annotated[int, typer.Option(help="Of each, afterwards.")] = 300,
    seed: Annotated[int, typer.Option(help="Of all that clients draw.")] = 0,
) -> None:
    """Soak a server, and see that everything adds up."""
    about, parts = describe_run(), []
    result: dict[str, Any] = {}
    console = Console(stderr=True)
    for name, tokens in (("random", random), ("organism", organism)):
        console.print(f"{name}: {tokens} tokens")
        with tempfile.TemporaryDirectory() as folder:
            deployment = MAKERS[name](Path(folder, "deployment"))
            part = soak(
                deployment,
                Path(folder, "soak"),
                tokens=tokens,
                reloads=reloads,
                seed=seed,
            )
        console.print_json(data={k: v for k, v in part.items() if k != "memory"})
        parts.append(part)
        # After each of them: what is measured is not lost with what comes next.
        result = about | sum_up(parts)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for fault in result["faults"]:
        console.print(fault)
    if result["faults"]:
        raise typer.Exit(1)


def sum_up(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the keys of the results file besides those of every one."""
    sums = ("tokens_computed", "tokens_counted", "requests", "verdicts")
    memory = ("rss_start_mb", "rss_end_mb")
    return {
        **{key: sum(part[key] for part in parts) for key in sums},
        **{key: round(sum(p["memory"][key] for p in parts), 1) for key in memory},
        "faults": [fault for part in parts for fault in find_faults(part)],
        "parts": list(parts),
    }


if __name__ == "__main__":
    typer.run(main)
