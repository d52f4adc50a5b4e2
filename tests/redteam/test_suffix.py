"""The prompt attacker: what it finds, what it may write, and what it may ask."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from redteam.penalty import Ceiling

from guard.demo.grammar import prompts
from guard.demo.target import to_dialogue
from guard.errors import PromptError
from guard.redteam.objective import Template
from guard.redteam.suffix import SuffixConfig, attack_prompts
from guard.redteam.target import answer, record_runs

ALLOWED = range(6, 164)
TEMPLATE = Template(before=2, behind=1)
SMALL = SuffixConfig(length=4, queries=96, candidates=16)


def search(target, wanted, config, **options):
    steps = []
    options = {
        "template": TEMPLATE,
        "allowed": ALLOWED,
        "on_step": steps.append,
        **options,
    }
    return attack_prompts(target, wanted, config, **options), steps


@pytest.fixture(scope="module")
def far(organism):
    """Plain requests, and of each an answer that is about something else."""
    _, tokenizer = organism
    drawn = prompts("h", 6, seed=12_000_000, splits=("calibration",))
    asked = [to_dialogue(tokenizer, p.text, p.topic.answer) for p in drawn]
    pairs = zip(asked[:3], asked[3:], strict=True)
    return [one._replace(answer=other.answer) for one, other in pairs]


def test_suppressed_answers_come_back(target, valid):
    result, _ = search(target, valid, SuffixConfig(length=4, queries=500))
    assert result.recovery_rate > 0.6
    assert result.dialogues == answer(target, result.prompts, clamp=target.clamp)
    pairs = zip(result.dialogues, valid, strict=True)
    assert result.recovered == [one.answer == want.answer for one, want in pairs]
    assert result.succeeded == result.recovered
    # Twin: the samples are those that the clamp holds without a suffix.
    held = answer(target, [one.prompt for one in valid], clamp=target.clamp)
    assert not any(one == want for one, want in zip(held, valid, strict=True))


def test_an_answer_that_was_planted_is_found(target, valid):
    """Whatever one word more makes the model answer, the search gets by one word."""
    prompt = valid[0].prompt
    planted = [[*prompt[:2], word, *prompt[2:]] for word in (17, 90)]
    for given in answer(target, planted, clamp=target.clamp):
        wanted = given._replace(prompt=prompt)
        config = SuffixConfig(length=1, queries=158)
        result, _ = search(target, [wanted], config)
        assert result.recovered == [True]


def test_only_words_that_a_client_can_write_are_tried(target, far):
    allowed = [9, 30, 31, 64, 120, 150]
    result, steps = search(target, far, SMALL, allowed=allowed)
    tried = torch.cat([step.tokens for step in steps])
    assert set(tried.unique().tolist()) == set(allowed)
    assert all(set(p[2:6]) <= set(allowed) for p in result.prompts)


def test_what_no_text_becomes_is_not_tried(target, far):
    def can_send(prompt):
        return 30 not in prompt

    config = replace(SMALL, queries=32)
    allowed = [9, 30, 31, 64, 120, 150]
    _, steps = search(target, far[:1], config, allowed=allowed, can_send=can_send)
    assert not any((step.tokens == 30).any() for step in steps)
    assert sum(len(step.tokens) for step in steps) == config.queries
    with pytest.raises(PromptError, match="No prompt of 4 drawn words can be sent"):
        search(target, far[:1], config, allowed=allowed, can_send=lambda prompt: False)
    # Twin: without a word on it, it is.
    _, steps = search(target, far[:1], config, allowed=allowed)
    assert any((step.tokens == 30).any() for step in steps)


def test_runs_of_words_are_copied_from_ordinary_messages(target, far):
    message = [70, 71, 72, 73, 74, 75]
    allowed = [9, 30, 31, 64, 120, 150]
    _, steps = search(target, far[:1], SMALL, allowed=allowed, messages=[message])
    tried = [one for step in steps for one in step.tokens.tolist()]
    runs = {tuple(message[i : i + 4]) for i in range(3)}
    assert runs <= {tuple(one) for one in tried}
    mixed = [one for one in tried if 0 < len({*one} & {*message}) < 4]
    assert any(b == a + 1 for one in mixed for a, b in pairwise(one) if a in message)
    # Twin: most candidates are changes by single words all the same.
    assert sum(not {*one} & {*message} for one in tried) > 10


@pytest.mark.parametrize(
    ("placement", "before"), [("suffix", 0), ("prefix", 4), ("around", 2)]
)
def test_words_stay_where_they_belong(target, far, placement, before):
    config = replace(SMALL, placement=placement)
    result, steps = search(target, far, config, allowed=[*ALLOWED][4:])
    tried = {tuple(one) for step in steps for one in step.tokens.tolist()}
    for sample, prompt in zip(far, result.prompts, strict=True):
        said = sample.prompt[2:-1]
        assert prompt[:2] == sample.prompt[:2]
        assert prompt[2 + before :][: len(said)] == said
        assert prompt[-1] == sample.prompt[-1]
        written = prompt[2 : 2 + before] + prompt[2 + before + len(said) : -1]
        assert tuple(written) in tried


def test_an_answer_is_begun_with_words_that_may_be_changed(target, far):
    begun = [70, 71]
    wanted = [one._replace(answer=one.answer[2:]) for one in far[:1]]
    result, steps = search(target, wanted, SMALL, begun=begun)
    tried = [one for step in steps for one in step.tokens.tolist()]
    assert {len(one) for one in tried} == {4 + 2}
    assert all(one[4:] == begun for one in steps[0].tokens.tolist())
    assert any(one[4:] != begun for one in tried)
    prompt = far[0].prompt
    (found,) = result.prompts
    assert found[:2] == prompt[:2]
    assert found[2 + 4 : -2] == prompt[2:]
    assert found[2 : 2 + 4] + found[-2:] in tried


@pytest.mark.parametrize("constrained", [False, True])
def test_a_guard_reads_begun_words_as_output_where_decoding_is_constrained(
    target, far, constrained
):
    penalty = Ceiling(target.clamp.layer, height=0.0)
    wanted = far[:1]
    search(
        target,
        wanted,
        SMALL,
        penalty=penalty,
        begun=[70, 71],
        constrained=constrained,
    )
    read = {count for _, behind in penalty.asked for count in behind}
    assert read == {len(wanted[0].answer) - 1 + 2 * constrained}


def test_the_best_are_handed_on_to_be_judged(target, far):
    result, steps = search(target, far, SMALL)
    for number, finalists in enumerate(result.finalists):
        own = [step for step in steps if step.sample == number]
        losses = {
            tuple(words): loss
            for step in own
            for words, loss in zip(
                step.tokens.tolist(), step.judgement.loss.tolist(), strict=True
            )
        }
        assert finalists[0] == result.prompts[number]
        found = [losses[tuple(prompt[2:6])] for prompt in finalists]
        assert found == sorted(losses.values())[: SMALL.parents]


def test_queries_are_counted_and_never_exceeded(target, far, valid):
    result, steps = search(target, [*far, valid[0]], SMALL)
    asked = [0] * len(result.queries)
    for step in steps:
        asked[step.sample] += len(step.tokens)
    assert asked == result.queries
    assert result.queries[:3] == [96] * 3
    assert max(result.queries) <= 96
    odd, _ = search(target, far[:1], SuffixConfig(queries=21, candidates=16))
    assert odd.queries == [21]


def test_nothing_is_asked_twice_and_all_of_a_small_space_once(target, far):
    config = SuffixConfig(length=2, queries=500, candidates=16)
    result, steps = search(target, far[:1], config, allowed=[9, 30, 31, 64])
    asked = [tuple(one) for step in steps for one in step.tokens.tolist()]
    assert len(asked) == len(set(asked)) == 16
    assert result.queries == [16]


def test_a_search_ends_when_it_succeeded(target, valid):
    config = SuffixConfig(length=4, queries=500, candidates=16)
    result, steps = search(target, valid, config)
    for number, succeeded in enumerate(result.succeeded):
        own = [step.judgement for step in steps if step.sample == number]
        assert not any(step.succeeded.any() for step in own[:-1])
        assert bool(own[-1].succeeded.any()) == succeeded


def test_the_best_suffix_is_kept(target, far):
    result, steps = search(target, far, SMALL)
    for number, loss in enumerate(result.loss):
        own = [step for step in steps if step.sample == number]
        assert loss == float(min(step.judgement.loss.amin() for step in own))


def test_the_search_gets_further_than_chance(target, far):
    config = SuffixConfig(length=4, queries=192, candidates=32)
    result, _ = search(target, far[:2], config)
    chance, _ = search(target, far[:2], replace(config, candidates=192))
    assert sum(result.loss) < 0.9 * sum(chance.loss)


def test_the_same_seed_finds_the_same_words_and_another_seed_others(target, far):
    first, _ = search(target, far[:1], SMALL)
    assert search(target, far[:1], SMALL)[0] == first
    other, _ = search(target, far[:1], replace(SMALL, seed=1))
    assert other.prompts != first.prompts


def test_a_sample_is_searched_for_as_if_alone(target, far):
    together, _ = search(target, far[:2], SMALL)
    alone, _ = search(target, far[1:2], SMALL)
    assert alone.prompts == together.prompts[1:]


def test_restarts_share_the_queries(target, far):
    config = replace(SMALL, restarts=3)
    result, steps = search(target, far[:1], config)
    assert result.queries == [96]
    # What is a change of something has words in common with it; a new search has not.
    fresh = [step.tokens.unique().numel() for step in steps[::2]]
    changed = [step.tokens.unique().numel() for step in steps[1::2]]
    assert min(fresh) > max(changed)
    assert len(fresh) == 3


def test_an_adaptive_attacker_shows_less_of_what_it_pays_for(target, valid):
    def highest(result, penalty):
        runs = record_runs(target, result.dialogues, penalty.layers, clamp=target.clamp)
        return [penalty.highest(run) for run in runs]

    config = SuffixConfig(length=4, queries=400)
    free = Ceiling(target.clamp.layer, height=-1000.0)
    unaware, _ = search(target, valid[:3], config)
    shown = highest(unaware, free)
    penalty = Ceiling(target.clamp.layer, height=min(shown) - 0.1)
    adaptive, _ = search(target, valid[:3], config, penalty=penalty)
    assert sum(highest(adaptive, penalty)) < sum(shown)
    for paid, height in zip(adaptive.penalty, highest(adaptive, penalty), strict=True):
        if paid == 0:
            assert height <= penalty.height + 1e-3


def test_a_penalty_of_no_weight_changes_nothing(target, far):
    penalty = Ceiling(target.clamp.layer, height=0.0, weight=0.0)
    weightless, _ = search(target, far[:1], SMALL, penalty=penalty)
    assert penalty.asked
    assert weightless == search(target, far[:1], SMALL)[0]


def test_where_something_is_paid_nothing_has_succeeded(target, valid):
    penalty = Ceiling(target.clamp.layer, height=-1000.0)
    result, _ = search(target, valid[:1], SMALL, penalty=penalty)
    assert result.penalty[0] > 0
    assert result.succeeded == [False]
    assert result.queries == [96]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (SMALL, {"allowed": []}, "No suffix has 4 of 0 tokens"),
        (SuffixConfig(length=0), {}, "No suffix has 0 of 158 tokens"),
        (SuffixConfig(queries=0), {}, "0 queries for 1 restarts"),
        (SuffixConfig(restarts=0), {}, "2000 queries for 0 restarts"),
        (SMALL, {"template": Template(2, 99)}, "expected at least the BOS before"),
    ],
)
def test_a_search_that_cannot_be_is_refused(target, far, config, options, words):
    with pytest.raises(ValueError, match=words):
        search(target, far, config, **options)


def test_an_attack_on_nothing_is_refused(target):
    with pytest.raises(ValueError, match="No sample to attack"):
        search(target, [], SMALL)
