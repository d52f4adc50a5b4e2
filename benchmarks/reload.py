"""A thousand reloads under load, one in ten of them of a bad file.

The organism is served while two policy files take turns. Under the policy `open` one
of them clamps and the other does not, so that an answer's words tell which of them ran,
and its verdict must say the same. Nothing may be lost, and memory must stay flat: what
falls short is named, and ends this with 1.
"""

import contextlib
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.operator import TOKEN, Operator, Policies
from benchmarks.series import FEW_PRIMITIVES, describe_reloads, is_flat
from guard.demo.measure import ORGANISM
from guard.demo.show import OPTIONS
from guard.provenance import ROOT, describe_run
from guard.redteam.server import find_free_port, run_server, wait_until_ready

__all__ = ["Load", "find_faults", "keep_busy", "push"]

RESULTS = ROOT / "benchmarks" / "results" / "reload.json"
CLIENTS = 4
PROMPTS = 8
MAX_TOKENS = 24
BAD_EVERY = 10
"""One of so many reloads is of a bad file."""
_END_SECONDS = 120
"""What all clients are given for their last answers."""

PUSH = {"name": "push", "sae": "l3", "latents": [60, 67], "law": "set", "value": 12.0}
"""Changes every answer."""


def push(body: dict[str, Any]) -> None:
    """Make the second policy file of the first: clamps, thresholds and holds change."""
    body["policies"]["open"]["clamps"] = [PUSH]
    for monitor in body["policies"]["watch"]["monitors"]:
        monitor["target_fpr"] *= 2
    body["policies"]["default"]["hold_tokens"] = 2


@contextlib.contextmanager
def keep_busy(
    run: Callable[[int], None], clients: int, *, until: threading.Event
) -> Iterator[None]:
    """Run so many clients in threads of their own; at the end wait for all of them.

    Args:
        run: Of a client, by number; returns once the event is set.
        clients: How many.
        until: The event.
    """
    threads = [
        threading.Thread(target=run, args=(number,), daemon=True)
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        until.set()
        deadline = time.monotonic() + _END_SECONDS
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))


@dataclass
class Load:
    """Clients that ask and ask, and what became of it."""

    url: str
    prompts: Sequence[str]
    expected: dict[tuple[str, str], str]
    """Answer by fingerprint and prompt."""
    ended: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    gaps: list[float] = field(default_factory=list)
    """Longest silence within each stream, in milliseconds."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep all clients busy."""
        with keep_busy(self._run, CLIENTS, until=self.ended):
            yield

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            asked = number
            while not self.ended.is_set():
                prompt = self.prompts[asked % len(self.prompts)]
                stream = bool(asked % 2)
                kinds, gap = self._ask(client, prompt, stream=stream)
                with self._lock:
                    self.counts.update(kinds)
                    self.gaps += [gap] if gap else []
                asked += 1

    def _ask(
        self, client: httpx.Client, prompt: str, *, stream: bool
    ) -> tuple[list[str], float]:
        """Ask once; return what it counts as, and the longest silence."""
        try:
            text, verdict, gap = ask(client, prompt, stream=stream)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            return ["requests", "lost", f"lost: {type(error).__name__}: {error}"], 0.0
        known = self.expected.get((verdict["fingerprint"], prompt))
        kinds = ["requests", f"under {verdict['fingerprint'][:12]}"]
        return kinds + ([] if known == text else ["mismatched"]), gap


def ask(
    client: httpx.Client, prompt: str, *, stream: bool = False
) -> tuple[str, dict[str, Any], float]:
    """Return text and verdict of an answer, and the longest silence of its stream."""
    body = {
        "model": "organism",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "guard": {"policy": "open"},
        "stream": stream,
    }
    if not stream:
        answer = client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        said = answer.json()
        return said["choices"][0]["message"]["content"] or "", said["guard"], 0.0
    text, verdict, gap, before = "", {}, 0.0, 0.0
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, now = json.loads(line.removeprefix("data: ")), time.perf_counter()
            gap, before = max(gap, now - (before or now)), now
            verdict = chunk.get("guard", verdict)
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
    return text, {"fingerprint": verdict["fingerprint"]}, 1e3 * gap


