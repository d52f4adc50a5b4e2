"""`guard calibrate` on the organism: with an engine of its own, and on a server."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from e2e.commands import Done, run_command
from e2e.serving import ServerFactory, stop

from guard.calibration import Calibration, load_calibration
from guard.check import check_origin, check_policy, digest_model
from guard.demo.measure import ORGANISM
from guard.demo.traffic import (
    OrganismRecorder,
    build_reader,
    labelled_prompts,
    ordinary_prompts,
)
from guard.policy import load_policy
from guard.prompt import Prompt, split_prompts
from guard.recording import Recording

LATE = "layers.5.resid_post"
TOLERANCE = 1e-3
READING_TOLERANCE = 0.01
ENGINE = ("--dtype", "float32", "--max-model-len", "128")
MONITORS = """\
    monitors:
      - {{name: far, sae: {sae}, score: density, window: 2, calibration: c.safetensors,
         target_fpr: 0.05, on_alarm: flag}}
      - {{name: late, hook_point: {late}, score: density, stage: output,
         calibration: c.safetensors, target_fpr: 0.05, on_alarm: flag}}
      - {{name: content, hook_point: layers.3.resid_post, score: probe,
         probe: probes/content.safetensors, stage: output, window: 4,
         calibration: c.safetensors, target_fpr: 0.05, on_alarm: flag}}
      - {{name: left, sae: {sae}, score: clamp_residual, stage: prompt,
         calibration: c.safetensors, target_fpr: 0.05, on_alarm: flag}}
"""
"""Of the organism's default policy here: none blocks, and few requests are enough."""


def draw_prompts(count: int, *, seed: int) -> list[Prompt]:
    return ordinary_prompts(count, seed=seed, split="calibration")


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> Path:
    lines = [prompt.model_dump_json(exclude_defaults=True) for prompt in prompts]
    path.write_text("\n".join(lines))
    return path


