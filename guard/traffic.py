"""Traffic through a policy: calibrate on it, and check a calibration on more of it.

What drives the model is somebody else's: an engine that records what it computes, or a
server that tells its readings (`Recorder`, `Server`).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from guard.artefact import explaining, read_artefact, write_artefact
from guard.calibration import (
    Calibration,
    Entry,
    excess_probability,
    fit_scales,
    load_calibration,
    save_calibration,
    share_budgets,
)
from guard.errors import CalibrationError
from guard.policy import Policy
from guard.prompt import Prompt
from guard.recording import Reader, Recording, fit_calibration, fit_entries
from guard.score import Statistics

__all__ = [
    "Cell",
    "Plan",
    "Recorder",
    "Server",
    "Told",
    "calibrate",
    "check_sample",
    "judge_alarms",
    "recalibrate",
]

_CHUNK = 256
"""Requests after which a run that is interrupted can go on."""

Advance = Callable[[int], object]
"""Told how many more requests are done."""
Seen = tuple[int, Tensor]
"""Total length of a request, and the maximum of each monitor, `[num_entries]`."""


class Recorder(Protocol):
    """An engine under the policy's clamps that records what monitors would see."""

    def record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
        """Answer prompts and yield one recording each, in order."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a server said of one request."""

    scores: Mapping[str, float]
    """Largest score so far, by monitor."""
    alarms: frozenset[str]
    """Monitors that alarmed."""
    total_length: int
    """Most tokens the request could have had, prompt and output."""

    @classmethod
    def of(cls, verdict: Mapping[str, Any], total_length: int) -> Self:
        """Read a traced `guard` object."""
        return cls(
            scores={r["monitor"]: _score(r) for r in verdict["readings"]},
            alarms=frozenset(alarm["monitor"] for alarm in verdict["alarms"]),
            total_length=total_length,
        )


def _score(reading: Mapping[str, Any]) -> float:
    """Return the score of a reading; JSON has no word for what is not finite."""
    if reading["position"] is None:
        return -math.inf  # no token of the monitor's stage
    score = reading["score"]
    return math.inf if score is None else float(score)


class Server(Protocol):
    """A guarded engine that is asked like any client asks it."""

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[Told]:
        """Answer prompts and yield what the guard told of each, in order."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a calibration is to be made of."""

    fitting: Sequence[Prompt]
    """Benign prompts for the statistics."""
    held_out: Sequence[Prompt]
    """Others, for the thresholds."""
    lengths: tuple[int, ...] = ()
    """Largest total length of each bucket; one bucket for all when left out."""
    probes: Mapping[str, Statistics] | None = None
    """By name of the monitor, the weights of each probe."""


def calibrate(
    reader: Reader,
    recorder: Recorder,
    plan: Plan,
    *,
    provenance: Mapping[str, Any],
    work: Path,
    on_requests: Advance = lambda _: None,
) -> Calibration:
    """Fit a policy's monitors on benign traffic and collect their thresholds.

    Interrupted, it goes on where it was: `work` keeps what is done.

    Args:
        reader: Of the policy.
        recorder: Runs the prompts under the policy's clamps.
        plan: Which prompts, and what for.
        provenance: Kept in the file; what is in `work` is used only if it was made
            with the same.
        work: Folder for what is done so far; the caller removes it at the end.
        on_requests: Told as requests are done.

    Raises:
        CalibrationError: There is too little traffic for the policy's targets.
    """
    progress = _Progress(work, provenance)
    entries, reference = _fit(reader, recorder, plan, progress, on_requests)
    held_out = _collect(reader, recorder, plan, entries, progress, on_requests)
    lengths = plan.lengths or (max(n for n, _ in [*reference, *held_out]),)
    calibration = fit_calibration(
        entries,
        reference=reference,
        held_out=held_out,
        lengths=lengths,
        provenance=provenance,
    )
    check_sample(calibration, reader.policy)
    return calibration


