"""What a prompt attacker minimises, held against whole passes of the model."""

import pytest
import torch
from redteam.penalty import Ceiling

from guard.redteam.forward import edited, pad_left
from guard.redteam.objective import Objective, Template, places, spoken
from guard.redteam.target import answer, record_runs


def draw(count, length, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, 160, (count, length), generator=generator)


def test_words_go_where_they_belong(target, valid):
    prompt = valid[0].prompt
    first, last = prompt[:2], prompt[-1]

    def put(places):
        return Objective(target, valid[0], places=places).prompt(
            range(7, 7 + len(places))
        )

    assert put([1, 1]) == [*prompt[:-1], 7, 8, last]
    assert put([len(prompt) - 1] * 2) == [prompt[0], 7, 8, *prompt[1:]]
    assert put([0, 0]) == [*prompt, 7, 8]
    assert put([len(prompt) - 2, 1, 1]) == [*first, 7, *prompt[2:-1], 8, 9, last]
    for nowhere in (-1, len(prompt)):
        with pytest.raises(ValueError, match="expected one behind the BOS"):
            put([nowhere])
    with pytest.raises(ValueError, match="expected descending ones"):
        put([1, 2])


def test_a_placement_keeps_to_what_a_client_writes():
    prompt, template = [1, 4, 20, 21, 22, 5], Template(before=2, behind=1)

    def choose(placement):
        return places(placement, prompt, length=3, template=template)

    assert choose("suffix") == [1, 1, 1]
    assert choose("prefix") == [4, 4, 4]
    assert choose("around") == [4, 1, 1]
    for misfit in (Template(0, 1), Template(2, 5), Template(7, 0), Template(2, -1)):
        with pytest.raises(ValueError, match="does not fit a prompt of 6"):
            places("suffix", prompt, length=3, template=misfit)


def test_recovered_is_what_a_greedy_answer_under_the_clamp_is(target, valid):
    """As it is given token by token, and for candidates of both kinds."""
    tokens = draw(150, 4)
    wanted, back = valid[0], []
    objective = Objective(target, wanted, places=[1] * 4)
    judgement = objective.judge(tokens, batch_size=64)
    prompts = [objective.prompt(one) for one in tokens.tolist()]
    given = answer(target, prompts, clamp=target.clamp)
    back = [one.answer == wanted.answer for one in given]
    assert judgement.recovered.tolist() == back
    assert 0 < sum(back) < len(back)
    assert judgement.penalty.tolist() == [0.0] * 150


def test_the_loss_is_the_surprise_of_the_answer_under_the_clamp(target, valid):
    tokens = draw(3, 4)
    objective = Objective(target, valid[0], places=[1] * 4)
    judgement = objective.judge(tokens, batch_size=2)
    suppressed = valid[0].answer
    for one, loss in zip(tokens.tolist(), judgement.loss.tolist(), strict=True):
        batch = pad_left([[*objective.prompt(one), *suppressed[:-1]]])
        with (
            torch.no_grad(),
            edited(target.model, target.clamp, lambda b=batch: b.rows),
        ):
            logits = target.model(**batch.inputs, use_cache=False).logits[0]
        scores = logits[-len(suppressed) :].log_softmax(dim=-1)
        expected = -scores[range(len(suppressed)), suppressed].mean()
        assert loss == pytest.approx(float(expected), abs=1e-4)


def test_the_gradient_is_that_of_the_loss(target, valid):
    tokens, step = draw(1, 4), 1e-2
    objective = Objective(target, valid[0], places=[1] * 4)
    effect = objective.differentiate(tokens)
    embedding = target.model.get_input_embeddings().weight
    assert effect.shape == (1, 4, len(embedding))
    vectors = embedding[tokens]
    toward = torch.zeros_like(vectors)
    toward[0, 2] = embedding[70] - embedding[tokens[0, 2]]
    with torch.no_grad():
        more = objective.judge_vectors(vectors + step * toward).loss
        less = objective.judge_vectors(vectors - step * toward).loss
    slope = effect[0, 2, 70] - effect[0, 2, tokens[0, 2]]
    torch.testing.assert_close(
        (more - less)[0] / (2 * step), slope, rtol=0.05, atol=0.01
    )


def test_vectors_in_place_of_tokens_are_read_as_those_tokens(target, valid):
    tokens = draw(3, 4)
    objective = Objective(target, valid[0], places=[1] * 4)
    vectors = target.model.get_input_embeddings().weight[tokens]
    spoken_ones = objective.judge_vectors(vectors)
    written = objective.judge(tokens, batch_size=8)
    torch.testing.assert_close(spoken_ones.loss, written.loss)


def test_free_vectors_are_heard_in_the_prompt_and_in_no_decoding_step(target, valid):
    tokens = draw(1, 4)
    objective = Objective(target, valid[0], places=[1] * 4)
    vectors = target.model.get_input_embeddings().weight[tokens]
    (written,) = answer(
        target, [objective.prompt(tokens[0].tolist())], clamp=target.clamp
    )
    with spoken(target.model, vectors, objective.positions):
        (heard,) = answer(target, [objective.prompt([0] * 4)], clamp=target.clamp)
    assert heard.answer == written.answer
    assert not target.model.get_input_embeddings()._forward_hooks


def test_a_penalty_is_shown_what_an_engine_would_show(target, valid):
    penalty = Ceiling(target.clamp.layer, height=-1000.0)
    tokens = draw(2, 4)
    objective = Objective(target, valid[0], places=[1] * 4, penalty=penalty)
    judgement = objective.judge(tokens, batch_size=2)
    ((batch, behind),) = penalty.asked
    suppressed = valid[0].answer
    assert behind == [len(suppressed) - 1] * 2
    prompts = [objective.prompt(one) for one in tokens.tolist()]
    assert batch.tokens.tolist() == [[*p, *suppressed[:-1]] for p in prompts]
    runs = record_runs(
        target,
        [valid[0]._replace(prompt=p) for p in prompts],
        penalty.layers,
        clamp=target.clamp,
    )
    expected = [penalty.highest(run) + 1000.0 for run in runs]
    assert judgement.penalty.tolist() == pytest.approx(expected, abs=1e-2)
    free = Objective(target, valid[0], places=[1] * 4)
    alone = free.judge(tokens, batch_size=2)
    torch.testing.assert_close(judgement.loss, alone.loss + judgement.penalty)
    assert not judgement.succeeded.any()
