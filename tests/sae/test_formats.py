"""Published SAEs, folded, compute what their own formula says.

Folders are written here in SAELens's layout; the formulas are written out unfolded,
in double precision, as SAELens computes them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from guard.errors import SaeError
from guard.sae.load import load_sae

D_MODEL, D_SAE, K = 10, 24, 4
HOOK = "layers.3.resid_post"
MODES = ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]
FACTOR = 0.37


def v6(architecture: str = "standard", **changes: Any) -> dict[str, Any]:
    cfg = {
        "architecture": architecture,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.12.1",
            "sae_lens_training_version": "6.12.1",
            "model_name": "gpt2",
            "hook_name": "blocks.3.hook_resid_post",
            "hook_head_index": None,
            "model_from_pretrained_kwargs": {},
            "prepend_bos": True,
            "context_size": 128,
        },
    }
    if architecture == "topk":
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": False}
    return {**cfg, **changes}


def v5(architecture: str = "standard", **changes: Any) -> dict[str, Any]:
    cfg = {
        "architecture": architecture,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "normalize_activations": "none",
        "context_size": 128,
        "model_name": "gpt2",
        "hook_name": "blocks.3.hook_resid_post",
        "hook_layer": 3,
        "hook_head_index": None,
        "prepend_bos": True,
        "dtype": "torch.float32",
        "device": "cpu",
        "sae_lens_training_version": "5.0.0",
    }
    return {**cfg, **changes}


def draw_tensors(architecture: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "W_enc": draw(D_MODEL, D_SAE),
        "W_dec": draw(D_SAE, D_MODEL),
        "b_dec": draw(D_MODEL),
    }
    if architecture == "gated":
        return tensors | {name: draw(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
    tensors["b_enc"] = draw(D_SAE)
    if architecture == "jumprelu":
        tensors["threshold"] = draw(D_SAE)  # some negative: relu comes first
    return tensors


def write(
    folder: Path,
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    factor: float | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "sae_weights.safetensors")
    scaler = folder / "activation_scaler.json"
    scaler.unlink(missing_ok=True)
    if factor is not None:
        scaler.write_text(json.dumps({"scaling_factor": factor}))
    return folder


def unfolded(
    cfg: dict[str, Any], tensors: dict[str, Tensor], resid: Tensor
) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction as SAELens computes them, in double precision."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x, mode = resid.double(), cfg["normalize_activations"]
    scale, shift = torch.ones(len(x), 1), torch.zeros(len(x), 1)
    if mode == "expected_average_only_in":
        x, scale = x * FACTOR, scale / FACTOR
    elif mode == "constant_norm_rescale":
        coefficient = D_MODEL**0.5 / x.norm(dim=-1, keepdim=True)
        x, scale = x * coefficient, 1 / coefficient
    elif mode == "layer_norm":
        shift = x.mean(dim=-1, keepdim=True)
        x = x - shift
        scale = x.std(dim=-1, keepdim=True)
        x = x / (scale + 1e-5)
    x = x - t["b_dec"] * cfg["apply_b_dec_to_input"]
    norms = torch.ones(D_SAE)
    if cfg["architecture"] == "gated":
        gate = x @ t["W_enc"] + t["b_gate"] > 0
        latents = gate * (x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    elif cfg["architecture"] == "topk":
        if cfg["rescale_acts_by_decoder_norm"]:
            norms = t["W_dec"].norm(dim=-1)
        acts = (x @ t["W_enc"] + t["b_enc"]) * norms
        best = acts.topk(K, dim=-1)
        latents = torch.zeros_like(acts).scatter(-1, best.indices, best.values.relu())
    else:
        acts = x @ t["W_enc"] + t["b_enc"]
        latents = acts.relu()
        if cfg["architecture"] == "jumprelu":
            latents = latents * (acts > t["threshold"])
    out = (latents / norms) @ t["W_dec"] + t["b_dec"]
    return latents, out * scale + shift


def assert_computes_the_same(
    folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    sae = load_sae(folder, format="sae_lens", hook_point=HOOK)
    resid = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(7)) * 3
    resid += 2
    encoded = sae.encode(resid)
    latents, out = unfolded(cfg, tensors, resid)
    torch.testing.assert_close(encoded.latents.double(), latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae.decode(encoded).double(), out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_a_folder_computes_its_published_formula(
    tmp_path: Path, architecture: str, mode: str, *, pre_bias: bool
) -> None:
    cfg = v6(architecture, normalize_activations=mode, apply_b_dec_to_input=pre_bias)
    tensors = draw_tensors(architecture)
    factor = FACTOR if mode == "expected_average_only_in" else None
    assert_computes_the_same(write(tmp_path, cfg, tensors, factor), cfg, tensors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pre_bias", [True, False])
def test_topk_that_ranks_by_decoder_norm_computes_its_formula(
    tmp_path: Path, mode: str, *, pre_bias: bool
) -> None:
    cfg = v6(
        "topk",
        normalize_activations=mode,
        apply_b_dec_to_input=pre_bias,
        rescale_acts_by_decoder_norm=True,
    )
    tensors = draw_tensors("topk")
    factor = FACTOR if mode == "expected_average_only_in" else None
    assert_computes_the_same(write(tmp_path, cfg, tensors, factor), cfg, tensors)


@given(
    seed=st.integers(0, 10_000),
    architecture=st.sampled_from(["standard", "jumprelu", "topk", "gated"]),
    mode=st.sampled_from(MODES),
    pre_bias=st.booleans(),
)
def test_folding_never_changes_what_is_computed(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    architecture: str,
    mode: str,
    *,
    pre_bias: bool,
) -> None:
    cfg = v6(architecture, normalize_activations=mode, apply_b_dec_to_input=pre_bias)
    tensors = draw_tensors(architecture, seed)
    folder = tmp_path_factory.getbasetemp() / "folded"
    factor = FACTOR if mode == "expected_average_only_in" else None
    sae = load_sae(write(folder, cfg, tensors, factor), format="sae_lens")
    resid = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(seed))
    latents, _ = unfolded(cfg, tensors, resid)
    close = torch.isclose(sae.encode(resid).latents.double(), latents, atol=1e-3)
    # A pre-activation on its threshold to within rounding may fall either way.
    assert close.double().mean() > 0.99


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("standard", {}),
        ("standard", {"normalize_activations": None}),
        ("standard", {"normalize_activations": False}),
        ("jumprelu", {}),
        ("gated", {}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
    ],
)
def test_a_flat_config_of_older_versions_is_read_alike(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    tensors = draw_tensors(architecture)
    folder = write(tmp_path, v5(architecture, **changes), tensors)
    assert_computes_the_same(folder, v6(architecture), tensors)


def test_an_older_topk_that_calls_itself_standard_is_read_as_topk(
    tmp_path: Path,
) -> None:
    cfg = v5(activation_fn_str="topk", activation_fn_kwargs={"k": K})
    tensors = draw_tensors("topk")
    assert_computes_the_same(write(tmp_path, cfg, tensors), v6("topk"), tensors)


def test_a_boolean_normalisation_means_a_factor(tmp_path: Path) -> None:
    cfg, tensors = v5(normalize_activations=True), draw_tensors("standard")
    folder = write(tmp_path, cfg, tensors, FACTOR)
    meant = v6(normalize_activations="expected_average_only_in")
    assert_computes_the_same(folder, meant, tensors)


def test_a_row_of_ones_that_older_versions_saved_is_ignored(tmp_path: Path) -> None:
    tensors = draw_tensors("standard")
    folder = write(tmp_path, v5(), {**tensors, "scaling_factor": torch.ones(D_SAE)})
    assert_computes_the_same(folder, v6(), tensors)


def test_bf16_weights_are_computed_with_in_fp32(tmp_path: Path) -> None:
    tensors = {n: t.bfloat16() for n, t in draw_tensors("jumprelu").items()}
    folder = write(tmp_path, v6("jumprelu"), tensors)
    assert_computes_the_same(folder, v6("jumprelu"), tensors)


@pytest.mark.parametrize(
    ("name", "hook_point"),
    [
        ("blocks.12.hook_resid_post", "layers.12.resid_post"),
        ("blocks.12.hook_resid_pre", "layers.11.resid_post"),
        ("layers.12.resid_post", "layers.12.resid_post"),
        ("layers.12.resid_pre", "layers.11.resid_post"),
        ("model.layers.12", "layers.12.resid_post"),
        ("transformer.h.12", "layers.12.resid_post"),
        ("gpt_neox.layers.12", "layers.12.resid_post"),
    ],
)
def test_a_hook_name_is_translated_to_the_layer_that_puts_it_out(
    tmp_path: Path, name: str, hook_point: str
) -> None:
    cfg = v6(metadata={"hook_name": name})
    sae = load_sae(write(tmp_path, cfg, draw_tensors("standard")), format="sae_lens")
    assert sae.config.hook_point == hook_point


def test_a_folder_that_names_no_hook_takes_the_one_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, v6(metadata={}), draw_tensors("standard"))
    sae = load_sae(folder, format="sae_lens", hook_point="layers.7.resid_post")
    assert sae.config.hook_point == "layers.7.resid_post"


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        v6("temporal"),
        "cfg.json: architecture 'temporal' cannot be read; expected one of",
    ),
    (v6("transcoder"), "architecture 'transcoder' cannot be read"),
    (v6([]), r"architecture \[\] cannot be read"),
    (v6(activation_fn={"relu": 1}), "activation_fn {'relu': 1} cannot be computed"),
    (
        v6(reshape_activations=["none"]),
        r"reshape_activations \['none'\] reads",
    ),
    (v6("batchtopk"), "architecture batchtopk has no stored threshold, so a token's"),
    (v6("matryoshka_batchtopk"), "architecture matryoshka_batchtopk has no stored"),
    (
        v6(normalize_activations="unit"),
        "normalize_activations 'unit' cannot be computed",
    ),
    (
        v6(normalize_activations="expected_average_only_in"),
        "is expected_average_only_in and there is no activation_scaler.json",
    ),
    (v6(reshape_activations="hook_z"), "reshape_activations 'hook_z' reads attention"),
    (v6(hook_head_index=3), r"reads one attention head \(3\)"),
    (v6(d_in=None), "d_in is None; expected a whole number > 0"),
    (v6(d_sae="24"), "d_sae is '24'; expected a whole number > 0"),
    (v6("topk", k=None), "k is missing"),
    (v6("topk", k=100), "k is 100; expected at most d_sae"),
    (v6(apply_b_dec_to_input="yes"), "apply_b_dec_to_input: Input should be a valid"),
    (v5(activation_fn_str="tanh-relu"), "activation_fn 'tanh-relu' cannot be computed"),
    (v5("jumprelu", activation_fn_str="topk"), "activation_fn 'topk' cannot be"),
    (v5(finetuning_scaling_factor=True), "finetuning_scaling_factor is not supported"),
    (
        v6(metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}),
        r"stream with its mean removed \(center_writing_weights\)",
    ),
    (v6(metadata={}), "does not say where the SAE was trained; name a hook_point"),
    *(
        (v6(metadata={"hook_name": name}), "is not the residual stream after a layer")
        for name in (
            "blocks.3.attn.hook_z",
            "blocks.3.hook_mlp_out",
            "blocks.3.hook_resid_mid",
            "blocks.0.hook_resid_pre",
            "hook_embed",
            "model.layers.3.mlp",
        )
    ),
]


@pytest.mark.parametrize(("cfg", "message"), REFUSED)
def test_what_cannot_be_computed_exactly_is_refused_in_one_line(
    tmp_path: Path, cfg: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path, cfg, draw_tensors("standard"))
    with pytest.raises(SaeError, match=message) as caught:
        load_sae(folder, format="sae_lens")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", ["null", '"2"', "0", "-1", "NaN", "true", "[]"])
def test_a_factor_that_is_no_positive_number_is_refused(
    tmp_path: Path, factor: str
) -> None:
    cfg = v6(normalize_activations="expected_average_only_in")
    folder = write(tmp_path, cfg, draw_tensors("standard"))
    text = f'{{"scaling_factor": {factor}}}'
    (folder / "activation_scaler.json").write_text(text)
    with pytest.raises(SaeError, match=r"scaling_factor is .*; expected a number > 0"):
        load_sae(folder, format="sae_lens")


def test_a_scaling_row_that_is_not_ones_is_refused(tmp_path: Path) -> None:
    tensors = draw_tensors("standard") | {"scaling_factor": torch.full((D_SAE,), 2.0)}
    with pytest.raises(SaeError, match="scaling_factor is not all ones; fold it"):
        load_sae(write(tmp_path, v5(), tensors), format="sae_lens")


def test_another_layer_than_the_policy_hooks_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, v6(), draw_tensors("standard"))
    with pytest.raises(
        SaeError,
        match=r"trained at layers\.3\.resid_post, but the policy hooks it at layers\.4",
    ):
        load_sae(folder, format="sae_lens", hook_point="layers.4.resid_post")
