"""What the guard costs: guarded over unguarded throughput, on the same build.

Every variant of the engine lives in a process of its own. They take turns, task by
task and round by round (A B C D, A B C D, ...), and all but one are stopped, so that
whatever else the machine does meets all of them alike. `make bench` runs it; it takes
about ten minutes on two quiet cores.
"""

import contextlib
import json
import math
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.shape import (
    IDLE_POLICY,
    Shape,
    make_dummy_shape,
    make_organism_shape,
)
from benchmarks.subject import Subject, SubjectError, Task, Timing, Variant
from guard.provenance import ROOT, describe_run

__all__ = ["Case", "Row", "make_row", "median_interval"]

RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
CLAMP_AIM = 0.98
"""Least throughput under a clamp, relative to none."""
MONITOR_AIM = 1.25
"""Most time a monitor may add, in multiples of its share of the multiply-adds."""
CONFIDENCE = 0.9
"""Least coverage of `ratio_low` to `ratio_high`."""

Phase = Literal["prefill", "decode"]

_ENGINES: tuple[Variant, ...] = ("unguarded", "clamp", "monitor", "eager_hook")
_VARIANTS: tuple[Variant, ...] = ("idle", "clamp", "monitor", "eager_hook")


@dataclass(frozen=True, slots=True)
class Case:
    """One phase at one batch size; decode starts from prompts of a single token."""

    phase: Phase
    batch: int
    tokens: int
    """Of a prompt in prefill, of an output in decode."""

    @property
    def task(self) -> Task:
        """The work itself, asking for no policy."""
        if self.phase == "prefill":
            return Task(self.batch, prompt_tokens=self.tokens, output_tokens=1)
        return Task(self.batch, prompt_tokens=1, output_tokens=self.tokens)


