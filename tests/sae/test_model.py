"""The canonical SAE: encode, decode, and the columns that a clamp needs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guard.sae.config import Normalisation, SaeConfig
from guard.sae.load import build_sae
from guard.sae.model import Encoded, Sae

D_MODEL, D_SAE, K = 12, 40, 5
ARCHITECTURES = ["standard", "jumprelu", "topk", "gated"]
NORMALISATIONS = ["none", "constant_norm_rescale", "layer_norm"]


def make_sae(
    architecture: str,
    *,
    normalisation: str = "none",
    seed: int = 0,
    pre_bias: bool = True,
) -> Sae:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "W_enc": draw(D_MODEL, D_SAE),
        "W_dec": draw(D_SAE, D_MODEL),
        "b_dec": draw(D_MODEL),
    }
    if architecture == "gated":
        tensors |= {name: draw(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
    else:
        tensors["b_enc"] = draw(D_SAE)
    if architecture == "jumprelu":
        tensors["threshold"] = draw(D_SAE).abs()
    config = SaeConfig.model_validate(
        {
            "architecture": architecture,
            "d_model": D_MODEL,
            "d_sae": D_SAE,
            "hook_point": "layers.1.resid_post",
            "k": K if architecture == "topk" else None,
            "apply_b_dec_to_input": pre_bias,
            "normalize_activations": normalisation,
        }
    )
    return build_sae(config, tensors)


def rows(seed: int, count: int = 7, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(count, D_MODEL, generator=generator) * scale


sae_kinds = st.tuples(st.sampled_from(ARCHITECTURES), st.sampled_from(NORMALISATIONS))
seeds = st.integers(0, 10_000)
column_lists = st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=9)


@given(sae_kinds, seeds, column_lists, st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_few_columns_are_those_of_the_full_encode(
    kind: tuple[str, str], seed: int, columns: list[int], scale: float
) -> None:
    sae = make_sae(kind[0], normalisation=kind[1], seed=seed)
    resid = rows(seed, scale=scale)
    full = sae.encode(resid)
    some = sae.encode_columns(resid, torch.tensor(columns))
    wanted = full.latents[:, columns]
    # The two products may round differently, which may flip a latent that lies on
    # its threshold to within that rounding: leave those out.
    close = torch.isclose(some.latents, wanted, rtol=1e-4, atol=1e-4 * scale)
    assert close.float().mean() > 0.98
    torch.testing.assert_close(some.scale, full.scale)
    torch.testing.assert_close(some.shift, full.shift)


@given(seeds)
def test_topk_keeps_the_k_largest_that_are_positive(seed: int) -> None:
    sae = make_sae("topk", seed=seed)
    resid = rows(seed)
    latents = sae.encode(resid).latents
    acts = resid @ sae.W_enc + sae.b_enc
    values, indices = acts.topk(K, dim=-1)
    expected = torch.zeros_like(acts).scatter(-1, indices, values.relu())
    torch.testing.assert_close(latents, expected)
    assert int((latents > 0).sum(-1).max()) <= K


def test_topk_keeps_all_latents_that_tie_for_the_last_place() -> None:
    sae = make_sae("topk", pre_bias=False)
    sae.W_enc.zero_()
    sae.b_enc.copy_(torch.arange(D_SAE) // 8)  # eight equal values at the top
    assert int((sae.encode(rows(0)).latents > 0).sum(-1).unique()) == 8


@given(sae_kinds, seeds, st.floats(-4, 4), st.floats(-4, 4))
def test_decoding_is_linear_in_the_latents(
    kind: tuple[str, str], seed: int, a: float, b: float
) -> None:
    sae = make_sae(kind[0], normalisation=kind[1], seed=seed)
    encoded = sae.encode(rows(seed))
    one, two = encoded.latents, encoded.latents.flip(-1)
    zero = sae.decode(encoded._replace(latents=torch.zeros_like(one)))
    mixed = sae.decode(encoded._replace(latents=a * one + b * two)) - zero
    apart = [sae.decode(encoded._replace(latents=x)) - zero for x in (one, two)]
    expected = a * apart[0] + b * apart[1]
    torch.testing.assert_close(mixed, expected, rtol=1e-3, atol=1e-3)


@given(sae_kinds, seeds, column_lists)
def test_a_latent_writes_its_direction_times_the_scale(
    kind: tuple[str, str], seed: int, columns: list[int]
) -> None:
    sae = make_sae(kind[0], normalisation=kind[1], seed=seed)
    encoded = sae.encode(rows(seed))
    index = torch.tensor(sorted(set(columns)))
    dz = torch.ones(len(encoded.latents), len(index))
    moved = encoded.latents.index_add(1, index, dz)
    difference = sae.decode(encoded._replace(latents=moved)) - sae.decode(encoded)
    expected = encoded.scale * (dz @ sae.directions(index))
    torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_latents_are_never_negative(architecture: str) -> None:
    assert bool((make_sae(architecture).encode(rows(3, 50)).latents >= 0).all())


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_a_latent_on_its_threshold_is_not_active(architecture: str) -> None:
    sae = make_sae(architecture, pre_bias=False)
    sae.W_enc.zero_()
    sae.threshold.fill_(0.5)
    columns = torch.tensor([4, 2])
    for pre_activation, active in ((0.5, False), (0.5 + 1e-6, True)):
        sae.b_enc.fill_(pre_activation)
        every, some = sae.encode(rows(0)), sae.encode_columns(rows(0), columns)
        assert bool(((every.latents > 0) == active).all())
        assert bool(((some.latents > 0) == active).all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_row_does_not_depend_on_its_neighbours(
    architecture: str, normalisation: Normalisation
) -> None:
    sae = make_sae(architecture, normalisation=normalisation)
    resid = rows(5, 6)
    poisoned = resid.clone()
    poisoned[3:] = torch.nan
    torch.testing.assert_close(
        sae.encode(poisoned).latents[:3], sae.encode(resid).latents[:3]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_the_reconstruction_error(
    architecture: str, normalisation: Normalisation, value: float
) -> None:
    sae = make_sae(architecture, normalisation=normalisation)
    resid = rows(5)
    resid[2, 4] = value
    error = resid - sae.decode(sae.encode(resid))
    assert not bool(error[2].isfinite().all())
    assert bool(error[[0, 1, 3]].isfinite().all())


def test_a_nan_pre_activation_is_not_taken_for_an_inactive_latent() -> None:
    sae = make_sae("jumprelu")
    resid = torch.full((1, D_MODEL), torch.nan)
    assert bool(sae.encode(resid).latents.isnan().all())
    some = sae.encode_columns(resid, torch.tensor([3]))
    assert bool(some.latents.isnan().all())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_padding_row_of_zeros_stays_finite(normalisation: Normalisation) -> None:
    sae = make_sae("standard", normalisation=normalisation)
    encoded = sae.encode(torch.zeros(2, D_MODEL))
    assert bool(sae.decode(encoded).isfinite().all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_rows_give_no_latents(architecture: str) -> None:
    sae = make_sae(architecture)
    encoded = sae.encode(torch.zeros(0, D_MODEL))
    assert encoded.latents.shape == (0, D_SAE)
    assert sae.decode(encoded).shape == (0, D_MODEL)


def test_arithmetic_is_fp32_whatever_the_stream_is() -> None:
    sae = make_sae("jumprelu", normalisation="layer_norm")
    resid = rows(1).to(torch.bfloat16)
    encoded = sae.encode(resid)
    assert {part.dtype for part in encoded} == {torch.float32}
    torch.testing.assert_close(encoded.latents, sae.encode(resid.float()).latents)


def test_tensors_are_buffers_that_no_checkpoint_contains() -> None:
    sae = make_sae("jumprelu")
    assert {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} <= dict(
        sae.named_buffers()
    ).keys()
    assert not sae.state_dict()
    assert not list(sae.parameters())


@pytest.mark.parametrize(
    ("architecture", "normalisation"),
    [("jumprelu", "none"), ("topk", "constant_norm_rescale"), ("gated", "layer_norm")],
)
def test_encoding_traces_into_one_graph(
    architecture: str, normalisation: Normalisation
) -> None:
    sae = make_sae(architecture, normalisation=normalisation)
    columns = torch.tensor([3, 1])

    def both(resid: Tensor) -> tuple[Tensor, Tensor]:
        return sae.decode(sae.encode(resid)), sae.encode_columns(resid, columns).latents

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows(2)), both(rows(2)))


def test_a_tuple_of_encoded_parts_is_named() -> None:
    assert Encoded._fields == ("latents", "scale", "shift")


def test_a_dense_neighbour_changes_no_bit_of_a_sparse_row() -> None:
    sae = make_sae("standard", seed=3)
    latents = torch.zeros(2, D_SAE)
    latents[0, :3] = torch.tensor([0.3, 1.7, 2.9])
    ones, zeros = torch.ones(2, 1), torch.zeros(2, 1)
    alone = sae.decode(Encoded(latents, ones, zeros))[0]
    latents[1] = torch.linspace(0.1, 3.0, D_SAE)
    sparse, dense = sae.decode(Encoded(latents, ones, zeros))
    assert torch.equal(sparse, alone)
    torch.testing.assert_close(dense, latents[1] @ sae.W_dec + sae.b_dec)
