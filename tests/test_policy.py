"""The policy file: what is accepted, what is refused, and how that reads."""

# ruff: noqa: E501 (a refusal is one line, and is shown here as one)

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.limits import fuzz
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from guard.errors import PolicyError
from guard.fingerprint import (
    clamps_digest,
    file_fingerprint,
    fingerprint,
    list_files,
)
from guard.policy import PolicyFile, Rule, Tenant, load_policy

SHA = "a" * 64
FULL = f"""\
version: 1
max_policies: 16
require_stable: false
allow_unverified_model: false
on_error: closed
unscored: block
saes:
  l12: {{path: saes/l12, format: sae_lens, hook_point: layers.12.resid_post, sha256: {SHA}}}
policies:
  default:
    mode: enforce
    hold_tokens: 0
    clamps:
      - {{name: jailbreak, sae: l12, latents: [827, 224], law: ablate}}
      - {{name: refusal, sae: l12, latents: [303], law: set, value: 4.0,
         when: {{latents: [629], above: 0.5, scope: request}}}}
    monitors:
      - {{name: recovery, sae: l12, score: density, calibration: calib/l12.safetensors,
         target_fpr: 0.01, on_alarm: block}}
  open: {{mode: enforce, clamps: [], monitors: []}}
drills: []
tenants: []
public_policies: [default, open]
default_policy: default
"""
ABLATE = "{name: jailbreak, sae: l12, latents: [827, 224], law: ablate}"
DRILL = "{name: fire, sae: l12, delta: drills/fire.safetensors}"
TENANT = f"{{api_key_sha256: {SHA}, policies: [open, default]}}"
CLAMP0 = "policies.default.clamps[0]"
MONITOR0 = "policies.default.monitors[0]"


CERTIFIED = FULL.replace(
    "hold_tokens: 0", "hold_tokens: 0\n    certificate: certified/a.json"
)


def write(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text)
    return path


def edit(text: str, old: str, new: str) -> str:
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


def refusal(folder: Path, text: str) -> str:
    """The one line without the folder."""
    path = write(folder, text)
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line.removeprefix(f"{folder}/")


def test_every_key_of_the_format_is_read(tmp_path: Path) -> None:
    policy_file = load_policy(write(tmp_path, FULL))
    default = policy_file.policies["default"]
    assert [rule.law for rule in default.clamps] == ["ablate", "set"]
    assert default.clamps[0].latents == (827, 224)
    assert default.clamps[1].when is not None
    assert default.clamps[1].when.scope == "request"
    assert default.monitors[0].on_alarm == "block"
    assert list(policy_file.policies) == ["default", "open"]
    assert policy_file.public_policies == ("default", "open")


def test_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    policy_file = load_policy(write(tmp_path, FULL))
    assert policy_file.saes["l12"].path == tmp_path / "saes/l12"
    certified = load_policy(write(tmp_path, CERTIFIED)).policies["default"]
    assert certified.certificate == tmp_path / "certified/a.json"
    monitor = policy_file.policies["default"].monitors[0]
    assert monitor.calibration == tmp_path / "calib/l12.safetensors"


def test_an_absolute_path_stays(tmp_path: Path) -> None:
    text = edit(FULL, "path: saes/l12", "path: /srv/saes/l12")
    policy_file = load_policy(write(tmp_path, text))
    assert policy_file.saes["l12"].path == Path("/srv/saes/l12")


def test_only_the_default_policy_is_public_when_nothing_is_said(tmp_path: Path) -> None:
    text = edit(FULL, "public_policies: [default, open]\n", "")
    assert load_policy(write(tmp_path, text)).public_policies == ("default",)


def test_the_shortest_file_is_one_open_policy(tmp_path: Path) -> None:
    text = "version: 1\npolicies: {open: {}}\ndefault_policy: open\n"
    policy_file = load_policy(write(tmp_path, text))
    assert policy_file.policies["open"].clamps == ()
    assert (policy_file.on_error, policy_file.unscored) == ("closed", "block")


@pytest.mark.parametrize(
    ("law", "value"),
    [
        ("set", "value: -2, if_active: true"),
        ("set", "value: 3, unit: max"),
        ("cap", "value: 1e-3"),
        ("cap", "value: 0"),
        ("floor", "value: 2.5, unit: unit_norm"),
        ("scale", "value: .5"),
    ],
)
def test_every_law_that_exists_is_accepted(
    tmp_path: Path, law: str, value: str
) -> None:
    text = edit(FULL, "law: ablate", f"law: {law}, {value}")
    assert load_policy(write(tmp_path, text)).policies["default"].clamps[0].law == law


def test_block_under_observe_is_accepted_and_only_reported(tmp_path: Path) -> None:
    text = edit(FULL, "mode: enforce", "mode: observe")
    default = load_policy(write(tmp_path, text)).policies["default"]
    assert (default.mode, default.monitors[0].on_alarm) == ("observe", "block")


