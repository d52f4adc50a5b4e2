"""Where a process that hands out answers keeps what it is told of them.

One board in each API server, and in the process of an offline `LLM`.
"""

import logging
import math
import time
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from guard.audit import AuditLog
from guard.drift import PolicyDrift
from guard.generation import Generation
from guard.http.desk import PolicyDesk
from guard.http.keys import KeyRing
from guard.metrics import Metrics
from guard.verdict import Verdict
from vllm_guard.readings import Progress

__all__ = ["SILENT_SECONDS", "Board"]

logger = logging.getLogger(__name__)

SILENT_SECONDS = 10.0
"""Between two lines of the log about requests that were let through."""


class Board:
    """Where this process keeps verdicts and counts: one desk, one set of metrics."""

    def __init__(
        self,
        generation: Generation,
        *,
        secret: bytes,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """Open the desk and declare the metrics of a generation of policies.

        Args:
            generation: Whose policies are served.
            secret: Per-start secret shared with the engine core.
            registry: Where the metrics are registered, once.
        """
        policy_file, fingerprints = generation.policy_file, generation.fingerprints
        self.desk = PolicyDesk(policy_file, fingerprints, secret=secret)
        self.metrics = Metrics(
            policy_file,
            fingerprints=fingerprints,
            digests=_digests(generation),
            certificates=_certificates(generation),
            registry=registry,
        )
        self._drifts: dict[str, tuple[str, PolicyDrift]] = {}
        """By policy its fingerprint, and the drift of what runs under that."""
        self._follow(generation)
        self.ready = False
        """Whether every engine has said that it is guarded."""
        self._unsaid = 0
        self._silent_until = -math.inf
        self.audit: AuditLog | None = None
        """Where flagged and blocked requests are written down, if anywhere."""

    def show(self, generation: Generation, *, keys: KeyRing) -> None:
        """Let requests in under another generation, and show its series.

        Args:
            generation: The new one.
            keys: Whose API key is whose there.
        """
        self.desk.offer_terms(
            generation.policy_file,
            generation.fingerprints,
            keys=keys,
            generation=generation.number,
        )
        self.metrics.show_policies(
            generation.policy_file,
            fingerprints=generation.fingerprints,
            digests=_digests(generation),
            certificates=_certificates(generation),
            generation=generation.number,
        )
        self._follow(generation)

    def _follow(self, generation: Generation) -> None:
        """Begin anew with the drift of policies that are not what they were.

        Without a calibration there is nothing to hold requests against: such a policy
        stays at 0.
        """
        before, self._drifts = self._drifts, {}
        for name, fingerprint in generation.fingerprints.items():
            known = before.get(name)
            if known is None or known[0] != fingerprint:
                policy = generation.policy_file.policies[name]
                paths = {str(monitor.calibration) for monitor in policy.monitors}
                if not paths <= generation.calibrations.keys():
                    continue
                drift = PolicyDrift(policy, generation.calibrations)
                self.metrics.show_drift(name, drift.log_evalues)
                known = fingerprint, drift
            self._drifts[name] = known
            before.pop(name, None)
        for name, (_, gone) in before.items():
            self.metrics.show_drift(name, dict.fromkeys(gone.log_evalues, 0.0))

    def begin(self, request: Any, verdict: Verdict) -> None:
        """Know a request before the engine speaks of it.

        Args:
            request: vLLM's `RequestState`.
            verdict: What counts if the engine never does.
        """
        request.guard_begun = verdict

    def take(self, request: Any, progress: Progress) -> None:
        """Keep a request's progress: vLLM's `RequestState` carries its verdict."""
        verdict = Verdict.from_json(progress.verdict)
        before = getattr(request, "guard_progress", None)
        self.metrics.observe_progress(before and before[0], verdict)
        request.guard_progress = verdict, progress
        self.desk.record(verdict.id, _choice_of(request), verdict)

    def count(self, counted: dict[str, int]) -> None:
        """Count tokens and faults that the engine had not told before."""
        for phase in ("prefill", "decode"):
            if counted.get(phase):
                self.metrics.count_tokens(phase, counted[phase])
        if counted.get("unguarded"):
            self.metrics.count_unscored("no_reading", counted["unguarded"])
            self.metrics.count_error("worker")
        if counted.get("unscored"):
            self.metrics.count_unscored("no_score", counted["unscored"])
        if counted.get("not_finite"):
            self.metrics.count_unscored("not_finite", counted["not_finite"])
            self.metrics.count_error("model")

    def finish(self, request: Any, *, cut_short: bool) -> None:
        """Count a request that is over, once: vLLM may end a choice several times.

        Args:
            request: vLLM's `RequestState`.
            cut_short: Whether its client left, or the engine failed it.
        """
        begun = vars(request).pop("guard_begun", None)
        if begun is None:
            return
        known = getattr(request, "guard_progress", None)
        if known is None:
            self.metrics.finish(begun, {})
            return
        verdict, progress = known
        self.metrics.finish(verdict, progress.ratios)
        if self.audit is not None:
            self.audit.record(verdict, _choice_of(request))
        if not cut_short:
            self._observe_drift(verdict, progress)
        if verdict.reason is not None and verdict.action != "block":
            self.metrics.count_let_through(verdict.reason)
            self._say_let_through(verdict)
        for name, value in progress.observed.items():
            if name.startswith("error_ratio:"):
                self.metrics.observe_error_norm(value)
            elif name.startswith("clamp_residual:"):
                self.metrics.observe_clamp_residual(value)

    def _say_let_through(self, verdict: Verdict) -> None:
        """Log that requests go on that nobody vouches for, now and then.

        The first at once, and how many there were since each time; the metric has all.
        """
        self._unsaid += 1
        if time.monotonic() < self._silent_until:
            return
        logger.warning(
            "Answered although nobody vouches for them: %d requests, the last of them "
            "%s, under policy %r. The policy file lets them go on.",
            self._unsaid,
            verdict.reason,
            verdict.policy,
        )
        self._unsaid = 0
        self._silent_until = time.monotonic() + SILENT_SECONDS

    def _observe_drift(self, verdict: Verdict, progress: Progress) -> None:
        """Hold a request that ran to its end against those of the calibration."""
        fingerprint, drift = self._drifts.get(verdict.policy, (None, None))
        if drift is None or fingerprint != verdict.fingerprint:
            return  # it began before a reload
        moved = drift.observe(
            verdict, progress.maxima, total_length=progress.total_length
        )
        self.metrics.show_drift(verdict.policy, moved)


def _digests(generation: Generation) -> dict[str, str]:
    return {name: sae.sha256 for name, sae in generation.policy_file.saes.items()}


def _certificates(generation: Generation) -> dict[str, str]:
    return {name: found.id for name, found in generation.certificates.items()}


def _choice_of(request: Any) -> int:
    """Return the index of a request's choice in the HTTP answer.

    Prompt i of a list of prompts runs as request `cmpl-...-i`.
    """
    parent = request.parent_req
    external = request.external_req_id if parent is None else parent.external_req_id
    prompt = int(external.rsplit("-", 1)[1]) if external.startswith("cmpl-") else 0
    return prompt * (1 if parent is None else parent.n) + int(request.request_index)
