"""A reading is remembered exactly where its KV is, and nowhere else.

One engine with few blocks. What a request reads from the cache is held against the
same request under a salt of its own, which finds nothing there.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.faults import Faults
from e2e.serving import Toy
from e2e.stepped import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    Answer,
    Ask,
    SteppedEngine,
    python_path,
    step_engine,
)
from e2e.traffic import (
    Traffic,
    draw_neighbours,
    expect_same_answer,
    expect_same_rows,
    expect_same_verdict,
    make_traffic,
    rounding,
)
from e2e.tripwires import MIDDLE_OUTPUT, PROMPT, Tripwires

NUM_BLOCKS = 64
UNSCORED = 'guard_unscored_tokens_total{reason="no_score"}'
POLICIES = ["other", "both"]
"""One that shares a prefix while it is computed, one that remembers, and waits."""


@pytest.fixture(scope="module")
def traffic(toy: Toy, tripwires: Tripwires) -> Traffic:
    return make_traffic(toy, tripwires)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


def beside_guard(faults: Faults) -> dict[str, str]:
    """Return the environment of an engine that is guarded and has the faults."""
    there = faults.environment
    return {
        "PYTHONPATH": os.pathsep.join([there["PYTHONPATH"], python_path()]),
        "VLLM_PLUGINS": f"{there['VLLM_PLUGINS']},guard",
    }


def start(
    toy: Toy, policy_file: Path, faults: Faults, folder: Path
) -> AbstractContextManager[SteppedEngine]:
    return step_engine(
        toy.model,
        policy_file,
        folder,
        environment=beside_guard(faults),
        num_gpu_blocks_override=NUM_BLOCKS,
    )


@pytest.fixture(scope="module")
def engine(
    toy: Toy,
    traffic: Traffic,
    faults: Faults,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SteppedEngine]:
    folder = tmp_path_factory.mktemp("engine")
    with start(toy, traffic.policy_file, faults, folder) as engine:
        yield engine


@pytest.fixture
def fresh(request: pytest.FixtureRequest, traffic: Traffic) -> dict[str, Ask]:
    """One long request for each policy, of which this test's cache knows nothing."""
    sticky, *_ = traffic.subjects
    salt = request.node.name
    return {
        "both": replace(sticky, salt=salt),
        "other": replace(sticky, policy="other", salt=salt),
    }


def without_cache(engine: SteppedEngine, ask: Ask) -> Answer:
    """Answer alone, from nothing."""
    (answer,) = engine.run([replace(ask, salt=f"without-{ask.salt}")])
    assert answer.cached == 0
    return answer


