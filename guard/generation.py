"""One generation of policies: a policy file with all that it names, as it is served.

A server starts with the first; a reload brings the next. Every process has its own copy
of the same one, and each request belongs to the generation it began under. The slots,
columns and tables that hold generations were laid out for the first, with room for two
at once; `restart_reason` says what does not fit there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from guard.calibration import Calibration, policy_thresholds
from guard.certificate import Attestation, load_certificates
from guard.check import check_calibrations, list_used_saes, load_calibrations
from guard.drill import RecoveryEdit, load_edits
from guard.errors import PolicyError
from guard.fingerprint import file_fingerprint, fingerprint, sae_digest
from guard.monitor import Column, assign_columns, column_of, list_columns
from guard.policy import MAX_DRILLS, PolicyFile

__all__ = ["Generation", "load_generation", "restart_reason"]


@dataclass(frozen=True, slots=True)
class Generation:
    """A policy file, and what a process needs to serve it."""

    number: int
    """1 for the file the server started with."""
    policy_file: PolicyFile
    fingerprint: str
    """Of the whole policy file."""
    fingerprints: Mapping[str, str]
    """Of each policy, by name."""
    layout: tuple[Column, ...]
    """The columns that the server has, whichever generation reads them."""
    numbers: Mapping[Column, int]
    """Which of them each column of this file is."""
    num_slots: int
    """Slots of each generation."""
    calibrations: Mapping[str, Calibration]
    """By path, as the monitors name them; where requests are not judged, none."""
    certificates: Mapping[str, Attestation]
    """Of those policies that have one, by name."""
    edits: Mapping[str, RecoveryEdit]
    """Of the drills, by name, in their order."""
    saes: Mapping[str, str]
    """What tells each SAE in use from another, by name."""
    _thresholds: dict[tuple[str, tuple[int, ...]], tuple[float, ...]] = field(
        default_factory=dict
    )
    """By policy and bucket of each calibration."""

    @property
    def bank(self) -> int:
        """Which half of the slots and tables it has: each generation takes turns."""
        return (self.number - 1) % 2

    def slot(self, policy: str) -> int:
        """Return the slot of a policy; 0 is no policy at all."""
        index = list(self.policy_file.policies).index(policy)
        return self.bank * self.num_slots + index + 1

    def drill(self, name: str | None) -> int:
        """Return the number of a drill; 0 is no drill at all."""
        if name is None:
            return 0
        return self.bank * MAX_DRILLS + list(self.edits).index(name) + 1

    def column_numbers(self, policy: str) -> list[int]:
        """Return the number of the column of each monitor of a policy."""
        monitors = self.policy_file.policies[policy].monitors
        return [self.numbers[column_of(self.policy_file, one)] for one in monitors]

    def identify(self, policy: str) -> str:
        """Return what two requests must have in common to share a cached prefix.

        The fingerprint, and where the scores of a cached token stand.
        """
        numbers = self.column_numbers(policy)
        return "|".join([self.fingerprints[policy], *map(str, numbers)])

    def thresholds(self, policy: str, total_length: int) -> tuple[float, ...]:
        """Return the threshold of each monitor of a policy, in their order.

        Args:
            policy: Its name.
            total_length: Most tokens the request can have, prompt and output.
        """
        # Asked for every request: what is shared how is worked out once.
        buckets = tuple(c.bucket(total_length) for c in self.calibrations.values())
        if (policy, buckets) not in self._thresholds:
            entry = self.policy_file.policies[policy]
            found = policy_thresholds(entry, self.calibrations, total_length)
            ordered = tuple(found[monitor.name] for monitor in entry.monitors)
            self._thresholds[policy, buckets] = ordered
        return self._thresholds[policy, buckets]


def load_generation(
    policy_file: PolicyFile, *, number: int = 1, start: Generation | None = None
) -> Generation:
    """Load what a policy file names, the SAEs apart.

    Args:
        policy_file: Its first policies take the first slots.
        number: Of the generation.
        start: The one that the server started with; None for that one itself.

    Raises:
        GuardError: Something is missing or does not fit; or it needs a restart.
    """
    saes = {
        name: sae_digest(policy_file.saes[name]) for name in list_used_saes(policy_file)
    }
    if start is not None:
        _check_room(start, policy_file, saes)
    certificates = load_certificates(policy_file)
    layout = list_columns(policy_file) if start is None else start.layout
    calibrations = load_calibrations(policy_file)
    # Now, and not at a request, where a calibration does not fit.
    check_calibrations(policy_file, calibrations)
    return Generation(
        number=number,
        policy_file=policy_file,
        fingerprint=file_fingerprint(policy_file),
        fingerprints={
            name: fingerprint(policy_file, name) for name in policy_file.policies
        },
        layout=layout,
        numbers=assign_columns(layout, policy_file),
        num_slots=policy_file.max_policies if start is None else start.num_slots,
        calibrations=calibrations,
        certificates=certificates,
        edits=load_edits(policy_file),
        saes=saes,
    )


def _check_room(
    start: Generation, policy_file: PolicyFile, saes: Mapping[str, str]
) -> None:
    """Refuse what the server that started with `start` cannot take in as it runs.

    Raises:
        PolicyError: It needs a restart.
    """
    reason = restart_reason(start.policy_file, policy_file)
    changed = [name for name, digest in saes.items() if start.saes.get(name) != digest]
    if reason is None and changed:
        reason = f"the files of SAE {changed[0]!r} changed"
    if reason is not None:
        message = f"{reason}; that needs a restart, and the policies stay as they are"
        raise PolicyError(message)


def restart_reason(old: PolicyFile, new: PolicyFile) -> str | None:
    """Return why a server must be started again to serve another policy file.

    Args:
        old: What the server started with, for which its tables were laid out.
        new: What it should serve.

    Returns:
        What is new; None where a reload is enough, so far as the files tell: whether
        there is room for as many latents is known where they are clamped.
    """
    if len(new.policies) > old.max_policies:
        return (
            f"{len(new.policies)} policies are more than there are slots for, "
            f"{old.max_policies} (max_policies at the start)"
        )
    if new.allow_unverified_model != old.allow_unverified_model:
        return "allow_unverified_model changed"
    for name in list_used_saes(new):
        if name not in list_used_saes(old):
            return f"SAE {name!r} was not in use"
        was, now = (file.saes[name].model_dump(exclude={"path"}) for file in (old, new))
        for key, value in now.items():
            if was[key] != value:
                return f"SAE {name!r} has another {key}"
    for at in new.hook_points:
        if at not in old.hook_points:
            return f"hook point {at} is new"
    return _new_machinery(old, new)


def _new_machinery(old: PolicyFile, new: PolicyFile) -> str | None:
    """Return what the hooks would have to do that they were not built for."""
    for name in new.saes:
        for sticky, what in ((False, "clamped"), (True, "clamped with scope: request")):
            if _clamps(new, name, sticky=sticky) > _clamps(old, name, sticky=sticky):
                return f"SAE {name!r} was not {what}"
    drilled = {old.saes[drill.sae].hook_point for drill in old.drills}
    for drill in new.drills:
        if new.saes[drill.sae].hook_point not in drilled:
            return f"drill {drill.name!r} is the first at its hook point"
    try:
        assign_columns(list_columns(old), new)
    except PolicyError as error:
        return str(error)
    return None


def _clamps(policy_file: PolicyFile, sae: str, *, sticky: bool) -> bool:
    """Whether any policy clamps an SAE, on a condition that remembers or at all."""
    return any(
        not sticky or bool(rule.when and rule.when.scope == "request")
        for policy in policy_file.policies.values()
        for rule in policy.clamps
        if rule.sae == sae
    )
