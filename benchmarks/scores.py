"""What each score costs inside the op, and on a GPU what a captured graph makes of it.

One call of the guard at one hook point, on random tensors of a model's width: without
monitors, with the plain one (the norm of the SAE's error), and with each score beside
it. Variants take turns, round by round. On a GPU the calls are replays of a captured
CUDA graph, and it is checked that a replay obeys a row map written after the capture.
Writes `scores` into overhead.json, or a file of its own for another device.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from guard.calibration import Calibration, Entry
from guard.hook import HookPoint
from guard.monitor import list_columns
from guard.pipeline import Guard, StepBuffers, build_guards
from guard.policy import PolicyFile
from guard.provenance import ROOT, describe_run
from guard.sae.config import SaeConfig
from guard.sae.load import build_sae
from guard.score import SCORES, Activations, Statistics

RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
AT = "layers.0.resid_post"
PLAIN = "error_norm"
"""The monitor that all others are compared with."""
CLAMPED = 32
HIDDEN = 128
"""Width of the probe's hidden layer, as it is trained by default."""
WIDTHS = {"qwen2.5-0.5b": 896, "8b": 4096}
"""Of the stream; an SAE has 16 times as many latents, at the larger width 8 times."""
_CALLS, _CALLS_ON_CPU = 20, 5
"""Calls that are timed together."""


@dataclass(frozen=True, slots=True)
class Row:
    """One score beside the plain monitor, at one number of token rows."""

    device: str
    shape: str
    d_sae: int
    rows: int
    score: str
    """`none` is the clamp alone."""
    captured: bool
    """Whether the calls were replays of a CUDA graph."""
    microseconds: float
    """Of one call, median."""
    ratio_median: float
    """Against the plain monitor, of the same round; below 1 is cheaper."""
    ratio_low: float
    ratio_high: float


def make_statistics(score: str, d_model: int) -> Statistics:
    """Return statistics of the right shapes; their values cost the same as any."""
    if score == "probe":
        return {
            "weight": torch.zeros(d_model),
            "inward": torch.zeros(d_model, HIDDEN),
            "bias": torch.zeros(HIDDEN),
            "outward": torch.zeros(HIDDEN),
            "offset": torch.zeros(()),
        }
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, d_model, generator=generator)
    return SCORES[score].fit(Activations(rows, rows.roll(1, 0), rows[:, 0]))


def make_guard(
    scores: list[str], *, d_model: int, d_sae: int, max_tokens: int, device: str
) -> Guard:
    """Build a guard that clamps, and watches the given scores."""
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(d_sae, d_model, generator=generator)
    decoder = torch.nn.functional.normalize(decoder, dim=1)
    config = SaeConfig(
        architecture="jumprelu", d_model=d_model, d_sae=d_sae, hook_point=AT
    )
    # Some fifty latents are active on a row of unit variance, and half of the clamped.
    threshold = torch.full((d_sae,), 2.7)
    threshold[:CLAMPED] = 0.0
    tensors = {
        "W_enc": decoder.T.contiguous(),
        "b_enc": torch.zeros(d_sae),
        "W_dec": decoder,
        "b_dec": torch.zeros(d_model),
        "threshold": threshold,
    }
    monitors = [
        {
            "name": score,
            "score": score,
            "calibration": "c",
            "target_fpr": 0.01,
            "on_alarm": "flag",
            **({"sae": "s"} if SCORES[score].needs_sae else {"hook_point": AT}),
            **({"probe": "p"} if score == "probe" else {}),
        }
        for score in scores
    ]
    clamp = {"name": "c", "sae": "s", "latents": list(range(CLAMPED)), "law": "ablate"}
    source = {"path": "s", "format": "guard", "hook_point": AT, "sha256": "0" * 64}
    policy_file = PolicyFile.model_validate(
        {
            "version": 1,
            "saes": {"s": source},
            "policies": {"default": {"clamps": [clamp], "monitors": monitors}},
            "default_policy": "default",
        }
    )
    entries = {s: Entry(s, AT, None, 1, make_statistics(s, d_model)) for s in scores}
    calibration = Calibration(entries, (1,), (), (), {})
    step = StepBuffers(
        max_tokens=max_tokens,
        max_requests=8,
        num_columns=len(list_columns(policy_file)),
    )
    guards = build_guards(
        policy_file,
        {"s": build_sae(config, tensors)},
        {"c": calibration},
        step,
    )
    (guard,) = guards.values()
    assert guard.hook_point == HookPoint.parse(AT)
    guard.to(device)
    step.to(device)
    return guard


@torch.inference_mode()
def make_call(guard: Guard, rows: int, *, device: str) -> Callable[[], object]:
    """Return one call of a guard on `rows` token rows; on a GPU a replayed graph."""
    generator = torch.Generator().manual_seed(1)
    d_model = guard.dictionaries[0].sae.d_model
    stream = torch.randn(rows, d_model, generator=generator)
    stream = stream.to(device, torch.bfloat16)
    residual = torch.zeros_like(stream)
    guard.step.clear()
    guard.step.rows_in[:rows, 0] = 1
    guard.step.rows_in[:rows, 1] = 1

    @torch.inference_mode()
    def call() -> None:
        guard(stream, residual)

    call()
    if device == "cpu":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    check_replay(guard, graph, stream)

    # What the graph reads and writes must live as long as it does.
    return partial(_replay, graph, (guard, stream, residual))


