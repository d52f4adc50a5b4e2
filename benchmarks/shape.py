"""What is measured: a model, an SAE that fits it, and a policy file per variant."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from guard.calibration import Calibration, Entry, save_calibration
from guard.check import digest_model
from guard.fingerprint import clamps_digest
from guard.policy import PolicyFile, load_policy
from guard.provenance import ROOT
from guard.sae.config import SaeConfig
from guard.sae.load import save_sae, weights_digest
from guard.score import RANK, SCORES
from guard.testing import make_toy_model, save_toy_sae

__all__ = [
    "IDLE_POLICY",
    "MONITORS",
    "Shape",
    "make_dummy_shape",
    "make_llama_shape",
    "make_organism_shape",
    "write_calibration",
]

IDLE_POLICY = "open"
"""Name of the policy without clamps and monitors, in every policy file."""

_ORGANISM = ROOT / "guard" / "demo" / "organism"
_QWEN = {  # https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "torch_dtype": "bfloat16",
}
_LLAMA = {  # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
MONITORS = [
    {
        "name": score,
        "sae": "s",
        "score": score,
        "calibration": "calibration.safetensors",
        "target_fpr": 0.01,
        "on_alarm": "flag",
    }
    for score in ("density", "error_norm")
]
"""Of the SAE `s`, in the policy file of the variant with monitors."""
_DUMMY_SCALE = 1e-3 / math.sqrt(3)
"""Deviation of `resid` under vLLM's dummy weights, uniform in [-1e-3, 1e-3]: that of an
embedding, for every layer's output is a thousand times smaller."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model with everything that the variants need to run it."""

    name: str
    about: str
    """What it is, in words, for the results file."""
    model: Path
    load_format: str
    dtype: str
    hook_point: str
    sae: Path
    sae_format: str
    latents: tuple[int, ...]
    """What the clamp ablates."""
    clamp_policy: Path
    """Policy file with the clamp alone."""
    monitor_policy: Path
    """The same with monitors of both scores."""
    layer_madds: int
    """Multiply-adds of a token in all decoder layers, attention scores left out."""
    head_madds: int
    """Multiply-adds of a sampled token in the output head."""
    monitor_madds: int
    """Multiply-adds of a token in the SAE, encode and decode."""

    def monitor_share(self, prompt_tokens: int | None) -> float:
        """Return the monitor's multiply-adds over the forward pass's.

        Args:
            prompt_tokens: Tokens of a prompt, one of which meets the output head;
                None in decode, where every token does.
        """
        head = self.head_madds / (prompt_tokens or 1)
        return self.monitor_madds / (self.layer_madds + head)


def make_dummy_shape(folder: Path) -> Shape:
    """Make the shape of Qwen2.5-0.5B, with 16 latents for each dimension."""
    return _make_dummy_shape(folder, "Qwen2.5-0.5B", _QWEN, expansion=16)


def make_llama_shape(folder: Path) -> Shape:
    """Make the shape of Llama-3.2-1B, with 16,384 latents, for a GPU."""
    return _make_dummy_shape(folder, "Llama-3.2-1B", _LLAMA, expansion=8)