SCORES = [
    ("error_norm", "sae: l12"),
    ("error", "sae: l12"),
    ("clamp_residual", "sae: l12, stage: prompt"),
    ("density", "sae: l12, stage: output, window: 64"),
    ("density", "hook_point: layers.3.resid_post, window: 1"),
    ("probe", "sae: l12, probe: probes/p.safetensors"),
    ("probe", "hook_point: layers.0.resid_post, probe: probes/p.safetensors"),
    ("probe", "hook_point: layers.0.resid_pre, probe: probes/p.safetensors"),
    ("probe", "sae: l12, probe: probes/p.safetensors, stage: output, drift: 0.2"),
    ("density", "sae: l12, drift: 3, window: 1"),
]


@pytest.mark.parametrize(("score", "values"), SCORES)
def test_every_score_that_exists_is_accepted(
    tmp_path: Path, score: str, values: str
) -> None:
    text = edit(FULL, "sae: l12, score: density", f"{values}, score: {score}")
    policy_file = load_policy(write(tmp_path, text))
    (monitor,) = policy_file.policies["default"].monitors
    assert monitor.score == score
    place = "layers.12.resid_post" if monitor.sae else str(monitor.hook_point)
    assert policy_file.hook_point(monitor) == place
    probe = tmp_path / "probes/p.safetensors" if score == "probe" else None
    assert monitor.probe == probe


def test_a_monitor_watches_every_token_alone_when_nothing_is_said(
    tmp_path: Path,
) -> None:
    (monitor,) = load_policy(write(tmp_path, FULL)).policies["default"].monitors
    assert (monitor.stage, monitor.window, monitor.drift) == (None, 1, None)
    text = edit(FULL, "score: density", "score: density, stage: output, window: 4")
    (monitor,) = load_policy(write(tmp_path, text)).policies["default"].monitors
    assert (monitor.stage, monitor.window) == ("output", 4)


def test_every_place_is_listed_once_and_stays_without_monitors(tmp_path: Path) -> None:
    more = (
        "on_alarm: block}\n      - {name: late, hook_point: layers.20.resid_post, "
        "score: density, calibration: c, target_fpr: 0.1, on_alarm: flag}"
    )
    policy_file = load_policy(write(tmp_path, edit(FULL, "on_alarm: block}", more)))
    places = ("layers.12.resid_post", "layers.20.resid_post")
    assert policy_file.hook_points == places
    text = edit(CERTIFIED, "on_alarm: block}", more)
    observing = write(tmp_path, edit(text, "mode: enforce", "mode: observe"))
    bare = load_policy(observing).for_recording()
    assert bare.policies["default"].mode == "enforce"
    assert bare.policies["default"].monitors == ()
    assert bare.policies["default"].certificate is None
    assert bare.policies["default"].clamps == policy_file.policies["default"].clamps
    assert bare.hook_points == places[:1]
    assert list(bare.policies) == list(policy_file.policies)


def test_more_monitors_than_anybody_needs_are_refused(tmp_path: Path) -> None:
    def monitors(count: int) -> str:
        return "\n      - ".join(
            f"{{name: m{i}, sae: l12, score: density, calibration: c, "
            "target_fpr: 0.001, on_alarm: flag}"
            for i in range(count)
        )

    start = FULL.index("{name: recovery")
    own = FULL[start : FULL.index("\n", FULL.index("target_fpr"))]
    load_policy(write(tmp_path, edit(FULL, own, monitors(32))))
    line = refusal(tmp_path, edit(FULL, own, monitors(33)))
    assert line == "policy.yaml:17: policies.default.monitors: 33 entries; expected 32"


def test_a_loaded_file_cannot_be_changed(tmp_path: Path) -> None:
    policy_file = load_policy(write(tmp_path, FULL))
    with pytest.raises(ValidationError):
        policy_file.default_policy = "open"  # type: ignore[misc]


LATER = [
    (
        "require_stable: false",
        "require_stable: true",
        "3: require_stable: measuring stability is not built yet; expected false",
    ),
    (
        "law: ablate",
        "law: project",
        f"14: {CLAMP0}.law: 'project' is not built yet; expected one of ablate, set, "
        "cap, floor, scale",
    ),
]


@pytest.mark.parametrize(("old", "new", "line"), LATER)
def test_what_a_later_version_builds_is_refused_by_name(
    tmp_path: Path, old: str, new: str, line: str
) -> None:
    assert refusal(tmp_path, edit(FULL, old, new)) == f"policy.yaml:{line}"


def test_what_is_not_built_is_named_before_anything_else(tmp_path: Path) -> None:
    text = edit(FULL, "law: ablate", "law: project, basis: b.safetensors")
    text = edit(text, "unscored: block", "unscored: maybe")
    line = refusal(tmp_path, text)
    assert line.startswith(f"policy.yaml:14: {CLAMP0}.law: 'project' is not built yet")
    assert line.endswith("(and 2 more)")


