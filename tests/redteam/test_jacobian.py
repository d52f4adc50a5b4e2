"""What clamped latents of later layers cannot see, to first order and in truth."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from guard.clamp import clamp_resid
from guard.policy import Rule
from guard.redteam.forward import Edit, edited, pad_left
from guard.redteam.jacobian import JacobianSpace, Later, later_latents
from guard.redteam.projection import MAX_LEAK, null_space
from guard.redteam.tail import Tail
from guard.testing import make_toy_model, make_toy_sae

D_MODEL = 64
RULES = [Rule(name="a", sae="s", latents=(3, 9), law="ablate")]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy_model(folder, num_layers=4, d_model=D_MODEL)
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sae():
    return make_toy_sae(d_model=D_MODEL)


@pytest.fixture(scope="module")
def clamp(sae):
    return Edit(1, lambda resid: clamp_resid(resid, sae, RULES).resid)


@pytest.fixture(scope="module")
def batch():
    return pad_left([[1, 9, 30, 41, 7, 19], [1, 8, 22, 5], [1, 50, 60, 70, 80]])


@pytest.fixture(scope="module")
def tail(model, batch, clamp):
    return Tail(model, batch, clamp)


@pytest.fixture(scope="module")
def later():
    """Latents at two later layers, of two other SAEs."""
    return [
        later_latents(make_toy_sae(seed=seed), RULES, layer=layer)
        for layer, seed in ((2, 1), (3, 2))
    ]


@pytest.fixture(params=["last", "all"])
def rows(request, batch):
    last = torch.zeros_like(batch.mask)
    last[:, -1] = True
    return last if request.param == "last" else batch.rows


@pytest.fixture
def space(tail, rows, later, sae):
    return JacobianSpace(tail, rows, later, here=null_space(sae, RULES))


def drawn_edit(rows, *, seed=3):
    return draw(int(rows.sum()), D_MODEL, seed=seed)


def test_the_drift_of_a_projected_edit_vanishes_to_first_order(space, rows):
    """Halved, the edit drifts a quarter as far; without the projection, half as far."""
    size = space._runner.resid[rows].norm(dim=1).mean() / D_MODEL**0.5
    sizes = [0.1 * size, 0.05 * size, 0.025 * size]
    plain = drawn_edit(rows)
    hidden = space.project(plain)
    far = torch.stack([space.drift(scale * plain) for scale in sizes])
    near = torch.stack([space.drift(scale * hidden) for scale in sizes])
    for one, half in ((0, 1), (1, 2)):
        assert ((far[one] / far[half]) - 2).abs().amax() < 0.35
        assert ((near[one] / near[half]) - 4).abs().amax() < 0.7
    assert (near[-1] < 0.1 * far[-1]).all()


def test_a_projected_edit_shows_to_no_layer(space, rows, sae):
    edit = drawn_edit(rows)
    assert space.leak(edit).amax() > 0.05
    hidden = space.project(edit)
    assert space.leak(hidden).amax() < MAX_LEAK
    assert null_space(sae, RULES).leak(hidden).amax() < MAX_LEAK
    torch.testing.assert_close(space.project(hidden), hidden)
    assert space.leak(torch.zeros_like(edit)).tolist() == [0.0] * len(edit)


def test_the_first_layers_null_space_alone_shows_later(space, rows, sae):
    hidden = null_space(sae, RULES).project(drawn_edit(rows))
    assert null_space(sae, RULES).leak(hidden).amax() < MAX_LEAK
    assert space.leak(hidden).amax() > 0.01


def test_an_edit_loses_no_more_than_the_latents_see(space, rows):
    """The rank: two latents here and four later, for each sample."""
    count = int(rows[0].sum())
    seen = 2 * count + 4
    edits = draw(2000, count * D_MODEL, seed=4)
    kept = []
    for edit in edits[:200]:
        whole = torch.zeros(int(rows.sum()), D_MODEL)
        whole[:count] = edit.unflatten(0, (count, D_MODEL))
        hidden = space.project(whole)
        assert hidden[count:].abs().amax() < 1e-5
        kept.append(hidden[:count].square().sum() / whole.square().sum())
    expected = 1 - seen / (count * D_MODEL)
    assert torch.stack(kept).mean() == pytest.approx(expected, abs=0.02)


def test_the_jacobian_is_that_of_a_whole_pass_through_the_model(
    model, batch, clamp, later, space, rows
):
    """By finite differences, with hooks instead of the tail."""

    def look(delta):
        def add(resid):
            return resid + delta

        with (
            torch.no_grad(),
            edited(model, clamp, lambda: batch.rows),
            edited(model, Edit(clamp.layer, add), lambda: rows),
            contextlib.ExitStack() as stack,
        ):
            found = {}
            for at in later:
                layer = model.model.layers[at.layer]
                handle = layer.register_forward_hook(
                    lambda module, args, out, n=at.layer: found.update({n: out})
                )
                stack.callback(handle.remove)
            model(**batch.inputs, use_cache=False)
        seen = [found[at.layer][:, -1] @ at.directions.T + at.bias for at in later]
        return torch.cat(seen, dim=1)

    edit = drawn_edit(rows)
    torch.testing.assert_close(
        space.pre_activations(edit), look(edit), atol=1e-3, rtol=1e-3
    )
    small = 1e-2 * edit
    moved = (look(small) - look(-small)) / 2e-2
    counts = rows.sum(dim=1).tolist()
    for sample, own in enumerate(edit.split(counts)):
        jacobian = space._jacobian[sample, :, : own.numel()]
        torch.testing.assert_close(
            jacobian @ own.flatten(), moved[sample], atol=0.02, rtol=0.02
        )


def test_linearised_about_an_edit_it_takes_its_drift_back(space, rows):
    size = float(space._runner.resid[rows].norm(dim=1).mean()) / D_MODEL**0.5
    edit = space.project(0.5 * size * drawn_edit(rows))
    once = space.drift(edit)
    assert once.amax() > 0.01
    for _ in range(6):
        space.refresh(edit)
        edit = space.project(edit)
    assert (space.drift(edit) < 0.05 * once).all()
    assert edit.norm() > 0.5 * size


def test_it_is_linearised_anew_on_every_so_many_calls(tail, rows, later, sae):
    space = JacobianSpace(tail, rows, later, here=null_space(sae, RULES), every=3)
    edit = 2.0 * drawn_edit(rows)
    first = space.project(edit)
    for _ in range(2):
        space.refresh(first)
        assert torch.equal(space.project(edit), first)
    with torch.no_grad():  # as where a search only looks
        space.refresh(first)
    assert not torch.allclose(space.project(edit), first, atol=1e-3)


def test_latents_are_watched_at_every_row_that_is_read(tail, batch, later, sae):
    here = null_space(sae, RULES)
    rows = batch.rows & (batch.positions < 3)
    last = torch.zeros_like(rows)
    last[:, -1] = True
    edit = 0.05 * drawn_edit(rows)
    two = JacobianSpace(tail, rows, later, here=here, read=rows | last)
    one = JacobianSpace(tail, rows, later, here=here, read=last)
    hidden = one.project(edit)
    assert one.leak(hidden).amax() < MAX_LEAK
    assert two.leak(hidden).amax() > 0.01
    assert two.leak(two.project(edit)).amax() < MAX_LEAK
    assert two.drift(two.project(edit)).amax() < 0.1 * two.drift(hidden).amin()


def test_by_default_the_last_edited_row_is_read(tail, batch, later, sae):
    here = null_space(sae, RULES)
    rows = batch.rows & (batch.positions < 3)
    last = rows & (batch.positions == 2)
    edit = drawn_edit(rows)
    plain = JacobianSpace(tail, rows, later, here=here)
    told = JacobianSpace(tail, rows, later, here=here, read=last)
    assert torch.equal(plain.project(edit), told.project(edit))


def test_a_sample_is_projected_as_if_alone(tail, rows, later, sae, space, model, clamp):
    edit = drawn_edit(rows)
    alone = pad_left([[1, 50, 60, 70, 80]])
    own = alone.rows if rows.sum() > len(rows) else torch.zeros_like(alone.mask)
    own[:, -1] = True
    single = JacobianSpace(
        Tail(model, alone, clamp), own, later, here=null_space(sae, RULES)
    )
    count = int(own.sum())
    torch.testing.assert_close(
        single.project(edit[-count:]), space.project(edit)[-count:], atol=1e-3, rtol=0
    )


def test_a_shortened_edit_is_still_hidden(space, rows):
    hidden = space.project(drawn_edit(rows))
    radius = 0.9 * float(hidden.norm(dim=1).amax())
    capped = space.cap_norm(hidden, radius)
    assert capped.norm(dim=1).amax() <= radius * 1.0001
    assert not torch.equal(capped, hidden)
    assert space.leak(capped).amax() < MAX_LEAK
    assert torch.equal(space.cap_norm(hidden, 1e3), hidden)


def test_a_random_edit_is_as_long_and_as_hidden(space, rows):
    edit = drawn_edit(rows)
    random = space.random_like(edit, torch.Generator().manual_seed(0))
    counts = rows.sum(dim=1).tolist()
    for one, other in zip(random.split(counts), edit.split(counts), strict=True):
        assert one.norm() == pytest.approx(float(other.norm()), rel=1e-4)
    assert space.leak(random).amax() < MAX_LEAK


def test_a_latent_that_is_off_still_drifts(tail, rows, sae):
    """Its pre-activation moves, where the relative drift of 0 would say nothing."""
    at = later_latents(make_toy_sae(seed=1), RULES, layer=2)
    off = Later(at.layer, at.directions, at.bias - 1e3)
    space = JacobianSpace(tail, rows, [off], here=null_space(sae, RULES))
    assert (space.drift(drawn_edit(rows)) > 0).all()


@pytest.mark.parametrize("which", ["edited", "read"])
def test_a_sample_without_a_row_is_refused(which, tail, batch, later, sae):
    some = batch.rows.clone()
    some[1] = False
    given = {"edited": (some, batch.rows), "read": (batch.rows, some)}[which]
    with pytest.raises(ValueError, match=f"A sample has no row that is {which}"):
        JacobianSpace(tail, given[0], later, here=null_space(sae, RULES), read=given[1])


def test_an_sae_that_normalises_is_refused():
    sae = make_toy_sae()
    sae.config = sae.config.model_copy(update={"normalize_activations": "layer_norm"})
    with pytest.raises(ValueError, match="The SAE of layer 2 normalises its input"):
        later_latents(sae, RULES, layer=2)
