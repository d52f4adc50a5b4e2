"""The one way this plugin changes vLLM: wrap a function, once, or fail loudly.

Each caller says what it wraps, why, and when that can go.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from guard.errors import EngineError

__all__ = ["wrap"]


def wrap(owner: type | ModuleType, name: str, around: Callable[..., Any]) -> None:
    """Let `around(original, ...)` stand for `owner.name(...)`, `self` included.

    A second call for the same function does nothing.

    Raises:
        EngineError: This vLLM has no such function: the seam has moved.
    """
    original = owner.__dict__.get(name)
    if original is None:
        place = owner.__name__
        if isinstance(owner, type):
            place = f"{owner.__module__}.{owner.__qualname__}"
        message = (
            f"This vLLM has no {place}.{name}; expected one the plugin was tested with."
        )
        raise EngineError(message)
    if getattr(original, "wrapped_by_guard", False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapper.wrapped_by_guard = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)
