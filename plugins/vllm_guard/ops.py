"""The opaque op through which a compiled model, or a captured graph, calls a guard.

Runs in the worker. The compiler sees an op that mutates `hidden_states`; which policy
a row belongs to, and every value of every rule, is content of buffers it never sees.
"""

import time
from collections import deque

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from guard.pipeline import Guard, read_resid
from vllm_guard.recorder import Recorder

__all__ = ["bind", "bound", "call_guard", "take_seconds"]

SAMPLED = 64
"""One call in so many is timed."""
MAX_SECONDS = 1024
"""Times that wait to be told, at most: idle passes take none along."""

_guards: list[Guard] = []
_recorder: Recorder | None = None
_calls = 0
_seconds: deque[float] = deque(maxlen=MAX_SECONDS)


def bind(guards: list[Guard], *, recorder: Recorder | None = None) -> None:
    """Let `call_guard(..., index)` reach `guards[index]` in this process.

    Args:
        guards: In the order of their indices.
        recorder: Sees what flows on behind each of them.
    """
    global _recorder
    _guards[:] = guards
    _recorder = recorder


def bound() -> list[Guard]:
    """Return the guards of this process, in the order of their indices."""
    return list(_guards)


def _guard(hidden_states: Tensor, residual: Tensor | None, index: int) -> None:
    global _calls
    _calls += 1
    if _calls % SAMPLED:
        _guards[index](hidden_states, residual)
    else:
        start = time.perf_counter()
        _guards[index](hidden_states, residual)
        _seconds.append(time.perf_counter() - start)
    if _recorder is not None:
        _recorder.see(_guards[index], read_resid(hidden_states, residual))


def take_seconds() -> list[float]:
    """Return how long the timed calls took since the last time this was asked.

    On the host's clock: a replayed CUDA graph calls nothing, and is not timed.
    """
    taken = list(_seconds)
    _seconds.clear()
    return taken


def _guard_fake(hidden_states: Tensor, residual: Tensor | None, index: int) -> None:
    return None


if not hasattr(torch.ops.vllm, "guard"):
    direct_register_custom_op(
        op_name="guard",
        op_func=_guard,
        mutates_args=["hidden_states"],
        fake_impl=_guard_fake,
    )

call_guard = torch.ops.vllm.guard
