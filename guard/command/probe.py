"""`guard probe train`: probes from labelled prompts, judged on topics never seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from guard.errors import CalibrationError, PromptError
from guard.probe import (
    Example,
    ProbeRecipe,
    judge_probe,
    load_probe,
    save_probe,
    train_probe,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from guard.policy import Monitor, Policy
    from guard.prompt import Prompt
    from guard.recording import Reader, Recording
    from guard.score import Statistics
    from guard.traffic import Recorder

__all__ = ["FOLDS", "list_probes", "load_probes", "make_probes", "train_all"]

FOLDS = 4
"""Parts of the groups; each is judged by a probe that was trained on the others."""


def make_probes(
    reader: Reader,
    prompts: Sequence[Prompt],
    *,
    names: Sequence[str] = (),
    start: Callable[[], Recorder],
    console: Console,
    recipe: ProbeRecipe | None = None,
) -> None:
    """Train probes that a policy names, judge them, and write them.

    Args:
        reader: Of the policy.
        prompts: With labels and groups.
        names: Of the monitors whose probes are trained; all, if left out.
        start: Starts the engine, once it is known that the prompts will do.
        console: Where progress and result are shown.
        recipe: How probes are trained.

    Raises:
        PromptError: A prompt has no label or group.
        CalibrationError: The policy names no probe, or none of that name, or the groups
            are too few.
    """
    monitors = _choose(list_probes(reader.policy), names)
    for number, prompt in enumerate(prompts, start=1):
        if prompt.label is None or prompt.group is None:
            message = f"Prompt {number} has no label or no group; expected both."
            raise PromptError(message)
    recipe = recipe or ProbeRecipe()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Recording", total=len(prompts))
        recordings = []
        for recording in start().record(prompts):
            recordings.append(recording)
            progress.advance(task)
        steps = len(monitors) * (FOLDS + 1) * recipe.steps
        task = progress.add_task("Training", total=steps)
        judged = train_all(
            reader,
            monitors,
            prompts,
            recordings,
            recipe,
            on_step=lambda: progress.advance(task),
        )
    table = Table(title="Probes, on groups they were not trained on")
    for column in ("monitor", "groups", "AUROC", "caught at 1 % false alarms", "file"):
        table.add_column(column)
    for monitor in monitors:
        found = judged[monitor.name]
        numbers = f"{found['auroc']:.3f}", f"{found['tpr_at_1pct']:.2f}"
        groups = f"{found['groups']:.0f}"
        table.add_row(monitor.name, groups, *numbers, str(monitor.probe))
    console.print(table)


def _choose(monitors: Sequence[Monitor], names: Sequence[str]) -> list[Monitor]:
    """Return the monitors of these names, or all of them.

    Raises:
        CalibrationError: There is none, or none of a name.
    """
    if not monitors:
        message = "The policy names no probe; expected a monitor with score: probe."
        raise CalibrationError(message)
    known = [monitor.name for monitor in monitors]
    if unknown := [name for name in names if name not in known]:
        message = (
            f"Monitor {unknown[0]!r} watches no probe of the policy; expected one of "
            f"{', '.join(known)}."
        )
        raise CalibrationError(message)
    return [monitor for monitor in monitors if not names or monitor.name in names]


def list_probes(policy: Policy) -> list[Monitor]:
    """Return the monitors of a policy that watch a probe."""
    return [monitor for monitor in policy.monitors if monitor.score == "probe"]


def load_probes(policy: Policy) -> dict[str, Statistics]:
    """Read the probes of a policy, by name of the monitor.

    Raises:
        CalibrationError: One is missing or damaged.
    """
    found: dict[str, Statistics] = {}
    for monitor in list_probes(policy):
        assert monitor.probe is not None
        found[monitor.name] = load_probe(monitor.probe)[0]
    return found


def train_all(
    reader: Reader,
    monitors: Sequence[Monitor],
    prompts: Sequence[Prompt],
    recordings: Sequence[Recording],
    recipe: ProbeRecipe,
    *,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Train, judge and write the probes of some monitors on recorded requests.

    Returns:
        What `judge_probe` says of each, by name of the monitor.
    """
    found = {}
    for monitor in monitors:
        at = reader.hook_point(monitor)
        examples = [
            Example.of(
                recording, monitor, at, int(prompt.label or 0), str(prompt.group)
            )
            for recording, prompt in zip(recordings, prompts, strict=True)
        ]
        judged = judge_probe(examples, monitor, recipe, folds=FOLDS, on_step=on_step)
        statistics = train_probe(examples, recipe, drift=monitor.drift, on_step=on_step)
        about = {
            "judged": judged,
            "hook_point": at,
            "stage": monitor.stage,
            "recipe": recipe._asdict(),
        }
        assert monitor.probe is not None
        save_probe(monitor.probe, statistics, about)
        found[monitor.name] = judged
    return found
