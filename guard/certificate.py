"""What a certificate says of itself, for a server that runs the certified policy.

`guard certify` writes it; here only its id and whom it was issued for are read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from guard.errors import CertificateError
from guard.file import read_file
from guard.fingerprint import fingerprint
from guard.policy import PolicyFile

__all__ = ["Attestation", "certificate_id", "load_certificates", "read_certificate"]

MAX_FILE_BYTES = 64 << 20
"""Of a certificate; those of this project have about 100 kB."""

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class Attestation:
    """Which certificate it is, and for what."""

    id: str
    """sha256 of its content, 64 hexadecimal digits."""
    policy_fingerprint: str
    """Of the policy that was certified."""
    issued: str
    """ISO date."""


class _Subject(BaseModel):
    policy_fingerprint: _Digest


class _Certificate(BaseModel):
    """Those of its keys that are read; the others only count for its id."""

    id: _Digest
    issued: Annotated[str, Field(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    subject: _Subject


def certificate_id(content: Mapping[str, Any]) -> str:
    """Hash everything a certificate says, but its id.

    Returns:
        64 hexadecimal digits.
    """
    said = {key: value for key, value in content.items() if key != "id"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_certificate(path: Path) -> Attestation:
    """Read what a certificate is for.

    Raises:
        CertificateError: It cannot be read, is none, or was changed since.
    """
    try:
        content = json.loads(read_file(path, limit=MAX_FILE_BYTES).decode())
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); expected a certificate."
        raise CertificateError(message) from error
    except (ValueError, RecursionError) as error:
        message = f"{path}: is not JSON; expected what `guard certify` writes."
        raise CertificateError(message) from error
    try:
        said = _Certificate.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"])) or "content"
        message = (
            f"{path}: its {name} is missing or not valid; expected what "
            "`guard certify` writes."
        )
        raise CertificateError(message) from error
    if said.id != certificate_id(content):
        message = (
            f"{path}: was changed since it was issued; expected it as `guard certify` "
            "wrote it."
        )
        raise CertificateError(message)
    return Attestation(said.id, said.subject.policy_fingerprint, said.issued)


def load_certificates(policy_file: PolicyFile) -> dict[str, Attestation]:
    """Read the certificates of those policies that have one, by name of the policy.

    Raises:
        CertificateError: One is damaged, or was issued for another policy.
        PolicyError: A calibration cannot be read.
    """
    certificates = {}
    for name, policy in policy_file.policies.items():
        if policy.certificate is None:
            continue
        found = read_certificate(policy.certificate)
        wanted = fingerprint(policy_file, name)
        if found.policy_fingerprint != wanted:
            message = (
                f"{policy.certificate}: was issued for policy fingerprint "
                f"{found.policy_fingerprint[:12]}..., that of {name!r} is "
                f"{wanted[:12]}...; certify it again, or leave 'certificate' out."
            )
            raise CertificateError(message)
        certificates[name] = found
    return certificates
