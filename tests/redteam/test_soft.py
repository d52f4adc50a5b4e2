"""The soft prompt: what bounds it, what it reaches, and what monitors can read."""

from dataclasses import replace

import pytest
import torch
from redteam.penalty import Ceiling

from guard.hook import HookPoint
from guard.redteam.objective import Template
from guard.redteam.soft import SoftConfig, attack_embeddings, record_soft
from guard.redteam.suffix import SuffixConfig, attack_prompts
from guard.redteam.target import record_runs

TEMPLATE = Template(before=2, behind=1)
SMALL = SoftConfig(length=4, steps=20, restarts=2)


@pytest.fixture(scope="module")
def attacked(target, valid):
    tried = []
    config = SoftConfig(length=4, steps=60)
    result = attack_embeddings(
        target,
        valid,
        config,
        template=TEMPLATE,
        on_step=lambda v, j: tried.append((v, j)),
    )
    return result, tried


def test_no_vector_is_longer_than_the_longest_embedding(target, attacked, valid):
    result, tried = attacked
    longest = float(target.model.get_input_embeddings().weight.norm(dim=1).amax())
    assert result.radius == longest
    for vectors in (*result.vectors, *(v for v, _ in tried)):
        assert vectors.norm(dim=-1).amax() <= 1.0001 * longest
    # Twin: where steps are long, the cap is what holds them.
    eager = SoftConfig(length=2, steps=3, learning_rate=10.0, restarts=1)
    norms = []
    penalty = Ceiling(target.clamp.layer, height=-1000.0)
    attack_embeddings(
        target,
        valid[:1],
        eager,
        template=TEMPLATE,
        penalty=penalty,
        on_step=lambda v, j: norms.append(v.norm(dim=-1).amax()),
    )
    assert norms[-1] == pytest.approx(longest, rel=1e-4)


def test_suppressed_answers_come_back(attacked, valid):
    result, _ = attacked
    assert result.recovery_rate > 0.9
    pairs = zip(result.dialogues, valid, strict=True)
    assert result.recovered == [one.answer == want.answer for one, want in pairs]
    assert [v.shape for v in result.vectors] == [(4, 128)] * len(valid)


def test_a_free_vector_stands_where_a_word_would(attacked, valid):
    result, _ = attacked
    pairs = zip(valid, result.dialogues, result.positions, strict=True)
    for sample, dialogue, positions in pairs:
        assert positions.tolist() == [2, 3, 4, 5]
        expected = [*sample.prompt[:2], 0, 0, 0, 0, *sample.prompt[2:]]
        assert dialogue.prompt == expected


def test_tokens_as_vectors_are_recorded_as_those_tokens(target, valid, attacked):
    result, _ = attacked
    config = SuffixConfig(length=4, queries=32)
    words = attack_prompts(
        target, valid, config, template=TEMPLATE, allowed=range(6, 164)
    )
    embedding = target.model.get_input_embeddings().weight
    spoken = [embedding[torch.tensor(p[2:6])] for p in words.prompts]
    given = [
        soft._replace(answer=hard.answer)
        for soft, hard in zip(result.dialogues, words.dialogues, strict=True)
    ]
    layers = [target.clamp.layer, 5]
    heard = record_soft(
        target, replace(result, vectors=spoken, dialogues=given), layers
    )
    read = record_runs(target, words.dialogues, layers, clamp=target.clamp)
    for one, other in zip(heard, read, strict=True):
        assert one.prompt_length == other.prompt_length
        assert one.total_length == other.total_length
        for layer in layers:
            at = str(HookPoint(layer))
            torch.testing.assert_close(
                one.resid[at], other.resid[at], atol=1e-3, rtol=1e-3
            )


def test_the_same_seed_finds_the_same_vectors_and_another_seed_others(target, valid):
    def vectors(seed):
        config = SoftConfig(length=4, steps=3, restarts=2, seed=seed)
        found = attack_embeddings(target, valid[:2], config, template=TEMPLATE)
        return torch.cat(found.vectors)

    first = vectors(0)
    assert torch.equal(first, vectors(0))
    assert not torch.equal(first, vectors(1))


def test_an_adaptive_attacker_shows_less_of_what_it_pays_for(target, valid):
    def highest(result, penalty):
        return [penalty.highest(r) for r in record_soft(target, result, penalty.layers)]

    free = Ceiling(target.clamp.layer, height=0.0)
    unaware = attack_embeddings(target, valid[:3], SMALL, template=TEMPLATE)
    shown = highest(unaware, free)
    penalty = Ceiling(target.clamp.layer, height=min(shown) - 0.5)
    adaptive = attack_embeddings(
        target, valid[:3], SMALL, template=TEMPLATE, penalty=penalty
    )
    assert sum(highest(adaptive, penalty)) < sum(shown)


def test_a_penalty_of_no_weight_changes_nothing(target, valid):
    penalty = Ceiling(target.clamp.layer, height=0.0, weight=0.0)
    free = attack_embeddings(target, valid[:2], SMALL, template=TEMPLATE)
    weightless = attack_embeddings(
        target, valid[:2], SMALL, template=TEMPLATE, penalty=penalty
    )
    torch.testing.assert_close(weightless.vectors, free.vectors, atol=1e-4, rtol=1e-3)
    assert weightless.dialogues == free.dialogues


def test_what_cannot_be_searched_for_is_refused(target, valid):
    with pytest.raises(ValueError, match="No sample to attack"):
        attack_embeddings(target, [], SMALL, template=TEMPLATE)
    with pytest.raises(ValueError, match="1 searches for 0 vectors"):
        attack_embeddings(
            target, valid, SoftConfig(length=0, restarts=1), template=TEMPLATE
        )