FAULTS = [
    # Choices and names of keys
    ("version: 1", "version: 2", "1: version: 2 is not a version this guard reads; expected 1"),
    ("version: 1\n", "\n", "1: version: is missing"),
    ("on_error: closed", "on_error: shut", "5: on_error: 'shut' is not a choice; expected one of closed, open"),
    ("unscored: block", "unscored: 3", "6: unscored: 3 is not an action; expected one of flag, block"),
    ("format: sae_lens", "format: npz", "8: saes.l12.format: 'npz' is not an SAE format; expected one of guard, sae_lens"),
    ("mode: enforce", "mode: force", "11: policies.default.mode: 'force' is not a mode; expected one of observe, enforce"),
    ("law: ablate", "law: ablat", f"14: {CLAMP0}.law: 'ablat' is not a law; expected one of ablate, set, cap, floor, scale"),
    ("law: set", "law: set, unit: mean", "15: policies.default.clamps[1].unit: 'mean' is not a unit; expected one of native, unit_norm, max"),
    ("scope: request", "scope: session", "16: policies.default.clamps[1].when.scope: 'session' is not a scope; expected one of token, request"),
    ("score: density", "score: norm", f"18: {MONITOR0}.score: 'norm' is not a score; expected one of error_norm, density, error, probe, clamp_residual"),
    ("on_alarm: block", "on_alarm: stop", f"19: {MONITOR0}.on_alarm: 'stop' is not an action; expected one of flag, block"),
    ("mode: enforce", "mod: enforce", "11: policies.default.mod: unknown key; did you mean 'mode'?"),
    ("scope: request", "zzz: 1", "16: policies.default.clamps[1].when.zzz: unknown key; expected one of latents, above, scope"),
    ("default_policy:", "default_polcy: x\ndefault_policy:", "24: default_polcy: unknown key; did you mean 'default_policy'?"),
    ("target_fpr: 0.01,", "", f"18: {MONITOR0}.target_fpr: is missing"),
    ("sha256: ", "sha: ", "8: saes.l12.sha256: is missing (and 1 more)"),
    ("default_policy: default\n", "", "1: default_policy: is missing"),
    # Kinds of values
    ("max_policies: 16", "max_policies: many", "2: max_policies: 'many' should be a valid integer"),
    ("max_policies: 16", "max_policies: 0", "2: max_policies: 0 should be greater than or equal to 1"),
    ("max_policies: 16", "max_policies: 010", "2: max_policies: '010' is no decimal number; quote it if it is text"),
    ("allow_unverified_model: false", "allow_unverified_model: 1", "4: allow_unverified_model: 1 should be a valid boolean"),
    ("hold_tokens: 0", "hold_tokens: 1025", "12: policies.default.hold_tokens: 1025 should be less than or equal to 1024"),
    ("hold_tokens: 0", "hold_tokens: -1", "12: policies.default.hold_tokens: -1 should be greater than or equal to 0"),
    ("hold_tokens: 0", "constrained_decoding: deny", "12: policies.default.constrained_decoding: 'deny' is not a choice; expected one of allow, refuse"),
    ("hold_tokens: 0", "constrained_decoding: true", "12: policies.default.constrained_decoding: True is not a choice; expected one of allow, refuse"),
    ("hold_tokens: 0", "constrain_decoding: refuse", "12: policies.default.constrain_decoding: unknown key; did you mean 'constrained_decoding'?"),
    ("latents: [827, 224]", "latents: [827, -1]", f"14: {CLAMP0}.latents[1]: -1 should be greater than or equal to 0"),
    ("latents: [827, 224]", "latents: [1e99]", f"14: {CLAMP0}.latents[0]: 1e+99 should be a valid integer (and 1 more)"),
    ("latents: [827, 224]", "latents: []", f"14: {CLAMP0}.latents: is empty; expected at least 1 entry"),
    ("latents: [827, 224]", "latents: 827", f"14: {CLAMP0}.latents: 827 should be a valid array"),
    ("value: 4.0", "value: .inf", "15: policies.default.clamps[1].value: inf is not a finite number; expected one"),
    ("value: 4.0", "value: .nan", "15: policies.default.clamps[1].value: nan is not a finite number; expected one"),
    ("value: 4.0", "value: '4'", "15: policies.default.clamps[1].value: '4' should be a valid number"),
    ("above: 0.5", "above: -1", "16: policies.default.clamps[1].when.above: -1 should be greater than or equal to 0"),
    ("target_fpr: 0.01", "target_fpr: 0", f"19: {MONITOR0}.target_fpr: 0 should be greater than 0"),
    ("target_fpr: 0.01", "target_fpr: 0.51", f"19: {MONITOR0}.target_fpr: 0.51 should be less than or equal to 0.5"),
    (f"sha256: {SHA}", "sha256: abc", "8: saes.l12.sha256: is not a sha256; expected 64 hexadecimal digits"),
    ("layers.12.resid_post", "blocks.12.hook_resid_post", "8: saes.l12.hook_point: 'blocks.12.hook_resid_post' is not a hook point; expected layers.<n>.resid_post"),
    ("path: saes/l12", "path: ''", "8: saes.l12.path: '.' is not the path of a file or folder"),
    ("name: jailbreak", "name: jail break", f"14: {CLAMP0}.name: 'jail break' is not a name; expected 1 to 64 letters, digits, '_', '.', '-'"),
    ("  open:", "  \"o/p\":", "20: policies.o/p: 'o/p' is not a name; expected 1 to 64 letters, digits, '_', '.', '-'"),
    # Laws
    ("law: ablate", "law: ablate, value: 1", f"14: {CLAMP0}.value: law ablate takes no value; leave it out"),
    ("law: ablate", "law: cap", f"14: {CLAMP0}.law: law cap needs a value"),
    ("law: ablate", "law: cap, value: 1, if_active: true", f"14: {CLAMP0}.if_active: goes with law set, not cap; leave it out"),
    ("law: ablate", "law: scale, value: 2, unit: max", f"14: {CLAMP0}.unit: law scale has no unit; leave it out"),
    # What one part says about another
    ("latents: [827, 224]", "latents: [827, 827]", f"14: {CLAMP0}.latents[1]: latent 827 is listed twice"),
    ("latents: [303]", "latents: [224]", "15: policies.default.clamps[1].latents: latent 224 of l12 is already held by 'jailbreak'; a latent may be clamped once"),
    ("name: refusal", "name: Jailbreak", "15: policies.default.clamps[1].name: 'jailbreak' is already the name of another"),
    ("calibration: calib/l12.safetensors,", "", f"18: {MONITOR0}.score: score density needs a calibration; expected the path of one"),
    ("score: density, calibration: calib/l12.safetensors,", "score: error_norm,", f"18: {MONITOR0}.score: score error_norm needs a calibration; expected the path of one"),
    # Scores, and what goes with them
    ("score: density,", "score: error, hook_point: layers.3.resid_post,", f"18: {MONITOR0}.hook_point: score error is read at its SAE; leave it out"),
    ("sae: l12, score: density,", "hook_point: layers.3.resid_post, score: error,", f"18: {MONITOR0}.sae: score error needs an SAE; expected a key of saes"),
    ("sae: l12, score: density,", "score: clamp_residual,", f"18: {MONITOR0}.sae: score clamp_residual needs an SAE; expected a key of saes"),
    ("sae: l12, score: density,", "score: error_norm,", f"18: {MONITOR0}.sae: score error_norm needs an SAE; expected a key of saes"),
    ("sae: l12, score: density,", "score: density,", f"18: {MONITOR0}.score: expected either sae or hook_point"),
    ("sae: l12, score: density,", "sae: l12, hook_point: layers.3.resid_post, score: density,", f"18: {MONITOR0}.score: expected either sae or hook_point"),
    ("sae: l12, score: density,", "hook_point: layers.03.resid_post, score: density,", f"18: {MONITOR0}.hook_point: 'layers.03.resid_post' is not a hook point; expected layers.<n>.resid_post or layers.0.resid_pre"),
    ("score: density,", "score: density, probe: p.safetensors,", f"18: {MONITOR0}.probe: goes with score probe, not density; leave it out"),
    ("score: density,", "score: probe,", f"18: {MONITOR0}.score: score probe needs a probe; expected the path of one"),
    ("score: density,", "score: probe, probe: '',", f"18: {MONITOR0}.probe: '.' is not the path of a file or folder"),
    ("score: density, calibration: calib/l12.safetensors,", "score: probe, probe: p,", f"18: {MONITOR0}.score: score probe needs a calibration; expected the path of one"),
    ("score: density,", "score: density, stage: answer,", f"18: {MONITOR0}.stage: 'answer' is not a stage; expected one of prompt, last_prompt, output"),
    ("score: density,", "score: density, window: 0,", f"18: {MONITOR0}.window: 0 should be greater than or equal to 1"),
    ("score: density,", "score: density, window: 65,", f"18: {MONITOR0}.window: 65 should be less than or equal to 64"),
    ("score: density,", "score: density, window: 1.5,", f"18: {MONITOR0}.window: 1.5 should be a valid integer"),
    ("score: density,", "score: density, drift: 0,", f"18: {MONITOR0}.drift: 0 should be greater than 0"),
    ("score: density,", "score: density, drift: -0.1,", f"18: {MONITOR0}.drift: -0.1 should be greater than 0"),
    ("score: density,", "score: density, drift: .inf,", f"18: {MONITOR0}.drift: inf is not a finite number; expected one"),
    ("score: density,", "score: density, drift: '1',", f"18: {MONITOR0}.drift: '1' should be a valid number"),
    ("score: density,", "score: density, drift: true,", f"18: {MONITOR0}.drift: True should be a valid number"),
    ("score: density,", "score: density, drift: 0.2, window: 2,", f"18: {MONITOR0}.drift: goes without a window; leave out one of the two"),
    ("score: density,", "score: density, windw: 2,", f"18: {MONITOR0}.windw: unknown key; did you mean 'window'?"),
    ("sae: l12, score: density", "sae: l12, score: density, target: 2", f"18: {MONITOR0}.target: unknown key; did you mean 'target_fpr'?"),
    ("on_alarm: block}", "on_alarm: block}\n      - {name: Recovery, sae: l12, score: error_norm, calibration: c, target_fpr: 0.01, on_alarm: flag}", "20: policies.default.monitors[1].name: 'recovery' is already the name of another"),
    ("on_alarm: block}", "on_alarm: block}\n      - {name: more, sae: l12, score: error_norm, calibration: c, target_fpr: 0.5, on_alarm: flag}", "17: policies.default.monitors: their target_fpr add up to more than 0.5, the false alarms of the policy; expected less"),
    ("sae: l12, score", "sae: l13, score", f"18: {MONITOR0}.sae: 'l13' is not in saes; expected one of l12"),
    ("sae: l12, latents: [827", "sae: l13, latents: [827", f"14: {CLAMP0}.sae: 'l13' is not in saes; expected one of l12"),
    ("max_policies: 16", "max_policies: 1", "9: policies: 2 policies; expected at most max_policies, which is 1"),
    ("default_policy: default", "default_policy: strict", "24: default_policy: 'strict' is not in policies; expected one of default, open"),
    ("[default, open]", "[default, opn]", "23: public_policies[1]: 'opn' is not in policies; expected one of default, open"),
    ("[default, open]", "[open]", "23: public_policies: default_policy 'default' is missing; add it"),
    ("[default, open]", "[]", "23: public_policies: default_policy 'default' is missing; add it"),
    ("[default, open]", "[default, default]", "23: public_policies[1]: 'default' is listed twice"),
    ("  open:", "  Default: {}\n  open:", "20: policies.Default: differs from another name in case only"),
    ("policies:\n  default", f"  twin: {{path: x, format: guard, hook_point: layers.12.resid_post, sha256: {SHA}}}\npolicies:\n  default", "9: saes.twin: is the same SAE as 'l12'; name it once, so that a latent is clamped once"),
    # Tenants
    ("tenants: []", f"tenants: [{{api_key_sha256: {SHA}, policies: [gone]}}]", "22: tenants[0].policies[0]: 'gone' is not in policies; expected one of default, open"),
    ("tenants: []", f"tenants: [{{api_key_sha256: {SHA}, policies: []}}]", "22: tenants[0].policies: is empty; expected at least 1 entry"),
    ("tenants: []", f"tenants: [{{api_key_sha256: {SHA}, policies: [open, open]}}]", "22: tenants[0].policies[1]: 'open' is listed twice"),
    ("tenants: []", f"tenants: [{{api_key_sha256: {SHA}, policy: open}}]", "22: tenants[0].policies: is missing (and 1 more)"),
    ("tenants: []", "tenants: [{api_key_sha256: sk-secret, policies: [open]}]", "22: tenants[0].api_key_sha256: is not a sha256; expected 64 hexadecimal digits"),
    ("tenants: []", f"tenants: [{TENANT}, {TENANT}]", "22: tenants[1].api_key_sha256: is the key of another tenant already; expected one entry per key"),
    # Drills
    ("drills: []", f"drills: [{DRILL}, {DRILL}]", "21: drills[1].name: 'fire' is already the name of another"),
    ("drills: []", f"drills: [{DRILL}, {DRILL.replace('fire', 'Fire', 1)}]", "21: drills[1].name: 'fire' is already the name of another"),
    ("drills: []", f"drills: [{DRILL.replace('l12', 'l13')}]", "21: drills[0].sae: 'l13' is not in saes; expected one of l12"),
    ("drills: []", "drills: [{name: fire, sae: l12}]", "21: drills[0].delta: is missing"),
    ("drills: []", f"drills: [{DRILL.replace('fire,', 'fire, sea: x,')}]", "21: drills[0].sea: unknown key; did you mean 'sae'?"),
    ("drills: []", f"drills: [{DRILL.replace('fire,', 'fire, position: first_prompt,')}]", "21: drills[0].position: 'first_prompt' is not a position; expected one of last_prompt, all_prompt"),
    ("drills: []", f"drills: [{', '.join(DRILL.replace('fire', f'f{i}', 1) for i in range(65))}]", "21: drills: 65 entries; expected 64"),
    # YAML
    ("version: 1", "version: 1\nversion: 1", "2: key 'version' is already on line 1"),
    ("name: jailbreak,", "name: jailbreak, name: other,", f"14: {CLAMP0}: key 'name' is already on line 14"),
    ("latents: [629]", "latents: &a [629]", "16: is not the YAML a policy is written in: anchors and aliases are refused; write the value out"),
    ("latents: [629]", "latents: *a", "16: is not the YAML a policy is written in: anchors and aliases are refused; write the value out"),
    ("latents: [629]", f"latents: {'[' * 30}{']' * 30}", "16: is not the YAML a policy is written in: it is nested too deeply"),
    ("latents: [629]", "latents: !!python/tuple [629]", "16: is not the YAML a policy is written in: tags are refused; write a plain value, quoted if it is text"),
    ("latents: [629]", "latents: 2026-01-01", "16: policies.default.clamps[1].when.latents: 'timestamp' is no plain value; quote it"),
    ("  open:", "  yes:", "20: policies: key 'yes' is not text; quote it"),
    ("  open:", "  ? [a]\n  :", "20: policies: key this is not text; quote it"),
    ("mode: enforce", "mode: enforce\n\t x: 1", "12: is not the YAML a policy is written in: found character '\\t' that cannot start any token"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line"), FAULTS)
def test_a_fault_is_one_line_with_file_line_and_key(
    tmp_path: Path, old: str, new: str, line: str
) -> None:
    assert refusal(tmp_path, edit(FULL, old, new)) == f"policy.yaml:{line}"


def test_more_clamps_than_bits_are_refused(tmp_path: Path) -> None:
    def clamps(count: int) -> str:
        return "\n      - ".join(
            f"{{name: c{i}, sae: l12, latents: [{1000 + i}], law: ablate}}"
            for i in range(count)
        )

    load_policy(write(tmp_path, edit(FULL, ABLATE, clamps(23))))
    line = refusal(tmp_path, edit(FULL, ABLATE, clamps(24)))
    assert line == "policy.yaml:13: policies.default.clamps: 25 entries; expected 24"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "policy.yaml: holds no keys; expected 'version: 1' and so on"),
        (b"- 1\n", "policy.yaml: holds no keys; expected 'version: 1' and so on"),
        (b"\xff\xfe\x00", "policy.yaml: is not UTF-8; expected YAML text"),
        (b"a: \x07", "policy.yaml: is not YAML: "),
        (b"a: 1\n---\nb: 1\n", "policy.yaml:2: is not the YAML a policy is written in"),
        (b'a: "\\UFFFFFFFF"', "policy.yaml: is not YAML: "),
        (b"%YAML " + b"9" * 5000 + b".1\n---\na: 1", "policy.yaml: is not YAML: "),
        (b"a: !!bool x", "policy.yaml:1: is not the YAML a policy is written in: tags"),
        (b"a: !!float ''", "policy.yaml:1: is not the YAML a policy is written in: "),
        (b"a: 1:30.5", "policy.yaml:1: a: '1:30.5' is no decimal number; quote it if"),
        (b"a: 1" + b":1" * 400 + b".0", "policy.yaml:1: a: '1:1:1"),
        (b"#" * (1 << 20) + b"\n", "policy.yaml: cannot be read (Larger than 1 MiB)"),
    ],
)
def test_a_file_that_is_no_policy_at_all_is_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(content)
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"cannot be read \(No such file"):
        load_policy(tmp_path / "nowhere.yaml")


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


