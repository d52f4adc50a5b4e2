"""Whatever a supplier's file holds: used, or refused in one line, soon and cheaply."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzz.limits import attempt, fuzz
from fuzz.mutation import (
    changed,
    changed_safetensors,
    damaged,
    describe,
    read_safetensors,
    write_json,
    write_safetensors,
)
from hypothesis import given
from hypothesis import strategies as st
from redteam.paper import make_certificate
from rich.console import Console
from sae.test_formats import FACTOR, draw_tensors, v5, v6, write
from specimens import draw_probe, fit_everything, watch_everything, write_certificate
from test_generation import calibrate, make_body
from test_generation import load as load_body
from test_policy import FULL

from guard.calibration import load_calibration, save_calibration
from guard.certificate import read_certificate
from guard.check import check_calibrations
from guard.command.doctor import Subject, check_model
from guard.drill import RecoveryEdit, load_edit, save_edit
from guard.fingerprint import file_fingerprint
from guard.generation import load_generation
from guard.pipeline import StepBuffers, build_guards
from guard.policy import load_policy
from guard.probe import load_probe, save_probe
from guard.prompt import read_prompts
from guard.redteam.command import Source as Certified
from guard.redteam.command import verify_certificate
from guard.sae.config import Format
from guard.sae.load import load_sae
from guard.testing import save_toy_sae

SNIPPETS = [
    *(b"!!python/object/apply:os.system [id] ", b"!!python/name:os.system ", b"!x "),
    *(
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"? ",
        b"- ",
        b": ",
        b"\t",
        b"---\n",
        b"...\n",
        b"|\n",
    ),
    *(b"!!bool x", b"!!float ''", b"!!int ''", b"!!binary x", b"!!set ", b"!!null x"),
    *(b'"\\UFFFFFFFF"', b'"\\ud800"', b"%YAML 1.9\n", b"%TAG ! x\n", b"%YAML 9" * 2),
    *(b".nan", b"-.inf", b"0x1f", b"0o7", b"1:30", b"1_000", b"1:2.5", b"2026-01-01"),
    *(b"1" + b":1" * 400 + b".0", b"[" * 400, b"{a: " * 400, b"- " * 400, b"? " * 400),
]
BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (name + 1, name + 1, b",".join([b"*%c" % name] * 9))
    for name in range(ord("a"), ord("j"))
)


@dataclass(frozen=True)
class Kind:
    """A file that somebody supplies, and who reads it."""

    path: Path
    parse: Callable[[], object]
    changes: st.SearchStrategy[bytes]


def trees(*values: Any) -> st.SearchStrategy[bytes]:
    """Return changes of JSON documents: first of what they say, then of their bytes."""
    texts = st.sampled_from(values).flatmap(changed).map(write_json)
    contents = texts.map(str.encode)
    return contents | contents.flatmap(damaged)


def make_policy(folder: Path) -> Kind:
    path = folder / "policy.yaml"
    path.write_text(FULL)
    text = damaged(FULL.encode(), snippets=SNIPPETS)
    changes = trees(yaml.safe_load(FULL)) | text | st.just(BOMB)
    return Kind(path, lambda: load_policy(path), changes)


def make_sae(folder: Path, format: Format, file: str) -> Kind:
    if format == "guard":
        save_toy_sae(folder, d_model=8, d_sae=12, architecture="jumprelu")
        cfgs = [json.loads((folder / "cfg.json").read_text())]
        name = "sae.safetensors"
    else:
        averaged = {"normalize_activations": "expected_average_only_in"}
        cfgs = [v6(**averaged), v5(**averaged), v6("topk")]
        tensors = draw_tensors("standard") | {"scaling_factor": torch.ones(24)}
        write(folder, cfgs[0], tensors, FACTOR)
        name = "sae_weights.safetensors"
    path = folder / {"weights": name, "scaler": "activation_scaler.json"}.get(
        file, file
    )
    changes = (
        changed_safetensors(path.read_bytes())
        if file == "weights"
        else trees(*(cfgs if file == "cfg.json" else [json.loads(path.read_text())]))
    )

    def parse() -> None:
        sae = load_sae(folder, format=format)
        sae.decode(sae.encode(torch.ones(2, sae.d_model)))

    return Kind(path, parse, changes)


def make_calibration(folder: Path) -> Kind:
    policy_file, saes = watch_everything()
    calibrations = fit_everything(policy_file)
    path = folder / "calibration.safetensors"
    save_calibration(calibrations["calibration"], path)
    step = StepBuffers(max_tokens=1, max_requests=1, num_columns=40)

    def parse() -> None:
        read = {**calibrations, "calibration": load_calibration(path)}
        check_calibrations(policy_file, read)
        build_guards(policy_file, saes, read, step)

    return Kind(path, parse, changed_safetensors(path.read_bytes()))


def make_probe(folder: Path) -> Kind:
    path = folder / "probe.safetensors"
    save_probe(path, draw_probe(), {"auroc": 0.9})
    return Kind(path, lambda: load_probe(path), changed_safetensors(path.read_bytes()))


def make_drill(folder: Path) -> Kind:
    path = folder / "edit.safetensors"
    edit = RecoveryEdit(torch.ones(12), "say", "this", 0.7, "last_prompt", "a" * 64)
    save_edit(path, edit)
    return Kind(path, lambda: load_edit(path), changed_safetensors(path.read_bytes()))


def make_attestation(folder: Path) -> Kind:
    path = folder / "certificate.json"
    write_certificate(path, "ab" * 32, said={"a": [1, "x"]})
    content = json.loads(path.read_text())
    return Kind(path, lambda: read_certificate(path), trees(content))


def make_verified(folder: Path) -> Kind:
    """A whole certificate, as `guard certify --verify` reads it first."""
    path = folder / "certificate.json"
    content = make_certificate().model_dump(mode="json")
    path.write_text(json.dumps(content))
    nothing = Certified(folder, folder / "policy.yaml", "default", folder / "x")
    console = Console(quiet=True)
    parse = lambda: verify_certificate(nothing, path, rows=0, console=console)  # noqa: E731
    return Kind(path, parse, trees(content))


def make_model(folder: Path) -> Kind:
    """The configuration of a model, as `guard doctor` reads it."""
    path = folder / "config.json"
    plain = {"hidden_size": 64, "num_hidden_layers": 4, "model_type": "llama"}
    path.write_text(json.dumps(plain))
    changes = trees(plain, {"text_config": plain})
    return Kind(path, lambda: check_model(Subject(model=folder)), changes)


def make_reload(folder: Path) -> Kind:
    """The policy file of a server that runs, when it is told to read it again."""
    body = make_body(folder)
    policy_file = load_body(folder, body)
    calibrate(folder, policy_file)
    start, path = load_generation(policy_file), folder / "policy.yaml"

    def parse() -> None:
        load_generation(load_policy(path), number=2, start=start)

    changes = trees(body) | damaged(path.read_bytes(), snippets=SNIPPETS)
    return Kind(path, parse, changes)


def make_prompts(folder: Path) -> Kind:
    path = folder / "prompts.jsonl"
    lines: list[Any] = [
        {"prompt": "say", "max_tokens": 4, "group": "a", "label": 1, "response": "so"},
        {"messages": [{"role": "user", "content": "say"}]},
        {"text": "say"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    several = st.lists(trees(*lines), min_size=1, max_size=3).map(b"\n".join)
    return Kind(path, lambda: read_prompts(path), several)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "policy": make_policy,
    "policy at a reload": make_reload,
    "model config": make_model,
    "guard cfg": lambda folder: make_sae(folder, "guard", "cfg.json"),
    "guard weights": lambda folder: make_sae(folder, "guard", "weights"),
    "sae_lens cfg": lambda folder: make_sae(folder, "sae_lens", "cfg.json"),
    "sae_lens scaler": lambda folder: make_sae(folder, "sae_lens", "scaler"),
    "sae_lens weights": lambda folder: make_sae(folder, "sae_lens", "weights"),
    "calibration": make_calibration,
    "probe": make_probe,
    "drill": make_drill,
    "attestation": make_attestation,
    "certificate": make_verified,
    "prompts": make_prompts,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    return KINDS[request.param](tmp_path)


def test_a_file_as_it_was_is_read(kind: Kind) -> None:
    refused = attempt(kind.parse)
    assert refused is None or "holds no model" in str(refused)


def test_a_changed_file_is_used_or_refused_in_one_line(kind: Kind) -> None:
    outcomes = set()

    @fuzz
    @given(kind.changes)
    def read(content: bytes) -> None:
        kind.path.write_bytes(content)
        outcomes.add(attempt(kind.parse) is None)

    read()
    assert False in outcomes, "nothing was refused: the changes reach no check"


def test_what_is_no_file_is_refused_and_not_waited_for(kind: Kind) -> None:
    def become_a_pipe() -> None:
        if kind.path.name != "prompts.jsonl":  # `--prompts <(command)` is one
            os.mkfifo(kind.path)

    for become in (
        lambda: None,
        kind.path.mkdir,
        lambda: kind.path.symlink_to("/dev/zero"),
        lambda: kind.path.symlink_to("/proc/self/mem"),
        lambda: kind.path.symlink_to(kind.path),
        lambda: kind.path.symlink_to("../gone"),
        become_a_pipe,
    ):
        kind.path.rmdir() if kind.path.is_dir() else kind.path.unlink(missing_ok=True)
        become()
        assert attempt(kind.parse) is not None


@pytest.mark.parametrize("name", ["calibration", "probe", "drill"])
@pytest.mark.parametrize("depth", [900, 2_000, 100_000])
def test_a_note_that_nests_without_end_is_refused(
    tmp_path: Path, name: str, depth: int
) -> None:
    kind = KINDS[name](tmp_path)
    tensors, _ = read_safetensors(kind.path.read_bytes())
    note = {"guard": '{"format": ' + "[" * depth + "]" * depth + "}"}
    kind.path.write_bytes(write_safetensors(describe(tensors, note), tensors))
    assert attempt(kind.parse) is not None


@pytest.mark.parametrize("depth", [*range(100, 1100, 50), 2_000, 100_000])
def test_a_certificate_that_nests_without_end_is_refused_or_hashed(
    tmp_path: Path, depth: int
) -> None:
    kind = make_attestation(tmp_path)
    text = kind.path.read_text().removesuffix("}")
    kind.path.write_text(f'{text}, "more": {"[" * depth}{"]" * depth}}}')
    assert attempt(kind.parse) is not None


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(
    kind: Kind, tmp_path: Path
) -> None:
    canary = tmp_path / "ran"
    torch.save(Canary(canary), kind.path)
    assert attempt(kind.parse) is not None
    kind.path.write_bytes(pickle.dumps(Canary(canary)))
    assert attempt(kind.parse) is not None
    assert not canary.exists()
    pickle.loads(kind.path.read_bytes())
    assert canary.exists(), "this pickle proves nothing"


def test_a_tag_in_a_policy_file_runs_nothing(tmp_path: Path) -> None:
    canary, path = tmp_path / "ran", tmp_path / "policy.yaml"
    path.write_text(f"policies: !!python/object/apply:os.mkdir ['{canary}']\n")
    assert attempt(lambda: load_policy(path)) is not None
    assert not canary.exists()
    yaml.unsafe_load(path.read_text())
    assert canary.exists(), "this tag proves nothing"


def test_a_file_beside_an_sae_cannot_hold_up_a_fingerprint(tmp_path: Path) -> None:
    policy = make_policy(tmp_path)
    folder = tmp_path / "saes" / "l12"
    folder.mkdir(parents=True)
    calibration = tmp_path / "calib" / "l12.safetensors"
    calibration.parent.mkdir()
    calibration.touch()
    before = file_fingerprint(load_policy(policy.path))
    (folder / "endless.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    refused = attempt(lambda: file_fingerprint(load_policy(policy.path)))
    assert refused is None
    (folder / "cfg.json").write_text("{}")
    assert file_fingerprint(load_policy(policy.path)) != before
