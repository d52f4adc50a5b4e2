"""What a model showed on whole requests, and what a policy's monitors make of it.

Where a calibration is made, and where attacks are judged: a request at a time, plain,
with the same scores that the worker computes and the same sums that a `Watch` keeps.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guard.calibration import Calibration, Entry, check_lengths, fit_scales
from guard.clamp import Clamp
from guard.errors import CalibrationError
from guard.policy import Monitor, PolicyFile
from guard.sae.model import Sae
from guard.score import SCORES, Activations, Statistics, drop_sinks
from guard.watch import stage_rows, sum_up

__all__ = ["Reader", "Recording", "fit_calibration", "fit_entries"]

MAX_FITTING_ROWS = 100_000
"""Tokens that a score's statistics are fitted on at most."""


class Recording(NamedTuple):
    """One request: every row that a monitor would score, prompt and output in order.

    Neither a true BOS at position 0 nor the last token, which no engine runs through
    the model.
    """

    resid: Mapping[str, Tensor]
    """By hook point, the stream after the clamps, `[num_tokens, d_model]`."""
    prompt_length: int
    """How many of the rows belong to the prompt."""
    total_length: int
    """Most tokens the request could have had, prompt and output."""

    def of_stage(self, monitor: Monitor) -> slice:
        """Return which rows a monitor judges."""
        return stage_rows(
            monitor.stage,
            first=0,
            count=len(next(iter(self.resid.values()))),
            prompt_length=self.prompt_length,
        )


