"""A real Prometheus scrapes the guard and answers for it."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e.scraping import scraping, wait_for
from e2e.serving import Server


@pytest.fixture
def query(
    toy_server: Server, tmp_path: Path
) -> Iterator[Callable[[str], dict[str, float]]]:
    """Run a Prometheus that scrapes the server, and tell how to ask it."""
    with scraping(toy_server, tmp_path) as ask:
        yield ask


def tokens_counted(server: Server) -> float:
    samples = server.metrics()
    return sum(v for k, v in samples.items() if k.startswith("guard_tokens_total"))


def test_a_real_prometheus_answers_for_the_tokens_that_were_guarded(
    query: Callable[[str], dict[str, float]], toy_server: Server
) -> None:
    wait_for(lambda: query("up == 1"))
    before = tokens_counted(toy_server)
    answer = toy_server.client.completions.create(
        model="model", prompt="w1 w2 w3", max_tokens=8, temperature=0
    )
    assert answer.usage is not None
    # The last token was sampled, and never went through the model itself.
    expected = before + answer.usage.total_tokens - 1
    assert tokens_counted(toy_server) == expected
    found = wait_for(lambda: query(f"sum(guard_tokens_total) >= {expected}"))
    assert found == {"": expected}
    phases = query("sum by (phase) (guard_tokens_total)")
    assert phases.keys() == {"phase=prefill", "phase=decode"}
    assert query("guard_info")
    assert query("up == 1 unless on (instance) guard_info") == {}


def test_every_guard_metric_follows_the_conventions(
    toy_server: Server, promtool: str
) -> None:
    lines = toy_server.get("/metrics").splitlines(keepends=True)
    own = [line for line in lines if re.match(r"(# (HELP|TYPE) )?guard_", line)]
    judged = subprocess.run(
        [promtool, "check", "metrics"],
        input="".join(own),
        capture_output=True,
        text=True,
        check=False,
    )
    assert own
    assert (judged.returncode, judged.stdout + judged.stderr) == (0, "")


def test_children_of_closed_label_sets_exist_before_the_first_event(
    toy_server: Server,
) -> None:
    samples = toy_server.metrics()
    for expected in (
        'guard_requests_total{action="block",mode="enforce",policy="default"}',
        'guard_requests_total{action="flag",mode="observe",policy="staff"}',
        'guard_alarms_total{action="flag",monitor="recovery",policy="default",stage="output"}',
        'guard_clamped_tokens_total{clamp="lift",policy="default"}',
        'guard_score_ratio_count{monitor="recovery",policy="default"}',
        'guard_score_ratio_bucket{le="1.0",monitor="recovery",policy="default"}',
        'guard_errors_total{component="worker"}',
        'guard_unscored_tokens_total{reason="no_reading"}',
        'guard_tokens_total{phase="decode"}',
    ):
        assert expected in samples
    info = [name for name in samples if name.startswith("guard_policy_info{")]
    assert {f'policy="{name}"' in " ".join(info) for name in ("default", "open")} == {
        True
    }


def test_a_request_is_counted_once_under_its_policy(toy_server: Server) -> None:
    series = 'guard_requests_total{action="allow",mode="enforce",policy="open"}'
    before = toy_server.metrics()[series]
    toy_server.client.completions.create(
        model="model",
        prompt=["w1", "w2"],
        max_tokens=2,
        extra_body={"guard": {"policy": "open"}},
    )
    assert toy_server.metrics()[series] == before + 2


def test_every_finished_request_moves_the_evidence_of_drift(
    toy_server: Server,
) -> None:
    series = 'guard_drift_log_evalue{monitor="recovery",policy="default"}'
    before = toy_server.metrics()[series]
    for _ in range(40):  # the same words over and over: no such traffic
        toy_server.client.completions.create(
            model="model", prompt="w1 w2 w3", max_tokens=1
        )
    assert toy_server.metrics()[series] != before


def test_a_clamp_counts_the_tokens_that_a_client_reads_of(toy_server: Server) -> None:
    series = 'guard_clamped_tokens_total{clamp="hold",policy="default"}'
    before = toy_server.metrics()[series]
    answer = toy_server.client.completions.create(
        model="model", prompt="w1 w2 w3", max_tokens=8, temperature=0
    )
    clamped = answer.guard["clamped_tokens"]["hold"]  # type: ignore[attr-defined]
    assert clamped > 0
    assert toy_server.metrics()[series] == before + clamped


def test_the_engines_are_asked_without_any_request(toy_server: Server) -> None:
    samples = toy_server.metrics()
    assert samples["guard_ready"] == 1
    assert 0 <= samples["guard_snapshot_age_seconds"] < 30


def test_the_time_of_a_hook_is_sampled(toy_server: Server) -> None:
    toy_server.client.completions.create(
        model="model",
        prompt="w1 w2",
        max_tokens=140,
        extra_body={"ignore_eos": True},
    )
    samples = toy_server.metrics()
    assert samples["guard_hook_seconds_count"] >= 2
    assert 0 < samples["guard_hook_seconds_sum"] < 60
