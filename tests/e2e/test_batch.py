"""A request is answered and judged as if it were alone, whatever shares its batch.

Each engine answers the same few requests; what surrounds them is what differs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from e2e.serving import Toy
from e2e.stepped import Answer, Ask, SteppedEngine, step_engine
from e2e.traffic import (
    COMMON_WORDS,
    Traffic,
    draw_neighbours,
    expect_same_answer,
    expect_same_rows,
    expect_same_verdict,
    make_traffic,
    rounding,
    salted,
)
from e2e.tripwires import Tripwires

from guard.policy import load_policy
from guard.testing import save_toy_adapter

NEIGHBOURS = 15
TIGHT_BLOCKS = 64
"""2,000 tokens: all prompts of a crowd find room, their answers do not."""
ENGINES = {
    "plain": {},
    "tight": {"num_gpu_blocks_override": TIGHT_BLOCKS},
    "drafting": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    },
    "adapted": {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2},
    "compiled": {"enforce_eager": False},
}


@dataclass(frozen=True)
class Surroundings:
    """What is different from being alone."""

    engine: str = "plain"
    arrange: Callable[[list[Ask], list[Ask]], list[Ask]] = list.__add__
    """Subjects and neighbours, in the order in which they come."""
    chunk: int | None = None


@dataclass(frozen=True)
class Served:
    """What came of it."""

    subjects: list[Answer]
    neighbours: list[Answer]


Serve = Callable[[str], Served]


@dataclass(frozen=True)
class Adapters:
    """Folders of LoRA adapters."""

    idle: str
    """Changes nothing. On CPUs, vLLM 0.32 does not serve requests without an adapter
    beside others that have one (`bgmv_shrink` reads index -1 as the last adapter)."""
    random: str


def hang_up(subjects: list[Ask], neighbours: list[Ask]) -> list[Ask]:
    """Let the neighbours' clients go, one after the other."""
    return subjects + [
        replace(ask, aborts=3 * index) for index, ask in enumerate(neighbours)
    ]


def crowd(subjects: list[Ask], neighbours: list[Ask]) -> list[Ask]:
    """Let neighbours grow until the last to come, the subjects, are preempted."""
    return [
        replace(ask, prompt=ask.prompt[:40], max_tokens=150) for ask in neighbours
    ] + subjects


def stagger(subjects: list[Ask], neighbours: list[Ask]) -> list[Ask]:
    """Let requests come one after the other."""
    both = [ask for pair in zip(neighbours, subjects, strict=False) for ask in pair]
    return [replace(ask, arrives=4 * index) for index, ask in enumerate(both)]


SURROUNDINGS = {
    "neighbours": Surroundings(),
    "another order": Surroundings(arrange=lambda us, them: [*them, *us][::-1]),
    "late arrivals": Surroundings(arrange=stagger),
    "hung up neighbours": Surroundings(arrange=hang_up),
    "chunks of 16": Surroundings(chunk=16),
    "chunks of 64": Surroundings(chunk=64),
    "chunks of 512": Surroundings(chunk=512),
    "preemption": Surroundings("tight", arrange=crowd),
    "preemption in chunks": Surroundings("tight", arrange=crowd, chunk=64),
    "drafts": Surroundings("drafting"),
    "drafts in chunks": Surroundings("drafting", chunk=16),
    "adapters": Surroundings("adapted"),
    "compilation": Surroundings("compiled"),
}


@pytest.fixture(scope="module")
def traffic(toy: Toy, tripwires: Tripwires) -> Traffic:
    return make_traffic(toy, tripwires)


@pytest.fixture(scope="module")
def adapters(toy: Toy) -> Adapters:
    save_toy_adapter(toy.folder / "idle", scale=0.0)
    save_toy_adapter(toy.folder / "random")
    return Adapters(str(toy.folder / "idle"), str(toy.folder / "random"))


