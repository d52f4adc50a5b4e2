"""What is refused before anything is loaded, and who hears a SIGHUP."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm_guard
from vllm_guard import launch

from guard.errors import EngineError, PolicyError


def test_a_file_of_options_that_vllm_would_overlook_is_refused(tmp_path: Path) -> None:
    """Or a server whose keys stand in it would let everybody in."""
    with pytest.raises(EngineError, match="expected two words, --config FILE"):
        launch.serve("model", tmp_path / "policy.yaml", ["--config=keys.yaml"])
    with pytest.raises(PolicyError, match="cannot be read"):
        launch.serve("model", tmp_path / "policy.yaml", ["--config", "keys.yaml"])


# An API server of its own process, which says when it is up and ends at "done"
SERVER = """
import signal, sys
{handler}
print("up", flush=True)
sys.stdin.readline()
"""
HANDLER = "signal.signal(signal.SIGHUP, lambda *_: print('reload', flush=True))"


@pytest.fixture
def start_children(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Have processes of these names below this one, with or without a handler."""
    started: list[subprocess.Popen[str]] = []

    def start(*children: tuple[str, bool]) -> list[subprocess.Popen[str]]:
        for _, is_ready in children:
            code = SERVER.format(handler=HANDLER if is_ready else "")
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
            started.append(child)
        known = [
            SimpleNamespace(name=name, pid=child.pid)
            for (name, _), child in zip(children, started, strict=True)
        ]
        monkeypatch.setattr(launch.multiprocessing, "active_children", lambda: known)
        return started

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_a_hangup_reaches_an_api_server_that_is_up_and_ends_none_that_is_not(
    start_children: Callable[..., list[subprocess.Popen[str]]],
) -> None:
    children = start_children(
        ("EngineCore_0", True), ("ApiServer_0", False), ("ApiServer_1", True)
    )
    launch._pass_on(signal.SIGHUP, None)
    told = [child.communicate("done\n", timeout=30)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert told == ["", "", "reload\n"]


def test_a_hangup_before_any_api_server_is_up_is_for_nobody(
    start_children: Callable[..., list[subprocess.Popen[str]]],
) -> None:
    (child,) = start_children(("ApiServer_0", False))
    launch._pass_on(signal.SIGHUP, None)
    child.communicate("done\n", timeout=30)
    assert child.returncode == 0
    # It is gone, and may still be listed.
    launch._pass_on(signal.SIGHUP, None)


REGISTER = """
import os, signal
import vllm_guard

vllm_guard.register()
os.kill(os.getpid(), signal.SIGHUP)
"""


def test_a_hangup_ends_no_process_that_has_the_guard(
    write_policy: Callable[..., Path],
) -> None:
    own = {"GUARD_POLICY": str(write_policy()), "VLLM_PLUGINS": "", "GUARD_SERVE": "1"}
    subprocess.run(
        [sys.executable, "-c", REGISTER], env=os.environ | own, check=True, timeout=500
    )


@pytest.mark.parametrize(
    ("serves", "before", "after"),
    [
        (True, signal.SIG_DFL, signal.SIG_IGN),
        (True, launch._pass_on, launch._pass_on),
        (False, signal.SIG_DFL, signal.SIG_DFL),
    ],
)
def test_a_process_with_a_handler_or_of_no_server_hears_hangups_as_before(
    serves: bool, before: Any, after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GUARD_SERVE", raising=False)
    if serves:
        monkeypatch.setenv("GUARD_SERVE", "1")
    own = signal.signal(signal.SIGHUP, before)
    try:
        vllm_guard._outlive_hangups()
        assert signal.getsignal(signal.SIGHUP) is after
    finally:
        signal.signal(signal.SIGHUP, own)
