"""What a soak serves: a model, its policies, who may use them, and what they ask.

Each is written into a folder of its own, where its policy file may change. Memory for
KV is so small that requests are preempted, and prompts begin alike, so that the cache
is hit.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.operator import Policies
from benchmarks.reload import push
from guard.calibration import Entry, save_calibration
from guard.check import digest_model
from guard.demo.measure import ORGANISM
from guard.demo.show import OPTIONS
from guard.drill import RecoveryEdit, save_edit
from guard.fingerprint import clamps_digest
from guard.policy import load_policy
from guard.recording import fit_calibration
from guard.sae.load import load_sae, weights_digest
from guard.score import SCORES, Activations
from guard.testing import TOY_WORDS, make_toy_model, save_toy_sae

__all__ = ["STRANGER", "Deployment", "make_organism", "make_toy"]

STRANGER = "sk-of-nobody"
"""A key of the server, and no tenant's."""
_SERVER = ("--block-size", "32", "--enforce-eager")
"""Small blocks, for prefixes are short; not compiled, which counts the same."""
_HOOK_POINT = "layers.1.resid_post"
_BENIGN = 150
"""Requests that the toy's thresholds are calibrated on, and as many for statistics."""
_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model with all that a server and its clients need."""

    name: str
    about: str
    """What it is, in words, for the results file."""
    model: Path
    policies: Policies
    options: tuple[str, ...]
    """Of the server."""
    keys: dict[str, tuple[str, ...]]
    """Policies that each key of the server may name."""
    drills: tuple[str, ...]
    max_tokens: int
    """Longest answer that is asked for."""
    draw_prompt: Callable[[random.Random], str]


def make_organism(folder: Path) -> Deployment:
    """Copy the demo's organism: trained, short, its clamp and monitors are real."""
    shutil.copytree(ORGANISM, folder, dirs_exist_ok=True)
    path = folder / "policy.yaml"
    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = _add_tenants(body, [("default", "watch"), ("open", "watch")])
    path.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    texts = [prompt["text"] for prompt in prompts]
    return Deployment(
        name="organism",
        about="the demo's organism, its clamps and monitors",
        model=folder / "model",
        policies=Policies(path, push),
        options=(
            *OPTIONS,
            *("--num-gpu-blocks-override", "28", *_SERVER),
            *("--api-key", *keys),
        ),
        keys=keys,
        drills=tuple(drill["name"] for drill in body["drills"]),
        max_tokens=120,
        draw_prompt=lambda draw: _draw_text(draw, texts),
    )


def _draw_text(draw: random.Random, texts: Sequence[str]) -> str:
    """Return one text, or one behind others that many requests begin with."""
    first = draw.choice([None, None, None, 0, 4])
    begin = [] if first is None else texts[first : first + 4]
    return " ".join([*begin, draw.choice(texts)])


