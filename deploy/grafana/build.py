"""Writes guard.json, the Grafana dashboard of the guard; with --check only compares.

    python deploy/grafana/build.py [--check]

Variables, tag, units and `$__rate_interval` follow vLLM's own dashboards. The
guard's series have no `model_name`: a model narrows the instances, they the series.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panel import BLUE, DATASOURCE, GREEN, ORANGE, RED, series, stat, table

DASHBOARD = Path(__file__).with_name("guard.json")


def select(*matchers: str) -> str:
    """Return a selector of the chosen servers and more."""
    return "{" + ", ".join(['job=~"$job"', 'instance=~"$instance"', *matchers]) + "}"


ON = select()
BLOCKED = select('action="block"')
LOST = select('result!="written"')
RATE = "[$__rate_interval]"
ACTIONS = {"allow": GREEN, "flag": ORANGE, "block": RED}


def quantile(q: float, metric: str, *by: str) -> str:
    """Return the quantile of a histogram over what came lately."""
    labels = ", ".join([*by, "le"])
    return (
        f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{ON}{RATE})))"
    )


def mean(metric: str) -> str:
    """Return the mean of a histogram over what came lately."""
    return f"sum(rate({metric}_sum{ON}{RATE})) / sum(rate({metric}_count{ON}{RATE}))"


def at_a_glance() -> list[dict[str, Any]]:
    """Return what says in five seconds whether it is on, what it did, what it costs."""
    return [
        stat(
            "Guard",
            "Whether every rank of every server says that it is guarded (guard_ready).",
            f"min(guard_ready{ON})",
            steps={0: RED, 1: GREEN},
            words={
                "0": ("NOT READY", RED),
                "1": ("ON", GREEN),
                "null": ("NOT LOADED", RED),
            },
        ),
        stat(
            "Servers without it",
            "vLLM servers that answer and have no guard (vllm:num_requests_running "
            "without guard_info).",
            # A job may have others in it, which `up` would count.
            'count(count by (job, instance) (vllm:num_requests_running{job=~"$job"})'
            " unless on (job, instance) guard_info) or vector(0)",
            steps={0: GREEN, 1: RED},
        ),
        stat(
            "Tokens nobody scored",
            "In the time shown (guard_unscored_tokens_total).",
            f"sum(increase(guard_unscored_tokens_total{ON}[$__range]))",
            steps={0: GREEN, 1: RED},
            decimals=0,
        ),
        stat(
            "Blocked (time shown)",
            "Requests stopped in the time shown (guard_requests_total).",
            f"sum(increase(guard_requests_total{BLOCKED}[$__range]))",
            steps={0: BLUE},
            decimals=0,
        ),
        stat(
            "Blocked, share",
            "Of all requests in the time shown (guard_requests_total).",
            f"sum(increase(guard_requests_total{BLOCKED}[$__range]))"
            f" / sum(increase(guard_requests_total{ON}[$__range]))",
            steps={0: BLUE, 0.02: ORANGE, 0.1: RED},
            unit="percentunit",
            decimals=1,
        ),
        stat(
            "Cost, share of a step",
            "Mean time of a hook (guard_hook_seconds) times their number "
            "(guard_hook_points), over the mean time between two tokens "
            "(vllm:inter_token_latency_seconds). Steps of prompts count among them, so "
            "it is an estimate.",
            f"{mean('guard_hook_seconds')} * max(guard_hook_points{ON})"
            f" / ({mean('vllm:inter_token_latency_seconds')})",
            steps={0: GREEN, 0.25: ORANGE, 0.5: RED},
            unit="percentunit",
            decimals=0,
        ),
    ]


def what_it_did() -> list[dict[str, Any]]:
    """Return requests, alarms and scores."""
    requests, alarms = "guard_requests_total", "guard_alarms_total"
    ratio = "guard_score_ratio"
    return [
        series(
            "Requests per minute, by what was decided",
            f"Several choices of an answer count each ({requests}).",
            [(f"60 * sum by (action) (rate({requests}{ON}{RATE}))", "{{action}}")],
            stacked=True,
            colors=ACTIONS,
        ),
        series(
            "Blocked per minute, by policy",
            f"Only of policies that enforce ({requests}).",
            [(f"60 * sum by (policy) (rate({requests}{BLOCKED}{RATE}))", "{{policy}}")],
            stacked=True,
        ),
        series(
            "Alarms per minute, by monitor",
            f"At most one of a monitor in a request, flag or block ({alarms}).",
            [(f"60 * sum by (monitor) (rate({alarms}{ON}{RATE}))", "{{monitor}}")],
            stacked=True,
        ),
        series(
            "Score over threshold, 95 % of requests",
            f"Largest of each request, by monitor; an alarm is above 1 ({ratio}). What "
            "creeps towards the line is a calibration that no longer fits.",
            [(quantile(0.95, ratio, "monitor"), "{{monitor}}")],
            line=1.0,
        ),
        series(
            "Clamped tokens per second, by clamp",
            "What a clamp changed (guard_clamped_tokens_total).",
            [
                (
                    f"sum by (clamp) (rate(guard_clamped_tokens_total{ON}{RATE}))",
                    "{{clamp}}",
                )
            ],
        ),
        series(
            "Where alarms are raised",
            "Token position in prompt and output (guard_alarm_position_tokens).",
            [
                (quantile(q, "guard_alarm_position_tokens"), f"{q:.0%}")
                for q in (0.5, 0.9)
            ],
        ),
    ]


def what_it_costs() -> list[dict[str, Any]]:
    """Return times of hooks beside vLLM's own, and tokens."""
    hook, between = "guard_hook_seconds", "vllm:inter_token_latency_seconds"
    return [
        series(
            "Time of a hook",
            f"One call in 64, on the host's clock: CUDA graphs are not in it ({hook}).",
            [(mean(hook), "mean"), (quantile(0.99, hook), "99 %")],
            unit="s",
        ),
        series(
            "Time between two tokens",
            f"As clients feel it, the guard included ({between}).",
            [(mean(between), "mean"), (quantile(0.99, between), "99 %")],
            unit="s",
        ),
        series(
            "Guarded tokens per second",
            "What passed the hooks (guard_tokens_total).",
            [(f"sum by (phase) (rate(guard_tokens_total{ON}{RATE}))", "{{phase}}")],
            stacked=True,
        ),
    ]


