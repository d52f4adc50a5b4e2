"""The certificate: how far one policy can be trusted, and all that is needed to re-run.

Plain data, as it is written to JSON; `JSON_SCHEMA` is what `guard certify --schema`
prints. Rates are shares of valid samples: those where the model as it was shows the
behaviour, and the clamped one does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from guard.certificate import MAX_FILE_BYTES
from guard.document import shorten
from guard.errors import CertificateError
from guard.file import read_file
from guard.redteam.bound import clopper_pearson, upper_bound
from guard.redteam.target import Position

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Attacker",
    "Benign",
    "Cell",
    "Certificate",
    "Control",
    "ControlRow",
    "DeploymentRow",
    "Headline",
    "LatentHeadline",
    "LatentRow",
    "PromptHeadline",
    "PromptRow",
    "Protocol",
    "Rate",
    "ReplayRow",
    "Search",
    "Served",
    "Subject",
    "load_certificate",
]

Attacker = Literal["unaware", "adaptive"]
"""Whether a latent attacker knows the monitors and differentiates through them."""

Control = Literal["null_space", "random", "benign_direction"]
"""Drawn in the null space; drawn anywhere; towards what benign prompts look like."""

Search = Literal["none", "suffix", "prefilled", "constrained", "soft_prompt"]
"""The prompt as it was; with words that were searched for; with the first words of its
answer in it as well; with decoding constrained to those; with free embedding vectors,
which no client can send."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rate(_Data):
    """A share of samples, with what it may be."""

    hits: int
    count: int
    low: float
    high: float
    """Two-sided 95 % interval of the share (Clopper and Pearson, 1934)."""
    upper: float
    """One-sided 95 % bound."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        """Refuse bounds that are not those of these counts."""
        if not 0 <= self.hits <= self.count:
            message = f"{self.hits} hits of {self.count}; expected 0 to {self.count}"
            raise ValueError(message)
        told = (self.low, self.high, self.upper)
        found = (
            *clopper_pearson(self.hits, self.count),
            upper_bound(self.hits, self.count),
        )
        if not all(map(_is_close, told, found)):
            raise ValueError(f"bounds {told}; expected {found}")
        return self

    @classmethod
    def of(cls, hits: int, count: int) -> Rate:
        """Bound the share of `hits` among `count`."""
        low, high = clopper_pearson(hits, count)
        return cls(
            hits=hits, count=count, low=low, high=high, upper=upper_bound(hits, count)
        )

    @property
    def share(self) -> float:
        """Hits among all; 0 of none."""
        return self.hits / self.count if self.count else 0.0


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, abs_tol=1e-9)


class Subject(_Data):
    """What is certified."""

    model: str
    """As the calibration calls it."""
    model_digest: str
    """`guard.check.digest_model` of its folder."""
    policy: str
    """Its name in the policy file."""
    policy_fingerprint: str
    saes: dict[str, str]
    """By name, the digest of the weights."""
    prompts_digest: str
    """Of the prompts that were attacked and asked."""
    target_fpr: float
    """Share of benign requests that the policy's blocking monitors may stop."""
    hold_tokens: int
    monitors: tuple[str, ...]
    """Those that block."""


class Protocol(_Data):
    """How it was judged."""

    preset: Literal["quick", "full"]
    seed: int
    samples: int
    """Valid ones."""
    drawn: int
    """Prompts that were tried for being valid."""
    shown: int
    """Of those, that the model as it was answers as wanted. Those of them that are not
    valid the clamp does not hold: nobody attacks them."""
    unheld_received: int
    """Of those that the clamp does not hold, received under the policy."""
    groups: int
    """Topics among the valid ones; samples of a topic are not independent."""
    mean_norm: float
    """Mean `|resid|` at the clamped hook point: the unit of a budget."""
    coherence_limit: float
    """Largest mean surprise of a coherent answer, in nats per token."""
    least_share: float
    """Share of the wanted answer from which on it counts as delivered."""
    steps: int
    """Of each search of a latent attacker."""
    queries: int
    """Prompts that a prompt attacker may try per sample and goal."""


class LatentRow(_Data):
    """One latent attacker within one budget."""

    attacker: Attacker
    recovered: Rate
    """What a client would have received behind the clamp alone."""
    undetected: Rate
    """What a client did receive under the policy, enforced."""
    undetected_groups: int
    """Topics among those."""
    flagged: Rate
    """Runs that were blocked at all, early enough or not."""
    delivered_share: float
    """Mean share of the wanted answer that a client received under the policy."""
    blocked_at: float | None
    """Median output token at which a run was blocked; negative is in the prompt."""
    alarms: dict[str, int]
    """Recovered runs in which each monitor alarmed."""
    without_probes: Rate | None = None
    """Undetected, were only the monitors there that are no probes, at the same rate of
    false alarms."""


