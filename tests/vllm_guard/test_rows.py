"""Every row finds its request, and every request its readings."""

import math
import random
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm_guard.readings import RequestReadings, StepReadings
from vllm_guard.rows import (
    DRILL_KEY,
    SLOT_KEY,
    StepRequest,
    StepRows,
    drill_of,
    slot_of,
    slots_of_positions,
)

from guard.pipeline import StepBuffers
from guard.policy import MAX_RULES

BLOCK_SIZE, NUM_BLOCKS, NUM_HOOKS, DEFAULT = 4, 14, 2, 1
LAST, WHOLE = 1, 2
"""Drills: at the last token of the prompt, and at all of them."""


def make_rows(*, max_tokens: int = 16, max_requests: int = 4) -> StepRows:
    step = StepBuffers(max_tokens=max_tokens, max_requests=max_requests, num_columns=1)
    rows = StepRows(
        *(step,), num_hooks=NUM_HOOKS, default_slot=DEFAULT, whole_prompt={WHOLE}
    )
    rows.allocate_column(NUM_BLOCKS * BLOCK_SIZE)
    return rows


def share(name: str, num_rows: int, *, first: int = 0, **values: object) -> StepRequest:
    """One request's part of a step, by default newly admitted."""
    wanted = {"slot": 1, "starts_with_bos": False, "admitted": first == 0}
    wanted["num_prompt_tokens"] = first + num_rows
    return StepRequest(
        id=name,
        first=first,
        num_rows=num_rows,
        **(wanted | values),  # type: ignore[arg-type]
    )


