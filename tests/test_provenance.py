"""What a results file says of the run that wrote it."""

import sys

import pytest

from guard.provenance import describe_run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["certify", "--api-key", "sk-1"], "python certify --api-key ..."),
        (
            ["certify", "--api-key=sk-1", "--seed", "1"],
            "certify --api-key=... --seed 1",
        ),
        (["drill", "--admin-token", "sk-1", "x"], "drill --admin-token ... x"),
        (["certify", "--api-key"], "certify --api-key"),
    ],
)
def test_a_command_is_told_without_its_secrets(monkeypatch, words, told):
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *words])
    monkeypatch.setattr(sys, "executable", "/somewhere/python")
    command = describe_run()["command"]
    assert command.endswith(told)
    assert "sk-1" not in command
