"""Clients who write: what a row of theirs says, and who begins the answer himself."""

from dataclasses import replace

import pytest

from guard.redteam.certificate import Rate
from guard.redteam.judge import LEAST_SHARE
from guard.redteam.prompt import BEGUN, encode_prompts, retry_prompts, run_prompts

TRIES = 64


@pytest.fixture(scope="module")
def few(subject):
    return replace(subject, samples=subject.samples[:3])


@pytest.fixture(scope="module")
def unaware(few):
    return {
        search: run_prompts(few, search, "unaware", queries=TRIES, seed=0)
        for search in BEGUN
    }


@pytest.fixture(scope="module")
def adaptive(few):
    return {
        search: run_prompts(few, search, "adaptive", queries=TRIES, seed=0)
        for search in BEGUN
    }


@pytest.mark.parametrize("search", BEGUN)
def test_who_knows_how_an_answer_begins_gets_the_rest_behind_the_clamp(
    few, unaware, search
):
    row = unaware[search]
    assert row.queries == 0
    assert row.recovered.hits == 3
    for sample, beginning in zip(few.samples, row.beginnings, strict=True):
        begun = few.tokenizer.encode(beginning, add_special_tokens=False)
        assert begun == sample.wanted.answer[:4]
    # Twin: the clamp holds the same prompts where nobody begins the answer.
    plain = run_prompts(few, "none", "unaware", queries=0, seed=0)
    assert plain.recovered == Rate.of(0, 3)
    assert plain.prompts == row.prompts
    assert plain.beginnings == ()


def test_what_a_client_said_himself_counts_for_nothing(few):
    """An answer that is all his own but for less than half of the rest is none."""
    longer = replace(few, target=replace(few.target, max_tokens=3))
    for search in BEGUN:
        row = run_prompts(longer, search, "unaware", queries=0, seed=0)
        assert row.recovered.hits == 0
    least = round(LEAST_SHARE * (len(few.wanted[0].answer) - 4))
    enough = replace(few, target=replace(few.target, max_tokens=least + 1))
    row = run_prompts(enough, "prefilled", "unaware", queries=0, seed=0)
    assert row.recovered.hits == 3


def test_a_guard_takes_what_is_prefilled_for_prompt_and_what_is_constrained_for_output(
    few, unaware
):
    prefilled, constrained = unaware["prefilled"], unaware["constrained"]
    assert prefilled.prompts == constrained.prompts
    assert prefilled.beginnings == constrained.beginnings
    assert prefilled.alarms != constrained.alarms


@pytest.mark.parametrize("search", BEGUN)
def test_who_adapts_searches_for_words_and_beginnings(few, unaware, adaptive, search):
    row = adaptive[search]
    assert row.queries == 2 * TRIES
    assert row.recovered.hits <= 3
    assert row.undetected.hits >= unaware[search].undetected.hits
    for prompt, sample in zip(encode_prompts(few, row), few.wanted, strict=True):
        written = len(prompt) - len(sample.prompt)
        assert written in (4, 8 + 4)
        assert prompt[:2] == sample.prompt[:2]


@pytest.mark.parametrize("search", BEGUN)
def test_a_row_comes_again_from_what_it_says_was_written(few, adaptive, search):
    row = adaptive[search]
    assert retry_prompts(few, row) == row
    # Twin: with each other's beginnings it is another row.
    other = row.model_copy(update={"beginnings": row.beginnings[::-1]})
    assert retry_prompts(few, other) != other


def test_an_adaptive_row_has_what_the_unaware_attacker_found(few):
    free, aware = (
        run_prompts(few, "suffix", attacker, queries=TRIES, seed=0)
        for attacker in ("unaware", "adaptive")
    )
    assert aware.queries == 3 * TRIES
    assert aware.recovered.hits >= free.recovered.hits
    assert free.recovered.hits