@fuzz
@given(
    at=st.integers(0, len(FULL) - 1),
    length=st.integers(0, 12),
    put=st.text("[]{}:,-&*!? \n\"'#0e.", max_size=3),
)
def test_any_small_damage_is_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, at: int, length: int, put: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "damage.yaml"
    path.write_text(FULL[:at] + put + FULL[at + length :])
    line = ""
    try:
        load_policy(path)
    except PolicyError as error:
        line = str(error)
    assert "\n" not in line


def test_the_key_of_a_tenant_is_never_echoed() -> None:
    with pytest.raises(ValidationError) as caught:
        Tenant(api_key_sha256="sk-secret", policies=("default",))
    assert "sk-secret" not in caught.value.errors()[0]["msg"]


def test_tenants_are_read_with_their_policies_in_order(tmp_path: Path) -> None:
    text = edit(FULL, "tenants: []", f"tenants: [{TENANT}]")
    (tenant,) = load_policy(write(tmp_path, text)).tenants
    assert (tenant.api_key_sha256, tenant.policies) == (SHA, ("open", "default"))


def test_drills_are_read_in_order_and_stand_at_the_last_token_unasked(
    tmp_path: Path,
) -> None:
    whole = edit(DRILL, "fire,", "whole, position: all_prompt,")
    text = edit(FULL, "drills: []", f"drills: [{DRILL}, {whole}]")
    drills = load_policy(write(tmp_path, text)).drills
    assert [drill.name for drill in drills] == ["fire", "whole"]
    assert [drill.position for drill in drills] == ["last_prompt", "all_prompt"]
    assert drills[0].delta == tmp_path / "drills/fire.safetensors"