def _replay(graph: Any, _alive: object) -> None:
    graph.replay()


@torch.inference_mode()
def check_replay(guard: Guard, graph: Any, stream: torch.Tensor) -> None:
    """Check that a replay reads the row map and the stream of now, not of the capture.

    Raises:
        RuntimeError: It does not do what an eager call does.
    """
    generator = torch.Generator().manual_seed(2)
    fresh = torch.randn(stream.shape, generator=generator).to(stream)
    slots = (torch.arange(len(stream)) % 2).to(stream.device)

    def run(act: Callable[[], object]) -> tuple[torch.Tensor, torch.Tensor]:
        guard.step.clear()
        guard.step.rows_in[: len(stream), 0] = slots
        guard.step.rows_in[: len(stream), 1] = 1
        stream.copy_(fresh)
        act()
        return stream.clone(), guard.step.readings[: len(stream)].clone()

    eager = run(lambda: guard(stream, torch.zeros_like(stream)))
    replayed = run(graph.replay)
    torch.cuda.synchronize()
    same = all(map(torch.equal, eager, replayed))
    untouched = torch.equal(replayed[0][slots == 0], fresh[slots == 0])
    clamped = not torch.equal(replayed[0][slots == 1], fresh[slots == 1])
    if not (same and untouched and (clamped or len(stream) == 1)):
        message = f"A replay differs: {same=}, {untouched=}, {clamped=}."
        raise RuntimeError(message)


@torch.inference_mode()
def check_device(*, device: str) -> None:
    """Check that a guard on a GPU says what it says on the CPU.

    Raises:
        RuntimeError: A stream or a score is further off than rounding explains.
    """
    found = {}
    for place in ("cpu", device):
        guard = make_guard(
            list(SCORES), d_model=256, d_sae=2048, max_tokens=64, device=place
        )
        make_call(guard, 64, device="cpu" if place == "cpu" else device)
        generator = torch.Generator().manual_seed(3)
        stream = torch.randn(64, 256, generator=generator).to(place)
        guard.step.clear()
        guard.step.rows_in[:64, :2] = 1
        guard(stream, None)
        found[place] = stream.cpu(), guard.step.scores[:64].cpu()
    for ours, theirs in zip(*found.values(), strict=True):
        gap = ((ours - theirs).abs() / (1 + ours.abs())).max()
        if not gap < 1e-2:
            message = f"The device is off by {gap:.3g} from the CPU."
            raise RuntimeError(message)
        typer.echo(f"largest relative gap to the CPU: {gap:.3g}")


def time_call(call: Callable[[], object], *, device: str) -> float:
    """Return the microseconds of one call, over several in a row."""
    if device != "cpu":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / _CALLS
    begin = time.perf_counter()
    for _ in range(_CALLS_ON_CPU):
        call()
    return (time.perf_counter() - begin) * 1e6 / _CALLS_ON_CPU


def measure(
    shape: str, rows: int, *, device: str, rounds: int, factor: int
) -> list[Row]:
    """Time every score at one shape and number of rows."""
    d_model = WIDTHS[shape]
    d_sae = factor * d_model
    variants = {"none": [], PLAIN: [PLAIN], "density alone": ["density"]}
    variants |= {"probe alone": ["probe"]}
    variants |= {s: [PLAIN, s] for s in SCORES if s != PLAIN}
    variants |= {"all": list(SCORES)}
    calls = {}
    for name, scores in variants.items():
        guard = make_guard(
            scores, d_model=d_model, d_sae=d_sae, max_tokens=rows, device=device
        )
        calls[name] = make_call(guard, rows, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_call(call, device=device))
    found = []
    for name, taken in times.items():
        ratios = sorted(a / b for a, b in zip(taken, times[PLAIN], strict=True))
        found.append(
            Row(
                device=device,
                shape=shape,
                d_sae=d_sae,
                rows=rows,
                score=name,
                captured=device != "cpu",
                microseconds=round(statistics.median(taken), 1),
                ratio_median=round(statistics.median(ratios), 3),
                ratio_low=round(ratios[0], 3),
                ratio_high=round(ratios[-1], 3),
            )
        )
    return found


def main(
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 9,
    shape: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure every score, and keep what else the results file holds."""
    about = describe_run()
    if device == "cuda":
        about["machine"]["gpu"] = torch.cuda.get_device_name()
        check_device(device=device)
    rows: list[Row] = []
    for name in shape or (["qwen2.5-0.5b"] if device == "cpu" else list(WIDTHS)):
        for count in (1, 8, 32, 512) if device == "cpu" else (1, 8, 32, 512, 2048):
            rows += measure(
                name,
                count,
                device=device,
                rounds=rounds,
                factor=16 if name != "8b" else 8,
            )
            for row in rows[-9:]:
                typer.echo(f"{name} {count}: {row.score} {row.microseconds} us")
    known = json.loads(output.read_text(encoding="utf-8")) if output.exists() else about
    known["scores"] = {**about, "rows": [asdict(row) for row in rows]}
    output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
