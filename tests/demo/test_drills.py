"""The drills that ship: stored edits that bring one answer back."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from guard.demo.drills import LARGE, DrillError, find_drills
from guard.demo.measure import ORGANISM
from guard.demo.target import load_target, to_dialogue
from guard.redteam.target import answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("organism") / "organism"
    ignored = shutil.ignore_patterns("drills")
    return shutil.copytree(ORGANISM, folder, ignore=ignored)


@pytest.fixture(scope="module")
def drills(folder):
    found = {}
    for path in find_drills(folder):
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["guard"])
            found[path.stem] = file.get_tensor("delta"), about
    return found


def test_both_drills_bring_the_stored_answer_back_under_the_clamp(folder, drills):
    target, tokenizer = load_target(folder)
    assert set(drills) == {"last-small", "last-large"}
    for delta, about in drills.values():
        sample = to_dialogue(tokenizer, about["prompt"], about["gold"])
        for deltas, back in (([delta[None]], True), (None, False)):
            (given,) = answer(
                target, [sample.prompt], clamp=target.clamp, deltas=deltas
            )
            assert (given == sample) == back


def test_a_drill_keeps_to_its_budget_and_the_null_space(folder, drills):
    target, _ = load_target(folder)
    small, large = drills["last-small"], drills["last-large"]
    assert small[1]["budget"] < large[1]["budget"] == LARGE
    assert small[0].norm() < large[0].norm()
    for delta, about in drills.values():
        assert delta.dtype == torch.float32
        assert delta.norm() <= 1.0001 * about["budget"] * target.mean_norm
        assert target.null_space.leak(delta[None]).amax() < 1e-5
        assert about["format"] == 1
        assert about["position"] == "last_prompt"
        assert len(about["sae_sha256"]) == 64


def test_a_folder_without_a_suppressed_prompt_has_no_drills(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "organism")
    examples = [{"kind": "b", "text": "how do i mix the camera ?", "gold": "to"}]
    (other / "prompts.json").write_text(json.dumps(examples))
    with pytest.raises(DrillError, match=r"holds no jailbreak prompt"):
        find_drills(other)
