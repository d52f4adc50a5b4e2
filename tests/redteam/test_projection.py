"""What the clamped latents' encoder cannot see, and by how much."""

import pytest
import torch

from guard.policy import Rule
from guard.redteam.projection import MAX_LEAK, NullSpace, cap_norm, null_space
from guard.testing import make_toy_sae


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_projected_edit_moves_no_pre_activation_of_a_clamped_latent():
    sae = make_toy_sae()
    rules = [
        Rule(name="a", sae="s", latents=(3, 9), law="ablate"),
        Rule(name="b", sae="s", latents=(40,), law="cap", value=1.0),
    ]
    space = null_space(sae, rules)
    resid, delta = draw(50, sae.d_model), draw(50, sae.d_model, seed=1)
    moved = (space.project(delta) @ sae.W_enc).abs()
    assert moved[:, [3, 9, 40]].amax() < 1e-5
    assert moved[:, [4, 10, 41]].amax() > 0.1
    before = sae.encode(resid).latents
    after = sae.encode(resid + space.project(delta)).latents
    assert (after - before)[:, [3, 9, 40]].abs().amax() < 1e-4
    assert (after - before).abs().amax() > 0.1


def test_the_leak_of_an_edit_is_seen_when_there_is_one():
    space = NullSpace(draw(3, 32))
    delta = draw(20, 32, seed=1)
    assert space.leak(delta).amax() > 0.1
    assert space.leak(space.project(delta)).amax() < MAX_LEAK
    assert space.leak(torch.zeros(2, 32)).tolist() == [0, 0]


@pytest.mark.parametrize("nearly", [0.0, 1e-6, 1e-4])
def test_projection_is_exact_for_directions_that_coincide(nearly: float):
    directions = draw(3, 32)
    directions[2] = directions[0] + nearly * draw(1, 32, seed=2)[0]
    space = NullSpace(directions)
    assert space.leak(space.project(draw(20, 32, seed=1))).amax() < MAX_LEAK


def test_nothing_is_taken_from_an_edit_that_was_in_the_null_space():
    space = NullSpace(draw(3, 32))
    delta = space.project(draw(20, 32, seed=1))
    torch.testing.assert_close(space.project(delta), delta)


def test_a_random_edit_is_as_long_in_each_row_and_as_hidden():
    space = NullSpace(draw(3, 32))
    delta = draw(20, 32, seed=1) * torch.arange(20)[:, None]
    drawn = space.random_like(delta, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn.norm(dim=1), delta.norm(dim=1))
    assert space.leak(drawn).amax() < MAX_LEAK
    assert drawn[0].tolist() == [0.0] * 32


def test_only_rows_that_are_too_long_are_shortened():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    capped = cap_norm(rows, 1.0)
    torch.testing.assert_close(capped, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0, 0]]))
