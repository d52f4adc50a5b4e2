"""Whether traffic still looks like the calibration's, request after request.

Lives in the API server, which holds each finished request against the held-out ones of
the calibration: evidence about all requests together, where a verdict is about one.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from guard.calibration import Calibration, share_budgets
from guard.martingale import Martingale, Ranks, Reference
from guard.policy import Policy

if TYPE_CHECKING:
    from guard.verdict import Verdict

__all__ = ["ALPHA", "LINE", "Drift", "PolicyDrift"]

ALPHA = 0.001
"""Probability that a series ever crosses the line on traffic like the calibration's."""

LINE = -math.log(ALPHA)
"""The line: a log e-value of 6.9."""


class Drift:
    """Evidence that a monitor's scores are no longer like its calibration's."""

    def __init__(self, buckets: Sequence[Reference], *, seed: int = 0) -> None:
        """Begin with a log e-value of 0.

        Args:
            buckets: What scores are held against, by total length.
            seed: Of what breaks ties.
        """
        draw = random.Random(seed)
        self._ranks = [Ranks(one, draw=draw) for one in buckets]
        self._martingale = Martingale()
        self.log_evalue = 0.0
        """Natural logarithm of the e-value so far."""

    def observe(self, score: float, *, stopped: bool = False, bucket: int = 0) -> float:
        """Take in a finished request; return the log e-value so far.

        Args:
            score: As in `Reference`; inf where one was not finite.
            stopped: Whether the policy stopped it.
            bucket: Its total length's.
        """
        self._martingale.bet(self._ranks[bucket].rank(score, stopped=stopped))
        self.log_evalue = self._martingale.log_wealth
        return self.log_evalue


class PolicyDrift:
    """The drift of every monitor of a policy.

    A request that was stopped ranks above all that were not, whichever monitor of the
    calibration it was: what the others would have said of its rest nobody knows. So do
    those of the calibration that the policy would stop.
    """

    def __init__(self, policy: Policy, calibrations: Mapping[str, Calibration]) -> None:
        """Begin with a log e-value of 0 for each monitor.

        Args:
            policy: One of those served.
            calibrations: By path, as the monitors name them.
        """
        self._paths = {m.name: str(m.calibration) for m in policy.monitors}
        self._calibrations = {p: calibrations[p] for p in self._paths.values()}
        self._drifts = {
            name: Drift(_list_references(policy, name, path, calibrations[path]))
            for name, path in self._paths.items()
        }

    @property
    def log_evalues(self) -> dict[str, float]:
        """Natural logarithms of the e-values so far, by monitor."""
        return {name: drift.log_evalue for name, drift in self._drifts.items()}

    def observe(
        self, verdict: "Verdict", scores: Sequence[float], *, total_length: int
    ) -> dict[str, float]:
        """Take in a request that ran to its end, and return what moved.

        A drill is no traffic, and where a token was not seen nobody knows the largest
        score: those are left out.

        Args:
            verdict: The last one.
            scores: The largest of each monitor, in the order of the policy; -inf where
                no token was scored.
            total_length: Most tokens the request could have had, prompt and output.

        Returns:
            The log e-value so far, by monitor.
        """
        if verdict.drill is not None or verdict.reason is not None:
            return {}
        stopped = verdict.action == "block"
        stoppers = {
            alarm.monitor
            for alarm in verdict.alarms
            if stopped and alarm.action == "block"
        }
        stopped_by = {self._paths[name] for name in stoppers}
        found = {}
        for (name, path), score in zip(self._paths.items(), scores, strict=True):
            if stopped and path not in stopped_by:
                continue  # cut short by what its reference knows nothing of
            is_known = not stopped or name in stoppers
            found[name] = self._drifts[name].observe(
                score if is_known else -math.inf,
                stopped=stopped,
                bucket=self._calibrations[path].bucket(total_length),
            )
        return found


def _list_references(
    policy: Policy, name: str, path: str, calibration: Calibration
) -> list[Reference]:
    """Return what a monitor made of the held-out requests, by bucket."""
    blocking = {}
    if policy.mode == "enforce":
        blocking = share_budgets(policy).get((path, "block"), {})
    names = list(calibration.entries)
    references = []
    for length, rows in zip(calibration.lengths, calibration.maxima, strict=True):
        maxima = rows.double().numpy()
        # Those at a threshold, too: the next may lie anywhere up to it.
        over = np.zeros_like(maxima, dtype=bool)
        if blocking:
            bars = calibration.thresholds(length, targets=blocking)
            for one, bar in bars.items():
                column = names.index(one)
                over[:, column] = maxima[:, column] >= bar
        stopped = np.asarray(over.any(1))
        own = names.index(name)
        known = ~stopped | over[:, own]
        scores = np.where(known, maxima[:, own], -math.inf)
        references.append(Reference(scores, stopped))
    return references
