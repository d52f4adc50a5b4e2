"""Every Prometheus collector of the guard, declared once.

Lives in the API server, which counts from the readings that arrive with the
tokens; the engine's own `/metrics` shows it. Labels come from closed sets, and
children exist before the first event, so that `rate()` sees that event too.
"""

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from guard import __version__
from guard.policy import Mode
from guard.request import Fault

if TYPE_CHECKING:
    from guard.policy import PolicyFile
    from guard.verdict import Verdict

__all__ = [
    "AuditResult",
    "Component",
    "Metrics",
    "Phase",
    "ReloadResult",
    "UnscoredReason",
]

Phase = Literal["prefill", "decode"]
"""Whether a token was read from the prompt or generated."""

Component = Literal["http", "engine", "worker", "model"]
"""Where an internal failure was noticed; the model's is that it computes NaN."""

UnscoredReason = Literal["no_reading", "no_score", "not_finite"]
"""The step brought no reading; the token's cached score was not there; or the model
computed nothing that could be scored."""

ReloadResult = Literal["success", "refused", "busy", "unanswered"]
"""Whether a reload brought what it should, or was refused for what it brought; had to
wait for requests of the last but one, or for an engine that did not answer."""

AuditResult = Literal["written", "dropped", "failed"]
"""Whether an event is in the audit log, found its queue full, or the disk."""

_RATIO = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
_ERROR = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0)
_ACTIVATION = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_POSITION = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)
_SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
_CEILING = 1e6


