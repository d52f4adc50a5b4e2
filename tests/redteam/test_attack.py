"""The latent attacker: what bounds it, what it reaches, and its controls."""

from dataclasses import replace

import pytest
import torch

from guard.hook import HookPoint
from guard.redteam.attack import AttackConfig, attack, random_deltas
from guard.redteam.forward import added, edited, pad_left, place
from guard.redteam.projection import MAX_LEAK
from guard.redteam.target import answer, record_runs


@pytest.fixture(scope="module", params=["last", "all", "every"])
def config(request):
    return AttackConfig(position=request.param, budget=1.0, steps=15)


@pytest.fixture(scope="module")
def attacked(target, valid, config):
    steps = []
    return attack(target, valid, config, on_step=steps.append, batch_size=4), steps


def test_every_edit_that_is_tried_hides_from_the_clamped_latents(target, attacked):
    result, steps = attacked
    assert len(steps) >= 16
    for step in steps:
        assert target.null_space.leak(step.delta).amax() < MAX_LEAK
    assert result.leak < MAX_LEAK


def test_an_edit_that_would_show_is_not_tried(target, valid, monkeypatch):
    monkeypatch.setattr(target.null_space, "project", lambda delta: delta)
    with pytest.raises(ArithmeticError, match="An edit shows to the clamped latents"):
        attack(target, valid[:1], AttackConfig(steps=2))


def test_no_row_of_any_edit_is_longer_than_the_budget(target, attacked):
    result, steps = attacked
    radius = result.config.budget * target.mean_norm
    longest = max(step.delta.norm(dim=1).amax() for step in steps)
    assert 0.9 * radius < longest <= 1.0001 * radius


def test_each_edited_row_has_an_edit_of_its_own(valid, attacked):
    result, _ = attacked
    for sample, delta in zip(valid, result.deltas, strict=True):
        rows = {
            "last": 1,
            "all": len(sample.prompt) - 1,
            "every": len(sample.answer),
        }[result.config.position]
        assert delta.shape == (rows, 128)
        assert len(delta.unique(dim=0)) == rows


def test_suppressed_answers_come_back_within_a_large_budget(target, valid, attacked):
    result, _ = attacked
    assert result.recovery_rate > 0.6
    given = answer(
        target,
        [sample.prompt for sample in valid],
        clamp=target.clamp,
        deltas=result.deltas,
        position=result.config.position,
    )
    assert given == result.dialogues
    assert [one == want for one, want in zip(given, valid, strict=True)] == (
        result.recovered
    )


def test_a_random_edit_of_the_same_length_brings_nothing_back(target, valid, attacked):
    result, _ = attacked
    prompts = [sample.prompt for sample in valid]
    drawn = random_deltas(target, result.deltas, seed=0)
    for one, other in zip(drawn, result.deltas, strict=True):
        torch.testing.assert_close(one.norm(dim=1), other.norm(dim=1))
    given = answer(
        target,
        prompts,
        clamp=target.clamp,
        deltas=drawn,
        position=result.config.position,
    )
    back = sum(one == want for one, want in zip(given, valid, strict=True))
    assert back < sum(result.recovered)


def test_what_the_search_calls_recovered_is_what_greedy_answers_are(attacked, valid):
    result, steps = attacked
    ever = torch.stack([s.recovered for s in steps if len(s.recovered) == 4]).any(dim=0)
    by_length = sorted(range(len(valid)), key=lambda i: len(valid[i].prompt))[:4]
    assert ever.tolist() == [result.recovered[index] for index in by_length]


def test_the_best_edit_met_is_kept_and_one_that_recovers_is_better(target, valid):
    steps = []
    # Steps as long as the budget go past what is good.
    config = AttackConfig(budget=0.7, steps=12, learning_rate=2.0, restarts=2)
    for sample in valid[:4]:
        steps.clear()
        result = attack(target, [sample], config, on_step=steps.append)
        assert len(steps) == 2 * 13
        back = [step for step in steps if step.recovered]
        best = min(back or steps, key=lambda step: float(step.loss))
        assert result.loss == [float(best.loss)]
        assert torch.equal(result.deltas[0], best.delta)
        assert result.recovered == [bool(back)]


def test_without_a_budget_nothing_comes_back(target, valid):
    result = attack(target, valid, AttackConfig(budget=0.0, steps=2))
    assert result.recovery_rate == 0
    assert all(delta.abs().amax() == 0 for delta in result.deltas)


def test_the_same_seed_finds_the_same_edits_and_another_seed_others(target, valid):
    def search(seed):
        config = AttackConfig(budget=0.5, steps=3, restarts=2, seed=seed)
        tried = []
        attack(target, valid[:3], config, on_step=lambda step: tried.append(step.delta))
        return torch.cat(tried)

    first = search(0)
    assert torch.equal(first, search(0))
    assert not torch.equal(first, search(1))


def test_a_sample_is_searched_for_as_if_alone(target, valid):
    config = AttackConfig(budget=0.5, steps=5)
    together = attack(target, valid, config).deltas
    for index, sample in enumerate(valid[:2]):
        (alone,) = attack(target, [sample], config).deltas
        torch.testing.assert_close(alone, together[index], atol=0.02, rtol=0)


