"""Whoever runs a server under test: reloads its policies, reads what it counts.

Reads from outside only: the server's metrics and status, and what the system says of
its processes.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["TOKEN", "Memory", "Operator", "Policies", "total"]

TOKEN = "benchmark-administrator"
_IDLE_SECONDS = 120


class Policies:
    """A policy file, to be replaced by another again and again."""

    def __init__(self, path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        """Take the file as it is for the first of two good ones.

        Args:
            path: The file; its policy `default` clamps and has calibrated monitors.
            change: Makes the second good file of the first, in place.
        """
        self.path = path
        self._plain = path.read_text(encoding="utf-8")
        self._change = change

    def write(self, text: str | None) -> None:
        """Replace the file at once; None removes it."""
        if text is None:
            self.path.unlink(missing_ok=True)
            return
        new = self.path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.rename(self.path)

    def good(self, number: int) -> str:
        """Return one of two files; each has all policies of the other."""
        body = yaml.safe_load(self._plain)
        if number % 2:
            self._change(body)
        return yaml.safe_dump(body, sort_keys=False)

    def new(self, number: int) -> str:
        """Return a good file that is like none before it, for numbers up to 1,024."""
        body = yaml.safe_load(self._plain)
        body["policies"]["default"]["hold_tokens"] = number
        return yaml.safe_dump(body, sort_keys=False)

    def bad(self, number: int) -> str | None:
        """Return one of several files that cannot be served."""
        body = yaml.safe_load(self._plain)
        match number % 5:
            case 0:
                return self._plain + "policies: ["
            case 1:
                body["unheard_of"] = True
            case 2:
                for sae in body["saes"].values():
                    sae["sha256"] = "0" * 64
            case 3:
                body["policies"]["default"]["clamps"][0]["latents"] = [1]
            case _:
                return None
        return yaml.safe_dump(body, sort_keys=False)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a server's processes hold, in MB."""

    rss: dict[str, float]
    """Resident memory of each, by name; pages that several share count for each."""
    pss: float
    """Of all of them together, a shared page once."""


@dataclass(frozen=True, slots=True)
class Operator:
    """A handle on a running server."""

    client: httpx.Client
    """Sends a key of the server, where it asks for one."""
    session: int
    """Number of the session that all its processes are in."""

    def reload(self) -> tuple[int, float]:
        """Return the status that a reload is answered with, and its milliseconds."""
        start = time.perf_counter()
        headers = {"x-guard-admin-token": TOKEN}
        answer = self.client.post("/guard/reload", headers=headers)
        return answer.status_code, 1e3 * (time.perf_counter() - start)

    def read_metrics(self) -> dict[str, float]:
        """Return every sample, keyed `name{label="value",...}`, labels sorted."""
        text = self.client.get("/metrics").raise_for_status().text
        return {
            _key(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def read_engines(self) -> list[dict[str, Any]]:
        """Return what engine core and workers say of themselves."""
        status = self.client.get("/guard/status").raise_for_status().json()
        return [part for engine in status["engines"] for part in engine]

    def wait_until_idle(self) -> None:
        """Wait until nothing runs, waits or is open any more.

        Raises:
            TimeoutError: Something goes on that nobody waits for.
        """
        deadline = time.monotonic() + _IDLE_SECONDS
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        while True:
            metrics = self.read_metrics()
            busy = {n: total(metrics, n) for n in (*names, "guard_open_requests")}
            if not any(busy.values()):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"The server is not idle: {busy}.")
            time.sleep(0.2)

    def read_memory(self) -> Memory:
        """Return what all processes hold now."""
        rss: dict[str, float] = {}
        pss = 0.0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                before, _, rest = (folder / "stat").read_text().rpartition(") ")
                if int(rest.split()[3]) != self.session:
                    continue
                name = f"{before.partition('(')[2]} {folder.name}"
                rollup = (folder / "smaps_rollup").read_text().splitlines()
                sizes = {line.split(":")[0]: line.split()[1] for line in rollup[1:]}
                rss[name] = round(int(sizes["Rss"]) / 1024, 1)
                pss += int(sizes["Pss"]) / 1024
        return Memory(rss, round(pss, 1))


def total(metrics: dict[str, float], name: str) -> float:
    """Return the sum over all labels of a metric."""
    return sum(v for key, v in metrics.items() if key.partition("{")[0] == name)


def _key(name: str, labels: dict[str, str]) -> str:
    written = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{written}}}" if written else name