class Metrics:
    """The guard's collectors on one registry, and the few ways to move them."""

    def __init__(
        self,
        policy_file: "PolicyFile",
        *,
        fingerprints: Mapping[str, str],
        digests: Mapping[str, str],
        certificates: Mapping[str, str] | None = None,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """Declare the collectors and every child a policy file can ever need.

        Args:
            policy_file: Names the policies, clamps, monitors and SAEs.
            fingerprints: Policy name to fingerprint.
            digests: SAE name to the sha256 of its weights.
            certificates: Name of each policy that has one to the certificate's id.
            registry: Where the collectors are registered, once.
        """
        self._declare_counters(registry)
        self._declare_histograms(registry)
        self._declare_reloads(registry)
        self._declare_faults(registry)
        self._declare_infos(registry)
        # What the model was hooked at stays, whatever a reload brings.
        self._hook_points.set(len(policy_file.hook_points))
        self._told: set[tuple[Gauge, tuple[str, ...]]] = set()
        self._named: dict[int, set[tuple[str, str]]] = {}
        """What `_name_series` says of the last two generations, by their numbers."""
        self.show_policies(
            policy_file,
            fingerprints=fingerprints,
            digests=digests,
            certificates=certificates,
        )

    def show_policies(
        self,
        policy_file: "PolicyFile",
        *,
        fingerprints: Mapping[str, str],
        digests: Mapping[str, str],
        certificates: Mapping[str, str] | None = None,
        generation: int = 1,
    ) -> None:
        """Create every child a policy file can ever need, and say what is served.

        What neither this generation names nor the one before it, under which requests
        may still run, ends.

        Args:
            policy_file: Names the policies, clamps, monitors and SAEs.
            fingerprints: Policy name to fingerprint.
            digests: SAE name to the sha256 of its weights.
            certificates: Name of each policy that has one to the certificate's id.
            generation: Its number.
        """
        self._create_children(policy_file)
        self._named[generation] = _name_series(policy_file)
        self._end_series(before=generation - 1)
        self._generation.set(generation)
        told: set[tuple[Gauge, tuple[str, ...]]] = set()
        told |= {(self._policy_info, pair) for pair in fingerprints.items()}
        told |= {(self._certificate_info, p) for p in (certificates or {}).items()}
        for name, sae in policy_file.saes.items():
            told.add((self._sae_info, (name, str(sae.hook_point), digests[name])))
        for info, labels in self._told - told:
            _retract(info, labels)
        for info, labels in told:
            info.labels(*labels).set(1)
        self._told = told

    def count_reload(self, result: ReloadResult) -> None:
        """Count a reload that somebody asked this process for."""
        self._reloads.labels(result).inc()
        if result != "busy":  # it says nothing of the file
            self._reload_successful.set(result == "success")
        if result == "success":
            self._reload_time.set_to_current_time()

    def count_tokens(self, phase: Phase, tokens: int) -> None:
        """Count tokens that passed through the hooks."""
        self._tokens.labels(phase).inc(tokens)

    def count_unscored(self, reason: UnscoredReason, tokens: int) -> None:
        """Count tokens whose scores cannot be known."""
        self._unscored.labels(reason).inc(tokens)

    def count_error(self, component: Component) -> None:
        """Count one internal failure of the guard."""
        self._errors.labels(component).inc()

    def show_open(self, requests: int) -> None:
        """Show how many requests this process has let in and not closed."""
        self._open.set(requests)

    def count_let_through(self, fault: str) -> None:
        """Count a request that was answered although something of it was not seen."""
        self._let_through.labels(fault).inc()

    def count_audit(self, result: AuditResult) -> None:
        """Count an event of the audit log, by what became of it."""
        self._audited.labels(result).inc()

    def show_ready(self, *, ready: bool) -> None:
        """Say whether every rank of every engine is guarded, as `/guard/ready` does."""
        self._ready.set(ready)

    def show_snapshot_age(self, seconds: float) -> None:
        """Say how long ago every engine last answered for the guard."""
        self._snapshot_age.set(seconds)

    def observe_error_norm(self, ratio: float) -> None:
        """Take in |error| / |resid|."""
        self._error_norm.observe(_bound(ratio))

    def observe_clamp_residual(self, activation: float) -> None:
        """Take in the activation that clamped latents still have when re-encoded."""
        self._clamp_residual.observe(_bound(activation))

    def observe_hook(self, seconds: float) -> None:
        """Take in how long a sampled call of a hook took."""
        self._hook_seconds.observe(seconds)

    def observe_progress(self, before: "Verdict | None", now: "Verdict") -> None:
        """Count what a verdict adds to the one before it for the same choice."""
        for clamp, tokens in now.clamped_tokens.items():
            known = before.clamped_tokens.get(clamp, 0) if before else 0
            if tokens > known:
                self._clamped.labels(now.policy, clamp).inc(tokens - known)

    def finish(self, verdict: "Verdict", ratios: Mapping[str, float]) -> None:
        """Count a request that is over: its action, its alarms, its scores.

        Args:
            verdict: The last one.
            ratios: Largest score over threshold, by monitor; -inf where no token
                was scored, which is no observation.
        """
        policy = verdict.policy
        self._requests.labels(policy, verdict.mode, verdict.action).inc()
        for monitor, ratio in ratios.items():
            if ratio != -math.inf:
                self._score_ratio.labels(policy, monitor).observe(_bound(ratio))
        for alarm in verdict.alarms:
            self._alarms.labels(policy, alarm.monitor, alarm.stage, alarm.action).inc()
            if alarm.position is not None:
                self._alarm_position.observe(alarm.position)

    def show_drift(self, policy: str, log_evalues: Mapping[str, float]) -> None:
        """Show the evidence that traffic is not like the calibration's.

        Args:
            policy: Whose monitors.
            log_evalues: Natural logarithms, by monitor.
        """
        for monitor, log_evalue in log_evalues.items():
            self._drift.labels(policy, monitor).set(log_evalue)

    def _declare_counters(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "guard_requests",
            "Requests that are over, by what was decided until then.",
            ["policy", "mode", "action"],
            registry=registry,
        )
        self._open = Gauge(
            "guard_open_requests",
            "Requests that are let in, whose answers are not over.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._tokens = Counter(
            "guard_tokens",
            "Tokens that passed through the hooks, recomputed ones included.",
            ["phase"],
            registry=registry,
        )
        self._clamped = Counter(
            "guard_clamped_tokens",
            "Tokens that a clamp changed.",
            ["policy", "clamp"],
            registry=registry,
        )
        self._alarms = Counter(
            "guard_alarms",
            "Monitors above their threshold, at most once per request.",
            ["policy", "monitor", "stage", "action"],
            registry=registry,
        )
        self._errors = Counter(
            "guard_errors",
            "Internal failures of the guard or model, and the ends of engines.",
            ["component"],
            registry=registry,
        )
        self._unscored = Counter(
            "guard_unscored_tokens",
            "Tokens whose scores cannot be known.",
            ["reason"],
            registry=registry,
        )

    def _declare_reloads(self, registry: CollectorRegistry) -> None:
        self._reloads = Counter(
            "guard_policy_reloads",
            "Reloads of the policy file, by what became of them.",
            ["result"],
            registry=registry,
        )
        self._generation = Gauge(
            "guard_policy_generation",
            "Generation of policies that new requests run under; 1 is the start's.",
            multiprocess_mode="min",
            registry=registry,
        )
        self._reload_successful = Gauge(
            "guard_policy_last_reload_successful",
            "Whether the last reload was not refused; 1 before the first.",
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._reload_successful.set(1)
        self._reload_time = Gauge(
            "guard_policy_last_reload_success_timestamp_seconds",
            "When the policies last were brought up to date, in Unix time.",
            multiprocess_mode="max",
            registry=registry,
        )
        self._reload_time.set_to_current_time()

    def _declare_faults(self, registry: CollectorRegistry) -> None:
        self._fails_open = Gauge(
            "guard_fails_open",
            "1 where requests go on though nobody vouches for them: on_error open.",
            multiprocess_mode="max",
            registry=registry,
        )
        self._let_through = Counter(
            "guard_requests_let_through",
            "Requests that were answered although not all of them was seen.",
            ["fault"],
            registry=registry,
        )
        self._ready = Gauge(
            "guard_ready",
            "Whether every rank of every engine last said that it is guarded.",
            multiprocess_mode="min",
            registry=registry,
        )
        self._snapshot_age = Gauge(
            "guard_snapshot_age_seconds",
            "Time since every engine last answered for the guard.",
            multiprocess_mode="max",
            registry=registry,
        )
        self._audited = Counter(
            "guard_audit_events",
            "Flagged and blocked requests, by whether the audit log has them.",
            ["result"],
            registry=registry,
        )

    def _declare_histograms(self, registry: CollectorRegistry) -> None:
        self._score_ratio = Histogram(
            "guard_score_ratio",
            "Largest score of a request over its threshold; an alarm is above 1.",
            ["policy", "monitor"],
            buckets=_RATIO,
            registry=registry,
        )
        self._error_norm = Histogram(
            "guard_error_norm_ratio",
            "Norm of the SAE reconstruction error over the norm of the stream.",
            buckets=_ERROR,
            registry=registry,
        )
        self._alarm_position = Histogram(
            "guard_alarm_position_tokens",
            "Token position of an alarm, counted from the start of the prompt.",
            buckets=_POSITION,
            registry=registry,
        )
        self._clamp_residual = Histogram(
            "guard_clamp_residual_activation",
            "Activation that clamped latents still have when encoded again.",
            buckets=_ACTIVATION,
            registry=registry,
        )

        self._hook_seconds = Histogram(
            "guard_hook_seconds",
            "Sampled time of one hook over the rows of a step, on the host's clock.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._hook_points = Gauge(
            "guard_hook_points",
            "Hooks that every step passes.",
            multiprocess_mode="max",
            registry=registry,
        )

        self._drift = Gauge(
            "guard_drift_log_evalue",
            "Log e-value that scores are not like the calibration's (docs/drift.md).",
            ["policy", "monitor"],
            multiprocess_mode="livemax",
            registry=registry,
        )

    def _declare_infos(self, registry: CollectorRegistry) -> None:
        """Declare the constant series: gauges at 1 with facts as labels.

        prometheus_client's Info does not work over several processes.
        """
        loaded = ("guard_info", "The guard is loaded.", ["version"])
        _declare_info(registry, *loaded).labels(__version__).set(1)
        self._policy_info = _declare_info(
            registry,
            "guard_policy_info",
            "Policies served, by fingerprint of their content.",
            ["policy", "fingerprint"],
        )
        self._sae_info = _declare_info(
            registry,
            "guard_sae_info",
            "Sparse autoencoders in use.",
            ["sae", "hook_point", "sha256"],
        )
        self._certificate_info = _declare_info(
            registry,
            "guard_certificate_info",
            "Policies that have a certificate, and which.",
            ["policy", "certificate"],
        )

    def _create_children(self, policy_file: "PolicyFile") -> None:
        for phase in get_args(Phase):
            self._tokens.labels(phase)
        for component in get_args(Component):
            self._errors.labels(component)
        for result in get_args(ReloadResult):
            self._reloads.labels(result)
        for reason in get_args(UnscoredReason):
            self._unscored.labels(reason)
        for fault in get_args(Fault):
            self._let_through.labels(fault)
        for outcome in get_args(AuditResult):
            self._audited.labels(outcome)
        self._fails_open.set(policy_file.on_error == "open")
        for name, policy in policy_file.policies.items():
            actions = ("allow", "flag", "block")
            for action in actions if policy.mode == "enforce" else actions[:2]:
                self._requests.labels(name, policy.mode, action)
            for rule in policy.clamps:
                self._clamped.labels(name, rule.name)
            for monitor in policy.monitors:
                self._score_ratio.labels(name, monitor.name)
                self._drift.labels(name, monitor.name)
                action = monitor.on_alarm if policy.mode == "enforce" else "flag"
                for stage in ("prompt", "output"):
                    self._alarms.labels(name, monitor.name, stage, action)

    def _end_series(self, *, before: int) -> None:
        """End the series of policies, and parts of them, that are gone for good.

        Where several processes share them in files, prometheus_client ends none.

        Args:
            before: Generations whose requests are over.
        """
        self._named = {n: names for n, names in self._named.items() if n >= before}
        if _is_shared():
            return
        kept = set().union(*self._named.values())
        for collector in (
            *(self._requests, self._clamped, self._alarms),
            *(self._score_ratio, self._drift),
        ):
            for labels in _list_children(collector):
                if labels[:2] not in kept:
                    collector.remove(*labels)


def _name_series(policy_file: "PolicyFile") -> set[tuple[str, str]]:
    """Return how each series of a policy begins: its name, and a part of it.

    The part is a mode, whichever it has now; a clamp; or a monitor.
    """
    return {
        (name, part)
        for name, policy in policy_file.policies.items()
        for part in (
            *get_args(Mode),
            *(rule.name for rule in policy.clamps),
            *(monitor.name for monitor in policy.monitors),
        )
    }


def _list_children(collector: Counter | Gauge | Histogram) -> set[tuple[str, ...]]:
    """Return the labels of every child, in the order they were declared in."""
    return {
        tuple(value for name, value in sample.labels.items() if name != "le")
        for metric in collector.collect()
        for sample in metric.samples
    }


def _retract(info: Gauge, labels: tuple[str, ...]) -> None:
    """Let a constant series end; where several processes share it, it becomes 0."""
    if _is_shared():
        info.labels(*labels).set(0)
    else:
        info.remove(*labels)


def _is_shared() -> bool:
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def _declare_info(
    registry: CollectorRegistry, name: str, text: str, labels: list[str]
) -> Gauge:
    return Gauge(name, text, labels, multiprocess_mode="max", registry=registry)


def _bound(number: float) -> float:
    """Return a number that leaves a histogram's sum usable.

    What is not finite is an alarm, so it counts as very large.
    """
    return min(number, _CEILING) if math.isfinite(number) else _CEILING