class Reader:
    """Reads recordings of requests under one policy."""

    def __init__(
        self, policy_file: PolicyFile, name: str, saes: Mapping[str, Sae]
    ) -> None:
        """Prepare to read for the monitors of a policy.

        Args:
            policy_file: A loaded policy file.
            name: Key of `policies`.
            saes: The SAEs that the policy uses, by name.
        """
        self.policy = policy_file.policies[name]
        self._policy_file = policy_file
        self._saes = saes
        self._clamps = {
            name: Clamp([self.policy], sae_name=name, sae=sae)
            for name, sae in saes.items()
        }

    def hook_point(self, monitor: Monitor) -> str:
        """Return where a monitor reads."""
        return self._policy_file.hook_point(monitor)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Return where the monitors read, each place once."""
        return tuple(dict.fromkeys(map(self.hook_point, self.policy.monitors)))

    def sae_sha256(self, monitor: Monitor) -> str | None:
        """Return the digest of the SAE that a monitor's score needs."""
        if not SCORES[monitor.score].needs_sae:
            return None
        return self._policy_file.saes[str(monitor.sae)].sha256

    def activations(
        self, monitors: Iterable[Monitor], resid: Mapping[str, Tensor]
    ) -> list[Activations]:
        """Return what each monitor looks at; each SAE encodes once.

        Args:
            monitors: Of the policy.
            resid: By hook point, the stream after the clamps, `[num_tokens, d_model]`.
        """
        found: dict[str, Activations] = {}
        activations = []
        for monitor in monitors:
            rows = resid[self.hook_point(monitor)].float()
            if not SCORES[monitor.score].needs_sae:
                activations.append(Activations(rows))
                continue
            name = str(monitor.sae)
            if name not in found:
                found[name] = self._explain(name, rows)
            activations.append(found[name])
        return activations

    def _explain(self, name: str, resid: Tensor) -> Activations:
        sae, clamp = self._saes[name], self._clamps[name]
        encoded = sae.encode(resid)
        slot = torch.ones(len(resid), dtype=torch.int64)
        left = clamp.residual_activation(encoded, slot)
        return Activations(resid, resid - sae.decode(encoded), left)

    def score_rows(
        self,
        monitors: Sequence[Monitor],
        statistics: Mapping[str, Statistics],
        resid: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return each monitor's score of every row, `[num_tokens]`, by name."""
        activations = self.activations(monitors, resid)
        return {
            monitor.name: SCORES[monitor.score].apply(seen, statistics[monitor.name])
            for monitor, seen in zip(monitors, activations, strict=True)
        }

    @torch.no_grad()
    def scores(
        self, statistics: Mapping[str, Statistics], recording: Recording
    ) -> dict[str, Tensor]:
        """Return the scores of one request's rows, `[num_tokens]`, by monitor."""
        return self.score_rows(self.policy.monitors, statistics, recording.resid)

    def maxima(self, entries: Mapping[str, Entry], recording: Recording) -> Tensor:
        """Return what each monitor makes of a request, fp32 `[num_monitors]`."""
        statistics = {name: entry.statistics for name, entry in entries.items()}
        scores = self.scores(statistics, recording)
        return torch.tensor(
            [
                sum_up(
                    scores[monitor.name].numpy(),
                    monitor,
                    prompt_length=recording.prompt_length,
                )
                for monitor in self.policy.monitors
            ]
        )


def fit_entries(
    reader: Reader, recordings: Sequence[Recording], probes: Mapping[str, Statistics]
) -> dict[str, Entry]:
    """Fit the statistics of a policy's monitors on benign requests.

    Args:
        reader: Of the policy.
        recordings: Of benign requests.
        probes: By name of the monitor, the weights of each probe.
    """
    entries = {}
    for monitor in reader.policy.monitors:
        if monitor.score == "probe":
            statistics = dict(probes[monitor.name])
        else:
            statistics = SCORES[monitor.score].fit(_gather(reader, monitor, recordings))
        entries[monitor.name] = Entry(
            score=monitor.score,
            hook_point=reader.hook_point(monitor),
            stage=monitor.stage,
            window=monitor.window,
            statistics=statistics,
            sae_sha256=reader.sae_sha256(monitor),
            drift=monitor.drift,
        )
    return entries


def fit_calibration(
    entries: Mapping[str, Entry],
    *,
    reference: Sequence[tuple[int, Tensor]],
    held_out: Sequence[tuple[int, Tensor]],
    lengths: Sequence[int],
    provenance: Mapping[str, Any],
) -> Calibration:
    """Sort the maxima of benign requests into buckets, from which thresholds are read.

    Args:
        entries: What `fit_entries` returned.
        reference: Total length and maxima `[num_entries]` of requests that only say how
            each monitor's maxima are spread; those of the fit will do.
        held_out: The same of requests that had no part in any fit.
        lengths: Largest total length of each bucket, in tokens, ascending.
        provenance: Kept in the file as it is; must be JSON.

    Raises:
        CalibrationError: A bucket has no request, a request no bucket, or a score was
            not a number.
    """
    check_lengths(lengths)
    buckets = _sort_into_buckets(held_out, lengths)
    known = _sort_into_buckets(reference, lengths)
    scales = [
        # A bucket with too few requests of its own borrows from all.
        fit_scales(
            torch.stack(own if len(own) >= _ENOUGH else [m for _, m in reference])
        )
        for own in known
    ]
    for length, maxima in zip(lengths, buckets, strict=True):
        if not maxima:
            message = (
                f"No held-out request falls into the bucket up to {length} tokens."
            )
            raise CalibrationError(message)
    return Calibration(
        entries=entries,
        lengths=tuple(lengths),
        scales=tuple(scales),
        maxima=tuple(map(torch.stack, buckets)),
        provenance=provenance,
    )


_ENOUGH = 100
"""Requests from which the spread of a bucket's maxima is worth fitting."""


@torch.no_grad()
def _gather(
    reader: Reader, monitor: Monitor, recordings: Sequence[Recording]
) -> Activations:
    """Return the tokens that a monitor's statistics are fitted on: of its stage."""
    parts = [
        reader.activations([monitor], recording.resid)[0].select(
            recording.of_stage(monitor)
        )
        for recording in recordings
    ]
    joined = Activations(
        *(
            None if part[0] is None else torch.cat(part)  # type: ignore[arg-type]
            for part in zip(*parts, strict=True)
        )
    )
    stride = -(-len(joined.resid) // MAX_FITTING_ROWS)
    return drop_sinks(joined.select(torch.arange(0, len(joined.resid), stride)))


def _sort_into_buckets(
    requests: Iterable[tuple[int, Tensor]], lengths: Sequence[int]
) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[] for _ in lengths]
    for total_length, maxima in requests:
        fitting = [i for i, length in enumerate(lengths) if total_length <= length]
        if not fitting:
            message = (
                f"A request has {total_length} tokens, more than the largest bucket; "
                f"expected at most {lengths[-1]}."
            )
            raise CalibrationError(message)
        if bool((maxima == torch.inf).any()) or bool(maxima.isnan().any()):
            message = (
                "A benign request has a score that is not finite; expected numbers."
            )
            raise CalibrationError(message)
        buckets[fitting[0]].append(maxima)
    return buckets
