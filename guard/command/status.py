"""`guard status`: what running servers say of their guard, once or again and again.

Talks to each server over HTTP only: `/guard/status` and `/guard/ready` say what is
served, `/metrics` says what happened.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client.samples import Sample
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from guard.client import Client, Status
from guard.errors import EngineError, as_line

__all__ = ["Sight", "look_at", "show_servers", "tell_status", "watch_servers"]

_PATIENCE = 15.0
"""Seconds; a server takes up to ten to say that its engines do not answer."""
_SHORT = 12
"""Digits of a fingerprint that a person compares."""
_COLUMNS = (
    *("policy", "mode", "fingerprint", "certificate"),
    *("requests", "flagged", "blocked", "alarms"),
)

Connect = Callable[..., Client]
"""Makes the client of a server from its URL, with whatever keys there are."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen of one server at one moment."""

    url: str
    fault: str = ""
    """Why nothing else is known, in one line."""
    not_ready: str = ""
    """Why it is not ready; empty where it is."""
    status: Status | None = None
    """`/guard/status`."""
    samples: Sequence[Sample] = ()
    """The guard's own, of `/metrics`."""

    def count(self, name: str, **labels: str) -> float:
        """Return the sum of a counter over the children that have these labels."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def policies(self) -> dict[str, dict[str, str]]:
        """Return every policy that is served, with what identifies it.

        A key sees the policies that it may name; `/metrics` has them all.
        """
        found = {
            name: {
                "mode": policy.mode,
                "fingerprint": policy.fingerprint,
                "certificate": policy.certificate.id if policy.certificate else "",
            }
            for name, policy in (self.status.policies if self.status else {}).items()
        }
        for sample in self.samples:
            # A series that several processes share cannot end: it becomes 0.
            if sample.name == "guard_policy_info" and sample.value:
                known = {"fingerprint": sample.labels.get("fingerprint", "")}
                found.setdefault(sample.labels.get("policy", ""), known)
        return found


def look_at(url: str, *, connect: Connect = Client) -> Sight:
    """Ask one server; what is wrong with it is part of what is seen."""
    client = connect(url, patience=_PATIENCE)
    try:
        said, samples = client.read_status(), client.read_metrics()
    except EngineError as error:
        return Sight(url, fault=str(error))
    try:
        client.call("/guard/ready")
    except EngineError as error:
        return Sight(url, not_ready=str(error), status=said, samples=samples)
    return Sight(url, status=said, samples=samples)


def tell_status(urls: Sequence[str], *, connect: Connect) -> Iterator[str]:
    """Yield `/guard/status` of each server, as it comes, in JSON to read.

    Raises:
        EngineError: A server cannot be reached, or refuses.
    """
    for url in urls:
        said = connect(url).call("/guard/status")
        try:
            yield json.dumps(said, indent=2)
        except RecursionError as error:
            message = f"{url} nests its status too deep; expected a guarded server."
            raise EngineError(message) from error


def show_servers(urls: Sequence[str], *, connect: Connect, console: Console) -> None:
    """Print what is seen of each server now.

    Raises:
        EngineError: One cannot be reached, or is not ready; the others are shown.
    """
    sights = _look(urls, connect=connect)
    seen = [sight for sight in sights if not sight.fault]
    if seen:
        console.print(Group(*map(_describe, seen)))
    faults = [sight.fault or sight.not_ready for sight in sights]
    if faults := list(filter(None, faults)):
        raise EngineError(" ".join(faults))


def watch_servers(
    urls: Sequence[str],
    *,
    connect: Connect,
    every: float,
    console: Console,
    rounds: int | None = None,
) -> None:
    """Show what is seen of each server, and go on until interrupted.

    Args:
        urls: Of the servers.
        connect: Makes the client of a server, with its keys.
        every: Seconds between two looks.
        console: Where it is shown; in place on a terminal, else one after the other.
        rounds: How many looks; None is for ever.
    """
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while rounds is None or rounds > 0:
            sights = _look(urls, connect=connect)
            now = datetime.now(UTC).astimezone()
            footer = Text(f"{now:%H:%M:%S}, every {every:g} s; Ctrl-C ends", "dim")
            view = Group(*map(_describe, sights), footer)
            if console.is_terminal:
                live.update(view, refresh=True)
            else:
                console.print(view)
            if rounds is not None:
                rounds -= 1
            time.sleep(every if rounds != 0 else 0)


def _look(urls: Sequence[str], *, connect: Connect) -> list[Sight]:
    """Look at every server at once, so that one that hangs holds up no other."""
    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(lambda url: look_at(url, connect=connect), urls))


def _describe(sight: Sight) -> Group:
    """Lay out one server: a head, a row for each policy, and what went wrong."""
    said = sight.status
    if said is None:
        return Group(Text(sight.fault, "bold red"))
    table = Table(*_COLUMNS, title_justify="left", title=_head(sight, said))
    for name, known in sight.policies().items():
        counts = {
            action: sight.count("guard_requests_total", policy=name, action=action)
            for action in ("allow", "flag", "block")
        }
        table.add_row(
            _show(name),
            _show(known.get("mode", "-")),
            _show(known["fingerprint"][:_SHORT]),
            _show(known.get("certificate", "")[:_SHORT]) or "-",
            f"{sum(counts.values()):.0f}",
            _warn(counts["flag"], "yellow"),
            _warn(counts["block"], "red"),
            _warn(sight.count("guard_alarms_total", policy=name), "yellow"),
        )
    return Group(table, _tell_counts(sight, said), _tell_reload(sight, said))


def _head(sight: Sight, said: Status) -> str:
    ready = "[green]ready[/]"
    if sight.not_ready:
        ready = f"[bold red]not ready:[/] {_show(sight.not_ready)}"
    return (
        f"[bold]{_show(sight.url)}[/]  {ready}\n"
        f"generation {said.generation}, file {_show(said.fingerprint[:_SHORT])}, "
        f"vllm-guard {_show(said.version)}"
    )


def _tell_counts(sight: Sight, said: Status) -> str:
    """Return tokens and whatever may have gone wrong with them."""
    tokens = f"{sight.count('guard_tokens_total'):.0f} tokens guarded"
    shown = {
        "unscored": "guard_unscored_tokens_total",
        "errors": "guard_errors_total",
        "let through": "guard_requests_let_through_total",
    }
    wrong = [f"{key} {_warn(sight.count(name), 'red')}" for key, name in shown.items()]
    if said.on_error == "open":
        wrong.append("[bold red]on_error: open[/]")
    return ", ".join([tokens, *wrong])


def _tell_reload(sight: Sight, said: Status) -> str:
    """Return when and how the policies last changed."""
    refused = sight.count("guard_policy_reloads_total", result="refused")
    told = f"{_warn(refused, 'red')} reloads refused"
    last = said.last_reload
    if last is None:
        return f"never reloaded, {told}"
    reason = f" ({_show(last.reason)})" if last.reason else ""
    at = datetime.fromtimestamp(last.at, UTC).astimezone()
    result = _show(last.result)
    return f"last reload {at:%Y-%m-%d %H:%M:%S}: {result}{reason}, {told}"


def _show(text: str) -> str:
    """Return what a server said so that it neither colours nor steers a terminal."""
    return escape(as_line(text))


def _warn(count: float, colour: str) -> str:
    return f"[{colour}]{count:.0f}[/]" if count else "0"