def _fit(
    reader: Reader,
    recorder: Recorder,
    plan: Plan,
    progress: "_Progress",
    on_requests: Advance,
) -> tuple[Mapping[str, Entry], list[Seen]]:
    """Fit the statistics, or find them done; with the maxima of the same requests."""
    known = progress.load_fit()
    if known is not None:
        on_requests(len(plan.fitting))
        return known
    recordings = []
    for recording in recorder.record(plan.fitting):
        recordings.append(recording)
        on_requests(1)
    entries = fit_entries(reader, recordings, plan.probes or {})
    reference = [(r.total_length, reader.maxima(entries, r)) for r in recordings]
    progress.save_fit(entries, reference)
    return entries, reference


def _collect(
    reader: Reader,
    recorder: Recorder,
    plan: Plan,
    entries: Mapping[str, Entry],
    progress: "_Progress",
    on_requests: Advance,
) -> list[Seen]:
    """Read the held-out requests, chunk by chunk, those left out that are done."""
    held_out: list[Seen] = []
    for start in range(0, len(plan.held_out), _CHUNK):
        share = plan.held_out[start : start + _CHUNK]
        known = progress.load_chunk(start)
        if known is not None:
            on_requests(len(share))
        else:
            known = []
            for recording in recorder.record(share):
                maxima = reader.maxima(entries, recording)
                known.append((recording.total_length, maxima))
                on_requests(1)
            progress.save_chunk(start, known)
        held_out += known
    return held_out


