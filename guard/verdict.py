"""What was decided about a request, and how the decision is told.

The engine core decides; the API server only reports. A verdict is a running
total: each one replaces the one before it for the same choice.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from guard.policy import Policy
    from guard.watch import Reading

__all__ = [
    "SCHEMA",
    "Action",
    "Alarm",
    "Mode",
    "Stage",
    "Verdict",
    "decide",
    "report",
    "worst",
]

SCHEMA = 1
"""Version of the `guard` object that clients read."""

Action = Literal["allow", "flag", "block"]
"""What was decided: nothing to report, reported, or stopped."""

Mode = Literal["observe", "enforce"]
"""Whether a policy only reports or also acts."""

Stage = Literal["prompt", "output"]
"""Where in the request an alarm was raised."""

_SEVERITY: dict[Action, int] = {"allow": 0, "flag": 1, "block": 2}


@dataclass(frozen=True, slots=True)
class Alarm:
    """One monitor whose score went above its threshold."""

    monitor: str
    """Name of the monitor, as the policy gives it."""
    score: float
    """Largest score so far; not finite when a score was not."""
    threshold: float
    """Calibrated threshold the score was held against."""
    ratio: float
    """Score over threshold."""
    position: int | None
    """First token position above the threshold, counted from the prompt's start."""
    stage: Stage
    """Whether that position lies in the prompt or in the output."""
    action: Action
    """What this alarm alone asks for: flag or block."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything decided about one choice of a request so far."""

    id: str
    """Guard id of the HTTP request."""
    policy: str
    """Policy the request ran under."""
    fingerprint: str
    """Fingerprint of that policy's content."""
    mode: Mode
    """Whether the policy reports or acts."""
    action: Action
    """What was decided."""
    stage: Stage | None = None
    """Where the decisive alarm was raised; None without one."""
    alarms: tuple[Alarm, ...] = ()
    """Every monitor above its threshold, in policy order."""
    clamped_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that each clamp changed, by name of the clamp."""
    tokens_seen: int = 0
    """Prompt and output tokens that the guard has judged."""
    readings: tuple[Alarm, ...] = ()
    """Every monitor's number so far, in the shape of an alarm; only when traced."""
    reason: str | None = None
    """Why there is a flag or a block without an alarm, such as "unscored"."""
    drill: str | None = None
    """Name of the fire drill it was; told only where it was one."""

    def to_json(self) -> dict[str, Any]:
        """Return the `guard` object a client receives; numbers are JSON-safe.

        A number that is not finite is null, since JSON has no word for it.
        """
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "id": self.id,
            "policy": self.policy,
            "fingerprint": self.fingerprint,
            "mode": self.mode,
            "action": self.action,
            "stage": self.stage,
            "alarms": [_entry(alarm) for alarm in self.alarms],
            "clamped_tokens": dict(self.clamped_tokens),
            "tokens_seen": self.tokens_seen,
        }
        if self.readings:
            body["readings"] = [_entry(reading) for reading in self.readings]
        if self.reason is not None:
            body["reason"] = self.reason
        if self.drill is not None:
            body["drill"] = self.drill
        return body

    def to_wire(self) -> dict[str, Any]:
        """Return what travels between processes: the JSON and each alarm's part.

        Clients are not shown the stage and action of a single alarm; metrics
        count them.
        """
        body = self.to_json()
        entries = [*body["alarms"], *body.get("readings", ())]
        alarms = [*self.alarms, *self.readings]
        for entry, alarm in zip(entries, alarms, strict=True):
            entry.update(stage=alarm.stage, action=alarm.action)
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read what `to_json` or `to_wire` wrote; a null number becomes NaN.

        Raises:
            KeyError: A key is missing.
            ValueError: The schema is another one.
        """
        if body["schema"] != SCHEMA:
            raise ValueError(
                f"Verdict has schema {body['schema']!r}; expected {SCHEMA}."
            )
        stage, action = body["stage"], body["action"]

        def read(name: str) -> tuple[Alarm, ...]:
            return tuple(
                Alarm(
                    monitor=entry["monitor"],
                    score=_number(entry["score"]),
                    threshold=_number(entry["threshold"]),
                    ratio=_number(entry["ratio"]),
                    position=entry["position"],
                    stage=entry.get("stage", stage),
                    action=entry.get("action", action),
                )
                for entry in body.get(name, ())
            )

        return cls(
            id=body["id"],
            policy=body["policy"],
            fingerprint=body["fingerprint"],
            mode=body["mode"],
            action=action,
            stage=stage,
            alarms=read("alarms"),
            readings=read("readings"),
            clamped_tokens=dict(body["clamped_tokens"]),
            tokens_seen=body["tokens_seen"],
            reason=body.get("reason"),
            drill=body.get("drill"),
        )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the most severe verdict, the first one among equals.

    Raises:
        ValueError: There is no verdict, so nothing may be said.
    """
    return max(verdicts, key=lambda verdict: _SEVERITY[verdict.action])


def decide(
    policy: "Policy", readings: Sequence["Reading"]
) -> tuple[Action, Stage | None, tuple[Alarm, ...]]:
    """Turn the readings of one request into an action.

    A policy that observes flags at most. One that enforces takes the strongest
    action among its alarmed monitors.

    Args:
        policy: The policy the request runs under.
        readings: Its monitors' running state.

    Returns:
        The action, the stage of the first alarm that asks for it, and all
        alarms in the order of the readings.
    """
    alarms = tuple(report(policy, reading) for reading in readings if reading.alarm)
    if not alarms:
        return "allow", None, ()
    decisive = min(alarms, key=_rank)
    return decisive.action, decisive.stage, alarms


def report(policy: "Policy", reading: "Reading") -> Alarm:
    """Return a reading as it is told, whether it is an alarm or not."""
    return Alarm(
        monitor=reading.monitor,
        score=reading.score,
        threshold=reading.threshold,
        ratio=reading.ratio,
        position=reading.position,
        stage=reading.stage,
        action=reading.action if policy.mode == "enforce" else "flag",
    )


def _entry(alarm: Alarm) -> dict[str, Any]:
    """Return what a client reads of an alarm or a reading."""
    return {
        "monitor": alarm.monitor,
        "score": _finite(alarm.score),
        "threshold": _finite(alarm.threshold),
        "ratio": _finite(alarm.ratio),
        "position": alarm.position,
    }


def _rank(alarm: Alarm) -> tuple[int, float]:
    """Order alarms: the strongest action first, then the earliest position."""
    position = math.inf if alarm.position is None else alarm.position
    return -_SEVERITY[alarm.action], position


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
