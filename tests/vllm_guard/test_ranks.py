"""A row is guarded where every rank guarded it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vllm_guard import context, ranks
from vllm_guard.rows import StepRequest, StepRows

from guard.pipeline import StepBuffers


@pytest.fixture
def rows(state: context.Context) -> StepRows:
    """Four rows of a request, at a place with two hooks; all have met both."""
    step = StepBuffers(
        max_tokens=8, max_requests=2, num_columns=len(state.current.layout)
    )
    rows = StepRows(step, num_hooks=2, default_slot=1)
    request = StepRequest(
        *("a", 1, 0, 4), starts_with_bos=False, admitted=True, num_prompt_tokens=4
    )
    rows.begin([request], kv_slots=None)
    step.marks_of(4).visits.fill_(2)
    return rows


@pytest.fixture
def be_one_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[float]]]:
    """Be one of so many ranks; the others together missed these rows.

    Returns what this rank tells them, call by call.
    """

    def be(world_size: int, *, others_missed: list[float]) -> list[list[float]]:
        told = []

        class Group:
            def __init__(self) -> None:
                self.world_size = world_size

            def all_reduce(self, missed: Tensor) -> Tensor:
                told.append(missed.tolist())
                return missed + torch.tensor(others_missed)

        monkeypatch.setattr("vllm.distributed.get_tp_group", Group)
        return told

    return be


def guarded(rows: StepRows) -> int:
    return rows.finish()["a"].guarded


def test_one_rank_asks_nobody(
    rows: StepRows, be_one_of: Callable[..., list[list[float]]]
) -> None:
    told = be_one_of(1, others_missed=[1.0] * 4)
    ranks.agree(rows)
    assert (guarded(rows), told) == (4, [])


def test_rows_that_every_rank_guarded_count_in_one_collective(
    rows: StepRows, be_one_of: Callable[..., list[list[float]]]
) -> None:
    told = be_one_of(8, others_missed=[0.0] * 4)
    ranks.agree(rows)
    assert (guarded(rows), told) == (4, [[0.0] * 4])


@pytest.mark.parametrize("missed", [[0.0, 1.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]])
def test_a_row_that_another_rank_missed_does_not_count(
    missed: list[float], rows: StepRows, be_one_of: Callable[..., list[list[float]]]
) -> None:
    be_one_of(8, others_missed=missed)
    ranks.agree(rows)
    assert guarded(rows) == 3


@pytest.mark.parametrize("visits", [0, 1, 3])
def test_a_rank_tells_the_others_what_it_missed_or_met_twice(
    visits: int, rows: StepRows, be_one_of: Callable[..., list[list[float]]]
) -> None:
    told = be_one_of(2, others_missed=[0.0] * 4)
    rows.step.marks_of(4).visits[2] = visits
    ranks.agree(rows)
    assert (guarded(rows), told) == (3, [[0.0, 0.0, 1.0, 0.0]])
