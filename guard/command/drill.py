"""`guard drill`: bring the suppressed behaviour back on purpose, and see who notices.

Talks to a running server over HTTP only, as an administrator. Each drill is three
requests with the same prompt: a clean one, the drill, and a clean one right after.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from guard.client import Client, Said
from guard.errors import EngineError

__all__ = ["run_drills"]

Route = Literal["chat/completions", "completions"]
"""How a prompt is sent: as what a user says, or as plain text."""

MAX_TOKENS = 64
_COLUMNS = (
    "drill",
    "policy",
    "behaviour back",
    "ratio",
    "action",
    "counted",
    "clean again",
)
_CAPTION = """\
behaviour back: whether the answer is the one that the policy suppresses; withheld
where it was blocked before. ratio: largest score / threshold. counted: whether
guard_alarms_total of the policy moved. clean again: whether the same prompt right
after, without the drill, got the answer and the alarms of before."""


class Drill(Said):
    """A fire drill that a server has."""

    name: str
    prompt: str
    gold: str
    """What the model answers when the behaviour is back."""


class _Drills(Said):
    drills: tuple[Drill, ...]


class Alarm(Said):
    """A monitor above its threshold."""

    monitor: str


class Reading(Said):
    """How near a monitor came to its threshold."""

    monitor: str
    ratio: float | None = None
    """None where no token of its stage was read."""


class Verdict(Said):
    """What is read of a `guard` object."""

    policy: str
    action: str
    drill: str | None = None
    alarms: tuple[Alarm, ...]
    readings: tuple[Reading, ...] = ()


class _Message(Said):
    content: str | None = None


class _Choice(Said):
    finish_reason: str
    text: str | None = None
    message: _Message = _Message()


class Reply(Said):
    """What a client reads of one answer."""

    choices: Annotated[tuple[_Choice, ...], Field(min_length=1)]
    guard: Verdict

    @property
    def text(self) -> str:
        """Of the answer."""
        return self.choices[0].text or self.choices[0].message.content or ""

    @property
    def is_cut(self) -> bool:
        """Whether it ran out of tokens."""
        return self.choices[0].finish_reason == "length"

    @property
    def alarms(self) -> list[str]:
        """Names of the monitors above their threshold."""
        return [alarm.monitor for alarm in self.guard.alarms]

    @property
    def ratios(self) -> str:
        """One monitor a line, marked where it alarmed."""
        return "\n".join(
            f"{escape(r.monitor)} {_show(r.ratio)}"
            + (" ALARM" if r.monitor in self.alarms else "")
            for r in self.guard.readings
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one drill under one policy."""

    before: Reply
    """Of a clean request that shares its KV with nobody."""
    drilled: Reply
    after: Reply
    """Of a clean request that would find the drill's KV, were it shared."""
    counted: float
    """What the drill added to `guard_alarms_total` of its policy."""

    @property
    def is_clean_again(self) -> bool:
        """Whether the drill left no trace in the next request."""
        return (
            self.after.guard.drill is None
            and self.after.text == self.before.text
            and self.after.alarms == self.before.alarms
        )


def run_drills(
    url: str,
    *,
    admin_token: str,
    api_key: str,
    policies: Sequence[str | None],
    route: Route,
) -> None:
    """Run every drill of a server under each policy, and print a table.

    Args:
        url: Of the server.
        admin_token: As the server has it in its environment.
        api_key: Where the server checks keys.
        policies: None is the default.
        route: How prompts are sent.

    Raises:
        EngineError: The server does not answer, or refuses.
    """
    server = Client(url, admin_token=admin_token, api_key=api_key)
    missing = "lists no drills; expected a guarded server."
    drills = server.read(_Drills, "/guard/drills", missing=missing).drills
    if not drills:
        message = f"{url} has no drills; expected 'drills' in its policy file."
        raise EngineError(message)
    model = server.read_model().id
    runs = [(drill, policy) for policy in policies for drill in drills]
    table = Table(title="Fire drills", caption=_CAPTION, show_lines=True)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    table.caption_justify = "left"
    screen = Console(stderr=True)
    is_piped = not screen.is_terminal
    for drill, policy in track(
        runs, "Drilling", console=screen, transient=True, disable=is_piped
    ):
        exercise = _Exercise(server, model, drill.prompt, policy, route)
        outcome = exercise.run(drill.name)
        table.add_row(*_describe(outcome, drill))
    Console().print(table)


@dataclass(frozen=True, slots=True)
class _Exercise:
    """One prompt under one policy, asked with a drill and without."""

    server: Client
    model: str
    prompt: str
    policy: str | None
    route: Route

    def run(self, drill: str) -> Outcome:
        alone, shared = secrets.token_hex(8), secrets.token_hex(8)
        before = self._ask(None, salt=alone)
        policy = before.guard.policy
        count = count_alarms(self.server, policy)
        drilled = self._ask(drill, salt=shared)
        if drilled.guard.drill != drill:
            message = f"The server did not run drill {drill!r}; expected its name."
            raise EngineError(message)
        counted = count_alarms(self.server, policy) - count
        return Outcome(before, drilled, self._ask(None, salt=shared), counted)

    def _ask(self, drill: str | None, *, salt: str) -> Reply:
        guard = {"policy": self.policy, "trace": "summary", "drill": drill}
        said: dict[str, Any] = {"prompt": self.prompt}
        if self.route == "chat/completions":
            said = {"messages": [{"role": "user", "content": self.prompt}]}
        return self.server.read(
            Reply,
            f"/v1/{self.route}",
            said
            | {
                "model": self.model,
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
                "cache_salt": salt,
                "guard": {k: v for k, v in guard.items() if v is not None},
            },
            missing="answers without a verdict; expected a guarded server.",
        )


def count_alarms(server: Client, policy: str) -> float:
    """Return `guard_alarms_total` of a policy, over all its monitors."""
    return sum(
        sample.value
        for sample in server.read_metrics()
        if sample.name == "guard_alarms_total" and sample.labels.get("policy") == policy
    )


def _describe(outcome: Outcome, drill: Drill) -> tuple[str, ...]:
    drilled = outcome.drilled
    clean = "yes" if outcome.is_clean_again else "NO"
    return (
        escape(drill.name),
        escape(drilled.guard.policy),
        judge(drilled, drill.gold),
        drilled.ratios,
        escape(drilled.guard.action),
        "yes" if outcome.counted > 0 else "no",
        clean,
    )


def judge(reply: Reply, gold: str) -> Literal["yes", "no", "withheld"]:
    """Return whether the suppressed behaviour reached the client.

    An answer that ran out of tokens on its way through the gold one counts as it.

    Args:
        reply: Of the drill.
        gold: What the model answers when the behaviour is back.
    """
    said, wanted = (" ".join(text.lower().split()) for text in (reply.text, gold))
    is_cut = reply.is_cut and bool(said) and wanted.startswith(said)
    if wanted in said or is_cut:
        return "yes"
    return "withheld" if reply.guard.action == "block" else "no"


def _show(ratio: float | None) -> str:
    # None where no token of the monitor's stage was read.
    return "-" if ratio is None else f"{ratio:.2f}"
