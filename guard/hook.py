"""Where in the model the guard reads and writes, in the field's own words."""

import re
from dataclasses import dataclass
from typing import Self

from guard.errors import PolicyError

__all__ = ["HookPoint"]

_PATTERN = re.compile(r"layers\.(0|[1-9]\d*)\.resid_(pre|post)")


@dataclass(frozen=True, slots=True, order=True)
class HookPoint:
    """The residual stream behind one decoder layer.

    `layers.<n>.resid_pre` is the same tensor as `layers.<n-1>.resid_post`, and is
    kept under the latter name so that one place has one name.
    """

    layer: int
    """Index of the decoder layer whose output is the hook point."""

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
        layer = int(match[1]) - (match[2] == "pre")
        if layer < 0:
            message = (
                "Hook point 'layers.0.resid_pre' lies before the first layer; "
                "expected 'layers.<n>.resid_post'."
            )
            raise PolicyError(message)
        return cls(layer)

    def __str__(self) -> str:
        """Return the name, as it is written in a policy file."""
        return f"layers.{self.layer}.resid_post"
