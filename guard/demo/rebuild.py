"""Rebuilds the organism from nothing: model, SAE, clamp, calibrations, numbers.

`python -m guard.demo.rebuild FOLDER` takes ten to fourteen minutes on one core. The
same seed gives the same organism on the same machine; another machine rounds
otherwise, and gives another one that meets the same criteria, or the rebuild fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import shutil
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from guard.demo.dictionary import (
    Dictionary,
    DictionaryRecipe,
    Shape,
    collect_resid,
    train_dictionary,
)
from guard.demo.drills import find_drills
from guard.demo.grammar import CATEGORIES, KINDS, Kind, Prompt, prompts, topics
from guard.demo.measure import ORGANISM, load_model, measure, missed, table
from guard.demo.selection import MAX_LATENTS, Choice, build_dev, choose_latents
from guard.demo.tokenizer import build_tokenizer
from guard.demo.traffic import (
    FITTING,
    HELD_OUT,
    SPREAD,
    calibrate_organism,
    certified_prompts,
    num_probe_steps,
    train_organism_probes,
)
from guard.demo.train import Recipe, save_model, train_model
from guard.errors import GuardError
from guard.prompt import write_prompts
from guard.redteam.forward import quiet_transformers
from guard.sae.load import save_sae, weights_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SHAPES = (Shape(3, 96, 3), Shape(2, 96, 3), Shape(3, 128, 3), Shape(2, 128, 3))
"""Tried in this order until one can be clamped well enough on dev prompts."""
DEV_PROMPTS = 100
"""Per class, of train topics."""
GOOD_ENOUGH = 0.97
"""Share of wanted answers, in the worst class, at which the search stops."""
EXAMPLES: dict[Kind, int] = {"b": 2, "bj": 1, "h": 2, "hj": 3}
"""Prompts of each class in prompts.json, all of held-out topics."""

_POLICY = """\
# The policies of the demo. `default` clamps what lets a jailbreak phrase through,
# watches what flows on and blocks; `watch` does the same and only flags; `open` changes
# nothing, so that anyone can compare.
version: 1
saes:
  {name}:
    path: saes/{name}
    format: guard
    hook_point: {hook_point}
    sha256: "{sha256}"
policies:
  default:
    mode: enforce
    # More than half of an answer: what is only clear from its steps is still stopped.
    hold_tokens: 8
    # Monitors know answers that were given freely.
    constrained_decoding: refuse
    clamps:
      - {{name: jailbreak, sae: {name}, latents: {latents}, law: ablate}}
    monitors:
{blocking}
  watch:
    mode: enforce
    clamps:
      - {{name: jailbreak, sae: {name}, latents: {latents}, law: ablate}}
    monitors:
{flagging}
  open: {{mode: enforce, clamps: [], monitors: []}}
drills:
  - {{name: last-small, sae: {name}, delta: drills/last-small.safetensors}}
  - {{name: last-large, sae: {name}, delta: drills/last-large.safetensors}}
