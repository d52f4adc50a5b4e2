"""Probes: what a behaviour looks like in the stream, learned from labelled requests.

A probe reads one token at a time and knows no attention. It is judged on whole groups
of prompts that it was not trained on: on few topics it would remember those.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from guard.artefact import explaining, read_artefact, write_artefact
from guard.errors import CalibrationError
from guard.policy import Monitor
from guard.recording import Recording
from guard.score import Activations, Statistics, probe
from guard.watch import sum_up

__all__ = [
    "Example",
    "ProbeRecipe",
    "auroc",
    "judge_probe",
    "largest_sum",
    "load_probe",
    "save_probe",
    "tpr_at_fpr",
    "train_probe",
]

FORMAT = 1
_PARTS = ("weight", "inward", "bias", "outward", "offset")
"""Statistics of the score `probe`."""


class Example(NamedTuple):
    """One labelled request at one hook point."""

    resid: Tensor
    """Rows of the probe's stage, `[num_tokens, d_model]`."""
    label: int
    """1 where the request shows the behaviour."""
    group: str
    """What it is about."""

    @classmethod
    def of(
        cls, recording: Recording, monitor: Monitor, at: str, label: int, group: str
    ) -> "Example":
        """Cut a recording to what a monitor's probe looks at."""
        rows = recording.resid[at].float()
        return cls(rows[recording.of_stage(monitor)], label, group)


class ProbeRecipe(NamedTuple):
    """How a probe is trained; the defaults were chosen on the organism's dev topics."""

    hidden: int = 64
    """Width of its hidden layer."""
    steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 2048
    """Tokens per step."""
    learning_rate: float = 3e-3
    """AdamW's."""
    weight_decay: float = 0.1
    """AdamW's."""
    noise: float = 0.3
    """Deviation of the noise on standardised activations; keeps it off details."""
    dropout: float = 0.2
    """Share of hidden units that are left out of each step."""


