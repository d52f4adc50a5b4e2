"""What is kept back comes out in order, whole at the end, and not past a block."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput
from vllm.v1.engine import FinishReason as Reason
from vllm.v1.outputs import LogprobsLists, SamplingMaskLists
from vllm_guard.holding import Holding

QUEUED, SCHEDULED, PREEMPTED = (
    EngineCoreEvent(kind, 0.0)
    for kind in (
        EngineCoreEventType.QUEUED,
        EngineCoreEventType.SCHEDULED,
        EngineCoreEventType.PREEMPTED,
    )
)


def output(tokens: Sequence[int], reason: Reason | None = None) -> EngineCoreOutput:
    return EngineCoreOutput("r", list(tokens), finish_reason=reason)


def logprobs(tokens: Sequence[int]) -> LogprobsLists:
    column = np.array(tokens).reshape(-1, 1)
    return LogprobsLists(column, -column.astype(float), column[:, 0])


def tokens_of(outputs: Sequence[Any]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@given(
    hold=st.integers(1, 6),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    end=st.sampled_from(["running", "finished", "blocked", "finished and blocked"]),
)
def test_the_last_tokens_stay_until_it_is_known_how_a_request_ends(
    hold: int, counts: list[int], end: str
) -> None:
    holding, left, made = Holding(hold), [], 0
    for number, count in enumerate(counts, 1):
        is_last = number == len(counts)
        is_blocked = "blocked" in end and is_last
        reason = Reason.LENGTH if is_last and end != "running" else None
        newest = output(range(made, made + count), reason)
        leaving = holding.take(newest, is_blocked=is_blocked)
        left += leaving
        made += count
        if reason is None:
            # Whole outputs: one is held as long as its last token is.
            assert made - hold - 3 <= len(tokens_of(left)) <= max(made - hold, 0)
        else:
            assert leaving[-1] is newest
    assert tokens_of(left) == list(range(len(tokens_of(left))))
    if end == "finished":
        assert len(tokens_of(left)) == made
    elif end != "running":
        assert len(tokens_of(left)) == max(made - hold, 0)
        assert all(one.new_token_ids for one in left[:-1])


def test_what_belongs_to_a_dropped_token_goes_with_it() -> None:
    holding = Holding(2)
    first, last = output([1]), output([2, 3, 4], Reason.LENGTH)
    first.new_logprobs, last.new_logprobs = logprobs([1]), logprobs([2, 3, 4])
    last.new_sampling_mask = SamplingMaskLists(np.arange(6), np.array([0, 1, 3, 6]))
    last.routed_experts = np.arange(5)  # of two tokens of the prompt as well
    assert holding.take(first, is_blocked=False) == []
    assert holding.take(last, is_blocked=True) == [first, last]
    assert first.new_logprobs.logprob_token_ids.tolist() == [[1]]
    assert last.new_token_ids == [2]
    assert last.new_logprobs.logprob_token_ids.tolist() == [[2]]
    assert last.new_sampling_mask.token_ids.tolist() == [0]
    assert last.routed_experts.tolist() == [0, 1, 2]


def test_of_an_output_without_a_token_left_nothing_is_left() -> None:
    last = output([2], Reason.LENGTH)
    last.new_logprobs = logprobs([2])
    last.new_sampling_mask = SamplingMaskLists(np.arange(3))
    last.new_prompt_logprobs_tensors = last.prompt_token_id_logprobs = object()
    assert Holding(2).take(last, is_blocked=True) == [last]
    assert tokens_of([last]) == []
    assert last.new_logprobs is last.new_sampling_mask is None
    assert last.new_prompt_logprobs_tensors is last.prompt_token_id_logprobs is None


@pytest.mark.parametrize("hold", [1, 9])
def test_a_blocked_request_still_tells_how_it_began(hold: int) -> None:
    holding = Holding(hold)
    first, second, last = output([1]), output([2]), output([], Reason.LENGTH)
    first.events, last.events = [QUEUED, SCHEDULED], [PREEMPTED]
    first.prefill_stats = SimpleNamespace(num_cached_tokens=3)
    left = [
        *holding.take(first, is_blocked=False),
        *holding.take(second, is_blocked=False),
        *holding.take(last, is_blocked=True),
    ]
    events = [event for output in left for event in output.events or ()]
    assert events == [QUEUED, SCHEDULED, PREEMPTED]
    assert left[0].prefill_stats is first.prefill_stats
    assert all(output.prefill_stats is None for output in left[1:])


def test_a_request_that_goes_on_after_an_end_holds_anew() -> None:
    holding = Holding(1)
    assert holding.take(output([1]), is_blocked=False) == []
    ended = holding.take(output([2], Reason.STOP), is_blocked=False)
    assert tokens_of(ended) == [1, 2]
    assert holding.take(output([3]), is_blocked=False) == []
    assert tokens_of(holding.take(output([4]), is_blocked=False)) == [3]