def test_a_digest_may_be_written_in_capitals() -> None:
    assert Tenant(api_key_sha256=SHA.upper(), policies=("a",)).api_key_sha256 == SHA


def test_rules_made_in_memory_are_checked_alike() -> None:
    with pytest.raises(ValidationError, match="needs a value"):
        Rule(name="x", sae="l12", latents=(1,), law="cap")


def served(folder: Path, text: str = FULL) -> PolicyFile:
    """A policy file whose SAE folder and calibration exist."""
    (folder / "saes/l12").mkdir(parents=True, exist_ok=True)
    (folder / "saes/l12/cfg.json").write_text("{}")
    (folder / "calib").mkdir(exist_ok=True)
    (folder / "calib/l12.safetensors").write_bytes(b"calibration")
    return load_policy(write(folder, text))


def test_a_fingerprint_does_not_depend_on_layout_place_or_neighbours(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = fingerprint(served(tmp_path / "a"), "default")
    text = edit(FULL, "value: 4.0", "value: 4").replace("open", "other")
    text = edit(text, "on_error: closed\n", "# closed\n")
    again = fingerprint(served(tmp_path / "b", text), "default")
    assert first == again
    assert len(first) == 64


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("latents: [827, 224]", "latents: [827]"),
        ("value: 4.0", "value: 4.5"),
        ("above: 0.5", "above: 0.6"),
        ("mode: enforce", "mode: observe"),
        ("hold_tokens: 0", "hold_tokens: 1"),
        ("hold_tokens: 0", "hold_tokens: 0\n    constrained_decoding: refuse"),
        ("target_fpr: 0.01", "target_fpr: 0.02"),
        ("on_alarm: block", "on_alarm: flag"),
        ("score: density", "score: error"),
        ("score: density", "score: density, stage: output"),
        ("score: density", "score: density, window: 2"),
        ("score: density", "score: density, drift: 2"),
        ("sae: l12, score", "hook_point: layers.12.resid_post, score"),
        (SHA, "b" * 64),
        ("layers.12.", "layers.11."),
        ("on_error: closed", "on_error: open"),
        ("unscored: block", "unscored: flag"),
    ],
)
def test_a_fingerprint_changes_with_what_is_computed(
    tmp_path: Path, old: str, new: str
) -> None:
    before = fingerprint(served(tmp_path), "default")
    assert fingerprint(served(tmp_path, edit(FULL, old, new)), "default") != before