def beside_the_scores() -> list[dict[str, Any]]:
    """Return what the SAE leaves unexplained, the clamp unclamped, and drift."""
    error, left = "guard_error_norm_ratio", "guard_clamp_residual_activation"
    decoded = (
        "Empty unless a monitor has one of the scores that decode the SAE: error_norm, "
        "error, clamp_residual."
    )
    return [
        series(
            "SAE error over the stream",
            f"Largest of a request; no alarm by itself, it is nearly blind ({error}). "
            f"{decoded}",
            [(quantile(q, error), f"{q:.0%}") for q in (0.5, 0.99)],
        ),
        series(
            "What clamps left",
            f"Activation of clamped latents, encoded again ({left}). {decoded}",
            [(quantile(q, left), f"{q:.0%}") for q in (0.5, 0.99)],
        ),
        series(
            "Drift from the calibration",
            "Log of the evidence that traffic is not what thresholds were set for "
            "(guard_drift_log_evalue); at the line once in a thousand lives of a "
            "server by chance.",
            [
                (
                    f"max by (policy, monitor) (guard_drift_log_evalue{ON})",
                    "{{policy}}: {{monitor}}",
                )
            ],
            line=10.0,
            least=None,
        ),
    ]


def what_is_loaded() -> list[dict[str, Any]]:
    """Return faults and versions."""
    return [
        series(
            "Faults",
            "In ten minutes; all of them 0 when all is well (guard_errors_total, "
            "guard_unscored_tokens_total, guard_requests_let_through_total, "
            "guard_audit_events_total).",
            [
                (f"sum(increase({metric}{servers}[10m]))", legend)
                for metric, servers, legend in (
                    ("guard_errors_total", ON, "errors"),
                    ("guard_unscored_tokens_total", ON, "unscored tokens"),
                    ("guard_requests_let_through_total", ON, "let through"),
                    ("guard_audit_events_total", LOST, "not in the audit log"),
                )
            ],
        ),
        series(
            "Since an engine last answered",
            "By server (guard_snapshot_age_seconds).",
            [(f"guard_snapshot_age_seconds{ON}", "{{instance}}")],
            unit="s",
        ),
        series(
            "Reloads",
            "In an hour, by what became of them (guard_policy_reloads_total).",
            [
                (
                    f"sum by (result) (increase(guard_policy_reloads_total{ON}[1h]))",
                    "{{result}}",
                )
            ],
            colors={"refused": RED, "success": GREEN},
        ),
        table(
            "Policies served",
            "More than one fingerprint of a policy: replicas differ "
            "(guard_policy_info).",
            f"count by (policy, fingerprint) (guard_policy_info{ON} == 1)",
            ["policy", "fingerprint"],
            value="servers",
        ),
    ]


