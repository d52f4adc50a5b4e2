"""Benign traffic through the clamped organism, and what its scores usually are."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from guard.calibration import fit_calibration, save_calibration
from guard.demo.dialogue import answers
from guard.demo.grammar import Split, benign_prompts
from guard.demo.measure import load_model, policy_edit
from guard.demo.tokenizer import encode_prompt
from guard.hook import HookPoint
from guard.monitor import Activations
from guard.policy import load_policy
from guard.redteam.forward import Batch, Edit, edited, pad_left
from guard.sae.load import load_sae

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import LlamaForCausalLM

    from guard.policy import SaeSource

__all__ = ["SCORES", "calibrate", "num_batches", "record_traffic"]

SCORES = ("density", "error_norm")
"""Scores the demo's policy watches."""
FITTING, HELD_OUT = 1000, 2000
"""Requests for the statistics, and others for the thresholds."""
TRAFFIC_SEED = 5_000_000
LONGEST = 128
"""Tokens of the one bucket of total lengths; prompts and answers are shorter."""
_BATCH = 100


def calibrate(
    folder: Path,
    *,
    seed: int = TRAFFIC_SEED,
    on_batch: Callable[[], object] = lambda: None,
) -> None:
    """Write `calib/<score>.safetensors` for the folder's default policy.

    Args:
        folder: An organism with model/, saes/ and policy.yaml.
        seed: Of the prompts.
        on_batch: Called for every 1 / `num_batches()` of the work.
    """
    source = _find_source(folder)
    # Thresholds from topics the statistics never saw: so they allow for new ones.
    record = functools.partial(record_traffic, folder, seed=seed, on_batch=on_batch)
    fitting = list(record(FITTING, split="train"))
    held_out = list(record(HELD_OUT, split="calibration"))
    joined = Activations(*map(torch.cat, zip(*fitting, strict=True)))
    for score in SCORES:
        calibration = fit_calibration(
            score,
            hook_point=source.hook_point,
            fitting=joined,
            held_out=held_out,
            lengths=[LONGEST],
            provenance={
                "sae_sha256": source.sha256,
                "model": "organism",
                "prompts": f"guard.demo.grammar.benign_prompts, seed {seed}",
                "topics": {"fitting": "train", "held_out": "calibration"},
                "fitting_requests": FITTING,
                "dtype": "float32",
                "torch": version("torch"),
                "date": datetime.now(tz=UTC).date().isoformat(),
            },
        )
        save_calibration(calibration, folder / "calib" / f"{score}.safetensors")


def num_batches() -> int:
    """Return how often `calibrate` calls `on_batch`."""
    return (FITTING + HELD_OUT) // _BATCH


def record_traffic(
    folder: Path,
    count: int,
    *,
    seed: int,
    split: Split,
    on_batch: Callable[[], object] = lambda: None,
) -> Iterator[Activations]:
    """Yield what each benign request shows at the hook point, after the clamp.

    Answers are greedy, as in serving; the BOS and the last token, which no engine
    runs through the model, are left out.

    Args:
        folder: An organism.
        count: Requests to draw.
        seed: Of their prompts.
        split: The topics they are about.
        on_batch: Called after each batch of them.
    """
    model, tokenizer = load_model(folder)
    edit = policy_edit(folder)
    source = _find_source(folder)
    sae = load_sae(source.path, format=source.format, sha256=source.sha256)
    layer = HookPoint.parse(source.hook_point).layer
    drawn = benign_prompts(count, seed=seed, splits=(split,))
    texts = [prompt.text for prompt in drawn]
    for start in range(0, count, _BATCH):
        share = texts[start : start + _BATCH]
        given = answers(model, tokenizer, share, edit=edit)
        sequences = [
            encode_prompt(tokenizer, text)
            + tokenizer.encode(answer, add_special_tokens=False)
            for text, answer in zip(share, given, strict=True)
        ]
        batch = pad_left(sequences, tokenizer.pad_token_id)
        recorded = _record(model, batch, edit, behind=layer)
        for resid, rows in zip(recorded, batch.rows, strict=True):
            scored = resid[rows]
            yield Activations(scored, scored - sae.decode(sae.encode(scored)))
        on_batch()


@torch.no_grad()
def _record(
    model: LlamaForCausalLM, batch: Batch, edit: Edit | None, *, behind: int
) -> torch.Tensor:
    """Return what the layer behind the hook reads, `[batch, length, d_model]`."""
    read: list[torch.Tensor] = []

    def keep(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        read.append(args[0])

    handle = model.model.layers[behind + 1].register_forward_pre_hook(keep)
    with edited(model, edit, lambda: batch.rows):
        model(
            input_ids=batch.tokens,
            attention_mask=batch.mask.long(),
            position_ids=batch.positions,
        )
    handle.remove()
    return read[0]


def _find_source(folder: Path) -> SaeSource:
    """Return the SAE that the folder's default policy clamps."""
    policies = load_policy(folder / "policy.yaml")
    return policies.saes[policies.policies[policies.default_policy].clamps[0].sae]