def test_a_larger_budget_that_begins_at_a_smaller_ones_edits_loses_nothing(
    target, valid
):
    small = attack(target, valid, AttackConfig("all", budget=0.3, steps=15))
    config = AttackConfig("all", budget=0.4, steps=1)
    large = attack(target, valid, config, start=small.deltas)
    assert sum(small.recovered) > 0
    assert large.recovery_rate >= small.recovery_rate


def test_the_gradient_reaches_delta_through_hooks_as_in_the_search(target, valid):
    """The shortcut behind the clamp computes what a whole pass does."""
    steps = []
    config = AttackConfig("all", budget=0.5, steps=2)
    attack(target, valid[:2], config, on_step=steps.append)
    order = sorted(valid[:2], key=lambda sample: len(sample.prompt))
    losses = [whole_pass_loss(target, order, step.delta) for step in steps]
    for step, (loss, grad) in zip(steps, losses, strict=True):
        torch.testing.assert_close(step.loss, loss, atol=1e-4, rtol=1e-4)
        assert (grad.norm(dim=1) > 0).all()
    assert losses[-1][0].sum() < losses[0][0].sum()


def whole_pass_loss(target, wanted, values):
    sequences = [[*prompt, *suppressed[:-1]] for prompt, suppressed in wanted]
    batch = pad_left(sequences)
    counts = [len(prompt) - 1 for prompt, _ in wanted]
    delta = place(
        values.split(counts),
        batch,
        layer=target.clamp.layer,
        behind=[len(suppressed) - 1 for _, suppressed in wanted],
    )
    leaf = values.clone().requires_grad_()
    with (
        edited(target.model, target.clamp, lambda: batch.rows),
        added(target.model, delta._replace(values=leaf)),
    ):
        logits = target.model(**batch.inputs, use_cache=False).logits
    losses = []
    for row, (_, suppressed) in enumerate(wanted):
        predicted = logits[row, -len(suppressed) :].log_softmax(dim=-1)
        chosen = predicted[range(len(suppressed)), suppressed]
        losses.append(-chosen.mean())
    loss = torch.stack(losses)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


class Ridge:
    """Charges what the highest row of a sample has along a direction, above 0."""

    def __init__(self, target, *, attached=True):
        self.layers = (target.clamp.layer,)
        self.attached, self.read = attached, []
        generator = torch.Generator().manual_seed(0)
        self.direction = target.null_space.random_like(torch.ones(1, 128), generator)[0]

    def __call__(self, found, batch, behind):
        self.read.append((sorted(found), list(behind)))
        along = found[self.layers[0]] @ self.direction
        paid = along.masked_fill(~batch.rows, -torch.inf).amax(dim=1).relu()
        return paid if self.attached else paid.detach()

    def highest(self, target, result):
        runs = record_runs(
            target,
            result.dialogues,
            self.layers,
            clamp=target.clamp,
            deltas=result.deltas,
        )
        at = str(HookPoint(self.layers[0]))
        return sum(float((run.resid[at] @ self.direction).amax()) for run in runs)


ADAPTED = AttackConfig("all", budget=0.7, steps=15, weight=1.0)


@pytest.mark.parametrize("evade", ["penalty", "projected"])
def test_an_adaptive_attacker_shows_less_of_what_it_pays_for(target, valid, evade):
    config = replace(ADAPTED, evade=evade)
    ridge = Ridge(target)
    unaware = attack(target, valid, config)
    adaptive = attack(target, valid, config, penalty=ridge)
    assert ridge.highest(target, adaptive) < 0.9 * ridge.highest(target, unaware)
    layers, behind = ridge.read[0]
    last = target.model.config.num_hidden_layers - 1
    assert layers == list(range(target.clamp.layer, last + 1))
    assert set(behind) <= {len(sample.answer) - 1 for sample in valid}


def test_without_a_gradient_through_the_score_nothing_is_evaded(target, valid):
    attached, detached = Ridge(target), Ridge(target, attached=False)
    seen = attack(target, valid, ADAPTED, penalty=detached)
    adaptive = attack(target, valid, ADAPTED, penalty=attached)
    assert attached.highest(target, adaptive) < 0.9 * attached.highest(target, seen)


def test_with_the_score_weighing_nothing_the_adaptive_attacker_is_the_unaware_one(
    target, valid
):
    unaware = attack(target, valid[:3], ADAPTED)
    free = replace(ADAPTED, weight=0.0)
    adaptive = attack(target, valid[:3], free, penalty=Ridge(target))
    for one, other in zip(unaware.deltas, adaptive.deltas, strict=True):
        assert torch.equal(one, other)
    assert unaware.dialogues == adaptive.dialogues
    weighed = attack(target, valid[:3], ADAPTED, penalty=Ridge(target))
    pairs = zip(unaware.deltas, weighed.deltas, strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_an_attack_on_nothing_is_refused(target):
    with pytest.raises(ValueError, match="No sample to attack"):
        attack(target, [], AttackConfig())
