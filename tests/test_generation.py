"""What a reload may change, and what needs a restart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from specimens import make_calibration

from guard.calibration import save_calibration
from guard.errors import CalibrationError, PolicyError
from guard.generation import Generation, load_generation, restart_reason
from guard.monitor import assign_columns, list_columns
from guard.policy import PolicyFile, load_policy
from guard.sae.load import weights_digest
from guard.testing import save_toy_sae

Change = Callable[[dict[str, Any]], None]

STICKY = {"latents": [7], "above": 0.5, "scope": "request"}


def make_body(folder: Path) -> dict[str, Any]:
    """Return a policy file of two SAEs, one of them only watched."""
    saes = {}
    for name, layer in (("s", 1), ("w", 2), ("idle", 3)):
        if not (folder / name).exists():
            save_toy_sae(folder / name, hook_point=f"layers.{layer}.resid_post")
        saes[name] = {
            "path": name,
            "format": "guard",
            "hook_point": f"layers.{layer}.resid_post",
            "sha256": weights_digest(folder / name, "guard"),
        }
    monitor = {
        "name": "watch",
        "sae": "w",
        "score": "error_norm",
        "calibration": "c.safetensors",
        "target_fpr": 0.1,
        "on_alarm": "block",
    }
    return {
        "version": 1,
        "max_policies": 3,
        "saes": saes,
        "policies": {
            "default": {
                "clamps": [{"name": "a", "sae": "s", "latents": [1], "law": "ablate"}],
                "monitors": [monitor],
            },
            "open": {},
        },
        "default_policy": "default",
    }


def load(folder: Path, body: dict[str, Any]) -> PolicyFile:
    path = folder / "policy.yaml"
    # Without the anchors of what it holds twice.
    text = yaml.safe_dump(json.loads(json.dumps(body)), sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return load_policy(path)


def calibrate(folder: Path, policy_file: PolicyFile) -> None:
    save_calibration(make_calibration(policy_file), folder / "c.safetensors")


@pytest.fixture
def body(tmp_path: Path) -> dict[str, Any]:
    return make_body(tmp_path)


@pytest.fixture
def start(tmp_path: Path, body: dict[str, Any]) -> Generation:
    policy_file = load(tmp_path, body)
    calibrate(tmp_path, policy_file)
    return load_generation(policy_file)


def default_of(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = body["policies"]["default"]
    return found


ALLOWED: dict[str, Change] = {
    "nothing": lambda _: None,
    "other latents": lambda b: default_of(b)["clamps"][0].update(latents=[3, 4]),
    "another law": lambda b: default_of(b)["clamps"][0].update(law="set", value=2.0),
    "a condition": lambda b: default_of(b)["clamps"][0].update(
        when={"latents": [3], "above": 1.0}
    ),
    "another action": lambda b: default_of(b)["monitors"][0].update(on_alarm="flag"),
    "another name and calibration": lambda b: default_of(b)["monitors"][0].update(
        name="other", calibration="d.safetensors"
    ),
    "no monitor": lambda b: default_of(b).update(monitors=[]),
    "another default": lambda b: b.update(default_policy="open"),
    "as many policies as slots": lambda b: b["policies"].update(more={}),
    "an SAE that nobody uses": lambda b: b["saes"].update(
        other=b["saes"]["s"] | {"sha256": "0" * 64}
    ),
    "held tokens": lambda b: default_of(b).update(hold_tokens=4),
}

REFUSED: dict[str, tuple[Change, str]] = {
    "more policies than slots at the start": (
        lambda b: b.update(
            max_policies=9, policies=b["policies"] | {"more": {}, "most": {}}
        ),
        "4 policies are more than there are slots for, 3",
    ),
    "another sha256": (
        lambda b: b["saes"]["s"].update(sha256="0" * 64),
        "SAE 's' has another sha256",
    ),
    "another hook point": (
        lambda b: b["saes"]["s"].update(hook_point="layers.9.resid_post"),
        "SAE 's' has another hook_point",
    ),
    "an SAE that was not in use": (
        lambda b: default_of(b)["clamps"][0].update(sae="idle"),
        "SAE 'idle' was not in use",
    ),
    "a first clamp": (
        lambda b: default_of(b)["clamps"][0].update(sae="w"),
        "SAE 'w' was not clamped",
    ),
    "a first memory": (
        lambda b: default_of(b)["clamps"][0].update(when=STICKY),
        "SAE 's' was not clamped with scope: request",
    ),
    "a probe at a new place": (
        lambda b: default_of(b)["monitors"].append(
            default_of(b)["monitors"][0]
            | {"name": "late", "sae": None, "score": "density"}
            | {"hook_point": "layers.7.resid_post"}
        ),
        "hook point layers.7.resid_post is new",
    ),
    "a further score": (
        lambda b: default_of(b)["monitors"].append(
            default_of(b)["monitors"][0] | {"name": "too", "score": "error"}
        ),
        "a further score 'error' at layers.2.resid_post has no column",
    ),
    "a second of the same score": (
        lambda b: default_of(b)["monitors"].append(
            default_of(b)["monitors"][0] | {"name": "again"}
        ),
        "a further score 'error_norm'",
    ),
    "a first drill": (
        lambda b: b.update(drills=[{"name": "d", "sae": "s", "delta": "d"}]),
        "drill 'd' is the first at its hook point",
    ),
    "a model that need not be verified": (
        lambda b: b.update(allow_unverified_model=True),
        "allow_unverified_model changed",
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_content_of_tables_may_change(
    name: str, tmp_path: Path, start: Generation
) -> None:
    body = make_body(tmp_path)
    ALLOWED[name](body)
    assert restart_reason(start.policy_file, load(tmp_path, body)) is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hooks_were_not_built_for_needs_a_restart(
    name: str, tmp_path: Path, start: Generation
) -> None:
    change, words = REFUSED[name]
    body = make_body(tmp_path)
    change(body)
    policy_file = load(tmp_path, body)
    reason = restart_reason(start.policy_file, policy_file)
    assert reason is not None
    assert words in reason
    with pytest.raises(PolicyError, match="needs a restart"):
        load_generation(policy_file, number=2, start=start)


def test_files_beside_an_sae_that_changed_need_a_restart(
    tmp_path: Path, body: dict[str, Any], start: Generation
) -> None:
    (config,) = (tmp_path / "s").glob("*.json")
    config.write_text(config.read_text() + " ")
    with pytest.raises(PolicyError, match="files of SAE 's' changed; that needs a re"):
        load_generation(load(tmp_path, body), number=2, start=start)


def test_generations_take_turns_in_two_halves_of_the_slots(
    tmp_path: Path, body: dict[str, Any], start: Generation
) -> None:
    assert [start.slot(name) for name in ("default", "open")] == [1, 2]
    body["policies"] = {"open": {}} | body["policies"]
    body["max_policies"] = 9
    policy_file = load(tmp_path, body)
    second = load_generation(policy_file, number=2, start=start)
    third = load_generation(policy_file, number=3, start=start)
    order = list(policy_file.policies)
    slots = [[one.slot(name) for name in order] for one in (second, third)]
    assert slots == [[4, 5], [1, 2]]
    assert (second.bank, third.bank) == (1, 0)


def test_a_calibration_that_does_not_fit_is_refused_at_a_reload_too(
    tmp_path: Path, body: dict[str, Any], start: Generation
) -> None:
    default_of(body)["clamps"][0]["latents"] = [9]
    with pytest.raises(CalibrationError, match="was made under other clamps"):
        load_generation(load(tmp_path, body), number=2, start=start)


def test_two_policies_share_a_prefix_only_where_their_scores_stand_alike(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    """A column keeps its number where it can; otherwise nothing cached is read."""
    first = default_of(body)
    monitor = first["monitors"][0]
    twin = first | {"monitors": [monitor | {"calibration": "e.safetensors"}]}
    body["policies"] = {"default": first, "twin": twin, "open": {}}
    policy_file = load(tmp_path, body)
    for name in ("c", "e"):
        path = tmp_path / f"{name}.safetensors"
        save_calibration(make_calibration(policy_file), path)
    start = load_generation(policy_file)
    assert start.fingerprints["default"] == start.fingerprints["twin"]
    assert start.identify("default") != start.identify("twin")
    body["policies"] = {"twin": twin, "default": first, "open": {}}
    turned = load_generation(load(tmp_path, body), number=2, start=start)
    for name in ("default", "twin", "open"):
        assert turned.identify(name) == start.identify(name)
    assert start.identify("open") == start.fingerprints["open"]


def test_a_column_goes_where_it_was_and_another_takes_a_place_that_is_free(
    tmp_path: Path, body: dict[str, Any], start: Generation
) -> None:
    layout = start.layout
    kept = assign_columns(layout, start.policy_file)
    assert kept == {column: i for i, column in enumerate(layout)}
    default_of(body)["monitors"][0]["calibration"] = "d.safetensors"
    changed = load(tmp_path, body)
    (old,) = (c for c in layout if c.entry)
    (new,) = (c for c in list_columns(changed) if c.entry)
    assert assign_columns(layout, changed)[new] == kept[old]
