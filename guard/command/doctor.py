"""`guard doctor`: what is broken in an installation, policy or server, and its mend.

Each check is a short function that returns what it found, returns None where it has
nothing to look at, or raises what is wrong. None of them starts an engine.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from guard.check import (
    MAX_CONFIG_BYTES,
    check_origin,
    check_policy,
    digest_model,
    load_calibrations,
    load_saes,
)
from guard.client import Client
from guard.command import installation
from guard.command.installation import FaultError
from guard.errors import (
    CalibrationError,
    CertificateError,
    DrillError,
    EngineError,
    GuardError,
    PolicyError,
    SaeError,
)
from guard.file import read_file
from guard.fingerprint import fingerprint
from guard.hook import HookPoint
from guard.policy import PolicyFile, load_policy

__all__ = ["Finding", "Subject", "examine", "run_doctor"]

_PATIENCE = 15.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at."""

    policy: Path | None = None
    model: Path | None = None
    """The folder of a model."""
    url: str = ""
    """Of a running server."""
    api_key: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def read_policy(self) -> PolicyFile | None:
        """Return the policy file where it can be read at all; one check says so."""
        try:
            return load_policy(self.policy) if self.policy else None
        except PolicyError:
            return None


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    said: str
    """What is there, or what is wrong with it."""
    mend: str = ""
    """What to do; empty where nothing is wrong."""


def check_policy_file(subject: Subject) -> str | None:
    """Read the policy file by itself."""
    if subject.policy is None:
        return None
    try:
        policy_file = load_policy(subject.policy)
    except PolicyError as error:
        raise FaultError(str(error), "docs/policy.md has every key") from error
    return f"{subject.policy}: {', '.join(policy_file.policies)}"


def check_permissions(subject: Subject) -> str | None:
    """Look at who may read and write what decides about the guard."""
    policy_file = subject.read_policy()
    if subject.policy is None or policy_file is None:
        return None
    paths = [subject.policy, *_list_files(policy_file)]
    for path in paths:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            continue  # another check says so
        except PermissionError:
            mode = 0
        if not mode or not os.access(path, os.R_OK, effective_ids=True):
            fault = f"{path} cannot be read by user {os.geteuid()}; expected to be."
            raise FaultError(fault, f"chmod u+r {path}, or chown it to who serves")
        if mode & stat.S_IWOTH:
            fault = f"{path} can be written by everybody; expected its owner alone."
            raise FaultError(fault, f"chmod o-w {path}")
    return f"{len(paths)} paths can be read, and not written by everybody"


_MENDS: Mapping[type[GuardError], str] = {
    SaeError: "mend path, format or sha256 of the SAE in the policy file",
    CalibrationError: "guard calibrate MODEL --policy FILE --prompts benign.jsonl",
    CertificateError: "guard certify --policy FILE, or leave `certificate` out",
    DrillError: "mend `drills` in the policy file, or leave the drill out",
}


def check_policy_parts(subject: Subject) -> str | None:
    """Load and compile everything that the policy file names."""
    policy_file = subject.read_policy()
    if policy_file is None:
        return None
    try:
        saes = check_policy(policy_file)
    except GuardError as error:
        mend = _MENDS.get(type(error), "guard check FILE says it again")
        raise FaultError(str(error), mend) from error
    widths = ", ".join(f"{name} of {sae.d_model}" for name, sae in saes.items())
    return f"SAEs: {widths or 'none'}"


def check_model(subject: Subject) -> str | None:
    """Hold the policy's SAEs, hook points and calibrations against a model's folder."""
    if subject.model is None:
        return None
    width, layers = _read_shape(subject.model)
    said = f"{subject.model}: {layers} layers of {width}"
    policy_file = subject.read_policy()
    if policy_file is None:
        return said
    try:
        saes, calibrations = load_saes(policy_file), load_calibrations(policy_file)
    except GuardError:
        return said  # the check of the policy's parts says so
    for name, sae in saes.items():
        if sae.d_model != width:
            fault = (
                f"SAE {name!r} has width {sae.d_model}; expected the model's {width}."
            )
            raise FaultError(fault, "take the SAE that was trained on this model")
    for at in map(HookPoint.parse, policy_file.hook_points):
        if at.layer >= layers:
            fault = f"Hook point {at} is not there; expected layers.0 to {layers - 1}."
            raise FaultError(fault, "mend hook_point in the policy file")
    for path, found in calibrations.items():
        try:
            # Only a server knows its dtype.
            dtype = str(found.provenance.get("dtype"))
            check_origin({path: found}, model=digest_model(subject.model), dtype=dtype)
        except CalibrationError as error:
            raise FaultError(str(error), _MENDS[CalibrationError]) from error
    return said