def test_a_fingerprint_of_earlier_files_stays_what_it_was(tmp_path: Path) -> None:
    # Nothing may become part of it that a policy without it does not say.
    assert fingerprint(served(tmp_path), "default") == (
        "0869dfd64a8e1e4b895e0565b5f615466b9d7640f4cde72862765bf1dc4d2ba0"
    )


def test_saying_what_holds_anyway_changes_no_fingerprint(tmp_path: Path) -> None:
    said = edit(FULL, "hold_tokens: 0", "constrained_decoding: allow")
    before = fingerprint(served(tmp_path), "default")
    assert fingerprint(served(tmp_path, said), "default") == before


def test_a_fingerprint_needs_no_probe_whose_weights_stand_in_the_calibration(
    tmp_path: Path,
) -> None:
    prints = {
        fingerprint(
            served(tmp_path, edit(FULL, "score: density", f"score: probe, probe: {p}")),
            "default",
        )
        for p in ("one.safetensors", "another.safetensors")
    }
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("name: jailbreak", "name: other", True),
        ("target_fpr: 0.01", "target_fpr: 0.02", True),
        ("score: density", "score: error", True),
        ("mode: enforce", "mode: observe", True),
        ("path: saes/l12", "path: ./saes/l12", True),
        ("latents: [827, 224]", "latents: [827]", False),
        ("law: ablate", "law: floor, value: 0", False),
        ("value: 4.0", "value: 4.5", False),
        ("above: 0.5", "above: 0.6", False),
        ("scope: request", "scope: token", False),
        (SHA, "b" * 64, False),
        ("layers.12.", "layers.11.", False),
    ],
)
def test_the_digest_of_clamps_changes_with_what_they_do_to_the_stream(
    tmp_path: Path, old: str, new: str, *, same: bool
) -> None:
    before = clamps_digest(served(tmp_path), "default")
    after = clamps_digest(served(tmp_path, edit(FULL, old, new)), "default")
    assert (before == after) == same
    assert clamps_digest(served(tmp_path), "open") != before


