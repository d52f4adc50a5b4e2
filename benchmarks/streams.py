"""What the verdict adds to the end of a stream: guarded and not, on the same build.

Two servers of the organism take turns, each stopped while the other answers, and a
client notes when the chunks of its stream arrive. The verdict travels in the chunk that
finishes the answer, so nothing should come later for its sake.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
import typer
from rich.console import Console
from rich.progress import track

from guard.demo.measure import ORGANISM
from guard.demo.show import OPTIONS
from guard.provenance import ROOT, describe_run
from guard.redteam.server import find_free_port, run_server, wait_until_ready

__all__ = ["Row", "Server", "Stream", "start"]

RESULTS = ROOT / "benchmarks" / "results" / "streams.json"
TURN = 25
"""Streams a server answers before the other one's turn."""

Variant = Literal["unguarded", "guarded"]


@dataclass(frozen=True, slots=True)
class Stream:
    """When a stream's chunks arrived, in milliseconds after the request."""

    tokens: tuple[float, ...]
    """Chunks with text or a reason to finish."""
    end: float
    """The last byte."""

    @property
    def after_last_token(self) -> float:
        """From the chunk that finishes the answer to the end of the stream."""
        return self.end - self.tokens[-1]

    @property
    def before_last_token(self) -> float:
        """From the chunk before it to that chunk."""
        return self.tokens[-1] - self.tokens[-2]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `rows`, in milliseconds."""

    variant: Variant
    streams: int
    tokens_median: int
    after_last_token_median: float
    after_last_token_p95: float
    before_last_token_median: float
    before_last_token_p95: float


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is stopped while it is not its turn."""

    variant: Variant
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def wait_until_ready(self) -> None:
        """Wait until it answers, then stop it.

        Raises:
            EngineError: It did not start.
        """
        wait_until_ready(self.url, self.process, self.log, "/v1/models")
        os.killpg(self.process.pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def turn(self) -> Iterator[httpx.Client]:
        """Let it run, and give a client of it."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            with httpx.Client(base_url=self.url, timeout=60) as client:
                yield client
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)


@contextlib.contextmanager
def start(variant: Variant, folder: Path) -> Iterator[Server]:
    """Start a server of the organism; it ends with the context."""
    model = str(ORGANISM / "model")
    command = {
        "guarded": [
            *("guard", "serve", model),
            *("--policy", str(ORGANISM / "policy.yaml")),
        ],
        "unguarded": ["vllm.entrypoints.openai.api_server", "--model", model],
    }[variant]
    port, log = find_free_port(), folder / f"{variant}.log"
    with run_server([*command, *OPTIONS], port=port, log=log) as process:
        try:
            yield Server(variant, f"http://127.0.0.1:{port}", process, log)
        finally:
            # What is stopped hears of no other end than being killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)


def read_stream(client: httpx.Client, prompt: str) -> Stream:
    """Ask once, and note when what arrives."""
    body = {
        "model": "organism",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 24,
        "stream": True,
    }
    start = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        tokens = [
            1e3 * (time.perf_counter() - start)
            for line in answer.iter_lines()
            if _is_token(line)
        ]
        end = 1e3 * (time.perf_counter() - start)
    return Stream(tuple(tokens), end)


def _is_token(line: str) -> bool:
    """Whether an event has text, or finishes the answer."""
    if not line.startswith("data: {"):
        return False
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return any(c["delta"].get("content") or c["finish_reason"] for c in choices)


def make_row(variant: Variant, streams: Sequence[Stream]) -> Row:
    """Sum up what a variant's streams did at their ends."""
    after = [stream.after_last_token for stream in streams]
    before = [stream.before_last_token for stream in streams]
    return Row(
        variant=variant,
        streams=len(streams),
        tokens_median=int(statistics.median(len(s.tokens) for s in streams)),
        after_last_token_median=round(statistics.median(after), 3),
        after_last_token_p95=round(_p95(after), 3),
        before_last_token_median=round(statistics.median(before), 3),
        before_last_token_p95=round(_p95(before), 3),
    )


def _p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def main(
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
    streams: Annotated[int, typer.Option(min=50, help="Per variant.")] = 1000,
) -> None:
    """Measure the ends of streams, guarded and not."""
    about = describe_run()
    prompts = json.loads((ORGANISM / "prompts.json").read_text(encoding="utf-8"))
    texts = [prompt["text"] for prompt in prompts if prompt["kind"] == "b"]
    console = Console(stderr=True)
    found: dict[Variant, list[Stream]] = {"unguarded": [], "guarded": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = []
        for variant in found:
            server = stack.enter_context(start(variant, Path(folder)))
            server.wait_until_ready()
            servers.append(server)
        rounds = range(-(-streams // TURN) + 1)
        for number in track(rounds, "streams", console=console):
            for server in servers:
                with server.turn() as client:
                    for index in range(TURN):
                        stream = read_stream(client, texts[index % len(texts)])
                        if number:  # the first round only warms up
                            found[server.variant].append(stream)
    rows = [asdict(make_row(variant, found[variant])) for variant in found]
    output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", "utf-8")
    console.print_json(data=rows)


if __name__ == "__main__":
    typer.run(main)