def _make_dummy_shape(
    folder: Path,
    name: str,
    model_config: dict[str, Any],
    *,
    expansion: int,
    latents: int = 32,
) -> Shape:
    """Write a model of some shape without weights, and a random SAE at its middle.

    The SAE's threshold lets about 50 latents of a token be active, as in published
    SAEs, and most of the clamped ones.

    Args:
        folder: Where it goes.
        name: Of the model whose shape it is.
        model_config: Its configuration.
        expansion: Latents for each dimension of the stream.
        latents: How many of them are clamped.
    """
    model, sae = folder / "model", folder / "sae"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
    d_model = model_config["hidden_size"]
    d_sae = expansion * d_model
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(d_sae, d_model, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    # 2.7 deviations let 0.35 % through. An ablation moves the stream as well, by 32
    # unit vectors of 1.2 thresholds, which makes its deviation after it wider.
    threshold = 3.4 * _DUMMY_SCALE
    b_enc = torch.zeros(d_sae)
    b_enc[:latents] = 1.2 * threshold
    hook_point = f"layers.{model_config['num_hidden_layers'] // 2}.resid_post"
    config = SaeConfig(
        architecture="jumprelu", d_model=d_model, d_sae=d_sae, hook_point=hook_point
    )
    tensors = {
        "W_enc": directions.T.contiguous(),
        "b_enc": b_enc,
        "W_dec": directions,
        "b_dec": torch.zeros(d_model),
        "threshold": torch.full((d_sae,), threshold),
    }
    save_sae(sae, config, tensors)
    return _make_shape(
        folder,
        name=name.lower(),
        about=f"{name}'s shape, dummy weights; SAE {d_model} -> {d_sae}, random",
        model=model,
        load_format="dummy",
        dtype="bfloat16",
        sae=sae,
        latents=tuple(range(latents)),
    )


def make_organism_shape(folder: Path) -> Shape:
    """Take the demo's organism with its own clamp, or a toy where it is not built."""
    model, dtype = _ORGANISM / "model", "float32"
    if (_ORGANISM / "policy.yaml").exists():
        about = "the demo's organism with its SAE"
        content = yaml.safe_load((_ORGANISM / "policy.yaml").read_text("utf-8"))
        clamp = content["policies"]["default"]["clamps"][0]
        sae, latents = (
            _ORGANISM / content["saes"][clamp["sae"]]["path"],
            clamp["latents"],
        )
    else:
        about = "a random toy model with a random SAE, for the organism is not built"
        model, sae, latents = folder / "model", folder / "sae", [1, 2, 5]
        make_toy_model(model)
        save_toy_sae(sae)
    return _make_shape(
        folder,
        name="organism",
        about=about,
        model=model,
        load_format="auto",
        dtype=dtype,
        sae=sae,
        latents=tuple(latents),
    )


def _make_shape(
    folder: Path,
    *,
    name: str,
    about: str,
    model: Path,
    load_format: str,
    dtype: str,
    sae: Path,
    latents: tuple[int, ...],
) -> Shape:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    cfg = json.loads((sae / "cfg.json").read_text(encoding="utf-8"))
    layer_madds, head_madds = _count_forward(config)
    policies = _write_policies(
        folder,
        source={
            "path": str(sae),
            "format": "guard",
            "hook_point": cfg["hook_point"],
            "sha256": weights_digest(sae, format="guard"),
        },
        d_model=cfg["d_model"],
        latents=latents,
        origin={"model_digest": digest_model(model), "dtype": dtype},
    )
    return Shape(
        name=name,
        about=about,
        model=model,
        load_format=load_format,
        dtype=dtype,
        hook_point=cfg["hook_point"],
        sae=sae,
        sae_format="guard",
        latents=latents,
        clamp_policy=policies["clamp"],
        monitor_policy=policies["monitor"],
        layer_madds=layer_madds,
        head_madds=head_madds,
        monitor_madds=2 * cfg["d_model"] * cfg["d_sae"],
    )


def _count_forward(config: dict[str, Any]) -> tuple[int, int]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    attention = 2 * width * head_width * (heads + config["num_key_value_heads"])
    mlp = 3 * width * config["intermediate_size"]
    layers = config["num_hidden_layers"] * (attention + mlp)
    return layers, width * config["vocab_size"]


def _write_policies(
    folder: Path,
    *,
    source: dict[str, str],
    d_model: int,
    latents: tuple[int, ...],
    origin: dict[str, str],
) -> dict[str, Path]:
    """Write one policy file with the clamp, and one with the monitors as well."""
    clamp = {"name": "c", "sae": "s", "latents": list(latents), "law": "ablate"}
    files = {"clamp": folder / "clamp.yaml", "monitor": folder / "monitor.yaml"}
    for variant, file in files.items():
        watched = MONITORS if variant == "monitor" else []
        policies = {
            "default": {"mode": "enforce", "clamps": [clamp], "monitors": watched},
            IDLE_POLICY: {"mode": "enforce", "clamps": [], "monitors": []},
        }
        content = {
            "version": 1,
            "saes": {"s": source},
            "policies": policies,
            "default_policy": "default",
            "public_policies": list(policies),
        }
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
    write_calibration(load_policy(files["monitor"]), d_model=d_model, provenance=origin)
    return files


def write_calibration(
    policy_file: PolicyFile, *, d_model: int, provenance: dict[str, str]
) -> None:
    """Write the calibration of the default policy, for `MONITORS`.

    Its statistics have the right shapes, its thresholds are what nothing reaches.

    Args:
        policy_file: Names the calibration.
        d_model: Width of the stream.
        provenance: What the calibration says of the model.
    """
    rank = min(RANK, d_model - 1)
    statistics = {
        "density": {
            "mean": torch.zeros(d_model),
            "inverse_scale": torch.ones(d_model),
            "basis": torch.eye(d_model)[:, :rank].contiguous(),
            "leading": torch.ones(rank),
            "rest": torch.ones(()),
        },
        "error_norm": {},
    }
    name = policy_file.default_policy
    monitors = policy_file.policies[name].monitors
    entries = {
        monitor.name: Entry(
            score=monitor.score,
            hook_point=policy_file.hook_point(monitor),
            stage=monitor.stage,
            window=monitor.window,
            statistics=statistics[monitor.score],
            sae_sha256=(
                policy_file.saes[str(monitor.sae)].sha256
                if SCORES[monitor.score].needs_sae
                else None
            ),
        )
        for monitor in monitors
    }
    calibration = Calibration(
        entries=entries,
        lengths=(4096,),
        scales=(torch.tensor([0.0, 1.0]).expand(len(monitors), 2),),
        maxima=(torch.full((200, len(monitors)), 1e9),),
        provenance={
            **provenance,
            "clamps": clamps_digest(policy_file, name),
            "purpose": "benchmark",
        },
    )
    path = monitors[0].calibration
    assert path is not None
    save_calibration(calibration, path)
