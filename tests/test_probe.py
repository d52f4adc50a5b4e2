"""Probes: what they learn, on whom they are judged, and their files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from specimens import AT, D_MODEL, draw_probe, draw_rows, make_monitor
from torch import Tensor

from guard.errors import CalibrationError
from guard.policy import Monitor
from guard.probe import (
    Example,
    ProbeRecipe,
    auroc,
    judge_probe,
    load_probe,
    save_probe,
    tpr_at_fpr,
    train_probe,
)
from guard.recording import Recording
from guard.score import Activations, probe

QUICK = ProbeRecipe(hidden=16, steps=150, batch_size=128)
EAGER = QUICK._replace(steps=600, noise=0.0, dropout=0.0, weight_decay=0.0)
"""What would learn anything by heart."""

EVEN = math.log(2)
"""What a probe reads where both labels are as likely."""


def watch_probe(**values: Any) -> Monitor:
    return make_monitor(score="probe", hook_point=AT, probe="x", **values)


def draw_examples(
    groups: int, *, each: int = 4, told_by: str, seed: int = 0
) -> list[Example]:
    """Return labelled requests of as many groups, half of them with label 1.

    Args:
        groups: How many.
        each: Requests of a group.
        told_by: What gives a label away: the `behaviour`, a direction that all
            requests with label 1 share, or the `group` alone.
        seed: Of the rows.
    """
    shown = 4.0 * torch.nn.functional.normalize(draw_rows(1, seed=seed + 70)[0], dim=0)
    topics = 6.0 * torch.nn.functional.normalize(draw_rows(groups, seed=seed + 71))
    examples = []
    for number in range(groups * each):
        group, label = number % groups, number % groups % 2
        rows = draw_rows(6, seed=1000 * seed + number) + topics[group]
        if told_by == "behaviour":
            rows = rows + label * shown
        examples.append(Example(rows, label, f"g{group}"))
    return examples


def show(statistics: dict[str, Tensor], examples: Sequence[Example]) -> list[Tensor]:
    """Return the scores of those with label 0, and of those with label 1."""
    found: list[list[Tensor]] = [[], []]
    for example in examples:
        found[example.label].append(probe(Activations(example.resid), statistics))
    return [torch.cat(scores) for scores in found]


def test_a_probe_learns_what_tells_the_labels_apart() -> None:
    examples = draw_examples(20, told_by="behaviour")
    statistics = train_probe(examples, QUICK)
    hides, shows = show(statistics, draw_examples(20, told_by="behaviour"))
    assert auroc(shows, hides) > 0.95
    assert hides.mean() < EVEN < shows.mean()


def test_a_probe_learns_what_no_linear_one_could() -> None:
    # Label 1 lies on both sides of label 0.
    examples = [
        Example(
            draw_rows(8, seed=seed)
            + torch.eye(D_MODEL)[0] * (0 if seed % 2 else 8) * (1 if seed % 4 else -1),
            (seed + 1) % 2,
            f"{seed}",
        )
        for seed in range(60)
    ]
    statistics = train_probe(examples, EAGER._replace(hidden=32))
    hides, shows = show(statistics, examples)
    assert auroc(shows, hides) > 0.98
    linear = {**statistics, "outward": torch.zeros(32)}
    assert 0.3 < auroc(*show(linear, examples)[::-1]) < 0.7


def test_the_standardisation_is_part_of_the_weights() -> None:
    examples = draw_examples(8, told_by="behaviour")
    size = torch.logspace(-3, 3, D_MODEL)
    moved = [Example(1e2 * size + e.resid * size, e.label, e.group) for e in examples]
    one, other = train_probe(examples, QUICK), train_probe(moved, QUICK)
    for before, after in zip(examples, moved, strict=True):
        torch.testing.assert_close(
            probe(Activations(after.resid.double()), _double(other)).float(),
            probe(Activations(before.resid), one),
            rtol=0.05,
            atol=0.05,
        )


def _double(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in statistics.items()}


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    examples = draw_examples(8, told_by="behaviour")
    one, same, other = (train_probe(examples, QUICK, seed=seed) for seed in (3, 3, 4))
    assert {name: tuple(value.shape) for name, value in one.items()} == {
        name: tuple(value.shape) for name, value in draw_probe(hidden=16).items()
    }
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["weight"], other["weight"])
    assert not any(value.requires_grad for value in one.values())


def test_training_does_not_touch_the_generator_of_others() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train_probe(draw_examples(4, told_by="behaviour"), QUICK._replace(steps=3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_rare_label_weighs_as_much_as_the_other() -> None:
    examples = draw_examples(20, told_by="behaviour")
    rare = [e for i, e in enumerate(examples) if e.label == 0 or i < 12]
    assert 4 * sum(e.label for e in rare) < len(rare)
    hides, shows = show(train_probe(rare, QUICK), examples)
    assert hides.mean() < EVEN < shows.mean()


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_alone_is_refused(label: int) -> None:
    examples = [e for e in draw_examples(8, told_by="behaviour") if e.label == label]
    with pytest.raises(CalibrationError, match="have one label; expected some of each"):
        train_probe(examples, QUICK)


def test_the_bar_of_progress_moves_once_a_step() -> None:
    steps: list[None] = []
    examples = draw_examples(8, told_by="behaviour")
    recipe = QUICK._replace(steps=7)
    train_probe(examples, recipe, on_step=lambda: steps.append(None))
    assert len(steps) == 7
    monitor = watch_probe()
    judge_probe(examples, monitor, recipe, folds=4, on_step=lambda: steps.append(None))
    assert len(steps) == 5 * 7


@pytest.mark.parametrize("way", [{"window": 3}, {"drift": 0.7}])
def test_a_probe_is_judged_on_groups_it_never_saw(way: dict[str, Any]) -> None:
    examples = draw_examples(24, told_by="behaviour")
    found = judge_probe(examples, watch_probe(**way), QUICK)
    assert found["groups"] == 24
    assert found["auroc"] > 0.75
    assert 0 <= found["tpr_at_1pct"] <= 1


def test_a_probe_that_knows_groups_by_heart_shows_nothing_on_others() -> None:
    examples = draw_examples(24, told_by="group")
    hides, shows = show(train_probe(examples, EAGER), examples)
    assert auroc(shows, hides) > 0.95
    found = judge_probe(examples, watch_probe(), EAGER)
    assert 0.2 < found["auroc"] < 0.8


def relabel(examples: Sequence[Example], labels: dict[str, int]) -> list[Example]:
    return [e._replace(label=labels.get(e.group, e.label)) for e in examples]


@pytest.mark.parametrize(
    ("groups", "labels"),
    [
        (6, {}),
        (8, {"g1": 0}),
        (8, {"g0": 1}),
        (9, {f"g{i}": 1 for i in range(1, 9)}),
        (8, {f"g{i}": 1 for i in range(8)}),
        (8, {f"g{i}": 0 for i in range(8)}),
    ],
)
def test_too_few_groups_of_a_label_are_refused(
    groups: int, labels: dict[str, int]
) -> None:
    examples = relabel(draw_examples(groups, told_by="behaviour"), labels)
    with pytest.raises(CalibrationError, match=r"too few to judge .* expected 4 at"):
        judge_probe(examples, watch_probe(), QUICK._replace(steps=1))


def test_a_group_may_hold_both_labels() -> None:
    examples = draw_examples(8, told_by="behaviour")
    mixed = [e._replace(group=f"g{i % 4}") for i, e in enumerate(examples)]
    mixed = [e._replace(label=i // 4 % 2) for i, e in enumerate(mixed)]
    found = judge_probe(mixed, watch_probe(), QUICK._replace(steps=1))
    assert found["groups"] == 4


@pytest.mark.parametrize(
    ("stage", "rows"),
    [(None, slice(None)), ("prompt", slice(4)), ("output", slice(4, None))],
)
def test_an_example_holds_the_rows_of_the_stage(stage: str | None, rows: slice) -> None:
    resid = draw_rows(9, seed=0).bfloat16()
    recording = Recording({AT: resid, "other": resid[:0]}, 4, 10)
    example = Example.of(recording, watch_probe(stage=stage), AT, 1, "g")
    assert torch.equal(example.resid, resid[rows].float())
    assert (example.label, example.group) == (1, "g")


NUMBERS = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@given(positive=NUMBERS, negative=NUMBERS, fpr=st.sampled_from([0.01, 0.1, 0.5]))
def test_areas_and_rates_are_those_of_counting(
    positive: list[int], negative: list[int], fpr: float
) -> None:
    shows, hides = torch.tensor(positive), torch.tensor(negative)
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    found = auroc(shows.float(), hides.float())
    assert found == pytest.approx(sum(pairs) / len(pairs))
    # The lowest bar that no more than this share of the negatives is above.
    most = fpr * (len(negative) - 1)
    bars = [bar for bar in negative if sum(n > bar for n in negative) <= most]
    caught = sum(p > min(bars) for p in positive) / len(positive)
    assert tpr_at_fpr(shows.float(), hides.float(), fpr) == pytest.approx(caught)


def test_a_probe_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "probe"
    statistics = draw_probe()
    save_probe(path, statistics, {"judged": {"auroc": 0.9}, "stage": None})
    loaded, about = load_probe(path)
    assert about == {"judged": {"auroc": 0.9}, "stage": None}
    assert loaded.keys() == statistics.keys()
    assert all(torch.equal(loaded[name], statistics[name]) for name in loaded)


@pytest.mark.parametrize(
    ("about", "dropped"),
    [
        ("not json", None),
        ("[]", None),
        ('"text"', None),
        ("{}", None),
        ('{"format": 2}', None),
        ('{"format": 1}', "weight"),
    ],
)
def test_a_damaged_probe_is_one_clear_line(
    tmp_path: Path, about: str, dropped: str | None
) -> None:
    tensors = {name: v for name, v in draw_probe().items() if name != dropped}
    path = tmp_path / "probe"
    save_file(tensors, path, metadata={"guard": about})
    with pytest.raises(CalibrationError) as caught:
        load_probe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_probe_at_all_is_one_clear_line(tmp_path: Path) -> None:
    save_probe(tmp_path / "whole", draw_probe(), {})
    save_file(load_file(tmp_path / "whole"), tmp_path / "bare")
    (tmp_path / "text").write_text(json.dumps({"format": 1}))
    (tmp_path / "empty").touch()
    for name in ("bare", "text", "empty", ""):
        with pytest.raises(CalibrationError, match="not a probe that `guard probe tr"):
            load_probe(tmp_path / name)
    with pytest.raises(CalibrationError, match="no such probe; `guard probe train`"):
        load_probe(tmp_path / "missing")


def test_a_request_without_rows_reads_as_none_at_all() -> None:
    examples = draw_examples(16, told_by="behaviour")
    some = [
        e._replace(resid=e.resid[:0]) if e.label == 0 and i % 3 else e
        for i, e in enumerate(examples)
    ]
    found = judge_probe(some, watch_probe(stage="output"), QUICK)
    assert found["auroc"] > 0.8
    assert not math.isnan(found["tpr_at_1pct"])