def start(name: str) -> Callable[..., Iterator[SteppedEngine]]:
    @pytest.fixture(scope="module", name=name)
    def engine(
        toy: Toy, traffic: Traffic, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[SteppedEngine]:
        folder = tmp_path_factory.mktemp(name)
        with step_engine(
            toy.model, traffic.policy_file, folder, **ENGINES[name]
        ) as engine:
            yield engine

    return engine


plain, tight, drafting, adapted, compiled = map(start, ENGINES)


@pytest.fixture(scope="module")
def alone(plain: SteppedEngine, traffic: Traffic) -> list[Answer]:
    """Each subject without neighbours, in one piece."""
    return [plain.run([ask])[0] for ask in salted(traffic.subjects, "alone")]


@pytest.fixture(scope="module")
def serve(
    request: pytest.FixtureRequest, traffic: Traffic, adapters: Adapters
) -> Serve:
    """Serve the subjects in some surroundings, once."""
    known: dict[str, Served] = {}

    def run(name: str) -> Served:
        if name not in known:
            surroundings = SURROUNDINGS[name]
            engine: SteppedEngine = request.getfixturevalue(surroundings.engine)
            us, them = list(traffic.subjects), draw_neighbours(NEIGHBOURS)
            if surroundings.engine == "adapted":
                us = [replace(ask, adapter=adapters.idle) for ask in us]
                them = [replace(ask, adapter=adapters.random) for ask in them]
            asks = surroundings.arrange(us, them)
            prompts = [ask.prompt for ask in asks]
            answers = engine.run(salted(asks, name), chunk=surroundings.chunk)
            ours = [answers[prompts.index(ask.prompt)] for ask in us]
            rest = [answer for answer in answers if not any(answer is a for a in ours)]
            known[name] = Served(ours, rest)
        return known[name]

    return run


def test_the_subjects_are_clear_cut(alone: list[Answer]) -> None:
    """Rounding can neither choose another token nor tip a verdict of theirs."""
    clearances = [value for answer in alone for value in answer.clearances]
    # Logits are sums of 64 products; the path to them is one layer longer.
    assert min(clearances) > 2 * rounding()
    for answer in alone:
        assert answer.guard is not None
        for reading in answer.guard["readings"]:
            assert abs(reading["ratio"] - 1) > rounding()
    actions = [answer.guard["action"] for answer in alone if answer.guard]
    assert actions == ["flag", "allow", "flag", "block", "block"]


def test_sticky_conditions_hold_from_the_trigger_on(
    alone: list[Answer], traffic: Traffic
) -> None:
    for answer, ask in zip(alone[:2], traffic.subjects, strict=False):
        assert answer.guard is not None
        trigger = traffic.trigger_of(ask)
        behind = answer.guard["tokens_seen"] - trigger
        assert answer.guard["clamped_tokens"]["lift"] == behind
        assert answer.guard["clamped_tokens"]["push"] == behind


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_request_is_answered_as_if_alone(
    name: str, serve: Serve, alone: list[Answer]
) -> None:
    for answer, one in zip(serve(name).subjects, alone, strict=True):
        expect_same_answer(answer, one)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_request_is_judged_as_if_alone(
    name: str, serve: Serve, alone: list[Answer], traffic: Traffic
) -> None:
    served = serve(name).subjects
    for answer, one, ask in zip(served, alone, traffic.subjects, strict=True):
        expect_same_verdict(answer, one, tolerance=rounding())
        expect_same_rows(
            answer, one, traffic.column_numbers(ask.policy), tolerance=rounding()
        )


@pytest.mark.parametrize("name", ["preemption", "preemption in chunks"])
def test_the_tight_engine_preempts(name: str, serve: Serve) -> None:
    sticky = serve(name).subjects[:2]
    assert any(answer.preemptions for answer in sticky)


def test_some_neighbours_are_hung_up_on_in_the_middle(serve: Serve) -> None:
    neighbours = serve("hung up neighbours").neighbours
    cut = [answer for answer in neighbours if answer.finish_reason is None]
    assert sum(len(answer.tokens) > 0 for answer in cut) > 2


def test_the_drafting_engine_accepts_and_rejects(
    serve: Serve, drafting: SteppedEngine
) -> None:
    serve("drafts")
    counts = drafting.count()
    assert 0 < counts.accepted < counts.drafted


@pytest.mark.parametrize("chunk", [None, 64])
def test_what_neighbours_say_and_under_which_policy_changes_no_bit(
    chunk: int | None, plain: SteppedEngine, traffic: Traffic
) -> None:
    """The geometry of the batch is the same: so is every bit of every column."""
    answers = [
        plain.run(
            salted([*traffic.subjects, *neighbours], f"bits-{chunk}-{index}"),
            chunk=chunk,
        )[: len(traffic.subjects)]
        for index, neighbours in enumerate(
            [
                draw_neighbours(NEIGHBOURS),
                draw_neighbours(NEIGHBOURS, policies=["open"]),
                draw_neighbours(NEIGHBOURS, policies=["both", "other"]),
                draw_neighbours(NEIGHBOURS, words=COMMON_WORDS[:2]),
            ]
        )
    ]
    for others in answers[1:]:
        for answer, first in zip(others, answers[0], strict=True):
            assert answer.tokens == first.tokens
            assert answer.clearances == first.clearances
            assert answer.clamped.tolist() == first.clamped.tolist()
            assert answer.scores.tobytes() == first.scores.tobytes()


def test_a_request_with_an_adapter_is_judged_as_if_alone(
    adapted: SteppedEngine, traffic: Traffic, adapters: Adapters
) -> None:
    ours = [replace(ask, adapter=adapters.random) for ask in traffic.subjects]
    neighbours = draw_neighbours(NEIGHBOURS)
    neighbours[::2] = [replace(ask, adapter=adapters.idle) for ask in neighbours[::2]]
    together = adapted.run(salted([*ours, *neighbours], "adapted"))
    for ask, answer in zip(salted(ours, "adapted-alone"), together, strict=False):
        (one,) = adapted.run([ask])
        expect_same_answer(answer, one)
        expect_same_verdict(answer, one, tolerance=rounding())
        expect_same_rows(
            answer, one, traffic.column_numbers(ask.policy), tolerance=rounding()
        )


def test_the_adapter_changes_what_is_read(
    adapted: SteppedEngine,
    alone: list[Answer],
    traffic: Traffic,
    adapters: Adapters,
) -> None:
    (answer,) = adapted.run([replace(traffic.subjects[0], adapter=adapters.random)])
    assert answer.tokens != alone[0].tokens
    assert answer.clamped.tolist() != alone[0].clamped.tolist()


def test_no_policy_needs_another_compilation(
    compiled: SteppedEngine, traffic: Traffic
) -> None:
    (prompt, *_) = (ask.prompt for ask in traffic.subjects)
    compiled.run([Ask(prompt, "open")])
    before = compiled.count().compilations
    assert before["dynamo unique_graphs"] > 0
    policies = list(load_policy(traffic.policy_file).policies)
    compiled.run([Ask(prompt, policy, max_tokens=4) for policy in policies])
    for policy in policies:
        compiled.run([Ask(prompt, policy, max_tokens=4)])
    assert compiled.count().compilations == before