def make_toy(folder: Path) -> Deployment:
    """Write a random-weight model with a long context, and calibrate its monitors."""
    make_toy_model(folder / "model", max_length=_MAX_LENGTH)
    save_toy_sae(folder / "sae", hook_point=_HOOK_POINT)
    digest = weights_digest(folder / "sae", "guard")
    delta = 20 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    edit = RecoveryEdit(delta, "w1 w2", "w3", 1.0, "last_prompt", digest)
    save_edit(folder / "drills" / "last.safetensors", edit)
    body = _toy_policies(digest)
    keys = _add_tenants(body, [("strict", "default"), ("open", "observed")])
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    _calibrate(folder, path)
    return Deployment(
        name="random",
        about=f"random weights, a context of {_MAX_LENGTH} tokens",
        model=folder / "model",
        policies=Policies(path, _lift),
        options=(
            *("--served-model-name", "random", "--dtype", "float32"),
            *("--max-model-len", str(_MAX_LENGTH), "--max-num-seqs", "16"),
            *("--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "80"),
            *(*_SERVER, "--api-key", *keys),
        ),
        keys=keys,
        drills=("last",),
        max_tokens=300,
        draw_prompt=_draw_words,
    )


def _draw_words(draw: random.Random) -> str:
    shared = random.Random(draw.randrange(6))
    words = shared.choices(TOY_WORDS[:100], k=draw.choice([0, 0, 64, 128, 300]))
    return " ".join(words + draw.choices(TOY_WORDS[:100], k=draw.randint(1, 200)))


def _toy_policies(digest: str) -> dict[str, Any]:
    hold = {"name": "hold", "sae": "s", "latents": [1, 2], "law": "ablate"}
    lift = {"name": "lift", "sae": "s", "latents": [5], "law": "set", "value": 4.0}
    lift["when"] = {"latents": [7, 8], "above": 0.5, "scope": "request"}

    def watch(policy: str, action: str) -> dict[str, Any]:
        calibration = f"calib/{policy}.safetensors"
        monitor = {"name": "recovery", "sae": "s", "score": "density"}
        more = {"calibration": calibration, "target_fpr": 0.2, "on_alarm": action}
        return monitor | more

    policies = {
        "default": {"clamps": [hold, lift], "monitors": [watch("default", "flag")]},
        "strict": {
            "hold_tokens": 4,
            "clamps": [hold],
            "monitors": [watch("strict", "block")],
        },
        "observed": {
            "mode": "observe",
            "clamps": [hold],
            "monitors": [watch("observed", "block")],
        },
        "open": {},
    }
    source = {"path": "sae", "format": "guard", "hook_point": _HOOK_POINT}
    drill = {"name": "last", "sae": "s", "delta": "drills/last.safetensors"}
    return json.loads(  # a copy of each part: YAML would write references
        json.dumps(
            {
                "version": 1,
                "saes": {"s": source | {"sha256": digest}},
                "policies": policies,
                "drills": [drill],
                "default_policy": "default",
                "public_policies": ["default", "open"],
            }
        )
    )


def _lift(body: dict[str, Any]) -> None:
    """Make the toy's second policy file of its first."""
    clamp = {"name": "push", "sae": "s", "latents": [5, 9], "law": "set", "value": 25.0}
    body["policies"]["open"]["clamps"] = [clamp]
    body["policies"]["strict"]["hold_tokens"] = 1
    body["policies"]["default"]["monitors"][0]["target_fpr"] = 0.3


def _add_tenants(
    body: dict[str, Any], offers: Sequence[Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Give each offer of policies to a tenant; return what each key may name."""
    keys = {f"sk-of-tenant-{i}": tuple(offer) for i, offer in enumerate(offers)}
    body["tenants"] = [
        {
            "api_key_sha256": hashlib.sha256(key.encode()).hexdigest(),
            "policies": list(offer),
        }
        for key, offer in keys.items()
    ]
    return keys | {STRANGER: tuple(body["public_policies"])}


def _calibrate(folder: Path, path: Path) -> None:
    """Fit the density of the toy's stream, and thresholds a few requests exceed."""
    resids = list(_read_streams(folder / "model"))
    sae = load_sae(folder / "sae", format="guard")

    def explain(resid: Tensor) -> Activations:
        return Activations(resid, resid - sae.decode(sae.encode(resid)))

    score = SCORES["density"]
    statistics = score.fit(explain(torch.cat(resids[:_BENIGN])))
    maxima = [
        (len(one), score.apply(explain(one), statistics).amax()[None]) for one in resids
    ]
    policy_file = load_policy(path)
    for name, policy in policy_file.policies.items():
        for monitor in policy.monitors:
            sha256 = policy_file.saes["s"].sha256 if score.needs_sae else None
            entry = Entry("density", _HOOK_POINT, None, 1, statistics, sha256)
            calibration = fit_calibration(
                {monitor.name: entry},
                reference=maxima[:_BENIGN],
                held_out=maxima[_BENIGN:],
                lengths=[_MAX_LENGTH],
                provenance={
                    "model_digest": digest_model(folder / "model"),
                    "dtype": "float32",
                    "clamps": clamps_digest(policy_file, name),
                    "purpose": "benchmark",
                },
            )
            assert monitor.calibration is not None
            save_calibration(calibration, monitor.calibration)


def _read_streams(model: Path) -> Iterator[Tensor]:
    """Yield the stream at the hook point on random prompts, `[num_tokens, d_model]`."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    draw = torch.Generator().manual_seed(1)
    for _ in range(2 * _BENIGN):
        length = int(torch.randint(10, 600, (), generator=draw))
        tokens = torch.randint(4, 104, (1, length), generator=draw)
        with torch.no_grad():
            states = loaded(tokens, output_hidden_states=True).hidden_states
        yield states[2][0]
