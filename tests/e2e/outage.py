"""A client in the midst of a stream, and an operator who watches it break."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from e2e.serving import Server, list_processes

WATCHED = (
    "guard_alarms_total",
    "guard_errors_total",
    "guard_requests_let_through_total",
    "guard_requests_total",
    "guard_unscored_tokens_total",
)
"""What an operator looks at; of the requests those that were not simply allowed."""
HUNG_SECONDS = 180
"""A client that waits longer has been left hanging, on the busiest machine too."""


@dataclass
class Caller(threading.Thread):
    """A client that reads one stream to its end, in a thread of its own."""

    server: Server
    policy: str = "default"
    max_tokens: int = 1900
    prompt: str = "w1 w2 w3"
    status: int = 0
    port: int = 0
    """Its own end of the connection."""
    chunks: list[dict[str, Any]] = field(default_factory=list)
    is_done: bool = False
    """Whether the stream said [DONE]."""
    broken: bool = False
    """Whether the connection ended before the answer."""
    gave_up: bool = False
    """Whether nothing came for `HUNG_SECONDS`."""

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        body = {
            "model": "model",
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "guard": {"policy": self.policy},
        }
        url = f"{self.server.url}/v1/completions"
        try:
            with httpx.stream("POST", url, json=body, timeout=HUNG_SECONDS) as stream:
                self.status = stream.status_code
                network = stream.extensions["network_stream"]
                self.port = network.get_extra_info("client_addr")[1]
                for line in stream.iter_lines():
                    if line == "data: [DONE]":
                        self.is_done = True
                    elif line.startswith("data: "):
                        self.chunks.append(json.loads(line.removeprefix("data: ")))
        except httpx.TimeoutException:
            self.gave_up = True
        except httpx.TransportError:
            self.broken = True

    def begin(self) -> "Caller":
        """Ask, and come back when the first tokens have arrived."""
        self.start()
        wait_until(lambda: len(self.chunks) >= 3 or not self.is_alive(), "a token")
        return self

    def end(self) -> "Caller":
        """Wait until the answer is over; it may not take for ever."""
        self.join(HUNG_SECONDS + 5)
        assert not self.is_alive(), "the client hangs"
        assert not self.gave_up, "the client was left waiting"
        return self

    @property
    def text(self) -> str:
        choices = [
            choice for chunk in self.chunks for choice in chunk.get("choices", ())
        ]
        return "".join(choice["text"] for choice in choices)

    @property
    def guard(self) -> dict[str, Any]:
        """The verdict; empty where there was none."""
        return next((c["guard"] for c in self.chunks if "guard" in c), {})

    def describe(self) -> str:
        """Say in words how the answer ended."""
        if self.broken:
            return f"{self.status}, tokens, then the connection ends"
        last = [
            chunk for chunk in self.chunks if chunk.get("choices") or "error" in chunk
        ]
        if "error" in last[-1]:
            return f"{self.status}, tokens, then an `error` event"
        finish = last[-1]["choices"][0]["finish_reason"]
        if finish is None:
            return f"{self.status}, tokens, then the stream ends"
        parts = [f"`finish_reason: {finish}`"]
        if self.guard:
            parts.append(f"`action: {self.guard['action']}`")
        if "reason" in self.guard:
            parts.append(f"`reason: {self.guard['reason']}`")
        if self.guard.get("alarms"):
            score = json.dumps(self.guard["alarms"][0]["score"])
            parts.append(f"an alarm of score `{score}`")
        return f"{self.status}, tokens, then " + ", ".join(parts)


class Operator:
    """Somebody who looks at the metrics before and after."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = server.metrics()

    def grown(self) -> dict[str, float]:
        """Return which series of `WATCHED` grew, and by how much."""
        after = self._server.metrics()
        return {
            name: value - self._before[name]
            for name, value in after.items()
            if name.startswith(WATCHED)
            and 'action="allow"' not in name.removeprefix("guard_alarms_total")
            and value > self._before[name]
        }

    def describe(self) -> str:
        """Say which metrics grew, and whether the server is ready."""
        names = [f"`{name}`" for name in sorted(self.grown())]
        verb = "grow" if len(names) > 1 else "grows"
        told = f"{', '.join(names)} {verb}" if names else "no metric of a fault"
        return f"{told}; `/guard/ready` {self.ready()}"

    def ready(self) -> int:
        """Return the status of `/guard/ready`."""
        return ask_ready(self._server)


def ask_ready(server: Server, seconds: float = 60) -> int:
    """Return the status of `/guard/ready`; 0 where nobody answers in time."""
    try:
        return httpx.get(f"{server.url}/guard/ready", timeout=seconds).status_code
    except httpx.TransportError:
        return 0


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Wait for a thing, however busy the machine; not for a time."""
    deadline = time.monotonic() + HUNG_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.01)


def find_processes(server: Server, *parts: str) -> list[int]:
    """Return the numbers of a server's processes whose name holds one of the parts.

    Args:
        server: Whose.
        parts: As vLLM calls them, cut to 15 letters; none is all of them.
    """
    found = []
    for entry in list_processes(server):
        number, _, name = entry.partition(" ")
        if not parts or any(part in name for part in parts):
            found.append(int(number))
    return found


def find_owner(caller: Caller) -> int:
    """Return the number of the process that serves a client's connection."""
    wanted = f":{int(caller.server.url.rpartition(':')[2]):04X}", f":{caller.port:04X}"
    entries = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    (inode,) = (
        entry[9] for entry in entries[1:] if (entry[1][-5:], entry[2][-5:]) == wanted
    )
    for number in find_processes(caller.server):
        for descriptor in Path(f"/proc/{number}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(descriptor) == f"socket:[{inode}]":
                    return number
    raise AssertionError("The server does not know the connection.")


def seconds_until_not_ready(server: Server, since: float) -> float:
    """Return how long after `since` the server first did not say that it is ready."""
    while time.monotonic() < since + HUNG_SECONDS:
        if ask_ready(server) != 200:
            return time.monotonic() - since
        time.sleep(0.02)
    raise AssertionError("The server still says that it is ready.")


def wait_for_end(server: Server) -> None:
    """Wait until a server has ended and none of its processes is left."""
    server.process.wait(timeout=HUNG_SECONDS)
    deadline = time.monotonic() + HUNG_SECONDS
    while (left := list_processes(server)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@contextlib.contextmanager
def limited(numbers: Sequence[int], kind: int, limits: Sequence[int]) -> Iterator[None]:
    """Lower a resource limit of running processes for a while."""
    import resource

    before = [resource.prlimit(number, kind) for number in numbers]
    try:
        for number, limit, (_, hard) in zip(numbers, limits, before, strict=True):
            resource.prlimit(number, kind, (limit, hard))
        yield
    finally:
        for number, known in zip(numbers, before, strict=True):
            resource.prlimit(number, kind, known)


def first_free_descriptor(number: int) -> int:
    """Return the lowest file descriptor that a process has not opened."""
    taken = {int(entry.name) for entry in Path(f"/proc/{number}/fd").iterdir()}
    return next(fd for fd in range(len(taken) + 1) if fd not in taken)


@contextlib.contextmanager
def stopped(*numbers: int) -> Iterator[None]:
    """Let processes stand still for a while."""
    for number in numbers:
        os.kill(number, signal.SIGSTOP)
    try:
        yield
    finally:
        for number in numbers:
            os.kill(number, signal.SIGCONT)
