"""Everything about a policy file that can be known without an engine."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from guard.calibration import Calibration, load_calibration, share_budgets
from guard.certificate import load_certificates
from guard.drill import load_edits
from guard.errors import CalibrationError
from guard.file import open_regular, read_file
from guard.fingerprint import clamps_digest
from guard.monitor import list_columns
from guard.pipeline import StepBuffers, build_guards
from guard.policy import Monitor, PolicyFile
from guard.sae.load import load_sae
from guard.sae.model import Sae
from guard.score import SCORES

__all__ = [
    "MAX_CONFIG_BYTES",
    "check_calibrations",
    "check_origin",
    "check_policy",
    "digest_model",
    "list_used_saes",
    "load_calibrations",
    "load_saes",
]

MAX_CONFIG_BYTES = 16 << 20
"""Of a model's config.json; those that models come with have a few thousand."""
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def check_policy(policy_file: PolicyFile) -> dict[str, Sae]:
    """Load and compile all that a policy file names.

    Returns:
        Its SAEs, by name.

    Raises:
        GuardError: The first thing that is missing or does not fit.
    """
    columns = list_columns(policy_file)
    # First: a wrong SAE would look like a calibration for another one.
    saes = load_saes(policy_file)
    calibrations = load_calibrations(policy_file)
    check_calibrations(policy_file, calibrations)
    load_certificates(policy_file)
    step = StepBuffers(max_tokens=1, max_requests=1, num_columns=len(columns))
    edits = load_edits(policy_file)
    build_guards(policy_file, saes, calibrations, step, edits=edits)
    return saes


def load_saes(policy_file: PolicyFile) -> dict[str, Sae]:
    """Load the SAEs that any policy clamps or monitors, or a drill names, by name.

    Raises:
        SaeError: A file is missing, or is not the one named.
    """
    sources = {name: policy_file.saes[name] for name in list_used_saes(policy_file)}
    return {
        name: load_sae(
            source.path,
            format=source.format,
            sha256=source.sha256,
            hook_point=source.hook_point,
        )
        for name, source in sources.items()
    }


def list_used_saes(policy_file: PolicyFile) -> list[str]:
    """Return the SAEs that any policy or drill needs, in the order of the file."""
    used = {drill.sae for drill in policy_file.drills}
    for policy in policy_file.policies.values():
        used.update(rule.sae for rule in policy.clamps)
        used.update(monitor.sae for monitor in policy.monitors if monitor.sae)
    return [name for name in policy_file.saes if name in used]


def load_calibrations(policy_file: PolicyFile) -> dict[str, Calibration]:
    """Load the calibrations of all monitors, by path.

    Raises:
        CalibrationError: A file is missing or damaged.
    """
    columns = list_columns(policy_file)
    paths = dict.fromkeys(column.calibration for column in columns)
    return {path: load_calibration(Path(path)) for path in paths if path is not None}


def check_calibrations(
    policy_file: PolicyFile, calibrations: Mapping[str, Calibration]
) -> None:
    """Check that each monitor was calibrated as it is, and for the rate it promises.

    Raises:
        CalibrationError: A calibration was made for something else, or holds too few
            requests.
    """
    for name, policy in policy_file.policies.items():
        for monitor in policy.monitors:
            calibration = calibrations[str(monitor.calibration)]
            _check_entry(policy_file, monitor, calibration)
            _check_clamps(policy_file, name, monitor, calibration)
        for (path, _), targets in share_budgets(policy).items():
            for length in calibrations[path].lengths:
                calibrations[path].thresholds(length, targets=targets)


def _check_entry(
    policy_file: PolicyFile, monitor: Monitor, calibration: Calibration
) -> None:
    entry = calibration.entries.get(monitor.name)
    if entry is None:
        message = (
            f"{monitor.calibration}: has no monitor {monitor.name!r}; expected one of "
            f"{', '.join(calibration.entries)}, or calibrate again."
        )
        raise CalibrationError(message)
    needs_sae = SCORES[monitor.score].needs_sae
    wanted = {
        "score": monitor.score,
        "hook_point": policy_file.hook_point(monitor),
        "stage": monitor.stage,
        "window": monitor.window,
        "drift": monitor.drift,
        "sae_sha256": policy_file.saes[str(monitor.sae)].sha256 if needs_sae else None,
    }
    for key, value in wanted.items():
        found = getattr(entry, key)
        if found != value:
            message = (
                f"{monitor.calibration}: monitor {monitor.name!r} was calibrated with "
                f"{key} {found!r}; expected {value!r}. Calibrate again."
            )
            raise CalibrationError(message)


def _check_clamps(
    policy_file: PolicyFile, name: str, monitor: Monitor, calibration: Calibration
) -> None:
    if calibration.provenance.get("clamps") != clamps_digest(policy_file, name):
        message = (
            f"{monitor.calibration}: was made under other clamps than those of policy "
            f"{name!r}; expected its own. Calibrate again."
        )
        raise CalibrationError(message)


def check_origin(
    calibrations: Mapping[str, Calibration], *, model: str | None, dtype: str
) -> None:
    """Check that calibrations were made for the model that is served.

    Args:
        calibrations: By path.
        model: Its digest (`digest_model`); one without a digest is not checked.
        dtype: What it computes in, such as "bfloat16".

    Raises:
        CalibrationError: One was made for another model or dtype.
    """
    for path, calibration in calibrations.items():
        for key, value in (("model_digest", model), ("dtype", dtype)):
            found = calibration.provenance.get(key)
            if value is not None and found != value:
                message = (
                    f"{path}: was made for {key} {found!r}; this server has {value!r}. "
                    "Calibrate again."
                )
                raise CalibrationError(message)


def digest_model(folder: Path) -> str:
    """Return what tells a model from another one, without reading all of it.

    Hashes config.json and, of each safetensors file, its size, its header and samples
    of its content.

    Raises:
        GuardError: The folder has no configuration.
    """
    digest = hashlib.sha256()
    try:
        digest.update(read_file(folder / "config.json", limit=MAX_CONFIG_BYTES))
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with open_regular(path) as file:
                for offset in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        message = f"{folder}: cannot be read ({error.strerror}); expected a model."
        raise CalibrationError(message) from error
    return digest.hexdigest()
