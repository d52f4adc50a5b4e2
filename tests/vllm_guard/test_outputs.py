"""Where outputs are processed: the verdict of a request is that of its last token."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessorOutput
from vllm_guard import context, outputs
from vllm_guard.readings import CARRIER_KEY, Progress

from guard.request import TICKET_KEY

STOP = 100
"""Tokens from here on complete a stop string."""


class FakeRequest(list[int]):
    """As much of vLLM's request as knows which tokens it has; it has no prompt."""

    prompt_len = 0
    logprobs_processor = None

    @property
    def detokenizer(self) -> Any:
        return SimpleNamespace(num_output_tokens=lambda: len(self))


class FakeProcessor:
    """As much of vLLM's processor as ends a request at a stop string."""

    def __init__(self, *names: str) -> None:
        self.request_states = {name: FakeRequest() for name in names}
        self.received = dict(self.request_states)

    def process_outputs(self, made: list[EngineCoreOutput]) -> OutputProcessorOutput:
        stopped = []
        for output in made:
            if output.request_id not in self.request_states:
                continue
            self.received[output.request_id] += output.new_token_ids
            is_over = output.finish_reason is not None
            if is_over or output.new_token_ids[0] >= STOP:
                del self.request_states[output.request_id]
            if output.new_token_ids and output.new_token_ids[0] >= STOP:
                stopped.append(output.request_id)
        return OutputProcessorOutput(list(made), stopped)


class FakeBoard:
    """As much of a board as takes verdicts."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, int]] = []
        self.counted = 0
        self.finished: list[Any] = []
        self.errors: list[str] = []
        self.metrics = SimpleNamespace(count_error=self.errors.append)

    def finish(self, request: Any, *, cut_short: bool) -> None:
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


# Whoever leaves


class LeavableProcessor:
    """As much of vLLM's processor as adds requests, and aborts them by families."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}
        self.children: dict[str, list[str]] = {}

    def add_request(self, request: Any) -> None:
        self.request_states[request.request_id] = SimpleNamespace()

    def abort_requests(self, names: list[str]) -> list[str]:
        aborted = []
        for name in names:
            if self.request_states.pop(name, None) is not None:
                aborted.append(name)
            elif name in self.children:
                # As vLLM does: through the method that is wrapped.
                aborted += outputs._abort_requests(
                    LeavableProcessor.abort_requests, self, self.children.pop(name)
                )
        return aborted


def begin(processor: LeavableProcessor, name: str, ticket: str | None = None) -> None:
    extra_args = {} if ticket is None else {TICKET_KEY: ticket}
    request = SimpleNamespace(
        request_id=name, sampling_params=SimpleNamespace(extra_args=extra_args)
    )
    outputs._add_request(LeavableProcessor.add_request, processor, request)


def leave(processor: LeavableProcessor, name: str) -> list[str]:
    original = LeavableProcessor.abort_requests
    return outputs._abort_requests(original, processor, [name])


def count(registry: CollectorRegistry, policy: str) -> float | None:
    labels = {"policy": policy, "mode": "enforce", "action": "allow"}
    return registry.get_sample_value("guard_requests_total", labels)


@pytest.fixture
def registry(state: context.Context) -> CollectorRegistry:
    registry = CollectorRegistry()
    context.get_board(registry)
    return registry


def test_who_leaves_before_the_engine_has_spoken_counts_under_his_policy(
    state: context.Context, registry: CollectorRegistry
) -> None:
    processor = LeavableProcessor()
    research = context.sampling_args("research", trace="none")[TICKET_KEY]
    for name, ticket in (("a", research), ("b", None), ("c", "g1.forged.x")):
        begin(processor, name, ticket)
        assert leave(processor, name) == [name]
    assert count(registry, "research") == 1
    assert count(registry, "default") == 2
    assert leave(processor, "a") == []
    assert count(registry, "research") == 1


def test_a_constraint_is_a_bad_request_before_the_engine_core_sees_it(
    state: context.Context, registry: CollectorRegistry
) -> None:
    processor = LeavableProcessor()
    request = SimpleNamespace(
        request_id="a",
        sampling_params=SimpleNamespace(
            extra_args=context.sampling_args("free", trace="none"), bad_words=["no"]
        ),
    )
    with pytest.raises(VLLMValidationError, match="'bad_words' constrains") as refused:
        outputs._add_request(LeavableProcessor.add_request, processor, request)
    assert refused.value.parameter == "bad_words"
    assert processor.request_states == {}
    assert count(registry, "free") == 0
    request.sampling_params.bad_words = []
    outputs._add_request(LeavableProcessor.add_request, processor, request)
    assert list(processor.request_states) == ["a"]


def test_a_choice_is_counted_once_though_its_family_is_ended_with_it(
    state: context.Context, registry: CollectorRegistry
) -> None:
    processor = LeavableProcessor()
    processor.children["parent"] = ["0_parent", "1_parent"]
    for name in ("0_parent", "1_parent"):
        begin(processor, name)
    assert leave(processor, "parent") == ["0_parent", "1_parent"]
    assert count(registry, "default") == 2


def test_a_verdict_that_is_behind_its_tokens_vouches_for_none_of_them(
    state: context.Context,
) -> None:
    state.board = FakeBoard()
    processor = FakeProcessor("slow", "neighbour")
    for token in (0, 1):
        made = [make_output("slow", token), make_output("neighbour", token)]
        outputs._process_outputs(FakeProcessor.process_outputs, processor, made)
    made = [make_output("slow", 1), make_output("neighbour", 2)]
    result = outputs._process_outputs(FakeProcessor.process_outputs, processor, made)
    assert processor.received == {"slow": [0, 1], "neighbour": [0, 1, 2]}
    assert made[0].finish_reason is FinishReason.ERROR
    assert result.reqs_to_abort == ["slow"]
    assert state.board.errors == ["engine"]