class _Progress:
    """The part of a calibration that is done, in a folder."""

    def __init__(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._fit = folder / "fit.safetensors"
        known = folder / "run.json"
        # A run that began yesterday is the same run.
        same = {key: value for key, value in provenance.items() if key != "date"}
        text = json.dumps(same, sort_keys=True).encode()
        if not known.exists() or known.read_bytes() != text:
            for old in folder.glob("*.safetensors"):
                old.unlink()
            known.write_bytes(text)

    def load_fit(self) -> tuple[Mapping[str, Entry], list[Seen]] | None:
        if not self._fit.exists():
            return None
        with self._explaining(self._fit):
            saved = load_calibration(self._fit)
            lengths = saved.provenance["total_lengths"]
            return saved.entries, _pair(lengths, saved.maxima[0])

    def save_fit(self, entries: Mapping[str, Entry], reference: list[Seen]) -> None:
        maxima = torch.stack([maxima for _, maxima in reference])
        lengths = [length for length, _ in reference]
        saved = Calibration(
            entries=entries,
            lengths=(max(lengths),),
            scales=(fit_scales(maxima),),
            maxima=(maxima,),
            provenance={"total_lengths": lengths},
        )
        # Whole or not at all, should the run end just now.
        scratch = self._fit.with_suffix(".new")
        save_calibration(saved, scratch)
        scratch.replace(self._fit)

    def load_chunk(self, start: int) -> list[Seen] | None:
        path = self._folder / f"chunk-{start}.safetensors"
        if not path.exists():
            return None
        with self._explaining(path):
            tensors, note = read_artefact(path)
            return _pair(note["total_lengths"], tensors["maxima"])

    def save_chunk(self, start: int, known: list[Seen]) -> None:
        path = self._folder / f"chunk-{start}.safetensors"
        maxima = torch.stack([maxima for _, maxima in known])
        scratch = path.with_suffix(".new")
        note = {"total_lengths": [length for length, _ in known]}
        write_artefact(scratch, {"maxima": maxima}, note)
        scratch.replace(path)

    def _explaining(self, path: Path) -> AbstractContextManager[None]:
        kind = f"part (remove {self._folder} to begin anew)"
        return explaining(path, kind=kind, command="guard calibrate")


def _pair(lengths: Sequence[int], maxima: Tensor) -> list[Seen]:
    """Return requests as they were saved.

    Raises:
        ValueError: These are none.
    """
    whole = all(isinstance(length, int) for length in lengths)
    if not whole or maxima.dim() != 2 or len(maxima) != len(lengths):
        message = "expected a length and maxima of each request"
        raise ValueError(message)
    return list(zip(lengths, maxima, strict=True))


def recalibrate(
    calibration: Calibration,
    policy: Policy,
    server: Server,
    prompts: Sequence[Prompt],
    *,
    provenance: Mapping[str, Any],
    on_requests: Advance = lambda _: None,
) -> Calibration:
    """Collect thresholds anew from what a running server tells of benign traffic.

    The statistics stay, and so do the buckets: a server tells scores, not the stream.

    Args:
        calibration: What the server runs under.
        policy: The policy that was asked for; its monitors must only flag, since a
            request that is cut short would hide how far its scores go.
        server: The running server.
        prompts: Benign, and none that had a part in the statistics.
        provenance: Added to the calibration's own.
        on_requests: Told as requests are done.

    Raises:
        CalibrationError: A monitor blocks, the calibration or the server has other
            monitors, or there is too little traffic.
    """
    names = [monitor.name for monitor in policy.monitors]
    _check_monitors("The calibration", calibration.entries, names)
    blocking = [m.name for m in policy.monitors if m.on_alarm == "block"]
    if policy.mode == "enforce" and blocking:
        message = (
            f"Monitors {', '.join(blocking)} block, and a blocked request does not "
            "show its largest score; expected a policy whose monitors flag."
        )
        raise CalibrationError(message)
    held_out = []
    for told in server.ask(prompts):
        _check_monitors("The server's policy", told.scores, names)
        maxima = torch.tensor([told.scores[name] for name in calibration.entries])
        held_out.append((told.total_length, maxima))
        on_requests(1)
    fresh = fit_calibration(
        calibration.entries,
        reference=held_out,
        held_out=held_out,
        lengths=calibration.lengths,
        provenance={**calibration.provenance, **provenance},
    )
    renewed = replace(fresh, scales=calibration.scales)
    check_sample(renewed, policy)
    return renewed


def _check_monitors(whose: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    if set(found) != set(wanted):
        message = (
            f"{whose} has the monitors {', '.join(found)}; expected those of the "
            f"policy, {', '.join(wanted)}."
        )
        raise CalibrationError(message)


def check_sample(calibration: Calibration, policy: Policy) -> None:
    """Refuse a sample that cannot support the false-alarm rates of a policy.

    Raises:
        CalibrationError: Says which bucket needs how many requests.
    """
    for targets in share_budgets(policy).values():
        for length in calibration.lengths:
            calibration.thresholds(length, targets=targets)


@dataclass(frozen=True, slots=True)
class Cell:
    """Alarms of one bucket and one action, against what was promised."""

    length: int
    """Largest total length of the bucket."""
    action: str
    target: float
    """Promised share of benign requests."""
    requests: int
    alarms: int
    p_value: float
    """Probability of as many alarms or more, were the promise kept."""


def judge_alarms(
    calibration: Calibration, policy: Policy, told: Sequence[Told]
) -> list[Cell]:
    """Hold the alarms of fresh benign requests against a calibration's promise.

    The threshold is the k-th of n calibration requests, so the number of alarms among
    m fresh ones is beta-binomial, and its upper tail is the p-value of a cell. With c
    cells a p-value below 0.05 / c breaks the promise (Bonferroni).

    Returns:
        A cell for each bucket and action that has requests.
    """
    asked = Counter(calibration.bucket(one.total_length) for one in told)
    cells = []
    for bucket, requests in sorted(asked.items()):
        for (_, action), targets in share_budgets(policy).items():
            target = float(sum(targets.values()))
            alarms = sum(
                bool(one.alarms & set(targets))
                for one in told
                if calibration.bucket(one.total_length) == bucket
            )
            p_value = excess_probability(
                alarms,
                requests=requests,
                held_out=len(calibration.maxima[bucket]),
                target_fpr=target,
            )
            cells.append(
                Cell(
                    length=calibration.lengths[bucket],
                    action=action,
                    target=target,
                    requests=requests,
                    alarms=alarms,
                    p_value=p_value,
                )
            )
    return cells
