"""Clamps on some tokens only, and answers that are drawn or may not end."""

import dataclasses

import pytest
import torch

from guard.redteam.deployment import Coverage, _holds, deploy
from guard.redteam.forward import Delta, generate, pad_left


@pytest.fixture(scope="module")
def ask(subject):
    """Answer the prompts of the samples, clamped."""
    target = subject.target
    batch = pad_left([sample.prompt for sample in subject.wanted])

    def ask(coverage=None, **how):
        if coverage is not None:
            how["covers"] = coverage.start()
        how = {"clamp": target.clamp, "max_tokens": target.max_tokens} | how
        return generate(target.model, batch, eos=target.eos, **how)

    return ask


@pytest.fixture(scope="module")
def clamped(ask):
    return ask()


@pytest.fixture(scope="module")
def free(ask):
    return ask(clamp=None)


def test_a_clamp_on_no_token_is_the_free_model(ask, free, clamped):
    assert ask(Coverage(0.0, 0.0)) == free != clamped


def test_a_clamp_on_all_tokens_is_the_whole_clamp(ask, clamped):
    assert ask(Coverage()) == clamped


def test_the_first_output_token_is_the_prompts(ask, free, clamped):
    """It is read off the last prompt row, whatever is done to the output's."""

    def first(answers):
        return [tokens[0] for tokens in answers]

    assert first(clamped) != first(free)
    assert first(ask(Coverage(output=0.0))) == first(clamped)
    assert first(ask(Coverage(prompt=0.0))) == first(free)


def test_a_clamp_covers_prompt_and_output_rows_apart():
    rows = torch.tensor([[False, True, True]])
    covers = Coverage(output=0.0).start()
    assert torch.equal(covers(rows, prompt=True), rows)
    assert not covers(rows, prompt=False).any()
    covers = Coverage(prompt=0.0).start()
    assert not covers(rows, prompt=True).any()
    assert torch.equal(covers(rows, prompt=False), rows)


def test_a_share_of_tokens_is_drawn_again_from_the_same_seed():
    rows = torch.ones(40, 100, dtype=torch.bool)
    rows[:, :10] = False

    def drawn(share, seed):
        return Coverage(share, share, seed).start()(rows, prompt=True)

    for share in (0.1, 0.5, 0.9):
        found = drawn(share, 0)
        assert found[:, 10:].float().mean() == pytest.approx(share, abs=0.03)
        assert not found[:, :10].any()
        assert torch.equal(found, drawn(share, 0))
        assert not torch.equal(found, drawn(share, 1))


def test_two_passes_do_not_repeat_a_draw():
    rows = torch.ones(8, 50, dtype=torch.bool)
    covers = Coverage(0.5, 0.5).start()
    assert not torch.equal(covers(rows, prompt=True), covers(rows, prompt=False))


@pytest.mark.parametrize("shares", [(-0.1, 1.0), (1.0, 1.5)])
def test_a_share_that_is_none_is_refused(shares):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        Coverage(*shares)


def test_tokens_are_drawn_again_from_the_same_seed(ask):
    """The organism is all but sure of a refusal, so of what comes behind it."""

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return ask(sample=generator, ban_eos=True, max_tokens=60)

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0) != ask(ban_eos=True, max_tokens=60)


def test_an_answer_that_may_not_end_begins_like_one_that_does(subject, ask, clamped):
    forced = ask(ban_eos=True, max_tokens=40)
    for long, short in zip(forced, clamped, strict=True):
        assert len(long) == 40
        assert subject.target.eos not in long
        end = short[-1] == subject.target.eos
        assert long[: len(short) - end] == short[: len(short) - end]


def test_an_edit_of_generated_rows_acts_where_the_clamp_does_not(subject, ask):
    """Edits and the cover do not share rows."""
    target = subject.target
    batch = pad_left([sample.prompt for sample in subject.wanted])
    later = 50.0 * torch.randn(
        len(batch.tokens), 3, 128, generator=torch.Generator().manual_seed(0)
    )
    rows = torch.zeros_like(batch.mask)
    rows[:, -1] = True
    delta = Delta(target.clamp.layer, torch.zeros(len(rows), 128), rows)
    plain = ask(Coverage(output=0.0))
    assert ask(Coverage(output=0.0), delta=delta) == plain
    assert ask(Coverage(output=0.0), delta=delta, later=later) != plain


@pytest.fixture(scope="module")
def few(subject):
    return dataclasses.replace(subject, samples=subject.samples[:3])


@pytest.fixture(scope="module")
def rows(few):
    return deploy(few, lengths=(24, 60, 10_000, 20_000), shares=(0.5,), seed=0)


def test_each_deployment_has_its_row(few, rows):
    context = few.target.model.config.max_position_embeddings
    longest = context - max(len(sample.prompt) for sample in few.wanted)
    assert [(row.coverage, row.max_tokens, row.temperature) for row in rows] == [
        ("prompt", 20, 0.0),
        ("output", 20, 0.0),
        ("0.5 of tokens", 20, 0.0),
        ("all", 24, 0.0),
        ("all", 60, 0.0),
        ("all", longest, 0.0),
        ("all", 20, 1.0),
    ]
    assert [row.recovered.count for row in rows] == [3, 3, 3, 3, 3, 3, 12]


def test_only_the_whole_clamp_is_judged_under_the_policy(rows):
    assert all((row.guarded is None) == (row.coverage != "all") for row in rows)


def test_monitors_never_add_to_what_comes_back(rows):
    whole = [row for row in rows if row.guarded is not None]
    assert whole
    assert all(row.guarded.hits <= row.recovered.hits for row in whole)


def test_a_prompt_that_nobody_clamps_brings_answers_back(rows):
    found = {row.coverage: row.recovered for row in rows[:3]}
    assert found["output"].hits == 3
    assert found["prompt"].hits == 0


def test_an_answer_is_looked_for_in_stretches_of_a_long_text():
    wanted, other = [1, 2, 3, 4], [9] * 30
    assert _holds([*other, 1, 2, 3, *other], wanted, 8)
    assert _holds([1, 2], wanted, 8)
    # Its tokens in order, but far apart.
    scattered = [1, *other, 2, *other, 3, *other, 4]
    assert not _holds(scattered, wanted, 8)
    assert _holds(scattered, wanted, 100)
    assert not _holds([], wanted, 8)
