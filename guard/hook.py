"""Where in the model the guard reads and writes, in the field's own words."""

import re
from dataclasses import dataclass
from typing import Self

from guard.errors import PolicyError

__all__ = ["HookPoint"]

_PATTERN = re.compile(r"layers\.(0|[1-9]\d*)\.resid_(pre|post)")


@dataclass(frozen=True, slots=True, order=True)
class HookPoint:
    """The residual stream behind one decoder layer, or before the first.

    `layers.<n>.resid_pre` is the same tensor as `layers.<n-1>.resid_post`, and is
    kept under the latter name so that one place has one name.
    """

    layer: int
    """Index of the decoder layer whose output is the hook point; -1 for what the first
    one reads: a token's embedding, before it has seen any other token."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a hook point as a policy file or an SAE names it.

        Raises:
            PolicyError: The text names no place the guard can hook.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            message = f"Unknown hook point {text!r}; expected 'layers.<n>.resid_post'."
            raise PolicyError(message)
        return cls(int(match[1]) - (match[2] == "pre"))

    def __str__(self) -> str:
        """Return the name, as it is written in a policy file."""
        if self.layer < 0:
            return "layers.0.resid_pre"
        return f"layers.{self.layer}.resid_post"
