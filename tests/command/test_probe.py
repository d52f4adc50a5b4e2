"""`guard probe train` without an engine."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from specimens import AT, draw_rows, make_monitor, make_policy_file

from guard.command.probe import load_probes, make_probes
from guard.errors import CalibrationError, PromptError
from guard.policy import Policy
from guard.probe import ProbeRecipe, load_probe, train_probe
from guard.prompt import Prompt
from guard.recording import Reader, Recording

QUICK = ProbeRecipe(hidden=8, steps=40, batch_size=64)


class Recorder:
    """Shows a direction in the answers to prompts that say so."""

    def record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
        for number, prompt in enumerate(prompts):
            rows = draw_rows(10, seed=number)
            rows[4:] += 5.0 * int(prompt.label or 0) * torch.eye(12)[3]
            yield Recording({AT: rows}, 4, 11)


def make_prompts(groups: int = 12) -> list[Prompt]:
    return [
        Prompt(prompt="x", label=i % groups % 2, group=f"g{i % groups}")
        for i in range(3 * groups)
    ]


def make_reader(folder: Path, *stages: str | None) -> Reader:
    monitors = tuple(
        make_monitor(
            f"m{i}",
            score="probe",
            hook_point=AT,
            probe=str(folder / f"m{i}"),
            stage=stage,
        )
        for i, stage in enumerate(stages)
    )
    policy_file = make_policy_file({"p": Policy(monitors=monitors)}, saes={"a": AT})
    return Reader(policy_file, "p", {})


def make(
    folder: Path, prompts: Sequence[Prompt], *stages: str | None
) -> tuple[Reader, str]:
    reader = make_reader(folder, *stages)
    console = Console(file=io.StringIO(), width=200)
    make_probes(reader, prompts, start=Recorder, console=console, recipe=QUICK)
    assert isinstance(console.file, io.StringIO)
    return reader, console.file.getvalue()


def test_every_probe_of_a_policy_is_trained_judged_and_written(tmp_path: Path) -> None:
    reader, shown = make(tmp_path, make_prompts(), "prompt", "output", None)
    judged = []
    for monitor in reader.policy.monitors:
        assert monitor.probe is not None
        _, about = load_probe(monitor.probe)
        assert (about["hook_point"], about["stage"]) == (AT, monitor.stage)
        assert ProbeRecipe(**about["recipe"]) == QUICK
        assert str(monitor.probe) in shown
        judged.append(about["judged"]["auroc"])
        assert f"{judged[-1]:.3f}" in shown
    # Nothing shows in the prompts.
    assert judged[0] < 0.85
    assert judged[1] > 0.95
    assert load_probes(reader.policy).keys() == {"m0", "m1", "m2"}


def test_what_is_written_was_trained_on_all_groups(tmp_path: Path) -> None:
    prompts = make_prompts()
    reader, _ = make(tmp_path, prompts, "output")
    found = load_probes(reader.policy)["m0"]
    recordings = list(Recorder().record(prompts))
    from guard.probe import Example

    (monitor,) = reader.policy.monitors
    examples = [
        Example.of(r, monitor, AT, int(p.label or 0), str(p.group))
        for r, p in zip(recordings, prompts, strict=True)
    ]
    expected = train_probe(examples, QUICK)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_probe_is_trained_by_itself_and_the_others_stay(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    make_probes(
        make_reader(tmp_path, "output", "output"),
        make_prompts(),
        names=["m1"],
        start=Recorder,
        console=console,
        recipe=QUICK,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["m1"]


def test_a_monitor_that_watches_no_probe_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="'m7' watches no probe"):
        make_probes(
            make_reader(tmp_path, None, None),
            make_prompts(),
            names=["m7"],
            start=fail,
            console=Console(),
        )


def fail() -> Recorder:
    raise AssertionError("the engine was started")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"label": None}, "Prompt 3 has no label"), ({"group": None}, "or no group")],
)
def test_prompts_without_labels_or_groups_are_refused_before_an_engine_starts(
    tmp_path: Path, change: dict[str, None], words: str
) -> None:
    prompts = make_prompts()
    prompts[2] = prompts[2].model_copy(update=change)
    with pytest.raises(PromptError, match=words):
        make_probes(make_reader(tmp_path, None), prompts, start=fail, console=Console())


def test_a_policy_without_probes_has_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="names no probe; expected a monitor"):
        make_probes(
            make_reader(tmp_path), make_prompts(), start=fail, console=Console()
        )


def test_too_few_groups_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="too few to judge a probe"):
        make(tmp_path, make_prompts(6), "output")
    assert list(tmp_path.iterdir()) == []