def wash(engine: SteppedEngine) -> None:
    """Leave in every block the readings of a policy that has nothing to remember."""
    wide = Ask([1] + [7] * (MAX_MODEL_LEN - BLOCK_SIZE), "open")
    for number in range(1 + NUM_BLOCKS * BLOCK_SIZE // len(wide.prompt)):
        engine.run([replace(wide, salt=f"wash-{number}")])


def expect_same(
    answer: Answer, uncached: Answer, traffic: Traffic, policy: str
) -> None:
    expect_same_answer(answer, uncached)
    expect_same_verdict(answer, uncached, tolerance=rounding())
    columns = traffic.column_numbers(policy)
    expect_same_rows(answer, uncached, columns, tolerance=rounding())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_hit_brings_back_what_was_read(
    policy: str, engine: SteppedEngine, traffic: Traffic, fresh: dict[str, Ask]
) -> None:
    ask = fresh[policy]
    (first,) = engine.run([ask])
    (again,) = engine.run([ask])
    assert again.cached > 2 * BLOCK_SIZE
    expect_same(again, first, traffic, policy)
    kept = slice(0, again.cached)
    assert again.scores[kept].tobytes() == first.scores[kept].tobytes()
    expect_same(again, without_cache(engine, ask), traffic, policy)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefix_that_a_neighbour_computes_in_the_same_step_is_read(
    policy: str,
    chunk: int | None,
    engine: SteppedEngine,
    traffic: Traffic,
    fresh: dict[str, Ask],
) -> None:
    ask = fresh[policy]
    wash(engine)
    answers = engine.run([ask] * 3, chunk=chunk)
    if policy == "other" and chunk is None:
        for answer in answers[1:]:
            assert answer.cached > 2 * BLOCK_SIZE
            shared = answer.cached // BLOCK_SIZE
            assert answer.blocks[:shared] == answers[0].blocks[:shared]
            assert set(answer.block_steps[:shared]) == {0}
    uncached = without_cache(engine, ask)
    for answer in answers:
        expect_same(answer, uncached, traffic, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_choice_reads_the_whole_prompt(
    policy: str, engine: SteppedEngine, traffic: Traffic, fresh: dict[str, Ask]
) -> None:
    ask = fresh[policy]
    wash(engine)
    answers = engine.run([replace(ask, n=3)])
    if policy == "other":
        assert [answer.cached > 0 for answer in answers] == [False, True, True]
    uncached = without_cache(engine, ask)
    prompt = len(ask.prompt)
    for answer in answers:
        assert answer.guard is not None
        assert answer.guard["tokens_seen"] == prompt + ask.max_tokens - 1
        assert answer.clamped[:prompt].tolist() == uncached.clamped[:prompt].tolist()
        for column in traffic.column_numbers(policy):
            found, known = (a.scores[:prompt, column] for a in (answer, uncached))
            assert found == pytest.approx(known, rel=rounding())
    assert len({tuple(answer.tokens) for answer in answers}) == 3


@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_that_was_evicted_keeps_nothing_of_its_old_prefix(
    policy: str, engine: SteppedEngine, traffic: Traffic, fresh: dict[str, Ask]
) -> None:
    ask = fresh[policy]
    (first,) = engine.run([ask])
    later = [
        replace(one, policy="other", salt=ask.salt)
        for one in draw_neighbours(12)
        if len(one.prompt) > 2 * BLOCK_SIZE
    ]
    fillers = [engine.run([one])[0] for one in later]
    reused = [set(answer.blocks) & set(first.blocks) for answer in fillers]
    assert any(reused)
    for one, filler in list(zip(later, fillers, strict=True))[-2:]:
        (again,) = engine.run([one])
        assert again.cached >= BLOCK_SIZE
        expect_same(again, filler, traffic, "other")
        expect_same(again, without_cache(engine, one), traffic, "other")
    (back,) = engine.run([ask])
    assert back.cached == 0
    expect_same(back, first, traffic, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_preempted_request_reads_its_cached_prefix_again(
    policy: str, engine: SteppedEngine, traffic: Traffic, fresh: dict[str, Ask]
) -> None:
    ask = replace(fresh[policy], max_tokens=90)
    uncached = without_cache(engine, ask)
    engine.run([ask])
    crowd = [
        replace(one, prompt=one.prompt[:40], max_tokens=150)
        for one in draw_neighbours(15)
    ]
    *_, answer = engine.run([*crowd, ask])
    assert answer.cached > 0
    assert answer.preemptions > 0
    expect_same(answer, uncached, traffic, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_second_turn_reads_the_first_answer_from_the_cache(
    policy: str, engine: SteppedEngine, traffic: Traffic, fresh: dict[str, Ask]
) -> None:
    sticky = traffic.subjects[1]
    turn = replace(sticky, policy=policy, salt=fresh[policy].salt)
    (first,) = engine.run([turn])
    follow = replace(turn, prompt=[*turn.prompt, *first.tokens, 5, 6], max_tokens=8)
    (second,) = engine.run([follow])
    assert second.cached > len(turn.prompt) + BLOCK_SIZE
    kept = slice(0, second.cached)
    assert second.scores[kept].tobytes() == first.scores[kept].tobytes()
    expect_same(second, without_cache(engine, follow), traffic, policy)


def test_what_an_answer_alarmed_on_alarms_in_the_next_prompt(
    engine: SteppedEngine, tripwires: Tripwires
) -> None:
    prompt = tripwires.encode(PROMPT)
    turn = Ask(prompt, "middle-output-observed", max_tokens=2 * BLOCK_SIZE)
    (first,) = engine.run([turn])
    follow = replace(turn, prompt=[*prompt, *first.tokens, 5])
    (second,) = engine.run([follow])
    position = len(prompt) + MIDDLE_OUTPUT
    assert second.cached > position
    for answer, stage in ((first, "output"), (second, "prompt")):
        assert answer.guard is not None
        assert answer.guard["stage"] == stage
        assert answer.guard["alarms"][0]["position"] == position
    assert first.guard is not None
    assert second.guard is not None
    assert second.guard["alarms"] == first.guard["alarms"]


def lose_scores(
    engine: SteppedEngine, faults: Faults, ask: Ask
) -> tuple[Answer, Answer, float]:
    """Ask twice, the second time without the scores of what is cached.

    Returns:
        Both answers, and the tokens counted as unscored meanwhile.
    """
    (first,) = engine.run([ask])
    before = engine.count().guard[UNSCORED]
    with faults.on("scores-lost"):
        (again,) = engine.run([ask])
    return first, again, engine.count().guard[UNSCORED] - before


def test_a_cached_token_without_a_score_blocks(
    engine: SteppedEngine, faults: Faults, traffic: Traffic, fresh: dict[str, Ask]
) -> None:
    first, again, counted = lose_scores(engine, faults, fresh["other"])
    assert again.cached > 0
    assert counted == again.cached
    assert again.guard is not None
    assert (again.guard["action"], again.guard["reason"]) == ("block", "unscored")
    assert again.finish_reason == "content_filter"
    assert again.tokens == []
    (healed,) = engine.run([fresh["other"]])
    expect_same(healed, first, traffic, "other")


def test_a_cached_token_without_a_score_can_be_flagged_instead(
    toy: Toy,
    traffic: Traffic,
    faults: Faults,
    fresh: dict[str, Ask],
    tmp_path: Path,
) -> None:
    policy_file = traffic.policy_file.with_name("flagging.yaml")
    policy_file.write_text(traffic.policy_file.read_text() + "unscored: flag\n")
    with start(toy, policy_file, faults, tmp_path) as engine:
        first, again, counted = lose_scores(engine, faults, fresh["other"])
    assert again.cached > 0
    assert counted == again.cached
    assert again.guard is not None
    assert (again.guard["action"], again.guard["reason"]) == ("flag", "unscored")
    expect_same_answer(again, first)
    # What was computed after the hit is judged as ever.
    assert len(again.scores) == len(first.scores) - again.cached
