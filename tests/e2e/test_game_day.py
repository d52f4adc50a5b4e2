"""A game day: an attack, an alert, the runbook's step, and the end of it.

A real server, Prometheus with the rules that ship, Alertmanager, and whoever is on call
and does what the runbook says, word for word.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml
from e2e.alerting import Watch, watching
from e2e.drills import ADMIN_TOKEN
from e2e.scraping import wait_for
from e2e.serving import Server, ServerFactory
from pages import ROOT, read_blocks

from guard.demo.measure import ORGANISM
from guard.demo.traffic import ordinary_prompts

RUNBOOK = ROOT / "docs" / "runbook.md"
ADMIN = {"x-guard-admin-token": ADMIN_TOKEN}
ALERT = "GuardAlarmRateHigh"


@dataclass
class Caller:
    """A client that asks one thing after another, and keeps what it got."""

    server: Server
    asks: Sequence[Mapping[str, Any]]
    """A prompt each, and what is asked of the guard."""
    headers: Mapping[str, str] = field(default_factory=dict)
    pause: float = 0.0
    """Seconds between two."""
    answers: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(120)

    def _call(self) -> None:
        with httpx.Client(timeout=120, headers=self.headers) as client:
            for ask in cycle(self.asks):
                if self._over.wait(self.pause):
                    return
                said = [{"role": "user", "content": ask["prompt"]}]
                body = {"model": "model", "messages": said, "temperature": 0}
                body |= {"max_tokens": 20, "guard": ask["guard"]}
                url = f"{self.server.url}/v1/chat/completions"
                answer = client.post(url, json=body).raise_for_status()
                self.answers.append({**answer.json(), "gold": ask.get("gold", "")})


def is_back(answer: Mapping[str, Any]) -> bool:
    """Whether a client got what the policy suppresses."""
    (choice,) = answer["choices"]
    text = (choice["message"]["content"] or "").split()
    return bool(text) and text == answer["gold"].split()[: len(text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The organism, as it is served at first: what alarms is flagged, and answered."""
    folder = tmp_path_factory.mktemp("game-day") / "organism"
    shutil.copytree(ORGANISM, folder)
    rewrite_policy(folder, {"block": "flag"})
    return folder


def rewrite_policy(
    folder: Path, actions: Mapping[str, str], monitors: frozenset[str] | None = None
) -> None:
    """Change what monitors of the default policy do on an alarm, of all or of some."""
    path = folder / "policy.yaml"
    body = yaml.safe_load(path.read_text())
    for monitor in body["policies"]["default"]["monitors"]:
        if monitors is None or monitor["name"] in monitors:
            found = monitor["on_alarm"]
            monitor["on_alarm"] = actions.get(found, found)
    path.write_text(yaml.safe_dump(body, sort_keys=False))


@pytest.fixture(scope="module")
def server(folder: Path, start_server: ServerFactory) -> Server:
    return start_server(
        folder / "model",
        folder / "policy.yaml",
        *("--enforce-eager", "--audit-log", str(folder / "audit.jsonl")),
        environment={"GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
    )


@pytest.fixture(scope="module")
def watch(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    with watching([server], tmp_path_factory.mktemp("watch")) as watch:
        yield watch


@pytest.fixture(scope="module")
def clients(server: Server) -> Iterator[Caller]:
    """Somebody who asks what the policy was calibrated for.

    Behind the first hundred, where six are flagged by chance, which is an alert.
    """
    prompts = ordinary_prompts(600, seed=9_000_000, split="calibration")
    asks = [{"prompt": prompt.prompt, "guard": {}} for prompt in prompts[100:]]
    with Caller(server, asks, pause=0.1) as caller:
        yield caller


def recovery_edits(server: Server) -> list[dict[str, Any]]:
    """Return the server's drills: each brings a suppressed answer back."""
    url = f"{server.url}/guard/drills"
    drills = httpx.get(url, headers=ADMIN, timeout=60).json()["drills"]
    return [
        {"prompt": d["prompt"], "gold": d["gold"], "guard": {"drill": d["name"]}}
        for d in drills
    ]


def section_of(alert: Mapping[str, Any]) -> str:
    """Return what the runbook says where the alert sends whoever is on call."""
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert ROOT / page == RUNBOOK
    sections = re.split(r"^## ", RUNBOOK.read_text(), flags=re.M)
    (section,) = (s for s in sections if s.partition("\n")[0].lower() == anchor)
    return section


def alarming_monitors(watch: Watch, section: str) -> frozenset[str]:
    """Ask what the runbook says to look at."""
    look = section.split("**Look at:**")[1].split("**Do:**")[0]
    expression = re.findall(r"`(job_policy_monitor:[^`]+)`", look)[0]
    found = [dict(labels) for labels in watch.query(f"{expression} > 0")]
    return frozenset(one["monitor"] for one in found if one["policy"] == "default")


def type_in(section: str, server: Server) -> str:
    """Type the command of a section, and return what it printed."""
    (block,) = read_blocks(section, RUNBOOK.name)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text.replace("curl ", "curl -sf ")],
        env={**os.environ, "SERVER": server.url, "GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_attack_is_seen_and_the_runbook_ends_it(
    folder: Path, server: Server, watch: Watch, clients: Caller
) -> None:
    wait_for(lambda: len(clients.answers) > 20)
    assert watch.alerts() == []
    with Caller(server, recovery_edits(server), ADMIN, pause=0.2) as attack:
        (alert,) = wait_for(lambda: watch.alerts(ALERT), seconds=120)
        assert alert["labels"]["policy"] == "default"
        wait_for(lambda: watch.paged(ALERT, "firing"))
        assert all(map(is_back, attack.answers))

        section = section_of(alert)
        seen_by = alarming_monitors(watch, section)
        audited = (folder / "audit.jsonl").read_text().splitlines()
        flagged = {json.loads(line)["id"] for line in audited}
        assert {answer["guard"]["id"] for answer in attack.answers[:5]} <= flagged
        assert "`on_alarm: block`" in section.split("**Do:**")[1]
        rewrite_policy(folder, {"flag": "block"}, seen_by)
        assert json.loads(type_in(section, server))["generation"] == 2

        before, served = len(attack.answers) + 1, len(clients.answers) + 1
        wait_for(lambda: watch.alerts("GuardBlocksHigh"), seconds=120)
        # It goes on, and nothing comes of it any more: still an alert.
        assert watch.alerts(ALERT)
        stopped = attack.answers[before:]
        assert len(stopped) > 5
        assert not any(map(is_back, stopped))
        assert {answer["guard"]["action"] for answer in stopped} == {"block"}
    others = [answer["guard"]["action"] for answer in clients.answers[served:]]
    assert len(others) > 5
    assert "block" not in others
    wait_for(lambda: watch.alerts() == [], seconds=120)
    wait_for(lambda: watch.paged(ALERT, "resolved"))
