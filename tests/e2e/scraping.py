"""A real Prometheus that scrapes a real server every second."""

import contextlib
import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.serving import Server, stop
from tools import find_tool

from guard.redteam.server import find_free_port

SECONDS = 60

Ask = Callable[[str], dict[str, float]]
"""Evaluates an expression now: values by labels, `name=value,...`, sorted."""


def wait_for(answer: Callable[[], Any], *, seconds: float = SECONDS) -> Any:
    """Return the first true value of `answer`, or fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := answer():
                return value
        except OSError:
            pass
        time.sleep(0.2)
    return pytest.fail(f"Nothing within {seconds} s.")


@contextlib.contextmanager
def scraping(server: Server, folder: Path, rules: str = "") -> Iterator[Ask]:
    """Run a Prometheus under whose job `vllm` the server is.

    Args:
        server: What it scrapes.
        folder: Where it keeps what it saw.
        rules: Path of a file of rules that it evaluates every second.
    """
    config = folder / "prometheus.yml"
    target = server.url.removeprefix("http://")
    every = "{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}"
    config.write_text(
        f"global: {every}\n"
        f"rule_files: {json.dumps([rules] if rules else [])}\n"
        "scrape_configs:\n"
        f"  - {{job_name: vllm, static_configs: [{{targets: ['{target}']}}]}}\n"
    )
    data = f"--storage.tsdb.path={folder / 'data'}"
    with running("prometheus", folder, config.name, data) as address:

        def ask(expression: str) -> dict[str, float]:
            words = urllib.parse.urlencode({"query": expression})
            body = read_json(f"{address}/api/v1/query?{words}")
            assert body["status"] == "success"
            series = body["data"]["result"]
            return {name_of(one["metric"]): float(one["value"][1]) for one in series}

        yield ask


def name_of(metric: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(metric.items()))


@contextlib.contextmanager
def running(name: str, folder: Path, config: str, *options: str) -> Iterator[str]:
    """Run a program of Prometheus on a free port; its URL is yielded.

    Args:
        name: The program.
        folder: Where its configuration is, and its log goes.
        config: Name of its configuration.
        options: More for its command line.
    """
    address = f"127.0.0.1:{find_free_port()}"
    command = [find_tool(name), f"--config.file={folder / config}", *options]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: read_ready(f"http://{address}"))
        yield f"http://{address}"
    finally:
        stop(process)


def read_ready(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/-/ready", timeout=10) as answer:
        return bool(answer.status == 200)


def read_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)
