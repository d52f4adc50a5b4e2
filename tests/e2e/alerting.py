"""Prometheus and Alertmanager as they ship, around real servers, in a hurry.

Configurations are those of the composition, other addresses and intervals apart. Rules
are shortened by the command that docs/watching.md gives for a rehearsal.
"""

import contextlib
import json
import shutil
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from e2e.scraping import read_json, running, wait_for
from e2e.serving import Server
from pages import ROOT, list_blocks

DEPLOY = ROOT / "deploy"
OPERATOR = "  - name: operator\n"
"""The receiver of `alertmanager.yml`, who has no address there."""


@dataclass(frozen=True)
class Watch:
    """What is known of the servers by those who watch them."""

    prometheus: str
    """URL."""
    alertmanager: str
    """URL."""
    pages: list[dict[str, Any]] = field(default_factory=list)
    """Notifications that the operator was sent, as Alertmanager writes them."""

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Evaluate an expression now: values by labels, sorted."""
        words = urllib.parse.urlencode({"query": expression})
        found = read_json(f"{self.prometheus}/api/v1/query?{words}")
        return {
            tuple(sorted(series["metric"].items())): float(series["value"][1])
            for series in found["data"]["result"]
        }

    def alerts(self, name: str = "") -> list[dict[str, Any]]:
        """Return the active alerts that Alertmanager has, of one name or of any."""
        words = urllib.parse.urlencode({"filter": f'alertname="{name}"'})
        url = f"{self.alertmanager}/api/v2/alerts?" + (words if name else "")
        return [a for a in read_json(url) if a["status"]["state"] == "active"]

    def paged(self, name: str, status: str) -> bool:
        """Whether the operator was told that an alert is `firing` or `resolved`."""
        return any(
            alert["status"] == status and alert["labels"]["alertname"] == name
            for page in list(self.pages)
            for alert in page["alerts"]
        )


@contextlib.contextmanager
def watching(servers: Sequence[Server], folder: Path) -> Iterator[Watch]:
    """Run a Prometheus that scrapes the servers and an Alertmanager that it tells.

    Args:
        servers: Under the job `vllm`.
        folder: Empty; for what they are told, log and keep.
    """
    with contextlib.ExitStack() as stack:
        pages: list[dict[str, Any]] = []
        pager = stack.enter_context(_paging(pages))
        (folder / "rules").mkdir()
        rehearse(folder / "rules")
        (folder / "alertmanager.yml").write_text(_page_operator(pager))
        alertmanager = stack.enter_context(
            running(
                *("prometheus-alertmanager", folder, "alertmanager.yml"),
                *(f"--storage.path={folder / 'alerts'}", "--cluster.listen-address="),
            )
        )
        (folder / "prometheus.yml").write_text(_scrape(servers, alertmanager))
        data = f"--storage.tsdb.path={folder / 'data'}"
        prometheus = stack.enter_context(
            running("prometheus", folder, "prometheus.yml", data)
        )
        watch = Watch(prometheus, alertmanager, pages)
        wait_for(lambda: len(watch.query("up == 1")) == len(servers))
        yield watch


def rehearse(folder: Path) -> None:
    """Write the rules that ship into a folder, as a rehearsal shortens them."""
    (block,) = (one for one in list_blocks("sh") if "rehearsal.yml" in one.text)
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", folder)
    subprocess.run(["bash", "-euc", block.text], cwd=folder, check=True)
    (folder / "rules.yml").unlink()


def _scrape(servers: Sequence[Server], alertmanager: str) -> str:
    text = (DEPLOY / "compose" / "prometheus.yml").read_text()
    targets = [server.url.removeprefix("http://") for server in servers]
    for old, new in (
        ('"guard:8000"', ", ".join(f'"{target}"' for target in targets)),
        ("alertmanager:9093", alertmanager.removeprefix("http://")),
        ("interval: 15s", "interval: 3s"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


def _page_operator(pager: str) -> str:
    text = (DEPLOY / "compose" / "alertmanager.yml").read_text()
    for old, new in (
        (OPERATOR, f"{OPERATOR}    webhook_configs: [{{url: '{pager}'}}]\n"),
        ("group_wait: 30s", "group_wait: 1s"),
        ("group_interval: 5m", "group_interval: 2s"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def _paging(pages: list[dict[str, Any]]) -> Iterator[str]:
    """Be the operator's pager: a webhook, whose URL is yielded."""

    class Pager(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            pages.append(json.loads(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Pager) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