def test_the_digest_of_clamps_covers_how_their_sae_is_used(tmp_path: Path) -> None:
    policy_file = served(tmp_path)
    before = {name: clamps_digest(policy_file, name) for name in ("default", "open")}
    (tmp_path / "saes/l12/cfg.json").write_text("changed")
    assert clamps_digest(policy_file, "default") != before["default"]
    assert clamps_digest(policy_file, "open") == before["open"]


@pytest.mark.parametrize("path", ["calib/l12.safetensors", "saes/l12/cfg.json"])
def test_a_fingerprint_changes_with_the_files_it_stands_on(
    tmp_path: Path, path: str
) -> None:
    policy_file = served(tmp_path)
    before = fingerprint(policy_file, "default")
    open_before = fingerprint(policy_file, "open")
    (tmp_path / path).write_text("changed")
    assert fingerprint(policy_file, "default") != before
    assert fingerprint(policy_file, "open") == open_before


def test_a_fingerprint_needs_the_calibration(tmp_path: Path) -> None:
    policy_file = load_policy(write(tmp_path, FULL))
    with pytest.raises(PolicyError, match=r"l12\.safetensors: cannot be read"):
        fingerprint(policy_file, "default")


def test_a_fingerprint_of_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="'x' is not in policies; expected one of"):
        fingerprint(served(tmp_path), "x")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[default, open]", "[default]"),
        ("max_policies: 16", "max_policies: 8"),
        ("default_policy: default", "default_policy: open"),
        ("\n  open:", "\n  other: {}\n  open:"),
        ("value: 4.0", "value: 5"),
    ],
)
def test_processes_with_different_files_see_it(
    tmp_path: Path, old: str, new: str
) -> None:
    before = file_fingerprint(served(tmp_path))
    assert file_fingerprint(served(tmp_path, edit(FULL, old, new))) != before


