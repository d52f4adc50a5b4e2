"""Recordings: what monitors make of them, and what is fitted on them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from specimens import (
    AT,
    draw_probe,
    draw_rows,
    fit_everything,
    make_entry,
    make_monitor,
    make_policy_file,
    make_sae,
    watch_everything,
)
from torch import Tensor

from guard.calibration import Calibration, Entry
from guard.errors import CalibrationError
from guard.monitor import column_of, list_columns
from guard.pipeline import StepBuffers, build_guards
from guard.policy import Policy
from guard.recording import Reader, Recording, fit_calibration, fit_entries
from guard.score import SCORES, Activations
from guard.watch import Watch

ENTRIES = {
    "far": Entry("density", AT, None, 1, {}),
    "unexplained": Entry("error_norm", AT, None, 1, {}),
}


def fit(
    *lengths_of_requests: int, lengths: tuple[int, ...] = (4, 8), sick: float = 0.0
) -> Calibration:
    """Fit on requests of given total lengths, whose maxima are those lengths."""
    requests = [
        (length, torch.tensor([float(length), sick - length]))
        for length in lengths_of_requests
    ]
    return fit_calibration(
        ENTRIES,
        reference=list(zip((3, 7) * 20, draw_rows(40, seed=0)[:, :2], strict=True)),
        held_out=requests,
        lengths=lengths,
        provenance={"model": "toy"},
    )


def test_a_bucket_keeps_the_maxima_of_the_requests_that_fall_into_it() -> None:
    calibration = fit(3, 4, 5, 1, 8)
    assert calibration.lengths == (4, 8)
    assert calibration.maxima[0].tolist() == [[3, -3], [4, -4], [1, -1]]
    assert calibration.maxima[1].tolist() == [[5, -5], [8, -8]]
    assert calibration.entries == ENTRIES
    assert calibration.provenance == {"model": "toy"}


def test_a_request_without_a_token_of_a_stage_is_kept() -> None:
    calibration = fit(3, 5, sick=-math.inf)
    assert calibration.maxima[0].tolist() == [[3, -math.inf]]


def test_fitting_refuses_what_it_cannot_promise_anything_for() -> None:
    with pytest.raises(CalibrationError, match=r"No held-out request falls into .* 8"):
        fit(3, 4)
    with pytest.raises(CalibrationError, match=r"has 9 tokens.*expected at most 8"):
        fit(3, 5, 9)
    for sick in (math.inf, math.nan):
        with pytest.raises(CalibrationError, match="not finite; expected numbers"):
            fit(3, 5, sick=sick)
    for lengths in ((), (4, 4), (8, 4)):
        with pytest.raises(CalibrationError, match="do not ascend; expected"):
            fit(3, 5, lengths=lengths)


def excess(column: Tensor) -> tuple[float, float]:
    """Return level and spread as the docstring says them, by sorting."""
    ranked = sorted(column.double().tolist())
    at = 0.9 * (len(ranked) - 1)
    low, high = ranked[int(at)], ranked[math.ceil(at)]
    level = low + (high - low) * (at - int(at))
    above = [value - level for value in ranked if value > level]
    return level, sum(above) / len(above)


def test_a_bucket_with_enough_requests_has_a_scale_of_its_own() -> None:
    rows = draw_rows(350, seed=5)[:, :2]
    lengths = [3] * 100 + [7] * 99 + [20] * 151
    calibration = fit_calibration(
        ENTRIES,
        reference=list(zip(lengths, rows, strict=True)),
        held_out=[(n, row) for n, row in zip((3, 7, 20), rows, strict=False)],
        lengths=(4, 8, 32),
        provenance={},
    )
    # 99 requests are too few: that bucket borrows from all.
    for scale, own in zip(
        calibration.scales, (rows[:100], rows, rows[199:]), strict=True
    ):
        for found, column in zip(scale, own.T, strict=True):
            assert found.tolist() == pytest.approx(excess(column), rel=1e-6)


def record(prompt: int, output: int, *, seed: int = 0) -> Recording:
    """Return a recording at the hook points of `watch_everything`."""
    return Recording(
        resid={
            f"layers.{layer}.resid_post": draw_rows(prompt + output, seed=seed + layer)
            for layer in (1, 3, 5)
        },
        prompt_length=prompt,
        total_length=prompt + output + 1,
    )


def test_a_reader_reads_what_the_engine_would() -> None:
    """The columns of the guards, and what a watch makes of them, are the twins."""
    policy_file, saes = watch_everything()
    calibrations = fit_everything(policy_file)
    reader = Reader(policy_file, "p", saes)
    columns = list_columns(policy_file)
    entries = calibrations["calibration"].entries
    recording = record(5, 6)
    step = StepBuffers(max_tokens=11, max_requests=1, num_columns=len(columns))
    bare = policy_file.model_copy(
        update={
            "policies": {
                **policy_file.policies,
                "p": reader.policy.model_copy(update={"mode": "observe"}),
            }
        }
    )
    guards = build_guards(bare, saes, calibrations, step)
    step.rows_in[:, 0] = 1
    for at, guard in guards.items():
        # Already clamped: only the monitors are run.
        guard.has_clamps = False
        guard(recording.resid[str(at)].clone(), None)
    numbers = [columns.index(column_of(policy_file, m)) for m in reader.policy.monitors]
    scores = reader.scores(
        {name: entry.statistics for name, entry in entries.items()}, recording
    )
    for monitor, number in zip(reader.policy.monitors, numbers, strict=True):
        torch.testing.assert_close(scores[monitor.name], step.scores[:, number])
    watch = Watch(
        bare.policies["p"],
        columns=numbers,
        thresholds=[1.0] * len(numbers),
        prompt_length=5,
    )
    watch.observe(0, step.scores.numpy(), np.zeros(11, np.int32))
    told = [reading.score for reading in watch.readings()]
    assert reader.maxima(entries, recording).tolist() == pytest.approx(told, rel=1e-5)


def test_a_reader_knows_its_places_and_saes() -> None:
    policy_file, saes = watch_everything()
    reader = Reader(policy_file, "p", saes)
    assert reader.hook_points == (AT, "layers.3.resid_post", "layers.5.resid_post")
    digests = {m.name: reader.sae_sha256(m) for m in reader.policy.monitors}
    a, b = (policy_file.saes[name].sha256 for name in "ab")
    assert digests == {
        "far": None,
        "odd": a,
        "apart": None,
        "content": None,
        "left": a,
        "late": b,
    }
    assert Reader(policy_file, "open", saes).hook_points == ()


def test_a_request_without_an_answer_has_no_maximum_there() -> None:
    policy_file, saes = watch_everything()
    entries = fit_everything(policy_file)["calibration"].entries
    maxima = Reader(policy_file, "p", saes).maxima(entries, record(4, 0))
    at = [monitor.stage for monitor in policy_file.policies["p"].monitors]
    assert [value == -math.inf for value in maxima] == [s == "output" for s in at]


def test_entries_are_fitted_on_every_row_of_every_request_but_sinks() -> None:
    policy_file, saes = watch_everything()
    recordings = [record(9, 30, seed=100 * seed) for seed in range(12)]
    # An attention sink, which would swamp a covariance.
    recordings[3].resid[AT][4] *= 1e6
    probes = {"content": draw_probe(seed=5)}
    reader = Reader(policy_file, "p", saes)
    entries = fit_entries(reader, recordings, probes)
    monitors = reader.policy.monitors
    assert list(entries) == [monitor.name for monitor in monitors]
    for monitor in monitors:
        entry = entries[monitor.name]
        expected = make_entry(policy_file, monitor, statistics=entry.statistics)
        assert entry == expected
        assert entry.statistics.keys() == _PARTS[monitor.score]
    assert all(
        torch.equal(entries["content"].statistics[name], value)
        for name, value in probes["content"].items()
    )
    rows = torch.cat([r.resid[AT] for r in recordings])
    rows = rows[rows.norm(dim=1) < 1e4]
    assert len(rows) == 12 * 39 - 1
    torch.testing.assert_close(entries["far"].statistics["mean"], rows.mean(0))
    error = rows - saes["a"].decode(saes["a"].encode(rows))
    for name, value in SCORES["error"].fit(Activations(rows, error)).items():
        if name not in ("basis", "up", "down"):  # up to signs
            torch.testing.assert_close(
                entries["odd"].statistics[name], value, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("stage", ["prompt", "last_prompt", "output"])
def test_a_stage_is_fitted_on_its_own_tokens(stage: str) -> None:
    monitor = make_monitor("m", score="density", hook_point=AT, sae=None, stage=stage)
    policy_file = make_policy_file({"p": Policy(monitors=(monitor,))}, saes={"a": AT})
    recordings = [record(9, 30, seed=100 * seed) for seed in range(12)]
    rows = {
        "prompt": slice(0, 9),
        "last_prompt": slice(8, 9),
        "output": slice(9, 39),
    }[stage]
    own = torch.cat([recording.resid[AT][rows] for recording in recordings])
    (entry,) = fit_entries(Reader(policy_file, "p", {}), recordings, {}).values()
    torch.testing.assert_close(entry.statistics["mean"], own.mean(0))


def test_an_entry_says_how_scores_were_put_together() -> None:
    ways: list[dict[str, Any]] = [{}, {"window": 3}, {"drift": 0.5}]
    monitors = tuple(make_monitor(f"m{i}", **way) for i, way in enumerate(ways))
    policy_file = make_policy_file({"p": Policy(monitors=monitors)}, saes={"a": AT})
    reader = Reader(policy_file, "p", {"a": make_sae("topk")})
    entries = fit_entries(reader, [record(9, 30)], {})
    assert [(e.window, e.drift) for e in entries.values()] == [
        (1, None),
        (3, None),
        (1, 0.5),
    ]
    largest, mean, total = reader.maxima(entries, record(9, 30)).tolist()
    assert mean < largest < total


_PARTS = {
    "density": {"mean", "inverse_scale", "basis", "leading", "rest"},
    "error": {"mean", "inverse_scale", "basis", "leading", "rest"}
    | {"origin", "down", "up"},
    "probe": set(draw_probe()),
    "error_norm": set(),
    "clamp_residual": set(),
}


def test_of_many_rows_every_so_many_are_fitted_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("guard.recording.MAX_FITTING_ROWS", 50)
    policy_file, saes = watch_everything()
    recordings = [record(9, 30, seed=100 * seed) for seed in range(4)]
    probes = {"content": draw_probe()}
    entries = fit_entries(Reader(policy_file, "p", saes), recordings, probes)
    rows = torch.cat([r.resid[AT] for r in recordings])[::4]
    torch.testing.assert_close(entries["far"].statistics["mean"], rows.mean(0))
