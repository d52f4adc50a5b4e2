"""Fingerprints: what tells two policies, or what they do to the stream, apart.

Two policies with one fingerprint compute the same and may share cached prefixes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from guard.errors import PolicyError
from guard.file import hash_file
from guard.policy import PolicyFile, SaeSource

__all__ = [
    "clamps_digest",
    "file_fingerprint",
    "fingerprint",
    "list_files",
    "sae_digest",
]


def fingerprint(policy_file: PolicyFile, name: str) -> str:
    """Hash everything that decides what one policy computes.

    Its content, the digests of the SAEs it uses with the small files beside them,
    and the digests of its calibrations; neither its own name, nor file paths, nor
    its certificate, nor anything of other policies.

    Args:
        policy_file: A loaded policy file.
        name: Key of `policies`.

    Returns:
        64 hexadecimal digits.

    Raises:
        PolicyError: There is no such policy, or a calibration cannot be read.
    """
    if name not in policy_file.policies:
        known = ", ".join(policy_file.policies)
        raise PolicyError(f"{name!r} is not in policies; expected one of {known}")
    policy = policy_file.policies[name]
    # A certificate names the fingerprint, and so cannot be in it.
    content = policy.model_dump(mode="json", exclude={"certificate"})
    if policy.constrained_decoding == "allow":
        content.pop("constrained_decoding")  # as before there was such a key
    used = {rule.sae for rule in policy.clamps}
    used |= {monitor.sae for monitor in policy.monitors if monitor.sae}
    for monitor, dumped in zip(policy.monitors, content["monitors"], strict=True):
        if monitor.calibration is not None:
            dumped["calibration"] = _hash_file(monitor.calibration)
        dumped.pop("probe")  # its weights stand in the calibration
        if monitor.drift is None:
            dumped.pop("drift")  # as before there was such a key
    return _hash(
        {
            "schema": 1,
            "on_error": policy_file.on_error,
            "unscored": policy_file.unscored,
            "policy": content,
            "saes": {sae: _identify(policy_file.saes[sae]) for sae in sorted(used)},
        }
    )


def clamps_digest(policy_file: PolicyFile, name: str) -> str:
    """Hash what a policy's clamps do to the stream, whatever they are called.

    Returns:
        64 hexadecimal digits.
    """
    rules = policy_file.policies[name].clamps
    return _hash(
        {
            "clamps": [
                rule.model_dump(mode="json", exclude={"name"}) for rule in rules
            ],
            "saes": {rule.sae: _identify(policy_file.saes[rule.sae]) for rule in rules},
        }
    )


def file_fingerprint(policy_file: PolicyFile) -> str:
    """Hash a whole policy file, for the processes of one server to compare.

    Unlike `fingerprint` it covers names and their order, which decide slots, and
    who may use what, the edits of its drills, which are no policy's, and certificates.

    Returns:
        64 hexadecimal digits.

    Raises:
        PolicyError: A calibration, a certificate or a drill's edit cannot be read.
    """
    content = policy_file.model_dump(mode="json", exclude={"saes", "policies"})
    for drill, dumped in zip(policy_file.drills, content["drills"], strict=True):
        dumped["delta"] = _hash_file(drill.delta)
    saes = {name: _identify(source) for name, source in policy_file.saes.items()}
    policies = [
        [name, fingerprint(policy_file, name), *_certified(policy.certificate)]
        for name, policy in policy_file.policies.items()
    ]
    return _hash({"schema": 1, **content, "saes": saes, "policies": policies})


def list_files(policy_file: PolicyFile) -> list[Path]:
    """Return the files beside a policy file that `file_fingerprint` reads.

    The weights of an SAE are not among them: their digest stands in the policy file.
    """
    files: list[Path | None] = [drill.delta for drill in policy_file.drills]
    for policy in policy_file.policies.values():
        files += [monitor.calibration for monitor in policy.monitors]
        files.append(policy.certificate)
    for source in policy_file.saes.values():
        files += _list_beside(source)
    return sorted({path for path in files if path is not None})


def sae_digest(source: SaeSource) -> str:
    """Hash what tells an SAE from another one, wherever it lies.

    Returns:
        64 hexadecimal digits.

    Raises:
        PolicyError: A file beside its weights cannot be read.
    """
    return _hash(_identify(source))


def _certified(path: Path | None) -> tuple[str, ...]:
    return () if path is None else (_hash_file(path),)


def _hash(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _identify(source: SaeSource) -> dict[str, object]:
    # The digest of the weights does not cover cfg.json and what else decides how
    # they are used: k, the normalisation, the scaling factor.
    beside = {path.name: _hash_file(path) for path in _list_beside(source)}
    return {**source.model_dump(mode="json", exclude={"path"}), "beside": beside}


def _list_beside(source: SaeSource) -> list[Path]:
    # What is no file decides nothing, and a pipe or a device has no end to wait for.
    return [path for path in source.path.glob("*.json") if path.is_file()]


def _hash_file(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot be read ({error.strerror}); expected a file"
        ) from error
