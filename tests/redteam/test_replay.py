"""Parts of edits: that they sum up, what is in which, and what may be concluded."""

import dataclasses

import pytest
import torch

from guard.redteam.attack import AttackConfig, attack
from guard.redteam.certificate import Rate, ReplayRow
from guard.redteam.forward import pad_left, record
from guard.redteam.replay import attribute, conclude, split_edit
from guard.redteam.target import answer
from guard.testing import make_toy_sae

LATENTS = [3, 17, 40]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["jumprelu", "topk"])
def sae(request):
    return make_toy_sae(architecture=request.param)


def normalised(sae, mode):
    """The same SAE, as if its file asked for its input to be normalised."""
    sae.config = sae.config.model_copy(update={"normalize_activations": mode})
    return sae


@pytest.mark.parametrize("mode", ["none", "constant_norm_rescale", "layer_norm"])
def test_parts_of_an_edit_sum_to_it(sae, mode):
    edit = 3.0 * draw(20, 64, seed=1)
    parts = split_edit(normalised(sae, mode), LATENTS, draw(20, 64), edit)
    torch.testing.assert_close(sum(parts), edit, atol=1e-4, rtol=0)
    assert all(part.norm() > 0.1 for part in parts)


def test_parts_that_do_not_sum_to_the_edit_are_refused(sae, monkeypatch):
    monkeypatch.setattr(
        sae, "decode", lambda encoded: encoded.latents @ sae.W_dec[:, :]
    )
    edit = 3.0 * draw(4, 64, seed=1)
    split_edit(sae, LATENTS, draw(4, 64), edit)  # a constant is in both, and cancels
    monkeypatch.setattr(sae, "decode", lambda encoded: 2 * encoded.latents @ sae.W_dec)
    with pytest.raises(ArithmeticError, match="expected at most 1e-04"):
        split_edit(sae, LATENTS, draw(4, 64), edit)


def test_an_edit_of_what_clamped_latents_write_is_all_clamped():
    sae = orthogonal_sae()
    before = 5.0 * sae.W_dec.sum(dim=0, keepdim=True)
    edit = draw(6, 3) @ sae.W_dec[LATENTS]
    parts = split_edit(sae, LATENTS, before.expand(6, -1), edit)
    torch.testing.assert_close(parts.clamped, edit, atol=1e-4, rtol=0)
    assert parts.other.norm() + parts.residual.norm() < 1e-3
    # Its twin: what others write is none of theirs.
    parts = split_edit(sae, [1, 2], before.expand(6, -1), edit)
    torch.testing.assert_close(parts.other, edit, atol=1e-4, rtol=0)


def orthogonal_sae():
    """An SAE whose latents do not see each other, all of them active."""
    sae = make_toy_sae(d_sae=48)
    basis = torch.linalg.qr(draw(64, 48)).Q
    sae.W_enc, sae.W_dec = basis, basis.T.contiguous()
    for name in ("b_enc", "b_dec", "threshold"):
        getattr(sae, name).zero_()
    return sae


@pytest.fixture(scope="module")
def result(subject):
    return attack(
        subject.target,
        subject.wanted,
        AttackConfig(position="all", budget=1.0, steps=15),
    )


@pytest.fixture(scope="module")
def rows(subject, result):
    return attribute(subject, result, seed=0)


def test_every_replay_has_its_row(rows):
    names = [(row.component, row.variant) for row in rows]
    assert names == [
        ("edit", "alone"),
        *(
            (part, variant)
            for part in ("clamped", "other", "residual")
            for variant in ("alone", "matched", "without")
        ),
        ("random", "matched"),
        ("random", "matched"),
    ]


def test_the_whole_edit_brings_back_what_it_did_and_no_edit_nothing(rows):
    found = {(row.component, row.variant): row for row in rows}
    whole = found["edit", "alone"].recovered
    assert whole.hits == whole.count > 2
    # The search hid from the clamped latents: only what crosses the k-th is theirs.
    assert found["clamped", "alone"].relative_norm < 0.01
    assert found["clamped", "alone"].recovered.hits == 0
    assert found["clamped", "without"].recovered.hits == whole.count


def test_matched_replays_are_as_long_as_the_edit(rows):
    norms = {
        (row.component, row.variant): row.relative_norm
        for row in rows
        if row.component != "clamped"
    }
    whole = norms["edit", "alone"]
    for component in ("other", "residual", "random"):
        assert norms[component, "matched"] == pytest.approx(whole, rel=1e-4)
        # The twin that can fail: parts of their own are not.
        if component != "random":
            assert norms[component, "alone"] != pytest.approx(whole, rel=0.02)