def slots(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def compute(rows: StepRows, tokens: list[int]) -> None:
    """Do what the hooks do: a row's score is its token, sticky bit 0 holds for 11."""
    step, count = rows.step, len(tokens)
    acts = torch.tensor(tokens) * (step.rows_in[:count, 0] > 0)
    step.scores[:count, 0] = acts.float()
    marks = step.marks_of(count)
    marks.clamped.copy_(acts % 4)
    marks.fired.copy_(acts == 11)
    marks.visits.add_(NUM_HOOKS)
    places = step.rows_in[:count, 1]
    step.state[:, 0].scatter_reduce_(0, places, (acts == 11).byte(), "amax")


def read_on(rows: StepRows, kv_slots: list[int]) -> RequestReadings:
    """Admit a request on a cached prefix, and let it compute a 6 behind it."""
    prefix = np.array(kv_slots)
    first = len(prefix)
    request = share("b", 1, first=first, admitted=True, prefix_slots=prefix)
    rows.begin([request], kv_slots=slots(8))
    compute(rows, [6])
    return rows.finish()["b"]


def test_rows_carry_slot_place_and_first_row_of_their_request() -> None:
    rows = make_rows()
    requests = [
        share("a", 3, slot=2),
        share("b", 1, first=7, slot=1, admitted=True),
        share("c", 2, slot=5, starts_with_bos=True),
    ]
    rows.begin(requests, kv_slots=None)
    slot, place, start, drill = rows.step.rows_in.T.tolist()
    assert not any(drill)
    assert slot == [2, 2, 2, 1, 0, 5] + [0] * 10
    assert start[:6] == [0, 0, 0, 3, 4, 4]
    a, b, c = place[0], place[3], place[4]
    assert place == [a, a, a, b, c, c] + [0] * 10
    assert len({0, a, b, c}) == 4


def test_bos_is_exempt_at_position_zero_alone_and_still_visited() -> None:
    rows = make_rows()
    rows.begin([share("a", 2, starts_with_bos=True)], kv_slots=slots(0, 1))
    compute(rows, [3, 5])
    (reading,) = rows.finish().values()
    assert reading.guarded == 2
    assert reading.scores[:, 0].tolist() == [0, 5]
    rows.begin([share("a", 1, first=2, starts_with_bos=True)], kv_slots=slots(2))
    assert rows.step.rows_in[0, 0] == 1


def test_after_a_step_every_row_is_nobodys() -> None:
    rows = make_rows()
    rows.begin([share("a", 16)], kv_slots=torch.arange(16))
    compute(rows, [1] * 16)
    rows.finish()
    assert not rows.step.rows_in.any()


def test_a_smaller_step_leaves_no_row_of_the_one_before() -> None:
    rows = make_rows()
    rows.begin([share("a", 9)], kv_slots=torch.arange(9))
    compute(rows, [1] * 9)
    rows.finish()
    rows.begin([share("a", 1, first=9)], kv_slots=slots(9))
    assert not rows.step.rows_in[1:].any()


def test_a_dummy_pass_before_a_step_is_not_taken_for_a_visit() -> None:
    rows = make_rows()
    rows.clear()
    rows.step.marks_of(8).visits.add_(NUM_HOOKS)  # what vLLM's dummy run leaves
    rows.begin([share("a", 2)], kv_slots=slots(0, 1))
    compute(rows, [1, 2])
    assert rows.finish()["a"].guarded == 2


@pytest.mark.parametrize("visits", [0, 1, 3])
def test_a_row_that_missed_a_hook_or_met_one_twice_is_not_guarded(visits: int) -> None:
    rows = make_rows()
    rows.begin([share("a", 2), share("b", 1)], kv_slots=slots(0, 1, 2))
    compute(rows, [1, 2, 3])
    rows.step.marks[1, 2] = visits
    readings = rows.finish()
    assert (readings["a"].guarded, readings["b"].guarded) == (1, 1)


def test_a_cached_prefix_brings_its_readings_along() -> None:
    rows = make_rows()
    rows.begin([share("a", 5)], kv_slots=slots(20, 21, 22, 23, 4))
    compute(rows, [3, 5, 7, 9, 2])
    rows.finish()
    reading = read_on(rows, [20, 21, 22, 23])
    assert reading.first == 0
    assert reading.scores[:, 0].tolist() == [3, 5, 7, 9, 6]
    assert reading.clamped.tolist() == [3, 1, 3, 1, 2]
    assert reading.guarded == 1


def test_a_prefix_that_missed_a_hook_is_not_taken_for_read() -> None:
    rows = make_rows()
    rows.begin([share("a", 4)], kv_slots=slots(20, 21, 22, 23))
    compute(rows, [3, 5, 7, 9])
    rows.step.marks[1, 2] = NUM_HOOKS - 1
    assert rows.finish()["a"].guarded == 3
    reading = read_on(rows, [20, 21, 22, 23])
    assert reading.first == 2
    assert reading.scores[:, 0].tolist() == [7, 9, 6]


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_in_the_end_is_broken_and_no_other(
    what: float,
) -> None:
    rows = make_rows()
    rows.begin([share("a", 2), share("b", 1)], kv_slots=slots(0, 1, 2))
    compute(rows, [1, 2, 3])
    hidden_states = torch.ones(5, 8, dtype=torch.bfloat16)
    hidden_states[1, 6] = hidden_states[3, 0] = what  # one row more than there are
    rows.mark_broken(hidden_states)
    readings = rows.finish()
    assert [(r.guarded, r.broken) for r in readings.values()] == [(2, 1), (1, 0)]


def test_a_prefix_that_was_broken_is_not_taken_for_read() -> None:
    rows = make_rows()
    rows.begin([share("a", 4)], kv_slots=slots(20, 21, 22, 23))
    compute(rows, [3, 5, 7, 9])
    rows.mark_broken(torch.tensor([[0.0], [math.nan], [0.0], [0.0]]))
    rows.finish()
    assert read_on(rows, [20, 21, 22, 23]).first == 2


def test_a_prefix_that_nothing_ever_computed_is_not_taken_for_read() -> None:
    rows = make_rows()
    assert read_on(rows, [20, 21, 22, 23]).first == 4


def test_a_prefix_that_a_neighbour_computes_in_the_same_step_is_read_after_it() -> None:
    rows = make_rows()
    prefix = np.array([0, 1, 2, 3])
    requests = [
        share("b", 1, first=4, admitted=True, prefix_slots=prefix),
        share("a", 5),
    ]
    rows.begin(requests, kv_slots=slots(9, 0, 1, 2, 3, 4))
    compute(rows, [6, 3, 5, 7, 9, 2])
    readings = rows.finish()
    assert readings["b"].scores[:, 0].tolist() == [3, 5, 7, 9, 6]
    assert readings["a"].scores[:, 0].tolist() == [3, 5, 7, 9, 2]


def state_of(rows: StepRows, row: int) -> list[int]:
    return rows.step.state[rows.step.rows_in[row, 1]].nonzero().flatten().tolist()


def test_sticky_conditions_are_restored_from_a_cached_prefix() -> None:
    rows = make_rows()
    rows.begin([share("a", 4)], kv_slots=slots(0, 1, 2, 3))
    compute(rows, [3, 11, 7, 9])
    rows.step.marks[2, 1] = 1 << (MAX_RULES - 1)
    rows.finish()
    for prefix, met in (([0], []), ([0, 1], [0]), ([1, 2], [0, MAX_RULES - 1])):
        again = share(
            f"b{prefix}",
            1,
            first=len(prefix),
            admitted=True,
            prefix_slots=np.array(prefix),
        )
        rows.begin([again], kv_slots=slots(9))
        assert state_of(rows, 0) == met
        rows.finish()


def test_sticky_conditions_last_over_steps_but_not_into_the_next_request() -> None:
    rows = make_rows(max_requests=1)
    rows.begin([share("a", 2)], kv_slots=slots(0, 1))
    compute(rows, [11, 1])
    rows.finish()
    rows.begin([share("a", 1, first=2)], kv_slots=slots(2))
    assert state_of(rows, 0) == [0]
    rows.finish()
    rows.release(["a"])
    rows.begin([share("b", 1)], kv_slots=slots(3))
    assert state_of(rows, 0) == []


def test_a_rejected_draft_leaves_no_sticky_condition_behind() -> None:
    rows = make_rows()
    rows.begin([share("a", 3)], kv_slots=slots(0, 1, 2))
    compute(rows, [1, 2, 11])
    rows.finish()
    assert rows.rewinds("a", 2)
    assert not rows.rewinds("a", 3)
    goes_on = share("a", 1, first=2, prefix_slots=np.array([0, 1]))
    rows.begin([goes_on], kv_slots=slots(2))
    assert state_of(rows, 0) == []
    compute(rows, [4])
    reading = rows.finish()["a"]
    assert (reading.first, reading.scores[:, 0].tolist()) == (2, [4])


def test_more_requests_than_places_one_after_the_other_are_no_trouble() -> None:
    rows = make_rows(max_requests=1)
    for number in range(5):
        rows.begin([share(str(number), 1)], kv_slots=slots(number))
        rows.finish()
        rows.release([str(number)])
        rows.release([str(number), "never seen"])


def test_a_slot_is_read_from_what_the_engine_core_wrote() -> None:
    def params(extra_args: object) -> SimpleNamespace:
        return SimpleNamespace(extra_args=extra_args)

    assert slot_of(params({SLOT_KEY: 3}), 1) == 3
    for nothing in (None, params(None), params({}), params({SLOT_KEY: "3"})):
        assert slot_of(nothing, 1) == 1


def test_a_drill_is_read_from_what_the_engine_core_wrote() -> None:
    def params(extra_args: object) -> SimpleNamespace:
        return SimpleNamespace(extra_args=extra_args)

    assert drill_of(params({DRILL_KEY: 3, SLOT_KEY: 1})) == 3
    for nothing in (None, params(None), params({}), params({DRILL_KEY: "3"})):
        assert drill_of(nothing) == 0


def drills_of(rows: StepRows, *requests: StepRequest) -> list[int]:
    """Return the drill of each row of a step, which is then over."""
    rows.begin(requests, kv_slots=None)
    count = rows.num_rows
    drills: list[int] = rows.step.drills_of(count).tolist()
    assert not rows.step.rows_in[count:].any()
    rows.finish()
    return drills


@pytest.mark.parametrize(
    ("drill", "chunks"),
    [
        (LAST, [[0, 0, 0, 1], [0]]),
        (LAST, [[0, 0], [0, 1], [0]]),
        (LAST, [[0, 0, 0], [1], [0, 0]]),
        (LAST, [[0, 0, 0], [1, 0, 0]]),
        (WHOLE, [[2, 2, 2, 2], [0]]),
        (WHOLE, [[2], [2, 2, 2, 0], [0]]),
        (0, [[0, 0], [0, 0]]),
    ],
)
def test_a_drill_is_at_its_tokens_however_the_prompt_is_cut(
    drill: int, chunks: list[list[int]]
) -> None:
    rows, first = make_rows(), 0
    for expected in chunks:
        request = share(
            *("a", len(expected)), first=first, drill=drill, num_prompt_tokens=4
        )
        neighbours = [share("b", 2, first=first), share("c", 1, first=first)]
        found = drills_of(rows, neighbours[0], request, neighbours[1])
        assert found == [0, 0, *expected, 0]
        first += len(expected)


@pytest.mark.parametrize("drill", [LAST, WHOLE])
def test_a_prompt_of_one_token_is_drilled_there_unless_it_is_bos(drill: int) -> None:
    rows = make_rows()
    plain, exempt = (
        share(name, 1, drill=drill, starts_with_bos=name == "bos")
        for name in ("word", "bos")
    )
    assert drills_of(rows, plain, exempt) == [drill, 0]
    both = share("both", 2, drill=drill, starts_with_bos=True)
    assert drills_of(rows, both) == [0, drill]


def test_a_resumed_request_is_drilled_again_where_it_is_computed_again() -> None:
    rows = make_rows()
    known = {"drill": LAST, "num_prompt_tokens": 3, "admitted": True}
    assert drills_of(rows, share("a", 5, **known)) == [0, 0, 1, 0, 0]
    rows.release(["a"])
    # On a prefix of its own: what it computed there was drilled.
    prefix = np.array([0, 1, 2, 3])
    assert drills_of(rows, share("a", 2, first=4, prefix_slots=prefix, **known)) == [
        *(0, 0)
    ]
    rows.release(["a"])
    assert drills_of(rows, share("a", 2, first=2, **known)) == [1, 0]


def test_positions_are_found_in_their_blocks() -> None:
    blocks = np.array([7, 2, 9])
    assert slots_of_positions(blocks, np.arange(10), 4).tolist() == [
        *(28, 29, 30, 31, 8, 9, 10, 11, 36, 37)
    ]


@dataclass
class Job:
    """A request of the simulated engine; all its tokens are known beforehand."""

    id: str
    tokens: list[int]
    slot: int
    has_bos: bool
    num_prompt_tokens: int
    drill: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    readings: dict[int, float] = field(default_factory=dict)


class Engine:
    """vLLM's life in small: chunks, prefix caching, preemption, aborts, drafts."""

    def __init__(self, rows: StepRows, *, seed: int, shares_within_step: bool) -> None:
        self.rows = rows
        self.random = random.Random(seed)
        self.shares_within_step = shares_within_step
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.gone: list[str] = []
        self.free = deque(range(NUM_BLOCKS))
        self.users = [0] * NUM_BLOCKS
        self.cached: dict[tuple[object, ...], int] = {}
        self.done = self.scheduled = self.guarded = self.hits = self.preemptions = 0
        self.drilled = 0

    def add(self, number: int) -> None:
        draw = self.random
        family, length = draw.randrange(3), draw.randint(2, 24)
        common = draw.randrange(length)
        tokens = [
            # 11 is what the sticky condition looks for.
            draw.choice([11, *range(900, 930)]) if i >= common else family * 50 + i + 12
            for i in range(length)
        ]
        self.waiting.append(
            Job(
                *(str(number), tokens),
                slot=family + 1,
                has_bos=family == 1,
                num_prompt_tokens=draw.randint(1, length),
                drill=draw.choice([0, 0, LAST, WHOLE]),
            )
        )

    def drop(self, job: Job) -> None:
        """Give a job's blocks back; their content stays until somebody takes them."""
        for block in job.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        job.blocks, job.computed = [], 0
        self.gone.append(job.id)

    def take_block(self, job: Job) -> bool:
        if not self.free:
            return False
        block = self.free.popleft()
        self.cached = {key: b for key, b in self.cached.items() if b != block}
        self.users[block] = 1
        job.blocks.append(block)
        return True

    def keep_blocks(self, job: Job, end: int) -> None:
        for index in range(end // BLOCK_SIZE):
            key = (job.slot, *job.tokens[: (index + 1) * BLOCK_SIZE])
            self.cached.setdefault(key, job.blocks[index])

    def find_prefix(self, job: Job) -> None:
        for end in range(BLOCK_SIZE, len(job.tokens), BLOCK_SIZE):
            block = self.cached.get((job.slot, *job.tokens[:end]))
            if block is None:
                return
            if not self.users[block]:
                self.free.remove(block)
            self.users[block] += 1
            job.blocks.append(block)
            job.computed = end
            self.hits += 1

    def schedule(self, job: Job, budget: int) -> int:
        count = min(self.random.randint(1, 8), budget, len(job.tokens) - job.computed)
        while len(job.blocks) * BLOCK_SIZE < job.computed + count:
            if not self.take_block(job):
                return 0
        if self.shares_within_step:
            self.keep_blocks(job, job.computed + count)
        return count

    def step(self) -> None:
        budget = len(self.rows.step.rows_in)
        shares: list[tuple[Job, int, bool]] = []
        released, self.gone = self.gone, []
        for job in list(self.running):
            if job not in self.running or not budget or self.random.random() < 0.1:
                continue
            count = self.schedule(job, budget)
            if count:
                shares.append((job, count, False))
                budget -= count
            elif self.random.random() < 0.5:
                self.running.remove(job)
                self.drop(job)
                released.append(self.gone.pop())
                self.waiting.append(job)  # behind others: they may take its place
                self.preemptions += 1
        while self.waiting and budget and len(self.running) < 4:
            job = self.waiting[0]
            self.find_prefix(job)
            count = self.schedule(job, budget)
            if not count:
                self.drop(job)
                self.gone.pop()
                break
            self.running.append(self.waiting.popleft())
            shares.append((job, count, True))
            budget -= count
        self.rows.release(released)
        if shares:
            self.run(shares)
        for job in list(self.running):
            if job.computed == len(job.tokens) or self.random.random() < 0.02:
                self.running.remove(job)
                self.drop(job)
                self.done += 1

    def run(self, shares: list[tuple[Job, int, bool]]) -> None:
        """Compute one step and hold it against what is known of every token."""
        requests, kv_slots, tokens, wrong = [], [], [], {}
        for job, count, admitted in shares:
            blocks = np.array(job.blocks)
            places = slots_of_positions(
                blocks, np.arange(job.computed + count), BLOCK_SIZE
            )
            drafts = 0 if self.shares_within_step else self.random.randrange(count)
            wrong[job.id] = drafts
            own = job.tokens[job.computed : job.computed + count - drafts]
            tokens += own + [11] * drafts
            kv_slots += places[job.computed :].tolist()
            goes_back = admitted or self.rows.rewinds(job.id, job.computed)
            requests.append(
                StepRequest(
                    id=job.id,
                    slot=job.slot,
                    first=job.computed,
                    num_rows=count,
                    starts_with_bos=job.has_bos,
                    admitted=admitted,
                    num_prompt_tokens=job.num_prompt_tokens,
                    drill=job.drill,
                    prefix_slots=places[: job.computed] if goes_back else None,
                )
            )
        self.rows.begin(requests, kv_slots=slots(*kv_slots))
        self.check_state(shares)
        self.check_drills(shares)
        compute(self.rows, tokens)
        readings = self.rows.finish()
        for job, count, _ in shares:
            self.scheduled += count
            self.guarded += readings[job.id].guarded
            job.computed += count - wrong[job.id]
            self.keep_blocks(job, job.computed)
            self.check_readings(job, readings)

    def check_state(self, shares: list[tuple[Job, int, bool]]) -> None:
        if self.shares_within_step:
            return  # see the engine core: such an admission waits for a step
        row = 0
        for job, count, _ in shares:
            seen = job.tokens[int(job.has_bos) : job.computed]
            assert state_of(self.rows, row) == ([0] if 11 in seen else [])
            row += count

    def check_drills(self, shares: list[tuple[Job, int, bool]]) -> None:
        found = self.rows.step.drills_of(self.rows.num_rows).tolist()
        expected = []
        for job, count, _ in shares:
            drilled = range(job.num_prompt_tokens)[0 if job.drill == WHOLE else -1 :]
            for position in range(job.computed, job.computed + count):
                exempt = job.has_bos and position == 0
                is_drilled = position in drilled and not exempt
                expected.append(job.drill if is_drilled else 0)
        assert found == expected
        self.drilled += sum(map(bool, found))

    def check_readings(self, job: Job, readings: StepReadings) -> None:
        reading = readings[job.id]
        for offset, score in enumerate(reading.scores[:, 0].tolist()):
            position = reading.first + offset
            if position < job.computed:
                exempt = job.has_bos and position == 0
                assert score == (0 if exempt else job.tokens[position])
                job.readings[position] = score
        assert list(job.readings) == list(range(len(job.readings)))
        assert len(job.readings) >= job.computed


@pytest.mark.parametrize(
    ("shares_within_step", "count"), [(True, 10_000), (False, 1_000)]
)
def test_no_token_goes_unread_and_no_place_is_lost_over_a_long_run(
    shares_within_step: bool, count: int
) -> None:
    rows = make_rows(max_tokens=20)
    engine = Engine(rows, seed=1, shares_within_step=shares_within_step)
    for number in range(count):
        engine.add(number)
        while len(engine.waiting) > 3 or engine.random.random() < 0.3:
            engine.step()
    while engine.waiting or engine.running or engine.gone:
        engine.step()
    assert engine.done == count
    assert engine.guarded == engine.scheduled
    assert engine.hits > count / 4
    assert engine.preemptions > 10
    assert engine.drilled > count / 4
    # Nothing is left: as many places as at first can be taken at once.
    rows.begin([share(f"last{i}", 1) for i in range(4)], kv_slots=torch.arange(4))
    with pytest.raises(IndexError):
        rows.begin([share("one more", 1)], kv_slots=slots(5))


def test_rows_tell_whose_they_are_until_the_step_is_over() -> None:
    rows = StepRows(
        StepBuffers(max_tokens=16, max_requests=4, num_columns=1),
        num_hooks=NUM_HOOKS,
        default_slot=DEFAULT,
    )
    for requests in ([share("a", 3), share("b", 2)], [], [share("b", 1, first=2)]):
        rows.begin(requests, kv_slots=None)
        assert list(rows.requests) == requests
        rows.finish()
        assert list(rows.requests) == []
