"""A request's last outputs, kept back until what follows them is judged.

Runs in the engine core, where an alarm can still stop them. An output is held whole,
with the verdict of the step that made it, so that a verdict covers the tokens that were
delivered.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

__all__ = ["Holding"]


class Holding:
    """What one request keeps back; `EngineCoreOutput`s go in and come out in order."""

    def __init__(self, hold_tokens: int) -> None:
        """Begin with nothing held.

        Args:
            hold_tokens: Tokens to keep back while the request runs, at least 1.
        """
        self._hold_tokens = hold_tokens
        self._outputs: deque[Any] = deque()
        self._num_tokens = 0

    def take(self, output: Any, *, is_blocked: bool) -> list[Any]:
        """Take in the newest output.

        Args:
            output: Goes behind what is held.
            is_blocked: Whether it ends the request because of an alarm.

        Returns:
            What leaves now, oldest first: all of it at the end of a request, but of a
            blocked one as much as would have left if its tokens had come one by one.
        """
        self._outputs.append(output)
        self._num_tokens += len(output.new_token_ids)
        if is_blocked:
            return self._stop()
        hold_tokens = self._hold_tokens if output.finish_reason is None else 0
        leaving = []
        while self._outputs:
            oldest = self._outputs[0]
            behind = self._num_tokens - len(oldest.new_token_ids)
            if behind < hold_tokens:
                break
            leaving.append(self._outputs.popleft())
            self._num_tokens = behind
        return leaving

    def _stop(self) -> list[Any]:
        """Drop the last tokens; the last output, which tells the end, stays."""
        *earlier, last = self._outputs
        room = max(self._num_tokens - self._hold_tokens, 0)
        self._outputs.clear()
        self._num_tokens = 0
        leaving: list[Any] = []
        dropped: list[Any] = []
        for output in earlier:
            (leaving if room else dropped).append(output)
            room -= _cut(output, room)
        _cut(last, room)
        _inherit(last, dropped)
        return [*leaving, last]


def _cut(output: Any, room: int) -> int:
    """Leave an output at most `room` tokens, and of the rest nothing.

    Returns:
        How many it has now.
    """
    surplus = len(output.new_token_ids) - room
    if surplus <= 0:
        return len(output.new_token_ids)
    output.new_token_ids = output.new_token_ids[:room]
    for name in ("new_logprobs", "new_sampling_mask"):
        part = getattr(output, name)
        if part is not None:
            setattr(output, name, part.slice_request(0, room) if room else None)
    if output.routed_experts is not None:
        output.routed_experts = output.routed_experts[:-surplus]
    if not room:
        output.new_prompt_logprobs_tensors = None
        output.prompt_token_id_logprobs = None
    return room


def _inherit(last: Any, dropped: Sequence[Any]) -> None:
    """Let the end of a request tell what vLLM's own metrics know from its beginning."""
    outputs = (*dropped, last)
    last.events = [event for output in outputs for event in output.events or ()] or None
    stats = (output.prefill_stats for output in outputs)
    last.prefill_stats = next((found for found in stats if found is not None), None)