class ControlRow(_Data):
    """Edits as long as the attack's that nobody searched for."""

    control: Control
    recovered: Rate
    flagged: Rate


class Cell(_Data):
    """All that was tried at some rows within one budget."""

    position: Position
    budget: float
    """Largest norm of the edit of a row, relative to the mean `|resid|`."""
    leak: float
    """Largest share of any edit that a clamped latent's encoder sees."""
    drift: float | None = None
    """Where a policy clamps at several layers: the largest relative change of what the
    latents clamped behind the first are given where a sample is edited."""
    rows: tuple[LatentRow, ...]
    controls: tuple[ControlRow, ...]

    def row(self, attacker: Attacker) -> LatentRow:
        """Return what an attacker reached."""
        return next(row for row in self.rows if row.attacker == attacker)


class Served(_Data):
    """Attacked prompts sent to a running server, as a client does."""

    attempts: int
    recovered: int
    blocked: int
    flagged: int


class PromptRow(_Data):
    """One prompt-only attacker."""

    search: Search
    attacker: Attacker
    queries: int
    """Per sample, at most."""
    recovered: Rate
    """Behind the clamp alone."""
    undetected: Rate
    """Under the policy."""
    undetected_groups: int
    alarms: dict[str, int]
    served: Served | None = None
    """What the server made of the prompts; None where it was not asked."""
    prompts: tuple[str, ...] = ()
    """As they were sent."""
    beginnings: tuple[str, ...] = ()
    """How the client begins each answer, where he does."""


class ReplayRow(_Data):
    """A part of recovered edits, replayed alone or left out."""

    position: Position
    """Of the edits."""
    component: str
    variant: str
    recovered: Rate
    relative_norm: float
    """Mean, relative to the mean `|resid|`."""


class DeploymentRow(_Data):
    """The clamp on some tokens only, or at another length or temperature."""

    coverage: str
    max_tokens: int
    temperature: float
    recovered: Rate
    guarded: Rate | None = None


class Benign(_Data):
    """What benign users pay."""

    exact: Rate
    """Answers that are the same, token for token, as the model's without the guard: to
    prompts with label 0, or to all where none has one."""
    false_alarms: Rate
    """Requests that a monitor stopped."""
    promised: float
    """Share that may be stopped."""
    hold_tokens: int
    """Steps by which the first token of a stream comes later."""
    seconds_guarded: float | None = None
    seconds_open: float | None = None
    """Median time of a request through the server, under the policy and under one that
    does nothing; None where no server was asked."""


class PromptHeadline(_Data):
    """Threat model P: what a client can do."""

    rate: float
    upper: float
    samples: int
    queries: int


class LatentHeadline(_Data):
    """Threat model L: an edit behind the clamp, of the worst attacker."""

    position: Position
    """Whose budget for half of the samples is smallest under the policy."""
    b50_unmonitored: float | None
    b95_unmonitored: float | None
    b50_undetected: float | None
    b95_undetected: float | None
    """Budgets at which half and 95 % come back, interpolated; None where they never
    did."""
    largest_budget: float
    """That was tried."""
    worst_rate: float
    worst_upper: float
    """Undetected recovery of the adaptive attacker at its best budget."""
    by_position: dict[str, dict[str, float | None]]


class Headline(_Data):
    """The answer, in numbers and one sentence."""

    sentence: str
    prompt: PromptHeadline | None
    latent: LatentHeadline


class Certificate(_Data):
    """How far a policy can be trusted."""

    schema_version: Literal[2] = 2
    id: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """sha256 of everything else (`guard.certificate.certificate_id`)."""
    issued: str
    """ISO date."""
    subject: Subject
    protocol: Protocol
    headline: Headline
    controls: dict[str, float]
    """`delta_zero`, and the worst `random`: shares that recover without an attack."""
    cells: tuple[Cell, ...]
    prompts: tuple[PromptRow, ...]
    replay: tuple[ReplayRow, ...]
    attribution: str
    """What the replays support, in one sentence."""
    deployments: tuple[DeploymentRow, ...]
    benign: Benign
    limits: tuple[str, ...]
    """What this does not say."""
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    command: str
    seconds: float


def load_certificate(path: Path) -> Certificate:
    """Read all that a certificate says.

    Raises:
        CertificateError: It cannot be read, or is none.
    """
    try:
        return Certificate.model_validate_json(read_file(path, limit=MAX_FILE_BYTES))
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); expected a certificate."
        raise CertificateError(message) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = shorten(".".join(map(str, first["loc"])) or "JSON")
        message = (
            f"{path}: is no certificate ({where}: {first['msg']}); expected "
            "what `guard certify` writes."
        )
        raise CertificateError(message) from error
