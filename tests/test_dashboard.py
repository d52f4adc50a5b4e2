"""The dashboard that ships: built by its script, asking for what the guard exposes."""

import json
import re
import subprocess
import sys
from math import exp
from pathlib import Path
from typing import Any

import pytest
from queries import declared_names, fill_in, list_targets, selected_names

from guard.score import SCORES

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "deploy/grafana/build.py"
DASHBOARD: dict[str, Any] = json.loads(SCRIPT.with_name("guard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def run(script: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(script), *words],
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_dashboard_is_what_its_script_writes() -> None:
    done = run(SCRIPT, "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_one_that_was_changed_by_hand_is_noticed_and_written_anew(
    tmp_path: Path,
) -> None:
    for source in SCRIPT.parent.glob("*.py"):
        (tmp_path / source.name).write_text(source.read_text())
    script, written = tmp_path / SCRIPT.name, tmp_path / "guard.json"
    written.write_text(json.dumps(DASHBOARD | {"title": "mine"}))
    done = run(script, "--check")
    assert done.returncode == 1
    assert done.stderr == "guard.json is not what build.py writes; run it.\n"
    assert run(script).returncode == 0
    assert json.loads(written.read_text()) == DASHBOARD
    assert run(script, "--chek").returncode == 2


def test_every_query_asks_for_what_somebody_exposes() -> None:
    names = {
        name
        for _, query in list_targets(DASHBOARD)
        for name in selected_names(fill_in(query, window="1m"))
    }
    own = {name for name in names if name.startswith("guard_")}
    assert own <= declared_names()
    assert {n for n in names - own if not n.startswith("vllm:")} == set()


def test_servers_without_the_guard_are_counted_and_exporters_are_not(
    promtool: str, tmp_path: Path
) -> None:
    (expression,) = (
        e for title, e in list_targets(DASHBOARD) if title == "Servers without it"
    )
    series = [
        'up{job="node", instance="n"}',
        'up{job="vllm", instance="n"}',
        'vllm:num_requests_running{job="vllm", instance="a", engine="0"}',
        'guard_info{job="vllm", instance="a", version="1"}',
        'vllm:num_requests_running{job="vllm", instance="b", engine="0"}',
        'vllm:num_requests_running{job="vllm", instance="b", engine="1"}',
    ]
    asked = {"expr": fill_in(expression, window="1m"), "eval_time": "1m"}
    case = {
        "input_series": [{"series": one, "values": "1x5"} for one in series],
        "promql_expr_test": [asked | {"exp_samples": [{"labels": "{}", "value": 1}]}],
    }
    (tmp_path / "test.yml").write_text(json.dumps({"tests": [case]}))
    words = [promtool, "test", "rules", str(tmp_path / "test.yml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_panels_about_the_sae_say_which_scores_fill_them() -> None:
    scores = ", ".join(name for name, score in SCORES.items() if score.needs_sae)
    said = f"decode the SAE: {scores}"
    told = {panel["title"] for panel in PANELS if said in panel["description"]}
    assert told == {"SAE error over the stream", "What clamps left"}


def test_only_the_curve_that_goes_below_zero_may() -> None:
    curves = [panel for panel in PANELS if panel["type"] == "timeseries"]
    free = [p["title"] for p in curves if "min" not in p["fieldConfig"]["defaults"]]
    assert free == ["Drift from the calibration"]


def test_the_line_of_drift_is_that_of_the_alert_and_of_its_page() -> None:
    (panel,) = (p for p in PANELS if p["title"] == "Drift from the calibration")
    line = panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"]
    rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
    assert f"(guard_drift_log_evalue) > {line:g}\n" in rules
    page = (ROOT / "docs/drift.md").read_text()
    assert f"have theirs at {line:g}: that is enough for {exp(line) / 1000:.0f}" in page


def test_what_can_be_chosen_are_vllms_servers() -> None:
    _, *variables = DASHBOARD["templating"]["list"]
    for entry in variables:
        assert entry["definition"].startswith("label_values(vllm:"), entry["name"]


def test_every_metric_of_the_guard_has_a_place() -> None:
    """What nobody sees need not be measured."""
    shown = {
        re.sub("_(total|bucket|sum|count)$", "", name)
        for _, query in list_targets(DASHBOARD)
        for name in selected_names(fill_in(query, window="1m"))
    }
    declared = {
        re.sub("_(total|bucket|sum|count)$", "", name) for name in declared_names()
    }
    elsewhere = {
        # Facts that `/guard/status` tells, and alerts.
        *("guard_certificate_info", "guard_sae_info", "guard_policy_generation"),
        *("guard_policy_last_reload_successful", "guard_fails_open"),
        "guard_open_requests",
        "guard_policy_last_reload_success_timestamp_seconds",
    }
    assert declared - shown == elsewhere


def test_a_wrong_query_is_noticed() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        selected_names("sum(rate(guard_tokens_total[1m])")
    assert selected_names("sum(rate(guard_no_such_total[1m])) / up") == {
        "guard_no_such_total",
        "up",
    }


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_says_what_it_shows_and_names_its_metric(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        for name in selected_names(fill_in(target["expr"], window="1m")):
            assert re.sub("_(bucket|sum|count)$", "", name) in panel["description"]
        assert "$job" in target["expr"]
        # Where a window is fixed, it stands in words.
        for window in re.findall(r"\[(\d+\w)\]", target["expr"]):
            assert {"1h": "hour", "10m": "ten minutes"}[window] in panel["description"]


def test_it_follows_the_conventions_of_vllms_own_dashboards() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["tags"]) == ("vllm-guard", ["vllm", "guard"])
    variables = [entry["name"] for entry in DASHBOARD["templating"]["list"]]
    assert variables == ["datasource", "job", "model_name", "instance"]
    places = {
        (panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]
    }
    assert len(places) == len(DASHBOARD["panels"])
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in PANELS)
