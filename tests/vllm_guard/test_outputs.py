"""Where outputs are processed: the verdict of a request is that of its last token."""

from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessorOutput
from vllm_guard import context, outputs
from vllm_guard.readings import CARRIER_KEY, Progress

STOP = 100
"""Tokens from here on complete a stop string."""


class FakeProcessor:
    """As much of vLLM's processor as ends a request at a stop string."""

    def __init__(self, *names: str) -> None:
        self.request_states = {name: [] for name in names}
        self.received = dict(self.request_states)

    def process_outputs(self, made: list[EngineCoreOutput]) -> OutputProcessorOutput:
        stopped = []
        for output in made:
            if output.request_id not in self.request_states:
                continue
            self.received[output.request_id] += output.new_token_ids
            if output.finish_reason or output.new_token_ids[0] >= STOP:
                del self.request_states[output.request_id]
            if output.new_token_ids[0] >= STOP:
                stopped.append(output.request_id)
        return OutputProcessorOutput(list(made), stopped)


class FakeBoard:
    """As much of a board as takes verdicts."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, int]] = []
        self.counted = 0
        self.finished: list[Any] = []

    def finish(self, request: Any, *, cut_short: bool) -> None:
        assert not cut_short
        self.finished.append(request)

    def take(self, request: Any, progress: Progress) -> None:
        self.taken.append((request, progress.verdict["tokens_seen"]))

    def count(self, counted: dict[str, int]) -> None:
        self.counted += counted["decode"]


def make_output(name: str, token: int, *, last: bool = False) -> EngineCoreOutput:
    """Make an output whose verdict has seen as many tokens as its own token says."""
    seen = {"tokens_seen": token % STOP}
    progress = Progress(seen, {}, [], 0, {}, {"decode": 1}, [])
    return EngineCoreOutput(
        name,
        [token],
        finish_reason=FinishReason.LENGTH if last else None,
        kv_transfer_params={CARRIER_KEY: progress._asdict()},
    )


@pytest.mark.parametrize("stops_at", [None, 0, 1, 2])
def test_tokens_that_leave_together_are_judged_up_to_the_stop_string(
    state: context.Context, stops_at: int | None
) -> None:
    state.board = FakeBoard()
    processor = FakeProcessor("held", "neighbour")
    held, neighbour = processor.request_states.values()
    tokens = [STOP + i if i == stops_at else i for i in range(3)]
    made = [make_output("held", token, last=token == 2) for token in tokens]
    made.insert(1, make_output("neighbour", 7))
    result = outputs._process_outputs(FakeProcessor.process_outputs, processor, made)
    delivered = tokens if stops_at is None else tokens[: stops_at + 1]
    assert processor.received == {"held": delivered, "neighbour": [7]}
    seen = {id(request): seen for request, seen in state.board.taken}
    assert seen == {id(held): delivered[-1] % STOP, id(neighbour): 7}
    assert [id(request) for request in state.board.finished] == [id(held)]
    assert result.request_outputs == made
    assert result.reqs_to_abort == ([] if stops_at is None else ["held"])
    # What is counted is counted, whoever received the tokens.
    assert state.board.counted == 4