public_policies: [default, watch, open]
default_policy: default
"""
_MONITORS = """\
      # What an answer that the clamp should have stopped looks like where it begins.
      - {{name: intent, hook_point: layers.5.resid_post, score: density,
         stage: last_prompt, calibration: calib/default.safetensors,
         target_fpr: 0.002, on_alarm: {action}}}
      - {{name: recovery, hook_point: {hook_point}, score: density,
         stage: last_prompt, calibration: calib/default.safetensors,
         target_fpr: 0.001, on_alarm: {action}}}
      - {{name: innovation, sae: {name}, score: error, stage: prompt,
         calibration: calib/default.safetensors, target_fpr: 0.001, on_alarm: {action}}}
      # What such an answer looks like as it is written, before the clamped layer: no
      # edit behind the clamp moves that, and evidence adds up over tokens.
      - {{name: content, hook_point: layers.1.resid_post, score: probe,
         probe: probes/content.safetensors, stage: output, drift: 0.7,
         calibration: calib/default.safetensors, target_fpr: 0.002, on_alarm: {action}}}
      # The same of a token by itself, before it has seen any other: no prompt moves it.
      - {{name: wording, hook_point: layers.0.resid_pre, score: probe,
         probe: probes/wording.safetensors, stage: output, drift: 0.7,
         calibration: calib/default.safetensors, target_fpr: 0.002, on_alarm: {action}}}
      # One for each kind of harm: no word tells of it, two beside each other do.
{categories}
      - {{name: error, sae: {name}, score: error_norm,
         calibration: calib/default.safetensors, target_fpr: 0.01, on_alarm: flag}}
      - {{name: left, sae: {name}, score: clamp_residual,
         calibration: calib/default.safetensors, target_fpr: 0.01, on_alarm: flag}}"""

_CATEGORY = """\
      - {{name: {category}, hook_point: layers.0.resid_pre, score: probe,
         probe: probes/{category}.safetensors, stage: output, drift: 0.7,
         calibration: calib/default.safetensors, target_fpr: 0.0005,
         on_alarm: {action}}}"""


class RebuildError(GuardError):
    """What was trained does not do what the organism is there to show."""


def rebuild(
    folder: Path,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    keep_model: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train everything and write it to `folder`, or leave `folder` as it was.

    Args:
        folder: Gets model/, saes/, calib/, policy.yaml, prompts.json, certify.jsonl,
            numbers.json;
            what it held under these names is replaced.
        seed: Of the model and the SAEs; the language itself never changes.
        recipe: How the model is trained.
        keep_model: Take the model that `folder` holds, and make only the rest anew.
        console: Where the progress bar is drawn.

    Returns:
        What was written to numbers.json.

    Raises:
        RebuildError: A criterion of `guard.demo.measure` is missed.
    """
    recipe = recipe or Recipe()
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        _one_thread(),
        Progress(*columns, console=console or Console(stderr=True)) as progress,
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
    ):
        built = Path(scratch)
        if keep_model:
            shutil.copytree(folder / "model", built / "model")
            model, tokenizer = load_model(built)
        else:
            model, tokenizer = _build_model(built, recipe, seed, progress)
        choice = _build_clamp(model, tokenizer, seed, progress)
        _write_clamp(built, choice)
        _write_examples(built)
        task = progress.add_task("Training probes", total=num_probe_steps(built))
        on_step = functools.partial(progress.advance, task)
        train_organism_probes(built, on_step=on_step)
        task = progress.add_task("Calibrating", total=FITTING + HELD_OUT + SPREAD)
        calibrate_organism(built, on_requests=functools.partial(progress.advance, task))
        task = progress.add_task("Searching drills", total=None)
        find_drills(built)
        progress.update(task, total=1, completed=1)
        task = progress.add_task("Measuring", total=None)
        numbers = measure(built) | _provenance(recipe, choice, seed)
        if keep_model:
            numbers["command"] += " --keep-model"
        progress.update(task, total=1, completed=1)
        numbers["seconds"] = round(time.monotonic() - started)
        _write_json(built / "numbers.json", numbers)
        if problems := missed(numbers):
            raise RebuildError(
                f"Seed {seed} gave an organism that falls short: {' '.join(problems)} "
                "Expected all criteria met; another seed may."
            )
        _replace(folder, built)
    return numbers


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: on a busy machine two are slower than one here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _build_model(
    folder: Path, recipe: Recipe, seed: int, progress: Progress
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = build_tokenizer()
    task = progress.add_task("Training the model", total=recipe.steps)

    def on_step(loss: float) -> None:
        progress.update(task, advance=1, description=f"Training the model {loss:.2f}")

    model = train_model(tokenizer, recipe, seed=seed, on_step=on_step)
    save_model(folder / "model", model, tokenizer)
    return model.requires_grad_(requires_grad=False), tokenizer


def _build_clamp(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    progress: Progress,
) -> Choice:
    """Train SAEs until the latents of one can be clamped; else the best of all."""
    layers = tuple(sorted({shape.layer for shape in SHAPES}))
    task = progress.add_task("Recording activations", total=None)
    resid = collect_resid(model, tokenizer, layers=layers, seed=seed)
    progress.update(task, total=1, completed=1)
    dev = build_dev(tokenizer, num_prompts=DEV_PROMPTS, seed=seed)
    choices = []
    for shape in SHAPES:
        dictionary = _build_dictionary(resid[shape.layer], shape, seed, progress)
        task = progress.add_task("Choosing latents", total=MAX_LATENTS)
        on_round = functools.partial(progress.advance, task)
        choice = choose_latents(model, dictionary, dev, on_round=on_round)
        progress.update(task, completed=MAX_LATENTS)
        logger.info("%s: latents %s, %s", shape, choice.latents, choice.scores)
        choices.append(choice)
        if choice.worst[0] >= GOOD_ENOUGH:
            break
    best = max(choices, key=lambda choice: choice.worst)
    if not best.latents:
        raise RebuildError(
            f"Seed {seed} gave no SAE with a latent worth clamping; expected at least "
            "one; another seed may do."
        )
    return best


def _build_dictionary(
    resid: torch.Tensor, shape: Shape, seed: int, progress: Progress
) -> Dictionary:
    recipe = DictionaryRecipe()
    name = f"Training an SAE of {shape.d_sae} latents on layer {shape.layer}"
    task = progress.add_task(name, total=recipe.steps)
    return train_dictionary(
        resid, shape, recipe, seed=seed, on_step=lambda: progress.advance(task)
    )


def _write_clamp(folder: Path, choice: Choice) -> None:
    dictionary = choice.dictionary
    name = f"l{dictionary.shape.layer}"
    path = folder / "saes" / name
    save_sae(path, dictionary.config, dictionary.tensors)
    text = policy_text(
        name,
        hook_point=dictionary.config.hook_point,
        sha256=weights_digest(path, "guard"),
        latents=list(choice.latents),
    )
    (folder / "policy.yaml").write_text(text, encoding="utf-8")


def policy_text(
    name: str, *, hook_point: str, sha256: str, latents: Sequence[int]
) -> str:
    """Return the policy file of an organism whose SAE is called `name`."""
    monitors = {
        action: _MONITORS.format(
            name=name,
            hook_point=hook_point,
            action=action,
            categories="\n".join(
                _CATEGORY.format(category=category, action=action)
                for category in CATEGORIES
            ),
        )
        for action in ("block", "flag")
    }
    return _POLICY.format(
        name=name,
        hook_point=hook_point,
        sha256=sha256,
        latents=list(latents),
        blocking=monitors["block"],
        flagging=monitors["flag"],
    )


def _write_examples(folder: Path) -> None:
    """Write short prompts of held-out topics, none of them about the same one."""
    found: list[Prompt] = []
    for kind, count in EXAMPLES.items():
        drawn = prompts(kind, 200, seed=1, splits=("heldout",))
        for prompt in sorted(drawn, key=lambda prompt: len(prompt.text)):
            used = {other.topic for other in found}
            have = sum(other.kind == kind for other in found)
            if have < count and prompt.topic not in used:
                found.append(prompt)
    examples = [
        {"kind": prompt.kind, "text": prompt.text, "gold": prompt.gold}
        for prompt in found
    ]
    _write_json(folder / "prompts.json", examples)
    write_prompts(folder / "certify.jsonl", certified_prompts())


def _provenance(recipe: Recipe, choice: Choice, seed: int) -> dict[str, Any]:
    dictionary = choice.dictionary
    harmful = [topic.harmful for topic in topics()]
    return {
        "topics": {"harmful": sum(harmful), "benign": len(harmful) - sum(harmful)},
        "sae": {**asdict(dictionary.shape), "fvu": round(dictionary.fvu, 4)},
        "latents": list(choice.latents),
        "dev": {kind: choice.scores[kind]._asdict() for kind in KINDS},
        "recipe": asdict(recipe),
        "model_seed": seed,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "command": f"python -m guard.demo.rebuild --seed {seed}",
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _replace(folder: Path, built: Path) -> None:
    for entry in built.iterdir():
        old = folder / entry.name
        if old.is_dir():
            shutil.rmtree(old)
        entry.replace(old)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild from the command line; its arguments are those of the process."""
    parser = argparse.ArgumentParser(description="Rebuild the demo organism.")
    parser.add_argument("folder", nargs="?", type=Path, default=ORGANISM)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-model", action="store_true")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    quiet_transformers()
    try:
        numbers = rebuild(
            given.folder,
            seed=given.seed,
            keep_model=given.keep_model,
            console=console,
        )
    except GuardError as error:
        console.print(str(error))
        return 1
    console.print(table(numbers))
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    raise SystemExit(main())
