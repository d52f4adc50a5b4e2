"""Everything about a policy file that can be known without an engine."""

from collections.abc import Mapping
from pathlib import Path

from guard.calibration import Calibration, load_calibration
from guard.drill import load_edits
from guard.monitor import list_columns
from guard.pipeline import StepBuffers, build_guards
from guard.policy import PolicyFile
from guard.sae.load import load_sae
from guard.sae.model import Sae

__all__ = ["check_policy", "check_targets", "load_calibrations", "load_saes"]


def check_policy(policy_file: PolicyFile) -> dict[str, Sae]:
    """Load and compile all that a policy file names.

    Returns:
        Its SAEs, by name.

    Raises:
        GuardError: The first thing that is missing or does not fit.
    """
    columns = list_columns(policy_file)
    calibrations = load_calibrations(policy_file)
    check_targets(policy_file, calibrations)
    edits = load_edits(policy_file)
    step = StepBuffers(max_tokens=1, max_requests=1, num_columns=len(columns))
    saes = load_saes(policy_file)
    build_guards(policy_file, saes, calibrations, step, edits=edits)
    return saes


def load_saes(policy_file: PolicyFile) -> dict[str, Sae]:
    """Load the SAEs that any policy clamps or monitors, or a drill names, by name.

    Raises:
        SaeError: A file is missing, or is not the one named.
    """
    used = {drill.sae for drill in policy_file.drills}
    for policy in policy_file.policies.values():
        used.update(rule.sae for rule in policy.clamps)
        used.update(monitor.sae for monitor in policy.monitors)
    return {
        name: load_sae(
            source.path,
            format=source.format,
            sha256=source.sha256,
            hook_point=source.hook_point,
        )
        for name, source in policy_file.saes.items()
        if name in used
    }


def load_calibrations(policy_file: PolicyFile) -> dict[str, Calibration]:
    """Load the calibrations of all monitors, by path.

    Raises:
        CalibrationError: A file is missing or damaged.
    """
    return {
        column.calibration: load_calibration(Path(column.calibration))
        for column in list_columns(policy_file)
        if column.calibration is not None
    }


def check_targets(
    policy_file: PolicyFile, calibrations: Mapping[str, Calibration]
) -> None:
    """Check that every calibration holds enough requests for its monitors' targets.

    Raises:
        CalibrationError: One holds too few.
    """
    for policy in policy_file.policies.values():
        for monitor in policy.monitors:
            calibration = calibrations[str(monitor.calibration)]
            for length in calibration.lengths:
                calibration.threshold(length, target_fpr=monitor.target_fpr)