def check_server(subject: Subject) -> str | None:
    """Ask a server whether it is ready, and counts."""
    if not subject.url:
        return None
    client = _client(subject)
    try:
        client.call("/guard/ready")
    except EngineError as error:
        mend = "see its log; is it `guard serve`, and is this its URL?"
        raise FaultError(str(error), mend) from error
    try:
        names = {sample.name for sample in client.read_metrics()}
    except EngineError as error:
        raise FaultError(str(error), "serve /metrics; vLLM does") from error
    if "guard_info" not in names:
        fault = f"{subject.url}/metrics has no guard_info; expected the guard's series."
        raise FaultError(fault, "unset PROMETHEUS_MULTIPROC_DIR, or empty its folder")
    return f"{subject.url} is ready and counts"


def check_served_policy(subject: Subject) -> str | None:
    """Hold what a server runs against the policy file at hand."""
    policy_file = subject.read_policy()
    if not subject.url or policy_file is None:
        return None
    try:
        served = _client(subject).read_status().policies
        own = {
            n: fingerprint(policy_file, n) for n in served if n in policy_file.policies
        }
    except GuardError:
        return None  # other checks say so
    other = [n for n, found in served.items() if own.get(n) != found.fingerprint]
    if other:
        fault = (
            f"{subject.url} runs another version of {', '.join(other)} than the file."
        )
        raise FaultError(fault, "POST /guard/reload, or start it again")
    return f"{subject.url} runs {', '.join(served)} as in the file"


CHECKS: Mapping[str, Callable[[Subject], str | None]] = {
    "versions": lambda _: installation.check_versions(),
    "vLLM": lambda _: installation.check_engine(),
    "entry points": lambda _: installation.check_entry_points(),
    "seams": lambda _: installation.check_seams(),
    "VLLM_PLUGINS": lambda one: installation.check_plugins(one.environment),
    "environment": lambda one: installation.check_environment(one.environment),
    "metrics path": lambda one: installation.check_metrics_path(one.environment),
    "temporary files": lambda _: installation.check_temporary(),
    "policy file": check_policy_file,
    "permissions": check_permissions,
    "SAEs and the rest": check_policy_parts,
    "model": check_model,
    "server": check_server,
    "served policies": check_served_policy,
}
"""In the order in which they are best mended."""


def examine(subject: Subject) -> Iterator[Finding]:
    """Yield what each check finds that has something to look at."""
    for name, check in CHECKS.items():
        try:
            said = check(subject)
        except FaultError as fault:
            yield Finding(name, str(fault), fault.mend)
        else:
            if said is not None:
                yield Finding(name, said)


def run_doctor(subject: Subject, *, console: Console) -> bool:
    """Print every finding, and return whether nothing is wrong."""
    is_well = True
    for finding in examine(subject):
        mark = Text("FAULT", "bold red") if finding.mend else Text("ok   ", "green")
        line = Text.assemble(mark, f" {finding.check:<18}{finding.said}")
        console.print(line, soft_wrap=True)
        if finding.mend:
            is_well = False
            console.print(Text(f"      mend: {finding.mend}"), soft_wrap=True)
    return is_well


def _client(subject: Subject) -> Client:
    return Client(subject.url, api_key=subject.api_key, patience=_PATIENCE)


def _list_files(policy_file: PolicyFile) -> list[Path]:
    """Return every path that a policy file names, and what lies in a folder."""
    found: dict[Path, None] = {}
    for sae in policy_file.saes.values():
        found |= dict.fromkeys([sae.path, *sae.path.glob("*")])
    for policy in policy_file.policies.values():
        named = [path for m in policy.monitors for path in (m.calibration, m.probe)]
        found |= dict.fromkeys(path for path in [*named, policy.certificate] if path)
    found |= dict.fromkeys(drill.delta for drill in policy_file.drills)
    return list(found)


def _read_shape(model: Path) -> tuple[int, int]:
    """Return width and number of layers of a model, as its config.json has them."""
    mend = "name the folder with config.json and the weights"
    try:
        config: Any = json.loads(
            read_file(model / "config.json", limit=MAX_CONFIG_BYTES)
        )
        text = config.get("text_config", config)
        return int(text["hidden_size"]), int(text["num_hidden_layers"])
    except OSError as error:
        fault = f"{model}/config.json cannot be read: {error.strerror}."
        raise FaultError(fault, mend) from error
    except (
        *(ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError),
    ) as error:
        fault = f"{model}/config.json tells no width and layers; expected a model's."
        raise FaultError(fault, mend) from error