ROWS = (
    ("At a glance", at_a_glance, 6, 4),
    ("What it did", what_it_did, 3, 8),
    ("What it costs", what_it_costs, 3, 7),
    ("Beside the scores", beside_the_scores, 3, 7),
    ("Faults and versions", what_is_loaded, 4, 8),
)
"""Title, panels, panels beside each other, height in Grafana's units."""


def lay_out() -> list[dict[str, Any]]:
    """Return all panels in rows, each with its place on a grid 24 wide."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, make, across, height in ROWS:
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"type": "row", "title": title, "gridPos": place, "panels": []})
        y, width = y + 1, 24 // across
        made = make()
        for number, panel in enumerate(made):
            down, right = divmod(number, across)
            place = {"x": right * width, "y": y + down * height}
            panels.append({**panel, "gridPos": {**place, "w": width, "h": height}})
        y += height * -(-len(made) // across)
    return [{"id": number, **panel} for number, panel in enumerate(panels, 1)]


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """Return a variable that the labels of a metric fill."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def build() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    running = 'vllm:num_requests_running{job=~"$job"'
    source = {"name": "datasource", "label": "Datasource", "type": "datasource"}
    return {
        "uid": "vllm-guard",
        "title": "vLLM guard",
        "description": "Whether the guard is on, what it did and what it costs.",
        "tags": ["vllm", "guard"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [],
        "annotations": {"list": []},
        "templating": {
            "list": [
                source | {"query": "prometheus", "refresh": 1},
                variable("job", "Job", "label_values(vllm:num_requests_running, job)"),
                variable(
                    "model_name",
                    "Model",
                    f"label_values({running}}}, model_name)",
                ),
                variable(
                    "instance",
                    "Instance",
                    f'label_values({running}, model_name=~"$model_name"}}, instance)',
                ),
            ]
        },
        "panels": lay_out(),
    }


def main(arguments: Sequence[str]) -> int:
    """Write the dashboard, or say whether what is written is what would be."""
    text = json.dumps(build(), indent=2, ensure_ascii=False) + "\n"
    if arguments and list(arguments) != ["--check"]:
        sys.stderr.write(f"Unknown {arguments[0]!r}; expected nothing or --check.\n")
        return 2
    if arguments:
        if DASHBOARD.exists() and DASHBOARD.read_text(encoding="utf-8") == text:
            return 0
        sys.stderr.write(f"{DASHBOARD.name} is not what build.py writes; run it.\n")
        return 1
    DASHBOARD.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
