"""The in-band channel: what travels with the tokens, from worker to API server.

Worker -> `ModelRunnerOutput.guard` -> engine core -> `EngineCoreOutput` -> API server.
Readings ride on the messages that carry the tokens they belong to, so they cannot
arrive late, twice, or at the wrong server.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from guard.pipeline import Marks

__all__ = [
    "CARRIER_KEY",
    "Progress",
    "RequestReadings",
    "Span",
    "StepReadings",
    "attach",
]

CARRIER_KEY = "guard"
"""Key of a progress in `EngineCoreOutput.kv_transfer_params`, the one dict field that
vLLM carries from the engine core to the API server."""


class RequestReadings(NamedTuple):
    """What the worker read on consecutive positions of one request."""

    first: int
    """Position of the first row; 0 where a cached prefix was found."""
    scores: npt.NDArray[np.float32]
    """`[num_rows, num_columns]`"""
    clamped: npt.NDArray[np.int32]
    """Bit r is set where rule r changed the token, `[num_rows]`."""
    guarded: int
    """Rows computed in this step that passed every hook."""
    broken: int = 0
    """Rows computed in this step of which the model made what is not finite."""


class Span(NamedTuple):
    """Where one request's rows lie in a step's table."""

    first: int
    """Position of the first one."""
    start: int
    end: int
    guarded: int
    """As in `RequestReadings`, like the next."""
    broken: int


class StepReadings(Mapping[str, RequestReadings]):
    """The readings of every request of a step, by request id.

    One table for all of them, so that it costs little to send.
    """

    def __init__(self, table: npt.NDArray[np.int32], spans: dict[str, Span]) -> None:
        """Cut nothing up yet.

        Args:
            table: Rows of `StepBuffers.readings`.
            spans: Which of them are whose.
        """
        self._table = table
        self._spans = spans

    def __getitem__(self, request_id: str) -> RequestReadings:
        first, start, end, guarded, broken = self._spans[request_id]
        rows = self._table[start:end]
        scores = rows[:, : -len(Marks._fields)].view(np.float32)
        clamped = rows[:, -len(Marks._fields)]
        return RequestReadings(first, scores, clamped, guarded, broken)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)


class Progress(NamedTuple):
    """What the engine core tells an API server with each output of a request."""

    verdict: dict[str, Any]
    """`Verdict.to_wire()`, a running total."""
    ratios: dict[str, float]
    """Largest score / threshold so far, by monitor."""
    maxima: list[float]
    """Largest score so far, in the order of the policy's monitors."""
    total_length: int
    """Most tokens the request can have, prompt and output."""
    observed: dict[str, float]
    """Largest value so far of what has no threshold, by name."""
    counted: dict[str, int]
    """Tokens and errors of this engine not told before, by kind."""
    hook_seconds: list[float]
    """Sampled calls of its hooks not told before."""


def attach(output: Any, readings: StepReadings, seconds: list[float]) -> None:
    """Let a model runner's output carry the readings of its step.

    An asynchronous output wraps the one that is sent to the engine core; the two
    runners call it differently.
    """
    inner = output
    for name in ("_model_runner_output", "model_runner_output"):
        inner = getattr(output, name, inner)
    inner.guard = readings
    inner.guard_seconds = seconds