PROMPTS = draw_prompts(60, seed=7_000_000)
FRESH = draw_prompts(40, seed=7_100_000)
DIALOGUES = labelled_prompts(2, seed=7_200_000, split="train")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The organism under a policy that is not calibrated yet."""
    folder = tmp_path_factory.mktemp("shop")
    for name in ("model", "saes", "probes", "drills"):
        shutil.copytree(ORGANISM / name, folder / name)
    text = (ORGANISM / "policy.yaml").read_text()
    (sae,) = load_policy(ORGANISM / "policy.yaml").saes
    start, end = text.index("    monitors:\n"), text.index("  open:")
    own = MONITORS.format(sae=sae, late=LATE)
    text = text[:start] + own + text[end:].replace("watch, ", "")
    (folder / "policy.yaml").write_text(text)
    return folder


def calibrate(shop: Path, *words: object, dialogues: Sequence[Prompt] = ()) -> Done:
    given = ("calibrate", "--policy", shop / "policy.yaml", *words)
    return run_command(shop, *given, dialogues=dialogues)


@pytest.fixture(scope="module")
def calibrated(shop: Path) -> Done:
    path = write_prompts(shop / "prompts.jsonl", PROMPTS)
    given = ("--prompts", path, "--lengths", "128", shop / "model", *ENGINE)
    done = calibrate(shop, *given, dialogues=DIALOGUES)
    assert done.code == 0, done.complaint
    return done


@pytest.fixture(scope="module")
def recorded(shop: Path) -> list[Recording]:
    """What transformers shows on the same prompts, and on the dialogues."""
    _, reader = build_reader(shop)
    recorder = OrganismRecorder(shop, reader.hook_points)
    fitting, held_out = split_prompts(PROMPTS, 1 / 3, seed=0)
    return list(recorder.record([*fitting, *held_out, *DIALOGUES]))


def read(
    shop: Path, calibration: Calibration, prompts: Sequence[Prompt]
) -> torch.Tensor:
    """Return what the plain reader makes of prompts, `[num_prompts, num_monitors]`."""
    _, reader = build_reader(shop)
    recordings = OrganismRecorder(shop, reader.hook_points).record(prompts)
    return torch.stack([reader.maxima(calibration.entries, one) for one in recordings])


def test_the_engine_records_what_transformers_shows_whole_and_in_chunks(
    calibrated: Done, recorded: list[Recording]
) -> None:
    """Prompts are computed in chunks of at most 16 tokens, shared by 8 requests."""
    assert len(calibrated.recordings) == len(recorded) == 60 + len(DIALOGUES)
    assert any(one.prompt_length > 16 for one in recorded)
    for ours, theirs in zip(calibrated.recordings, recorded, strict=True):
        assert ours.resid.keys() == theirs.resid.keys()
        assert ours.prompt_length == theirs.prompt_length
        for at, resid in theirs.resid.items():
            torch.testing.assert_close(
                ours.resid[at], resid, rtol=TOLERANCE, atol=TOLERANCE, msg=at
            )
    for ours, theirs in zip(calibrated.recordings[:60], recorded, strict=False):
        assert ours.total_length == theirs.total_length


def test_what_is_calibrated_can_be_served_and_is_what_transformers_would_give(
    shop: Path, calibrated: Done, recorded: list[Recording]
) -> None:
    path = shop / "c.safetensors"
    assert f"Wrote {path}\n" in calibrated.output
    assert not path.with_name("c.safetensors.partial").exists()
    policy_file, reader = build_reader(shop)
    check_policy(policy_file)
    calibration = load_calibration(path)
    model = digest_model(shop / "model")
    check_origin({str(path): calibration}, model=model, dtype="float32")
    assert list(calibration.entries) == ["far", "late", "content", "left"]
    held_out = recorded[20:60]
    assert len(calibration.maxima[0]) == len(held_out)
    expected = torch.stack(
        [reader.maxima(calibration.entries, one) for one in held_out]
    )
    torch.testing.assert_close(
        calibration.maxima[0],
        expected,
        rtol=READING_TOLERANCE,
        atol=READING_TOLERANCE,
    )


def test_fresh_prompts_alarm_as_promised_and_read_as_the_reader_reads(
    shop: Path, calibrated: Done
) -> None:
    before = (shop / "c.safetensors").read_bytes()
    path = write_prompts(shop / "fresh.jsonl", FRESH)
    done = calibrate(shop, "--check", "--prompts", path, shop / "model", *ENGINE)
    assert done.code == 0, done.complaint
    assert "as promised" in done.complaint
    assert (shop / "c.safetensors").read_bytes() == before
    calibration = load_calibration(shop / "c.safetensors")
    expected = read(shop, calibration, FRESH)
    found = torch.tensor([list(told.scores.values()) for told in done.told])
    assert [list(told.scores) for told in done.told] == [list(calibration.entries)] * 40
    torch.testing.assert_close(
        found, expected, rtol=READING_TOLERANCE, atol=READING_TOLERANCE
    )


def test_a_running_server_is_checked_and_sets_thresholds_anew(
    shop: Path, calibrated: Done, start_server: ServerFactory
) -> None:
    server = start_server(
        *(shop / "model", shop / "policy.yaml"),
        *("--max-model-len", "128", "--enforce-eager"),
    )
    before = load_calibration(shop / "c.safetensors")
    fresh = write_prompts(shop / "fresh.jsonl", FRESH)
    own = write_prompts(shop / "prompts.jsonl", PROMPTS)
    done = calibrate(shop, "--check", "--url", server.url, "--prompts", own)
    assert done.code == 1
    assert "These prompts made the calibration; expected fresh ones." in done.complaint
    done = calibrate(shop, "--check", "--url", server.url, "--prompts", fresh)
    assert done.code == 0, done.complaint
    done = calibrate(shop, "--url", server.url, "--prompts", fresh)
    assert done.code == 0, done.complaint
    assert done.output == f"Wrote {shop / 'c.safetensors'}\n"
    after = load_calibration(shop / "c.safetensors")
    expected = read(shop, before, FRESH)
    torch.testing.assert_close(
        after.maxima[0], expected, rtol=READING_TOLERANCE, atol=READING_TOLERANCE
    )
    assert all(map(torch.equal, after.scales, before.scales))
    for name, entry in before.entries.items():
        for key, value in entry.statistics.items():
            assert torch.equal(after.entries[name].statistics[key], value)
    assert after.provenance["thresholds"]["prompts"] == len(FRESH)
    stop(server.process)


def test_prompts_that_will_not_do_are_refused_before_an_engine_starts(
    shop: Path,
) -> None:
    path = write_prompts(shop / "few.jsonl", PROMPTS[:5])
    done = calibrate(shop, "--prompts", path, shop / "model", *ENGINE)
    assert done.code == 1
    assert "5 prompts leave 3 for thresholds" in done.complaint
    assert done.complaint.startswith("guard: ")
    assert done.complaint.count("\n") == 1
    assert done.recordings == []
