"""Every panel of the dashboard shows something of a real server under load."""

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from e2e.scraping import Ask, scraping, wait_for
from e2e.serving import Server, ServerFactory
from queries import fill_in, list_targets

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/guard.json").read_text())
RULES = ROOT / "deploy/prometheus/rules.yml"
ORGANISM = ROOT / "guard/demo/organism"
TOKEN = "administrator-of-this-test"
WINDOW = "30s"
SECONDS = 120


@pytest.fixture(scope="module")
def server(start_server: ServerFactory) -> Server:
    """Serve the organism: its policy has every kind of score, and drills that alarm."""
    return start_server(
        ORGANISM / "model",
        ORGANISM / "policy.yaml",
        "--enforce-eager",
        environment={"GUARD_ADMIN_TOKEN": TOKEN},
    )


@pytest.fixture(scope="module")
def load(server: Server) -> Iterator[None]:
    """Ask one thing after another: drills, and ordinary prompts."""
    headers = {"x-guard-admin-token": TOKEN}
    answer = httpx.get(f"{server.url}/guard/drills", headers=headers, timeout=30)
    drill = answer.json()["drills"][0]
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=120, headers=headers) as client:
            while not over.is_set():
                for guard in ({}, {"drill": drill["name"]}):
                    body = {
                        "model": "model",
                        "messages": [{"role": "user", "content": drill["prompt"]}],
                        "max_tokens": 40,
                        "guard": guard,
                    }
                    client.post(f"{server.url}/v1/chat/completions", json=body)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join(120)


@pytest.fixture(scope="module")
def query(
    server: Server,
    load: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ask]:
    folder = tmp_path_factory.mktemp("prometheus")
    with scraping(server, folder, str(RULES)) as ask:
        yield ask


def test_no_panel_is_empty_under_load(query: Ask, server: Server) -> None:
    blocked = f'sum(rate(guard_requests_total{{action="block"}}[{WINDOW}])) > 0'
    wait_for(lambda: query(blocked))
    empty = dict(list_targets(DASHBOARD))
    deadline = time.monotonic() + SECONDS
    while empty and time.monotonic() < deadline:
        empty = {
            title: expression
            for title, expression in list_targets(DASHBOARD)
            if not has_numbers(query(fill_in(expression, window=WINDOW)))
        }
        time.sleep(1)
    assert empty == {}


def has_numbers(found: dict[str, float]) -> bool:
    return any(math.isfinite(value) for value in found.values())


def test_what_is_seen_in_five_seconds_is_true(query: Ask, server: Server) -> None:
    def value(title: str) -> float:
        (expression,) = (e for t, e in list_targets(DASHBOARD) if t == title)
        (number,) = query(fill_in(expression, window=WINDOW)).values()
        return number

    wait_for(lambda: value("Blocked (time shown)") > 0)
    assert value("Guard") == 1
    assert value("Servers without it") == 0
    assert value("Tokens nobody scored") == 0
    # Every second request is a drill that its policy blocks.
    assert 0.2 < value("Blocked, share") < 0.8
    # An estimate, to which long prompts and a busy machine add.
    assert 0 < value("Cost, share of a step") < math.inf


def test_the_rules_run_and_only_what_drills_do_alarms(query: Ask) -> None:
    recorded = "job_policy:guard_requests_blocked:ratio_rate10m"
    assert wait_for(lambda: query(f"{recorded} > 0"))
    # Every second request is a drill: blocked, and no traffic it was calibrated for.
    expected = "GuardBlocksHigh|GuardAlarmRateHigh|GuardTrafficDrifted"
    assert query(f'ALERTS{{alertname!~"{expected}"}}') == {}
    # They wait before they fire: the panel knows at once, whoever sleeps later.
    assert wait_for(lambda: query('ALERTS{alertname="GuardBlocksHigh"}'))