def train_probe(
    examples: Sequence[Example],
    recipe: ProbeRecipe,
    *,
    drift: float | None = None,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Train a probe to tell labelled requests apart.

    By what a monitor makes of them. Where it averages, each token is an example with
    its request's label. Where it adds up what exceeds `drift`, each request is one: a
    token is then worth what it adds to the evidence of the others. Both labels weigh
    the same.

    Returns:
        The statistics of the score `probe`, the standardisation folded in.

    Raises:
        CalibrationError: A label is missing among the examples.
    """
    used = [example for example in examples if len(example.resid)]
    labels = torch.tensor([float(example.label) for example in used])
    if len(labels.unique()) < 2:
        message = (
            "All labelled requests have one label; expected some of each, 0 and 1."
        )
        raise CalibrationError(message)
    rows = torch.cat([example.resid for example in used]).float()
    mean, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
    parts = [((example.resid.float() - mean) / scale) for example in used]
    if drift is None:
        # Tokens are requests of one token.
        labels = labels.repeat_interleave(torch.tensor([len(part) for part in parts]))
        parts = [torch.cat(parts)[:, None]]
        tokens, mask = parts[0], torch.ones(len(labels), 1, dtype=torch.bool)
    else:
        tokens = pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    parameters = _descend(tokens, mask, labels, recipe, drift, seed, on_step)
    return _fold(parameters, mean, scale)


def _descend(
    tokens: Tensor,
    mask: Tensor,
    labels: Tensor,
    recipe: ProbeRecipe,
    drift: float | None,
    seed: int,
    on_step: Callable[[], object],
) -> dict[str, Tensor]:
    """Fit a probe to requests `[num, num_tokens, d_model]`, padded where not `mask`."""
    positive = labels.mean()
    weights = torch.where(labels > 0, 0.5 / positive, 0.5 / (1 - positive))
    generator = torch.Generator().manual_seed(seed)
    parameters = _initial(tokens.shape[-1], recipe.hidden, generator)
    bar = torch.ones((), requires_grad=True)
    optimizer = torch.optim.AdamW(
        [*parameters.values(), bar],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    size = max(recipe.batch_size // tokens.shape[1], 1)
    for _ in range(recipe.steps):
        chosen = torch.randint(len(tokens), (size,), generator=generator)
        shown = tokens[chosen]
        noise = torch.randn(shown.shape, generator=generator)
        kept = torch.rand(size, 1, recipe.hidden, generator=generator)
        kept = (kept >= recipe.dropout) / (1 - recipe.dropout)
        odds = _forward(shown + recipe.noise * noise, parameters, kept)
        if drift is None:
            odds = odds[:, 0]
        else:
            odds = largest_sum(functional.softplus(odds), mask[chosen], drift) - bar
        loss = functional.binary_cross_entropy_with_logits(
            odds, labels[chosen], weight=weights[chosen]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        on_step()
    return parameters


def largest_sum(scores: Tensor, mask: Tensor, drift: float) -> Tensor:
    """Return the CUSUM's maximum of each request, as a `Watch` has it, with a gradient.

    Args:
        scores: `[num_requests, num_tokens]`.
        mask: Which of them are scored, `[num_requests, num_tokens]`.
        drift: Taken off each.

    Returns:
        `[num_requests]`.
    """
    total = scores.new_zeros(len(scores))
    largest = total
    for column, known in zip(scores.unbind(1), mask.unbind(1), strict=True):
        total = torch.where(known, (total + column - drift).relu(), total)
        largest = largest.maximum(total)
    return largest


def _initial(width: int, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    parameters = {
        "weight": torch.zeros(width),
        "inward": torch.randn(width, hidden, generator=generator) / 10,
        "bias": torch.zeros(hidden),
        "outward": torch.randn(hidden, generator=generator) / 10,
        "offset": torch.zeros(()),
    }
    return {name: value.requires_grad_() for name, value in parameters.items()}


def _forward(rows: Tensor, parameters: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    hidden = (rows @ parameters["inward"] + parameters["bias"]).relu() * kept
    linear = rows @ parameters["weight"] + parameters["offset"]
    return linear + hidden @ parameters["outward"]


@torch.no_grad()
def _fold(
    parameters: Mapping[str, Tensor], mean: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    weight = parameters["weight"] / scale
    inward = parameters["inward"] / scale[:, None]
    return {
        "weight": weight.detach(),
        "inward": inward.detach(),
        "bias": (parameters["bias"] - mean @ inward).detach(),
        "outward": parameters["outward"].detach().clone(),
        "offset": (parameters["offset"] - mean @ weight).detach(),
    }


def judge_probe(
    examples: Sequence[Example],
    monitor: Monitor,
    recipe: ProbeRecipe,
    *,
    folds: int = 4,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Say how well probes tell requests of groups apart that they never saw.

    Each fold trains on the groups of the others. Requests are compared by what the
    monitor makes of them, within their fold.

    Returns:
        `auroc` and `tpr_at_1pct`, means over the folds, and the number of `groups`.

    Raises:
        CalibrationError: There are fewer groups of a label than folds.
    """
    # Dealt by label, so that each fold has groups of both.
    label_of: dict[str, int] = {}
    for example in examples:
        label_of[example.group] = max(label_of.get(example.group, 0), example.label)
    ranked = sorted(label_of, key=lambda group: (label_of[group], group))
    fold_of = {group: number % folds for number, group in enumerate(ranked)}
    held = [{e.label for e in examples if fold_of[e.group] == f} for f in range(folds)]
    if any(labels != {0, 1} for labels in held):
        message = (
            f"{len(label_of)} groups, {sum(label_of.values())} with label 1, are too "
            f"few to judge a probe on groups it never saw; expected {folds} at least "
            "of either label."
        )
        raise CalibrationError(message)
    found = []
    for fold in range(folds):
        trained = [e for e in examples if fold_of[e.group] != fold]
        judged = [e for e in examples if fold_of[e.group] == fold]
        statistics = train_probe(
            trained, recipe, drift=monitor.drift, seed=seed, on_step=on_step
        )
        shown: dict[int, list[float]] = {0: [], 1: []}
        for example in judged:
            shown[example.label].append(_read(statistics, example, monitor))
        shows, hides = torch.tensor(shown[1]), torch.tensor(shown[0])
        found.append((auroc(shows, hides), tpr_at_fpr(shows, hides, 0.01)))
    area, caught = torch.tensor(found).mean(0).tolist()
    return {"auroc": area, "tpr_at_1pct": caught, "groups": len(label_of)}


def _read(statistics: Statistics, example: Example, monitor: Monitor) -> float:
    scores = probe(Activations(example.resid), statistics).numpy()
    everything = monitor.model_copy(update={"stage": None})
    return sum_up(scores, everything, prompt_length=0)


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Return the probability that a positive is above a negative, ties half."""
    above = (positive[:, None] > negative).double().mean()
    level = (positive[:, None] == negative).double().mean()
    return float(above + level / 2)


def tpr_at_fpr(positive: Tensor, negative: Tensor, fpr: float) -> float:
    """Return the share of positives above all but `fpr` of the negatives."""
    bar = negative.double().quantile(1 - fpr, interpolation="higher")
    return float((positive > bar).double().mean())


def save_probe(path: Path, statistics: Statistics, about: Mapping[str, Any]) -> None:
    """Write a probe's weights; `about` must be JSON."""
    write_artefact(path, statistics, {"format": FORMAT, **about})


def load_probe(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a probe's weights, and what is known about it.

    Raises:
        CalibrationError: The file is missing, damaged or not a probe.
    """
    with explaining(path, kind="probe", command="guard probe train"):
        statistics, about = read_artefact(path)
        known = about.pop("format", None)
    if known != FORMAT or statistics.keys() != set(_PARTS):
        message = f"{path}: a probe of another format; train it again."
        raise CalibrationError(message)
    return statistics, about
