"""Whose API key a request carries, and whether an administrator sent it.

A server may check API keys or not; a policy file may give some of them to tenants. The
administrator's token is one more key, for what no client may do. Only digests are kept.
Runs in the API server.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence

from guard.errors import EngineError, PolicyError
from guard.policy import Tenant

__all__ = ["ADMIN_HEADER", "ADMIN_VARIABLE", "AdminToken", "KeyRing"]

ADMIN_HEADER = "x-guard-admin-token"
"""Header of a request that carries the administrator's token."""
ADMIN_VARIABLE = "GUARD_ADMIN_TOKEN"
"""Where server and command line find the token."""


class AdminToken:
    """What an administrator shows; where there is none, nobody is one."""

    def __init__(self, token: str | None) -> None:
        """Keep the digest.

        Args:
            token: As it stands in the server's environment; None or empty is none.

        Raises:
            EngineError: It is too short to keep anybody out, or no header can bring it.
        """
        if token and re.fullmatch("[!-~]{16,}", token) is None:
            message = (
                f"{ADMIN_VARIABLE} is no token; expected at least 16 printable ASCII "
                "characters without spaces."
            )
            raise EngineError(message)
        self._digest = _hash(token) if token else None

    @property
    def is_set(self) -> bool:
        """Whether there is a token."""
        return self._digest is not None

    def admits(self, shown: str | None) -> bool:
        """Whether this is the token; compared in constant time."""
        if self._digest is None or shown is None:
            return False
        return hmac.compare_digest(_hash(shown), self._digest)


class KeyRing:
    """The API keys that a server accepts, and the tenants some of them belong to."""

    def __init__(self, tenants: Sequence[Tenant], *, accepted: Sequence[str]) -> None:
        """Keep the digests.

        Args:
            tenants: Of the policy file.
            accepted: The keys themselves; where there are none, everybody is let in.

        Raises:
            PolicyError: A tenant's key is not among those the server accepts, so
                that its requests would run under what is public, or not at all.
        """
        self._accepted = [_hash(key) for key in accepted]
        self._tenants = [(bytes.fromhex(t.api_key_sha256), t) for t in tenants]
        if tenants and not accepted:
            message = (
                "tenants: the server checks no API keys; expected --api-key with the "
                "key of each tenant."
            )
            raise PolicyError(message)
        for index, (digest, _) in enumerate(self._tenants):
            if not self._accepts(digest):
                message = (
                    f"tenants[{index}].api_key_sha256: the server accepts no such key; "
                    "expected the sha256 of one of its --api-key."
                )
                raise PolicyError(message)

    def lets_in(self, authorization: str | None) -> bool:
        """Whether the server accepts the key in an `Authorization` header."""
        if not self._accepted:
            return True
        return self._accepts(_read(authorization))

    def _accepts(self, digest: bytes) -> bool:
        # Every one is compared, so that the time it takes names none of them.
        matches = [hmac.compare_digest(digest, known) for known in self._accepted]
        return any(matches)

    def tenant(self, authorization: str | None) -> Tenant | None:
        """Return whose key an `Authorization` header carries, if it is a tenant's."""
        digest = _read(authorization)
        found = None
        for known, tenant in self._tenants:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found


def _read(authorization: str | None) -> bytes:
    """Return the digest of a bearer's key; nobody's where there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return _hash(key) if scheme.lower() == "bearer" else b""


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
