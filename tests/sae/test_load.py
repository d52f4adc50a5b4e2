"""Loading SAE folders: digest, shapes, and our own format."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from guard.errors import SaeError
from guard.sae.config import SaeConfig
from guard.sae.load import build_sae, load_sae, save_sae, weights_digest

D_MODEL, D_SAE = 6, 16
CONFIG = SaeConfig(
    architecture="jumprelu",
    d_model=D_MODEL,
    d_sae=D_SAE,
    hook_point="layers.2.resid_post",
    model="toy",
    metadata={"seed": 3, "data": ["a", "b"]},
)


def draw_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "W_enc": torch.randn(D_MODEL, D_SAE, generator=generator),
        "b_enc": torch.randn(D_SAE, generator=generator),
        "W_dec": torch.randn(D_SAE, D_MODEL, generator=generator),
        "b_dec": torch.randn(D_MODEL, generator=generator),
        "threshold": torch.rand(D_SAE, generator=generator),
        "latent_max": torch.rand(D_SAE, generator=generator),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_sae(tmp_path / "sae", CONFIG, draw_tensors())
    return tmp_path / "sae"


def test_what_was_saved_is_loaded(folder: Path) -> None:
    sae = load_sae(folder, format="guard", hook_point="layers.2.resid_post")
    tensors = draw_tensors()
    assert sae.config == CONFIG
    for name, tensor in tensors.items():
        torch.testing.assert_close(sae.get_buffer(name), tensor)


def test_an_sae_in_memory_is_the_one_from_the_file(folder: Path) -> None:
    resid = torch.randn(5, D_MODEL)
    loaded = load_sae(folder, format="guard").encode(resid)
    built = build_sae(CONFIG, draw_tensors()).encode(resid)
    assert torch.equal(loaded.latents, built.latents)


def test_latent_max_may_be_left_out(tmp_path: Path) -> None:
    tensors = draw_tensors()
    del tensors["latent_max"]
    save_sae(tmp_path, CONFIG, tensors)
    assert load_sae(tmp_path, format="guard").latent_max is None


def test_the_digest_is_that_of_the_weights_file(folder: Path) -> None:
    content = (folder / "sae.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert weights_digest(folder, "guard") == digest
    load_sae(folder, format="guard", sha256=digest.upper())


def test_a_changed_weights_file_is_refused(folder: Path) -> None:
    digest = weights_digest(folder, "guard")
    weights = folder / "sae.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SaeError, match=f"expected {digest} as the policy says"):
        load_sae(folder, format="guard", sha256=digest)


def test_the_digest_is_checked_before_anything_is_parsed(folder: Path) -> None:
    (folder / "sae.safetensors").write_bytes(b"not safetensors at all")
    (folder / "cfg.json").write_text("{")
    with pytest.raises(SaeError, match="sha256 is"):
        load_sae(folder, format="guard", sha256="0" * 64)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps({"W_enc": 1}), b"\xff" * 64]
)
def test_what_is_not_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "sae.safetensors").write_bytes(content)
    with pytest.raises(SaeError, match="is not a safetensors file") as caught:
        load_sae(folder, format="guard")
    assert "\n" not in str(caught.value)


def test_a_pickle_beside_the_name_is_not_looked_at(folder: Path) -> None:
    (folder / "sae.safetensors").rename(folder / "sae.pt")
    with pytest.raises(SaeError, match=r"has no sae\.safetensors.*never read"):
        load_sae(folder, format="guard")


def test_a_folder_of_the_other_format_is_refused(folder: Path) -> None:
    with pytest.raises(SaeError, match=r"has no sae_weights\.safetensors"):
        load_sae(folder, format="sae_lens")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="is not a folder; expected one with"):
        load_sae(tmp_path / "nowhere", format="guard")


def test_an_unknown_format_is_refused(folder: Path) -> None:
    with pytest.raises(SaeError, match="'npz' is not an SAE format; expected one of"):
        load_sae(folder, format="npz")  # type: ignore[arg-type]


def test_another_hook_point_is_refused(folder: Path) -> None:
    with pytest.raises(SaeError, match=r"set hook_point: layers\.2\.resid_post"):
        load_sae(folder, format="guard", hook_point="layers.3.resid_post")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list; expected an object"),
        ("[" * 100_000, "is not JSON"),
        (" " * (1 << 20) + "{}", "cannot be read .Larger than 1 MiB"),
        ("{}", "architecture: Field required"),
        (
            json.dumps({"architecture": "relu"}),
            "architecture: Input should be 'standard'",
        ),
    ],
)
def test_a_bad_config_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "cfg.json").write_text(text)
    with pytest.raises(SaeError, match=message) as caught:
        load_sae(folder, format="guard")
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_refused(folder: Path) -> None:
    (folder / "cfg.json").unlink()
    with pytest.raises(SaeError, match=r"cfg\.json: cannot be read \(No such file"):
        load_sae(folder, format="guard")


DAMAGE = [
    ("W_enc", None, "W_enc is missing; a jumprelu SAE holds W_enc, W_dec"),
    ("threshold", None, "threshold is missing"),
    ("b_mag", torch.zeros(D_SAE), "'b_mag' is unknown; a jumprelu SAE holds"),
    (
        "W_enc",
        torch.zeros(D_SAE, D_MODEL),
        r"W_enc has shape \[16, 6\] \(transposed\); expected \[6, 16\]",
    ),
    (
        "W_dec",
        torch.zeros(D_MODEL, D_SAE),
        r"W_dec has shape \[6, 16\] \(transposed\); expected \[16, 6\]",
    ),
    ("b_enc", torch.zeros(D_SAE + 1), r"b_enc has shape \[17\]; expected \[16\]"),
    ("b_dec", torch.tensor(0.0), r"b_dec has shape \[\]; expected \[6\]"),
    ("latent_max", torch.zeros(2), r"latent_max has shape \[2\]; expected \[16\]"),
    ("b_enc", torch.zeros(D_SAE, dtype=torch.int64), "b_enc holds torch.int64"),
    ("b_dec", torch.full((D_MODEL,), torch.nan), "b_dec holds NaN or Inf"),
    ("W_dec", torch.full((D_SAE, D_MODEL), torch.inf), "W_dec holds NaN or Inf"),
    ("threshold", torch.full((D_SAE,), -1.0), "threshold holds a negative number"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), DAMAGE)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    tensors = draw_tensors()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "sae.safetensors")
    with pytest.raises(SaeError, match=message) as caught:
        load_sae(folder, format="guard")
    assert "\n" not in str(caught.value)
    with pytest.raises(SaeError, match=message):
        save_sae(folder / "again", CONFIG, tensors)
    assert not (folder / "again").exists()


def test_a_gate_that_overflows_when_folded_is_refused(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"architecture": "gated"})
    tensors = {n: draw_tensors()[n] for n in ("W_enc", "W_dec", "b_dec")}
    tensors |= {"b_gate": torch.ones(D_SAE), "b_mag": torch.ones(D_SAE)}
    tensors["r_mag"] = torch.full((D_SAE,), 200.0)
    with pytest.raises(SaeError, match="overflows when folded"):
        save_sae(tmp_path, config, tensors)