def test_drills_are_part_of_the_file_and_of_no_policy(tmp_path: Path) -> None:
    bare = served(tmp_path)
    (tmp_path / "drills").mkdir()
    edited = tmp_path / "drills/fire.safetensors"
    prints = {file_fingerprint(bare)}
    for content in (b"one", b"other"):
        edited.write_bytes(content)
        drilled = served(tmp_path, edit(FULL, "drills: []", f"drills: [{DRILL}]"))
        prints.add(file_fingerprint(drilled))
        for name in ("default", "open"):
            assert fingerprint(drilled, name) == fingerprint(bare, name)
    assert len(prints) == 3
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/drills").mkdir()
    (tmp_path / "moved/drills/fire.safetensors").write_bytes(b"other")
    moved = served(tmp_path / "moved", edit(FULL, "drills: []", f"drills: [{DRILL}]"))
    assert file_fingerprint(moved) == file_fingerprint(drilled)
    edited.unlink()
    with pytest.raises(PolicyError, match=r"fire\.safetensors: cannot be read"):
        file_fingerprint(drilled)


def test_a_certificate_is_part_of_the_file_and_of_no_policy(tmp_path: Path) -> None:
    bare = served(tmp_path)
    (tmp_path / "certified").mkdir()
    file = tmp_path / "certified/a.json"
    prints = {file_fingerprint(bare)}
    for content in ("one", "other"):
        file.write_text(content)
        certified = served(tmp_path, CERTIFIED)
        prints.add(file_fingerprint(certified))
        assert fingerprint(certified, "default") == fingerprint(bare, "default")
    assert len(prints) == 3
    before = file_fingerprint(certified)
    file.rename(tmp_path / "b.json")
    moved = served(tmp_path, edit(CERTIFIED, "certified/a.json", "b.json"))
    assert file_fingerprint(moved) == before
    with pytest.raises(PolicyError, match=r"a\.json: cannot be read"):
        file_fingerprint(certified)


def test_every_file_that_the_fingerprint_reads_is_listed(tmp_path: Path) -> None:
    text = edit(CERTIFIED, "drills: []", f"drills: [{DRILL}]")
    policy_file = served(tmp_path, text)
    listed = [path.relative_to(tmp_path).as_posix() for path in list_files(policy_file)]
    assert listed == [
        *("calib/l12.safetensors", "certified/a.json"),
        *("drills/fire.safetensors", "saes/l12/cfg.json"),
    ]
    for name in listed:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    prints = {file_fingerprint(policy_file)}
    for name in listed:
        (tmp_path / name).write_text("changed")
        prints.add(file_fingerprint(policy_file))
    assert len(prints) == 1 + len(listed)


def test_a_fingerprint_stays_the_one_that_was_certified(tmp_path: Path) -> None:
    """A change of these makes every certificate there is one of another policy."""
    policy_file = served(tmp_path)
    assert fingerprint(policy_file, "default") == (
        "0869dfd64a8e1e4b895e0565b5f615466b9d7640f4cde72862765bf1dc4d2ba0"
    )
    assert fingerprint(policy_file, "open") == (
        "b9b5e7c811a5bb8467f69fad9887d28632ecb90236b03013b6540d409f49e7f0"
    )


def test_the_order_of_policies_is_part_of_the_file_fingerprint(tmp_path: Path) -> None:
    one = "version: 1\npolicies: {a: {}, b: {mode: observe}}\ndefault_policy: a\n"
    two = "version: 1\npolicies: {b: {mode: observe}, a: {}}\ndefault_policy: a\n"
    prints = {file_fingerprint(load_policy(write(tmp_path, t))) for t in (one, two)}
    assert len(prints) == 2


def test_reading_a_policy_needs_no_torch() -> None:
    code = "import sys, guard.policy, guard.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
