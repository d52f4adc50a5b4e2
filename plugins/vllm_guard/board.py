"""Where a process that hands out answers keeps what it is told of them.

One board in each API server, and in the process of an offline `LLM`.
"""

import logging
from collections.abc import Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from guard.http.desk import PolicyDesk
from guard.metrics import Metrics
from guard.policy import PolicyFile
from guard.verdict import Verdict
from vllm_guard.readings import Progress

__all__ = ["Board"]

logger = logging.getLogger(__name__)


class Board:
    """Where this process keeps verdicts and counts: one desk, one set of metrics."""

    def __init__(
        self,
        policy_file: PolicyFile,
        fingerprints: Mapping[str, str],
        *,
        secret: bytes,
        certificates: Mapping[str, str] | None = None,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """Open the desk and declare the metrics of a policy file.

        Args:
            policy_file: Whose policies are served.
            fingerprints: Of each policy, by name.
            secret: Per-start secret shared with the engine core.
            certificates: Name of each policy that has one to the certificate's id.
            registry: Where the metrics are registered, once.
        """
        sources = policy_file.saes
        self.desk = PolicyDesk(policy_file, fingerprints, secret=secret)
        self.metrics = Metrics(
            policy_file,
            fingerprints=fingerprints,
            digests={name: source.sha256 for name, source in sources.items()},
            certificates=certificates,
            registry=registry,
        )
        self.ready = False
        """Whether every engine has said that it is guarded."""

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

    def finish(self, request: Any) -> None:
        """Count a request that is over, if the engine ever spoke of it."""
        known = getattr(request, "guard_progress", None)
        if known is None:
            return
        verdict, progress = known
        self.metrics.finish(verdict, progress.ratios)
        if verdict.reason is not None and verdict.action != "block":
            self.metrics.count_let_through(verdict.reason)
            logger.warning(
                "A request of policy %r was answered although it was %s: the policy "
                "file lets it go on.",
                verdict.policy,
                verdict.reason,
            )
        for name, value in progress.observed.items():
            if name.startswith("error_ratio:"):
                self.metrics.observe_error_norm(value)
            elif name.startswith("clamp_residual:"):
                self.metrics.observe_clamp_residual(value)


def _choice_of(request: Any) -> int:
    """Return the index of a request's choice in the HTTP answer.

    Prompt i of a list of prompts runs as request `cmpl-...-i`.
    """
    parent = request.parent_req
    external = request.external_req_id if parent is None else parent.external_req_id
    prompt = int(external.rsplit("-", 1)[1]) if external.startswith("cmpl-") else 0
    return prompt * (1 if parent is None else parent.n) + int(request.request_index)