# At most 1024 prompt tokens at once, so that the widest batch fits into the minutes.
_CASES = {
    "organism": (
        Case("prefill", 8, 128),
        Case("decode", 1, 128),
        Case("decode", 8, 128),
        Case("decode", 32, 128),
    ),
    "qwen2.5-0.5b": (
        Case("prefill", 1, 128),
        Case("prefill", 8, 128),
        Case("prefill", 32, 32),
        Case("decode", 1, 24),
        Case("decode", 8, 24),
        Case("decode", 32, 24),
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `rows` in the results file."""

    shape: str
    phase: Phase
    batch: int
    tokens_per_request: int
    variant: Variant
    ratio_median: float
    """Variant over unguarded throughput, the two of a round compared."""
    ratio_low: float
    ratio_high: float
    """Interval that holds the true median with at least `CONFIDENCE` (if it can)."""
    runs: int
    baseline_tokens_per_s: float
    """Median of the unguarded engine."""
    tokens_per_s: float
    monitor_share: float | None
    """The SAE's multiply-adds, encode and decode, over the forward pass's."""
    aim: float | None
    """Least `ratio_median` that was aimed at; None where nothing was."""
    met: bool | None


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return order statistics between which the median lies with `CONFIDENCE`.

    The median is below the k-th smallest of n values with the probability that fewer
    than k of n fair coins show heads. Few values give their whole range.
    """
    ordered, n = sorted(values), len(values)
    outside, cut = 2 * 0.5**n, 0
    while cut + 1 < n / 2:
        outside += 2 * math.comb(n, cut + 1) * 0.5**n
        if outside > 1 - CONFIDENCE:
            break
        cut += 1
    return ordered[cut], ordered[n - 1 - cut]


def find_aim(shape: Shape, case: Case, variant: Variant) -> float | None:
    """Return the throughput a variant should keep, relative to the unguarded one's."""
    if shape.load_format != "dummy":
        return None  # the organism is reported; its steps are too short for an aim
    if variant == "clamp":
        return CLAMP_AIM
    if variant == "monitor":
        return 1 / (1 + MONITOR_AIM * find_share(shape, case))
    return None


def find_share(shape: Shape, case: Case) -> float:
    """Return the SAE's multiply-adds over the forward pass's in a case."""
    return shape.monitor_share(case.tokens if case.phase == "prefill" else None)


def make_row(
    shape: Shape,
    case: Case,
    variant: Variant,
    *,
    baseline: Sequence[Timing],
    timings: Sequence[Timing],
) -> Row:
    """Compare a variant with the unguarded engine, round by round."""
    ratios = [
        plain.seconds / timing.seconds
        for plain, timing in zip(baseline, timings, strict=True)
    ]
    median, (low, high) = statistics.median(ratios), median_interval(ratios)
    tokens = case.batch * case.tokens
    aim = find_aim(shape, case, variant)
    return Row(
        shape=shape.name,
        phase=case.phase,
        batch=case.batch,
        tokens_per_request=case.tokens,
        variant=variant,
        ratio_median=round(median, 4),
        ratio_low=round(low, 4),
        ratio_high=round(high, 4),
        runs=len(ratios),
        baseline_tokens_per_s=_throughput(tokens, baseline),
        tokens_per_s=_throughput(tokens, timings),
        monitor_share=(
            round(find_share(shape, case), 5) if variant == "monitor" else None
        ),
        aim=None if aim is None else round(aim, 4),
        met=None if aim is None else median >= aim,
    )


def _throughput(tokens: int, timings: Sequence[Timing]) -> float:
    return round(tokens / statistics.median(t.seconds for t in timings), 1)


def measure_shape(
    shape: Shape,
    cases: Sequence[Case],
    *,
    rounds: int,
    progress: Progress,
    side_by_side: bool = False,
) -> list[Row]:
    """Start every variant of a shape and let them take turns.

    Args:
        shape: What to run.
        cases: What is timed.
        rounds: How often.
        progress: Is told.
        side_by_side: Whether engines start all at once, where there is room for that.

    Raises:
        SubjectError: A variant did not start, or did not do what it is for.
    """
    total = len(_ENGINES) + len(cases) * (rounds + 1)
    bar = progress.add_task(shape.name, total=total)
    rows = []
    starting = start_engines(
        shape, cases, progress=progress, bar=bar, side_by_side=side_by_side
    )
    with starting as engines:
        for case in cases:
            progress.update(
                bar, description=f"{shape.name} {case.phase} batch {case.batch}"
            )
            timings: dict[Variant, list[Timing]] = {}
            for number in range(rounds + 1):
                for variant, timing in take_turns(engines, case):
                    if number:  # the first round only warms up
                        timings.setdefault(variant, []).append(timing)
                progress.advance(bar)
            rows += [
                make_row(
                    shape,
                    case,
                    variant,
                    baseline=timings["unguarded"],
                    timings=timings[variant],
                )
                for variant in _VARIANTS
            ]
    return rows


@contextlib.contextmanager
def start_engines(
    shape: Shape,
    cases: Sequence[Case],
    *,
    progress: Progress,
    bar: Any,
    side_by_side: bool,
) -> Iterator[dict[Variant, Subject]]:
    """Start the engines; all of them end with the context."""
    longest = max(case.tokens for case in cases) + 1
    batch = max(case.batch for case in cases)
    with contextlib.ExitStack() as stack:
        engines: dict[Variant, Subject] = {}
        for variant in _ENGINES:
            progress.update(bar, description=f"{shape.name}: starting {variant}")
            subject = Subject(shape, variant, max_length=longest, max_batch=batch)
            engines[variant] = stack.enter_context(subject)
            if not side_by_side:
                subject.wait_until_ready()
                progress.advance(bar)
        for subject in engines.values() if side_by_side else ():
            subject.wait_until_ready()
            progress.advance(bar)
        yield engines


def take_turns(
    engines: dict[Variant, Subject], case: Case
) -> Iterator[tuple[Variant, Timing]]:
    """Let every variant do a case once, the unguarded one first."""
    for variant in ("unguarded", *_VARIANTS):
        engine = engines["clamp" if variant == "idle" else variant]
        policy = {"idle": IDLE_POLICY, "clamp": "default", "monitor": "default"}
        task = replace(case.task, policy=policy.get(variant))
        yield variant, engine.run(task)


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Show the results as a table."""
    table = Table("shape", "phase", "batch", "variant", "ratio", "interval", "aim")
    for row in rows:
        aim = "" if row.aim is None else f"{row.aim:.3f}"
        table.add_row(
            row.shape,
            row.phase,
            str(row.batch),
            row.variant,
            f"{row.ratio_median:.3f}",
            f"{row.ratio_low:.3f} to {row.ratio_high:.3f}",
            aim and f"{aim} {'met' if row.met else 'missed'}",
        )
    console.print(table)


def main(
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs per case.")] = 5,
    shape: Annotated[list[str] | None, typer.Option(help="Only these shapes.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke test; prints, writes nothing.")
    ] = False,
) -> None:
    """Measure the guard's cost on the organism and on Qwen2.5-0.5B's shape."""
    # Ctrl-C unwinds by itself; a SIGTERM must too, or stopped engines stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True)
    unknown = set(shape or ()) - set(_CASES)
    if unknown:
        message = f"Unknown shape {unknown.pop()!r}; expected {' or '.join(_CASES)}."
        raise typer.BadParameter(message)
    about = describe_run()  # before the machine is busy with us
    rows: list[Row] = []
    shapes: dict[str, dict[str, Any]] = {}
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=console) as progress,
    ):
        for name in shape or _CASES:
            at = Path(folder) / name
            at.mkdir()
            made = (make_organism_shape if name == "organism" else make_dummy_shape)(at)
            cases = _CASES[name]
            if quick:
                cases = tuple(replace(c, tokens=8) for c in cases if c.batch <= 8)
            try:
                rows += measure_shape(
                    made, cases, rounds=1 if quick else rounds, progress=progress
                )
            except SubjectError as error:
                console.print(f"error: {error}", markup=False)
                raise typer.Exit(1) from error
            shapes[name] = describe_shape(made)
    print_rows(rows, console)
    if not quick:
        result = about | {"shapes": shapes, "rows": [asdict(row) for row in rows]}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {output}")


def describe_shape(shape: Shape) -> dict[str, Any]:
    """Return what the results file says of a shape."""
    return {
        "about": shape.about,
        "dtype": shape.dtype,
        "hook_point": shape.hook_point,
        "clamped_latents": len(shape.latents),
        "layer_madds": shape.layer_madds,
        "head_madds": shape.head_madds,
        "monitor_madds": shape.monitor_madds,
    }


if __name__ == "__main__":
    typer.run(main)