def main(
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
    reloads: Annotated[int, typer.Option(min=20, help="How many.")] = 1000,
) -> None:
    """Reload under load, again and again, and see that nothing is lost."""
    about = describe_run()
    prompts = json.loads((ORGANISM / "prompts.json").read_text(encoding="utf-8"))
    texts = [prompt["text"] for prompt in prompts]
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name, "organism"), Path(name, "log")
        shutil.copytree(ORGANISM, folder)
        policies = Policies(folder / "policy.yaml", push)
        port = find_free_port()
        url = f"http://127.0.0.1:{port}"
        command = ["guard", "serve", str(ORGANISM / "model")]
        command += ["--policy", str(policies.path), *OPTIONS]
        environment = {"GUARD_ADMIN_TOKEN": TOKEN, **FEW_PRIMITIVES}
        with run_server(command, port=port, log=log, environment=environment) as server:
            wait_until_ready(url, server, log)
            with httpx.Client(base_url=url, timeout=120) as client:
                operator = Operator(client, server.pid)
                rows = measure(url, operator, policies, texts, reloads=reloads)
    if reloads < 1000:
        rows["note"] = f"shortened: {reloads} reloads in place of 1000"
    faults = find_faults(rows)
    result = about | rows | {"faults": faults}
    output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    console = Console(stderr=True)
    console.print_json(data=rows)
    for fault in faults:
        console.print(fault)
    if faults:
        raise typer.Exit(1)


def find_faults(rows: Mapping[str, Any]) -> list[str]:
    """Return in what a run falls short, one line each."""
    asked = rows["reloads_asked"]
    bad = asked // BAD_EVERY
    served = rows["requests_by_fingerprint"]
    memory = rows["memory"]["rss_mb"]
    checks = {
        "reloads ended otherwise than they should": (
            rows["reloads"] == {"good 200": asked - bad, "bad 422": bad}
        ),
        "the server counted other refusals": rows["refused_counted"] == bad,
        "a file answered nobody": len(served) == 2 and all(served.values()),
        "a client lost an answer": not rows["lost"],
        "an answer is not that of the policy its verdict names": not rows["mismatched"],
        "memory grew until the end": is_flat(memory[len(memory) // 2], memory[-1]),
    }
    return [text for text, holds in checks.items() if not holds]


def measure(
    url: str,
    operator: Operator,
    policies: Policies,
    prompts: Sequence[str],
    *,
    reloads: int,
) -> dict[str, Any]:
    """Return the keys of the results file besides those of every one."""
    expected: dict[tuple[str, str], str] = {}
    for number in (1, 0):
        policies.write(policies.good(number))
        operator.reload()
        for prompt in prompts:
            text, verdict, _ = ask(operator.client, prompt)
            expected[verdict["fingerprint"], prompt] = text
    fingerprints = sorted({found for found, _ in expected})
    first, second = fingerprints
    prompts = [p for p in prompts if expected[first, p] != expected[second, p]]
    prompts = prompts[:PROMPTS]
    load = Load(url, prompts, expected)
    statuses: Counter[str] = Counter()
    seconds: dict[int, list[float]] = {200: [], 422: []}
    memory: list[tuple[float, float]] = []
    good = 0
    with load.running():
        for number in track(range(reloads), "reloads", console=Console(stderr=True)):
            is_bad = number % BAD_EVERY == BAD_EVERY - 1
            good += not is_bad
            policies.write(
                policies.bad(number // BAD_EVERY) if is_bad else policies.good(good)
            )
            status, took = operator.reload()
            statuses[f"{'bad' if is_bad else 'good'} {status}"] += 1
            seconds.setdefault(status, []).append(took)
            resident = sum(operator.read_memory().rss.values())
            memory.append(((number + 1) / 100, resident))
    metrics = operator.read_metrics()
    return {
        "reloads_asked": reloads,
        "reloads": dict(statuses),
        "generation": metrics["guard_policy_generation"],
        "refused_counted": metrics['guard_policy_reloads_total{result="refused"}'],
        "requests": load.counts["requests"],
        "requests_by_fingerprint": {
            name.removeprefix("under "): count
            for name, count in load.counts.items()
            if name.startswith("under ")
        },
        "lost": load.counts["lost"],
        "reasons": [name for name in load.counts if name.startswith("lost: ")][:5],
        "mismatched": load.counts["mismatched"],
        "prompts": len(prompts),
        "memory": describe_reloads(memory),
        "reload_ms_median": round(statistics.median(seconds[200]), 1),
        "reload_ms_p95": round(statistics.quantiles(seconds[200], n=20)[-1], 1),
        "refusal_ms_median": round(statistics.median(seconds[422]), 1),
        "stream_silence_ms_median": round(statistics.median(load.gaps), 1),
        "stream_silence_ms_p95": round(statistics.quantiles(load.gaps, n=20)[-1], 1),
    }


if __name__ == "__main__":
    typer.run(main)
