"""The in-band channel: what travels with the tokens, from worker to API server.

Worker -> `ModelRunnerOutput.guard` -> engine core -> `EngineCoreOutput` -> API server.
Readings ride on the messages that carry the tokens they belong to, so they cannot
arrive late, twice, or at the wrong server.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["CARRIER_KEY", "Progress", "RequestReadings", "StepReadings", "attach"]

CARRIER_KEY = "guard"
"""Key of a progress in `EngineCoreOutput.kv_transfer_params`, the one dict field that
vLLM carries from the engine core to the API server."""


@dataclass(frozen=True, slots=True)
class RequestReadings:
    """What the worker read on consecutive positions of one request."""

    first: int
    """Position of the first row; 0 where a cached prefix was found."""
    scores: npt.NDArray[np.float32]
    """`[num_rows, num_columns]`"""
    clamped: npt.NDArray[np.int32]
    """Bit r is set where rule r changed the token, `[num_rows]`."""
    guarded: int
    """Rows computed in this step that passed every hook."""


StepReadings = dict[str, RequestReadings]
"""By request id, for every request of a step."""


class Progress(NamedTuple):
    """What the engine core tells an API server with each output of a request."""

    verdict: dict[str, Any]
    """`Verdict.to_wire()`, a running total."""
    ratios: dict[str, float]
    """Largest score / threshold so far, by monitor."""
    observed: dict[str, float]
    """Largest value so far of what has no threshold, by name."""
    counted: dict[str, int]
    """Tokens and errors of this engine not told before, by kind."""
    hook_seconds: list[float]
    """Sampled calls of its hooks not told before."""


def attach(output: Any, readings: StepReadings, seconds: list[float]) -> None:
    """Let a model runner's output carry the readings of its step.

    Asynchronous outputs wrap the one that is sent to the engine core.
    """
    inner = getattr(output, "_model_runner_output", output)
    inner.guard = readings
    inner.guard_seconds = seconds
