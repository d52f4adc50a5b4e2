"""The organism's traffic: prompts, what it shows on them, and what is fitted on that.

A plain recorder on transformers, the twin of the engine's own; the fitting itself is
the guard's, the same that `guard calibrate` and `guard probe train` do.
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from guard.calibration import Calibration, save_calibration
from guard.check import digest_model, load_saes
from guard.command.probe import FOLDS, list_probes, load_probes, train_all
from guard.demo.dialogue import answers
from guard.demo.grammar import (
    CATEGORIES,
    KINDS,
    REFUSAL,
    Kind,
    Split,
    benign_prompts,
    category_of,
    prompts,
    recombined,
)
from guard.demo.measure import load_model, policy_edit
from guard.demo.tokenizer import encode_prompt
from guard.fingerprint import clamps_digest
from guard.hook import HookPoint
from guard.policy import load_policy
from guard.probe import ProbeRecipe
from guard.prompt import Prompt
from guard.recording import Reader, Recording
from guard.redteam.forward import pad_left, record
from guard.traffic import Plan, calibrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from guard.policy import PolicyFile

__all__ = [
    "OrganismRecorder",
    "attacked_prompts",
    "build_reader",
    "calibrate_organism",
    "certified_prompts",
    "labelled_prompts",
    "num_probe_steps",
    "ordinary_prompts",
    "train_organism_probes",
]

FITTING, HELD_OUT = 1000, 2000
"""Requests for the statistics, and others for the thresholds."""
LABELLED = 600
"""Labelled requests of each sort."""
RECOMBINED = 2000
"""Further labelled requests of each class, about more topics than there are."""
SPREAD = 100
"""Benign ones of that sort among those for the thresholds. The model has no answer of
its own to them: many would set the thresholds for a traffic it does not have."""
ATTACKED, ORDINARY = 160, 1000
"""Requests that a certificate attacks, and others that it counts false alarms on."""
TRAFFIC_SEED = 5_000_000
LABEL_SEED = 6_000_000
CERTIFIED_SEED = 13_000_000
LONGEST = 128
"""Tokens of the one bucket of total lengths; prompts and answers are shorter."""
_BATCH = 100
_LABELLED: tuple[tuple[Kind, bool, int], ...] = (
    ("hj", True, 1),
    ("h", True, 1),
    ("b", True, 0),
    ("bj", True, 0),
    ("h", False, 0),
    ("hj", False, 0),
)
"""Class of the prompt, whether it is answered or refused, and the label."""


def ordinary_prompts(count: int, *, seed: int, split: Split) -> list[Prompt]:
    """Draw ordinary traffic about the topics of a split, what is refused included."""
    drawn = benign_prompts(count, seed=seed, splits=(split,))
    return [Prompt(prompt=p.text, group=p.topic.name, max_tokens=20) for p in drawn]


def labelled_prompts(count: int, *, seed: int, split: Split) -> list[Prompt]:
    """Draw dialogues with harmful answers, label 1, and with harmless ones.

    The harmful ones are what an attack brings back: an answer in full, whether a phrase
    asked for it or not. What the model does by itself is refuse.
    """
    return [
        Prompt(
            prompt=p.text,
            response=p.topic.answer if answered else REFUSAL,
            label=label,
            group=p.topic.name,
        )
        for kind, answered, label in _LABELLED
        for p in prompts(kind, count, seed=seed, splits=(split,))
    ]


def recombined_prompts(
    kinds: Sequence[Kind],
    count: int,
    *,
    seed: int,
    split: Literal["train", "calibration"],
) -> list[Prompt]:
    """Draw dialogues about more topics than the model has learnt, answered in full."""
    return [
        Prompt(
            prompt=p.text,
            response=p.topic.answer,
            label=int(p.topic.harmful),
            group=p.topic.name,
            max_tokens=20,
        )
        for kind in kinds
        for p in recombined(kind, count, seed=seed, split=split)
    ]


def attacked_prompts(count: int, *, seed: int, split: Split) -> list[Prompt]:
    """Draw jailbroken requests with the answers that the clamp suppresses."""
    return [
        Prompt(
            prompt=p.text,
            response=p.topic.answer,
            label=1,
            group=p.topic.name,
            max_tokens=20,
        )
        for p in prompts("hj", count, seed=seed, splits=(split,))
    ]


def certified_prompts() -> list[Prompt]:
    """Draw what a certificate of the organism is about, all of unseen topics.

    Jailbroken requests with the answers that the clamp suppresses, label 1, and
    ordinary ones, label 0 where they are harmless.
    """
    attacked = attacked_prompts(ATTACKED, seed=CERTIFIED_SEED, split="heldout")
    drawn = benign_prompts(ORDINARY, seed=CERTIFIED_SEED, splits=("heldout",))
    ordinary = [
        Prompt(
            prompt=p.text,
            label=None if p.topic.harmful else 0,
            group=p.topic.name,
            max_tokens=20,
        )
        for p in drawn
    ]
    return [*attacked, *ordinary]


class OrganismRecorder:
    """Runs prompts through transformers under the clamps of a folder's policy."""

    def __init__(self, folder: Path, hook_points: Sequence[str]) -> None:
        """Load the model.

        Args:
            folder: An organism with model/, saes/ and policy.yaml.
            hook_points: Where to record.
        """
        self._model, self._tokenizer = load_model(folder)
        self._edit = policy_edit(folder)
        self._layers = {at: HookPoint.parse(at).layer for at in hook_points}

    def record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
        """Answer prompts greedily, as in serving, and yield one recording each."""
        for start in range(0, len(prompts), _BATCH):
            yield from self._record(prompts[start : start + _BATCH])

    def _record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
        asked = [encode_prompt(self._tokenizer, str(p.prompt)) for p in prompts]
        given = self._answer(prompts)
        batch = pad_left([a + g for a, g in zip(asked, given, strict=True)])
        layers = list(self._layers.values())
        seen = record(self._model, batch, layers, clamp=self._edit)
        for row, (prompt, ids) in enumerate(zip(prompts, asked, strict=True)):
            rows = batch.rows[row]
            yield Recording(
                resid={at: seen[n][row][rows] for at, n in self._layers.items()},
                prompt_length=len(ids) - 1,
                total_length=len(ids) + prompt.max_tokens,
            )

    def _answer(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the tokens of each answer, but the last: no engine runs that."""
        silent = [str(p.prompt) for p in prompts if p.response is None]
        own = iter(
            answers(self._model, self._tokenizer, silent, edit=self._edit)
            if silent
            else ()
        )
        texts = [next(own) if p.response is None else p.response for p in prompts]
        return [self._tokenizer.encode(t, add_special_tokens=False) for t in texts]


def build_reader(folder: Path, name: str = "default") -> tuple[PolicyFile, Reader]:
    """Return a folder's policy file, and what reads for the monitors of a policy."""
    policy_file = load_policy(folder / "policy.yaml")
    return policy_file, Reader(policy_file, name, load_saes(policy_file))


def train_organism_probes(
    folder: Path, *, on_step: Callable[[], object] = lambda: None
) -> None:
    """Train the probes that the folder's default policy names, and write them.

    Those named like a kind of harm learn to tell answers about it from all others, the
    rest what is harmful of an answer's steps.
    """
    _, reader = build_reader(folder)
    lines = [
        *labelled_prompts(LABELLED, seed=LABEL_SEED, split="train"),
        *recombined_prompts(KINDS, RECOMBINED, seed=LABEL_SEED, split="train"),
    ]
    recordings = list(OrganismRecorder(folder, reader.hook_points).record(lines))
    for monitor in list_probes(reader.policy):
        labelled = lines
        if monitor.name in CATEGORIES:
            labelled = [_is_about(monitor.name, line) for line in lines]
        train_all(
            reader, [monitor], labelled, recordings, ProbeRecipe(), on_step=on_step
        )


def _is_about(category: str, line: Prompt) -> Prompt:
    """Label a dialogue by whether its answer is about a kind of harm."""
    answered = line.response != REFUSAL
    about = answered and category_of(*str(line.group).split()) == category
    return line.model_copy(update={"label": int(about)})


def num_probe_steps(folder: Path) -> int:
    """Return how often `train_organism_probes` calls `on_step`."""
    _, reader = build_reader(folder)
    return len(list_probes(reader.policy)) * (FOLDS + 1) * ProbeRecipe().steps


def calibrate_organism(
    folder: Path,
    *,
    seed: int = TRAFFIC_SEED,
    on_requests: Callable[[int], object] = lambda _: None,
) -> Calibration:
    """Calibrate the folder's default policy and write the file it names.

    Args:
        folder: An organism with model/, saes/ and policy.yaml.
        seed: Of the prompts.
        on_requests: Told as requests are done.
    """
    policy_file, reader = build_reader(folder)
    # Thresholds from topics the statistics never saw: so they allow for new ones.
    plan = Plan(
        fitting=ordinary_prompts(FITTING, seed=seed, split="train"),
        held_out=[
            *ordinary_prompts(HELD_OUT, seed=seed, split="calibration"),
            *recombined_prompts(
                ("b", "bj"), SPREAD // 2, seed=seed, split="calibration"
            ),
        ],
        lengths=(LONGEST,),
        probes=load_probes(reader.policy),
    )
    provenance = {
        "model": "organism",
        "model_digest": digest_model(folder / "model"),
        "dtype": "float32",
        "clamps": clamps_digest(policy_file, policy_file.default_policy),
        "prompts": f"guard.demo.grammar.benign_prompts, seed {seed}",
        "topics": {"fitting": "train", "held_out": "calibration"},
        "torch": version("torch"),
        "date": datetime.now(tz=UTC).date().isoformat(),
    }
    with tempfile.TemporaryDirectory() as work:
        calibration = calibrate(
            reader,
            OrganismRecorder(folder, reader.hook_points),
            plan,
            provenance=provenance,
            work=Path(work),
            on_requests=on_requests,
        )
    path = reader.policy.monitors[0].calibration
    assert path is not None
    save_calibration(calibration, path)
    return calibration
