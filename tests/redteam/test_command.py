"""`guard certify` on the command line: one clear line for what cannot be certified."""

import json
import shutil
import sys

import pytest

from guard.cli import main
from guard.demo.measure import ORGANISM
from guard.errors import CertificateError
from guard.provenance import ROOT
from guard.redteam import command
from guard.redteam.certificate import load_certificate
from guard.redteam.subject import load_transformer
from guard.testing import make_toy_model


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["guard", "certify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


POLICY = ("--policy", ORGANISM / "policy.yaml")
CERTIFICATE = load_certificate(ROOT / "benchmarks" / "results" / "certificate.json")


def test_its_schema_is_printed_for_whoever_reads_certificates(run):
    code, out, _ = run(*POLICY, "--schema")
    assert code in (0, None)
    schema = json.loads(out)
    assert {"headline", "cells", "prompts", "controls"} <= set(schema["required"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*POLICY, "nowhere"], "nowhere: holds no model"),
        ([*POLICY, "--name", "open"], "Policy 'open' stops nothing"),
        ([*POLICY, "--name", "watch"], "Policy 'watch' stops nothing"),
        ([*POLICY, "--name", "other"], "Unknown policy 'other'"),
        ([*POLICY, "--prompts", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        ([*POLICY, "--output", "nowhere/c.json"], "nowhere: is no folder"),
        ([*POLICY, "--output", "."], ".: is no name for a JSON file"),
        ([*POLICY, "--output", "c.html"], "c.html: is no name for a JSON file"),
        ([*POLICY, "--verify", "c.json", "--rows", "0"], "'--rows'"),
        ([*POLICY, "--preset", "long"], "'long' is not"),
        ([*POLICY, "--verify", "nowhere.json"], "nowhere.json: cannot be read"),
        ([*POLICY, "--url", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_what_is_wrong_is_one_line(run, arguments, words):
    code, _, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("guard: ")]
    assert code
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize("text", ["", "[]", '{"id": "x"}', "{" * 1000, "\x00"])
def test_what_is_no_certificate_is_one_line(run, tmp_path, text):
    path = tmp_path / "certificate.json"
    path.write_text(text)
    code, _, err = run(*POLICY, "--verify", path)
    assert code == 1
    assert f"{path}: is no certificate" in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_none_is_one_line(run, tmp_path):
    shutil.copytree(ORGANISM / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    code, _, err = run(*POLICY, tmp_path / "model", "--no-serve")
    assert code == 1
    assert "was made for another model" in err  # its weights are part of what it is
    assert len(err.splitlines()) == 1
    with pytest.raises(CertificateError, match="is no model that transformers loads"):
        load_transformer(tmp_path / "model")


def test_another_model_is_refused_before_it_runs(run, tmp_path):
    make_toy_model(tmp_path / "model")
    code, _, err = run(*POLICY, tmp_path / "model", "--no-serve")
    assert code == 1
    assert "was made for another model" in err
    assert len(err.splitlines()) == 1


def test_what_was_done_is_kept_until_the_certificate_is_written(run, tmp_path):
    """A page that cannot be written costs nothing but the writing."""
    done = tmp_path / "c.parts"

    def certify(*_, work, **__):
        work.mkdir()
        return CERTIFICATE

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "certify", certify)
        (tmp_path / "c.html").mkdir()
        code, _, err = run(*POLICY, "--output", tmp_path / "c.json", "--no-serve")
        assert code == 1
        assert "c.html: cannot be written (Is a directory); what was done is" in err
        assert done.exists()
        (tmp_path / "c.html").rmdir()
        done.rmdir()
        code, *_ = run(*POLICY, "--output", tmp_path / "c.json", "--no-serve")
    assert not code
    assert (tmp_path / "c.html").is_file()
    assert not done.exists()


def test_prompts_of_one_sort_alone_are_refused(run, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "how do i heat the door ?"}\n')
    code, _, err = run(*POLICY, "--prompts", path, "--no-serve")
    assert code == 1
    assert "holds 0 prompts with label 1 and 1 without; expected some of both" in err
