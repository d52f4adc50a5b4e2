"""The one way this plugin changes vLLM: wrap a method, once, or fail loudly.

Each caller says what it wraps, why, and when that can go.
"""

import functools
from collections.abc import Callable
from typing import Any

from guard.errors import EngineError

__all__ = ["wrap"]


def wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Let `around(original, self, ...)` stand for `owner.name(self, ...)`.

    A second call for the same method does nothing.

    Raises:
        EngineError: This vLLM has no such method: the seam has moved.
    """
    original = owner.__dict__.get(name)
    if original is None:
        message = (
            f"This vLLM has no {owner.__module__}.{owner.__qualname__}.{name}; "
            "expected one the plugin was tested with."
        )
        raise EngineError(message)
    if getattr(original, "wrapped_by_guard", False):
        return

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    wrapper.wrapped_by_guard = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)
