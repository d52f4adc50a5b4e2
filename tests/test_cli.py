"""Every mistake on the command line is one line, before the engine is imported."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from specimens import make_calibration, write_certificate

from guard.calibration import save_calibration
from guard.cli import main
from guard.drill import RecoveryEdit, save_edit
from guard.fingerprint import fingerprint
from guard.policy import load_policy
from guard.sae.load import weights_digest
from guard.testing import save_toy_sae

HOOK_POINT = "layers.1.resid_post"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an SAE, a calibration, a model's config and a policy."""
    folder = tmp_path_factory.mktemp("shop")
    save_toy_sae(folder / "sae", hook_point=HOOK_POINT)
    policy_file = load_policy(write_policy(folder, "plain"))
    calibration = make_calibration(policy_file, maxima=[torch.rand(119)])
    save_calibration(calibration, folder / "norm.safetensors")
    write_certificate(folder / "other.json", "f" * 64)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


def write_policy(
    shop: Path,
    name: str,
    *,
    sae: str = "sae",
    digest: str | None = None,
    law: str = "ablate",
    calibration: str = "norm.safetensors",
    target_fpr: float = 0.01,
    certificate: str = "null",
) -> Path:
    digest = digest or weights_digest(shop / "sae", format="guard")
    path = shop / f"{name}.yaml"
    path.write_text(
        f"""\
version: 1
saes:
  s: {{path: {sae}, format: guard, hook_point: {HOOK_POINT}, sha256: "{digest}"}}
policies:
  default:
    clamps:
      - {{name: hold, sae: s, latents: [1], law: {law}}}
    monitors:
      - {{name: watch, sae: s, score: error_norm, calibration: {calibration},
         target_fpr: {target_fpr}, on_alarm: flag}}
    certificate: {certificate}
default_policy: default
"""
    )
    return path


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[object, str, str]:
    """Run `guard` without an engine; return its exit code, output and complaints."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(sys, "argv", ["guard", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


MISTAKES = {
    "typo": ({"law": "ablatte"}, "typo.yaml:7: policies.default.clamps[0].law: "),
    "missing-sae": ({"sae": "nowhere"}, "nowhere: is not a folder; expected one with"),
    "digest": ({"digest": "0" * 64}, f"expected {'0' * 64} as the policy says"),
    "calibration": ({"calibration": "gone.safetensors"}, "gone.safetensors"),
    "certificate": ({"certificate": "other.json"}, "other.json: was issued for policy"),
    "target": ({"target_fpr": 0.001}, "needs at least 999"),
}


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_policy_that_cannot_be_used_is_one_line_before_the_engine(
    mistake: str,
    command: str,
    shop: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, expected = MISTAKES[mistake]
    policy = write_policy(shop, mistake, **change)  # type: ignore[arg-type]
    words = [policy] if command == "check" else [shop / "model", "--policy", policy]
    code, _, complaint = run(monkeypatch, capsys, command, *words)
    assert code == 1
    assert complaint.startswith("guard: ")
    assert complaint.count("\n") == 1
    assert expected in complaint


def test_a_changed_sae_is_refused(
    shop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "shop"
    shutil.copytree(shop, copy)
    policy = write_policy(copy, "good")
    words = ["serve", copy / "model", "--policy", policy]
    with (copy / "sae" / "sae.safetensors").open("ab") as weights:
        weights.write(b"\0")
    code, _, complaint = run(monkeypatch, capsys, *words)
    assert code == 1
    assert "sae.safetensors: sha256 is" in complaint


def test_a_model_that_is_not_there_is_one_line(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = write_policy(shop, "good")
    words = ["serve", shop / "nowhere", "--policy", policy]
    code, _, complaint = run(monkeypatch, capsys, *words)
    assert code == 1
    assert complaint == (
        f"guard: {shop / 'nowhere'}: has no config.json; expected the folder of a "
        "model, or its name.\n"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["serve", "model"], "Missing option '--policy'; expected what `guard serve"),
        (["serve"], "Missing argument"),
        (["sevre"], "No such command 'sevre'"),
        (["check", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["check"], "No policy file was named; expected one, or --schema."),
        (["status", "--url", "http://127.0.0.1:9"], "does not answer as a guarded"),
        (["status", "--url", "nonsense"], "does not answer as a guarded"),
    ],
)
def test_a_command_that_cannot_work_is_one_line(
    words: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, complaint = run(monkeypatch, capsys, *words)
    assert code not in (0, None)
    assert complaint.startswith("guard: ")
    assert complaint.count("\n") == 1
    assert expected in complaint


def test_check_shows_what_a_policy_holds(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, complaint = run(
        monkeypatch, capsys, "check", write_policy(shop, "good")
    )
    assert code in (0, None)
    assert shown.startswith("default: enforce, 1 clamps, 1 monitors, ")
    assert "certificate" not in shown
    assert complaint == ""


def test_check_shows_which_certificate_a_policy_has(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = write_policy(shop, "certified", certificate="certified.json")
    issued_for = fingerprint(load_policy(policy), "default")
    found = write_certificate(shop / "certified.json", issued_for)
    code, shown, _ = run(monkeypatch, capsys, "check", policy)
    assert code in (0, None)
    assert shown.endswith(f", {issued_for[:12]}, certificate {found[:12]}\n")


def test_check_loads_every_drill(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = write_policy(shop, "drilled")
    with policy.open("a") as file:
        file.write("drills: [{name: fire, sae: s, delta: fire.safetensors}]\n")
    code, _, complaint = run(monkeypatch, capsys, "check", policy)
    assert (code, complaint.count("\n")) == (1, 1)
    assert "fire.safetensors: no such file; expected the stored edit" in complaint
    digest = weights_digest(shop / "sae", format="guard")
    edit = RecoveryEdit(torch.ones(64), "w1", "w2", 0.5, "last_prompt", digest)
    save_edit(shop / "fire.safetensors", edit)
    code, shown, _ = run(monkeypatch, capsys, "check", policy)
    assert code in (0, None)
    assert shown.splitlines()[-1] == "drill fire: last_prompt behind s"


def test_check_prints_the_schema_of_a_policy_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(monkeypatch, capsys, "check", "--schema")
    assert code in (0, None)
    assert json.loads(shown)["properties"]["default_policy"]


def test_the_version_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(monkeypatch, capsys, "--version")
    assert code in (0, None)
    assert shown.startswith("vllm-guard ")
