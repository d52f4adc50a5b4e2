"""The alerts that ship: Prometheus takes them, and each has fired and kept still."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import list_blocks
from queries import declared_names, selected_names

ROOT = Path(__file__).parents[1]
RULES = ROOT / "deploy/prometheus/rules.yml"
CASES = RULES.with_name("rules.test.yml")
RUNBOOK = ROOT / "docs/runbook.md"


def list_rules(kind: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


ALERTS = {rule["alert"]: rule for rule in list_rules("alert")}
RECORDED = {rule["record"] for rule in list_rules("record")}


def run(tool: str, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [tool, *words], cwd=RULES.parent, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_prometheus_takes_the_rules(promtool: str) -> None:
    code, said = run(promtool, "check", "rules", RULES.name)
    assert (code, f"{len(ALERTS) + len(RECORDED)} rules found" in said) == (0, True)


def test_the_rules_do_what_their_own_tests_say(promtool: str) -> None:
    assert run(promtool, "test", "rules", CASES.name)[0] == 0, "run promtool by hand"


def test_a_rule_that_is_broken_fails_those_tests(promtool: str, tmp_path: Path) -> None:
    broken = RULES.read_text().replace("guard_ready == 0", "guard_ready == 2")
    (tmp_path / RULES.name).write_text(broken)
    (tmp_path / CASES.name).write_text(CASES.read_text())
    code, said = run(promtool, "test", "rules", str(tmp_path / CASES.name))
    assert (code, "GuardNotReady" in said) == (1, True)


def test_each_alert_fires_in_a_test_and_none_when_all_is_well() -> None:
    calm, *others = yaml.safe_load(CASES.read_text())["tests"]
    assert {"expr": "ALERTS", "eval_time": "50m", "exp_samples": []} in calm[
        "promql_expr_test"
    ]
    fired = {
        re.findall(r'alertname="(\w+)"', case["expr"])[0]
        for test in others
        for case in test["promql_expr_test"]
        if case["exp_samples"]
    }
    assert fired == ALERTS.keys()
    # What is calm must be able to alarm: it has every series that a rule looks at.
    shown = " ".join(series["series"] for series in calm["input_series"])
    asked = {name for rule in ALERTS.values() for name in selected_names(rule["expr"])}
    assert [name for name in asked - RECORDED if f"{name}{{" not in shown] == []


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do_and_has_a_section_in_the_runbook(name: str) -> None:
    rule = ALERTS[name]
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert "first" in notes["description"]
    assert rule["labels"]["severity"] in ("critical", "warning")
    page, _, anchor = notes["runbook_url"].partition("#")
    assert (ROOT / page, anchor) == (RUNBOOK, name.lower())
    section = RUNBOOK.read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    for part in ("**Means:**", "**Look at:**", "**Do:**"):
        assert part in section


def test_one_line_leads_to_the_runbook_where_it_can_be_read(tmp_path: Path) -> None:
    (block,) = (one for one in list_blocks("sh") if "runbook_url" in one.text)
    files = re.findall(r"deploy/\S+", block.text)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text((ROOT / file).read_text())
    subprocess.run(["bash", "-ec", block.text], cwd=tmp_path, check=True)
    for file in files:
        urls = re.findall("runbook_url: (.*)", (tmp_path / file).read_text())
        assert len(urls) == len(ALERTS)
        assert all(re.fullmatch("https://.+/docs/runbook.md#.+", url) for url in urls)


def test_the_runbook_has_no_section_without_an_alert() -> None:
    sections = re.findall(r"^## (.+)$", RUNBOOK.read_text(), re.M)
    assert sections == list(ALERTS)


@pytest.mark.parametrize("kind", ["alert", "record"])
def test_rules_ask_only_for_what_somebody_declares(kind: str) -> None:
    for rule in list_rules(kind):
        known = declared_names() | RECORDED | {"up"}
        assert selected_names(rule["expr"]) <= known


def test_the_runbook_asks_only_for_what_somebody_declares() -> None:
    named = set(re.findall(r"(?<![:\w])guard_[a-z_]+", RUNBOOK.read_text()))
    assert named
    known = declared_names()
    histograms = {"guard_score_ratio"}
    assert named - histograms <= known
    assert {f"{name}_bucket" for name in histograms} <= known
