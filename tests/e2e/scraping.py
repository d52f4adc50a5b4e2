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
def scraping(
    binary: str, server: Server, folder: Path, rules: str = ""
) -> Iterator[Ask]:
    """Run a Prometheus under whose job `vllm` the server is.

    Args:
        binary: The Prometheus server.
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
    address = f"127.0.0.1:{find_free_port()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ask(expression: str) -> dict[str, float]:
        words = urllib.parse.urlencode({"query": expression})
        url = f"http://{address}/api/v1/query?{words}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            body = json.load(answer)
        assert body["status"] == "success"
        return {
            ",".join(f"{k}={v}" for k, v in sorted(series["metric"].items())): float(
                series["value"][1]
            )
            for series in body["data"]["result"]
        }

    try:
        yield ask
    finally:
        stop(process)