def test_only_recovered_samples_are_replayed(subject, result):
    lost = answer(
        subject.target,
        [sample.prompt for sample in subject.wanted],
        clamp=subject.target.clamp,
    )
    none = dataclasses.replace(result, dialogues=lost)
    assert attribute(subject, none, seed=0) == []
    one = dataclasses.replace(result, dialogues=[subject.wanted[0], *lost[1:]])
    found = attribute(subject, one, seed=0)
    assert {row.recovered.count for row in found} == {1}


def test_an_edit_of_generated_rows_is_replayed_where_it_acted(subject):
    found = attack(
        subject.target,
        subject.wanted,
        AttackConfig(position="every", budget=1.0, steps=15),
    )
    rows = attribute(subject, found, seed=0)
    assert rows[0].recovered.hits == rows[0].recovered.count > 2


def test_the_stream_before_an_edit_is_what_it_is_added_to(subject, result, monkeypatch):
    """With the clamp as the only difference, h1 is the stream of the attacked run."""
    target, seen = subject.target, []

    def keep(sae, latents, before, edit):
        seen.append(before + edit)
        return split_edit(sae, latents, before, edit)

    monkeypatch.setattr("guard.redteam.replay.split_edit", keep)
    one = dataclasses.replace(subject, samples=subject.samples[:1], target=target)
    first = dataclasses.replace(
        result, deltas=result.deltas[:1], dialogues=[subject.wanted[0]]
    )
    attribute(one, first, seed=0)
    prompt = subject.wanted[0].prompt
    layer = target.clamp.layer
    clamped = record(target.model, pad_left([prompt]), [layer], clamp=target.clamp)
    expected = clamped[layer][0, 1:] + result.deltas[0]
    torch.testing.assert_close(seen[0], expected, atol=1e-3, rtol=1e-4)


def table(count=24, *, edit=24, random=0, **parts):
    """Rows as `attribute` gives them; of each part hits alone, matched and without."""

    def row(component, variant, hits, norm=0.5):
        return ReplayRow(
            position="last",
            component=component,
            variant=variant,
            recovered=Rate.of(hits, count),
            relative_norm=norm,
        )

    hits = {"clamped": (0, 0, count), "other": (0, 0, 0), "residual": (0, 0, 0)} | parts
    return [
        row("edit", "alone", edit),
        *(
            row(part, variant, own)
            for part, three in hits.items()
            for variant, own in zip(("alone", "matched", "without"), three, strict=True)
        ),
        row("random", "matched", 0),
        row("random", "matched", random),
    ]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "Nothing came back, so there is nothing to attribute."),
        (
            table(other=(20, 24, 0), residual=(0, 1, 22)),
            "The edit works through other latents, not through the clamped latents or "
            "the SAE's error.",
        ),
        (
            table(residual=(20, 24, 20), other=(0, 0, 23)),
            "Answers can come back through the SAE's error alone, but also without.",
        ),
        (
            table(residual=(9, 13, 2), other=(2, 5, 9)),
            "Answers can come back through the SAE's error alone, but fewer than "
            "through the whole edit.",
        ),
        (
            table(residual=(20, 23, 20), other=(21, 20, 23)),
            "Answers can come back through other latents alone and through the SAE's "
            "error alone.",
        ),
        (
            table(),
            "No single part does it alone, and fewer come back without other latents "
            "or the SAE's error.",
        ),
    ],
)
def test_the_conclusion_follows_from_the_replays(rows, sentence):
    assert conclude(rows) == sentence


@pytest.mark.parametrize(
    "rows",
    [
        table(2, edit=2, other=(2, 2, 0), residual=(0, 0, 2)),
        table(random=20, other=(24, 24, 0)),
    ],
)
def test_nothing_is_attributed_where_random_edits_may_do_as_much(rows):
    assert "nothing is attributed" in conclude(rows)


def test_nothing_strong_is_concluded_from_overlapping_intervals():
    rows = table(6, edit=6, other=(2, 3, 1), residual=(2, 2, 3))
    assert conclude(rows) == "The replays do not settle which part of the edit does it."
    rows = table(8, edit=8, other=(7, 8, 3), residual=(1, 2, 5))
    assert "not through" not in conclude(rows)
    assert "is not settled" in conclude(rows)


def test_a_part_that_is_longer_than_the_edit_does_not_count():
    rows = table(residual=(24, 0, 0))
    assert "through the SAE's error alone" in conclude(rows)
    longer = [
        row.model_copy(update={"relative_norm": 1.0})
        if (row.component, row.variant) == ("residual", "alone")
        else row
        for row in rows
    ]
    assert conclude(longer).startswith("No single part does it alone")
