import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from guard.metrics import Metrics
from guard.policy import load_policy
from guard.verdict import Alarm, Verdict

ROOT = Path(__file__).parents[1]
AT = "layers.12.resid_post"


def make_policy(mode: str, on_alarm: str = "block") -> Any:
    return SimpleNamespace(
        mode=mode,
        clamps=[SimpleNamespace(name="jailbreak")],
        monitors=[SimpleNamespace(name="recovery", on_alarm=on_alarm)],
    )


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry) -> Metrics:
    policy_file: Any = SimpleNamespace(
        policies={"default": make_policy("enforce"), "watch": make_policy("observe")},
        saes={"l12": SimpleNamespace(hook_point="layers.12.resid_post")},
        hook_points=(AT,),
        on_error="closed",
    )
    return Metrics(
        policy_file,
        fingerprints={"default": "f1", "watch": "f2"},
        digests={"l12": "d1"},
        certificates={"default": "c1"},
        registry=registry,
    )


def make_verdict(action: Any = "allow", **values: Any) -> Verdict:
    return Verdict("id", "default", "f1", "enforce", action, **values)


BLOCK_ALARM = Alarm("recovery", 8.0, 4.0, 2.0, 16, "output", "block")


def test_every_series_exists_before_the_first_event(metrics, registry):
    expected = [
        ("requests_total", {"policy": "default", "mode": "enforce", "action": "block"}),
        ("requests_total", {"policy": "watch", "mode": "observe", "action": "flag"}),
        ("tokens_total", {"phase": "prefill"}),
        ("tokens_total", {"phase": "decode"}),
        ("clamped_tokens_total", {"policy": "default", "clamp": "jailbreak"}),
        (
            "alarms_total",
            {
                "policy": "default",
                "monitor": "recovery",
                "stage": "prompt",
                "action": "block",
            },
        ),
        (
            "alarms_total",
            {
                "policy": "watch",
                "monitor": "recovery",
                "stage": "output",
                "action": "flag",
            },
        ),
        ("score_ratio_count", {"policy": "default", "monitor": "recovery"}),
        ("drift_log_evalue", {"policy": "default", "monitor": "recovery"}),
        ("error_norm_ratio_count", {}),
        ("alarm_position_tokens_count", {}),
        ("clamp_residual_activation_count", {}),
        ("errors_total", {"component": "engine"}),
        ("unscored_tokens_total", {"reason": "no_score"}),
    ]
    for name, labels in expected:
        assert registry.get_sample_value(f"guard_{name}", labels) == 0.0, name


def test_a_policy_that_observes_has_no_series_for_blocks(metrics, registry):
    labels = {"policy": "watch", "mode": "observe", "action": "block"}
    assert registry.get_sample_value("guard_requests_total", labels) is None


def test_the_facts_are_gauges_at_one(metrics, registry):
    get = registry.get_sample_value
    assert get("guard_policy_info", {"policy": "watch", "fingerprint": "f2"}) == 1.0
    sae = {"sae": "l12", "hook_point": "layers.12.resid_post", "sha256": "d1"}
    assert get("guard_sae_info", sae) == 1.0
    assert b"guard_info{" in generate_latest(registry)


def test_only_a_policy_that_has_a_certificate_shows_one(metrics, registry):
    found = {"policy": "default", "certificate": "c1"}
    assert registry.get_sample_value("guard_certificate_info", found) == 1.0
    assert generate_latest(registry).count(b"guard_certificate_info{") == 1


def test_a_ratio_of_one_lies_on_a_bucket_boundary(metrics, registry):
    metrics.finish(make_verdict(), {"recovery": 1.0})
    metrics.finish(make_verdict(), {"recovery": 1.0000001})
    labels = {"policy": "default", "monitor": "recovery", "le": "1.0"}
    assert registry.get_sample_value("guard_score_ratio_bucket", labels) == 1.0


@pytest.mark.parametrize("ratio", [math.inf, math.nan])
def test_a_score_that_is_not_finite_counts_as_large_and_spoils_nothing(
    metrics, registry, ratio
):
    metrics.finish(make_verdict(), {"recovery": ratio})
    labels = {"policy": "default", "monitor": "recovery"}
    value = registry.get_sample_value
    assert value("guard_score_ratio_bucket", labels | {"le": "10.0"}) == 0.0
    assert value("guard_score_ratio_count", labels) == 1.0
    assert math.isfinite(value("guard_score_ratio_sum", labels))


def test_a_monitor_that_scored_no_token_is_not_observed(metrics, registry):
    metrics.finish(make_verdict(), {"recovery": -math.inf})
    labels = {"policy": "default", "monitor": "recovery"}
    assert registry.get_sample_value("guard_score_ratio_count", labels) == 0.0


def test_progress_counts_only_what_is_new(metrics, registry):
    before = make_verdict(clamped_tokens={"jailbreak": 3})
    now = make_verdict(clamped_tokens={"jailbreak": 5})
    metrics.observe_progress(None, before)
    metrics.observe_progress(before, now)
    metrics.observe_progress(now, now)
    labels = {"policy": "default", "clamp": "jailbreak"}
    assert registry.get_sample_value("guard_clamped_tokens_total", labels) == 5.0


def test_progress_never_runs_backwards(metrics, registry):
    before = make_verdict(clamped_tokens={"jailbreak": 5})
    metrics.observe_progress(before, make_verdict(clamped_tokens={"jailbreak": 3}))
    labels = {"policy": "default", "clamp": "jailbreak"}
    assert registry.get_sample_value("guard_clamped_tokens_total", labels) == 0.0


def test_a_blocked_request_counts_its_action_alarm_and_position(metrics, registry):
    metrics.finish(make_verdict("block", alarms=(BLOCK_ALARM,)), {"recovery": 2.0})
    value = registry.get_sample_value
    requests = {"policy": "default", "mode": "enforce", "action": "block"}
    assert value("guard_requests_total", requests) == 1.0
    alarms = {"policy": "default", "monitor": "recovery"}
    alarms |= {"stage": "output", "action": "block"}
    assert value("guard_alarms_total", alarms) == 1.0
    assert value("guard_alarm_position_tokens_bucket", {"le": "16.0"}) == 1.0
    assert value("guard_alarm_position_tokens_bucket", {"le": "8.0"}) == 0.0


def test_tokens_errors_and_unscored_tokens_are_counted(metrics, registry):
    metrics.count_tokens("prefill", 98)
    metrics.count_unscored("no_reading", 4)
    metrics.count_error("worker")
    metrics.observe_error_norm(0.3)
    metrics.observe_clamp_residual(0.0)
    value = registry.get_sample_value
    assert value("guard_tokens_total", {"phase": "prefill"}) == 98.0
    assert value("guard_unscored_tokens_total", {"reason": "no_reading"}) == 4.0
    assert value("guard_errors_total", {"component": "worker"}) == 1.0
    assert value("guard_error_norm_ratio_count") == 1.0
    assert value("guard_clamp_residual_activation_count") == 1.0


def test_a_timed_hook_is_observed(metrics, registry):
    metrics.observe_hook(2e-4)
    assert registry.get_sample_value("guard_hook_seconds_count") == 1.0
    bucket = registry.get_sample_value("guard_hook_seconds_bucket", {"le": "0.0003"})
    assert bucket == 1.0


def test_drift_is_shown_as_it_is_told(metrics, registry):
    metrics.show_drift("default", {"recovery": -1.5})
    labels = {"policy": "default", "monitor": "recovery"}
    assert registry.get_sample_value("guard_drift_log_evalue", labels) == -1.5
    labels["policy"] = "watch"
    assert registry.get_sample_value("guard_drift_log_evalue", labels) == 0.0


def test_no_series_carries_a_request_id(metrics, registry):
    metrics.finish(make_verdict("block", alarms=(BLOCK_ALARM,)), {})
    assert b'"id"' not in generate_latest(registry)


def test_a_reload_shows_what_is_served_now_and_keeps_what_was_counted(
    metrics, registry
):
    def read(name, **labels):
        return registry.get_sample_value(f"guard_{name}", labels)

    assert read("policy_generation") == 1
    assert read("policy_last_reload_successful") == 1
    metrics.finish(make_verdict(), {})
    policy_file: Any = SimpleNamespace(
        policies={"default": make_policy("enforce"), "new": make_policy("enforce")},
        saes={"l12": SimpleNamespace(hook_point="layers.12.resid_post")},
        on_error="open",
    )
    assert read("fails_open") == 0
    for prints in ({"default": "g1", "new": "g2"}, {"default": "f1", "new": "g2"}):
        metrics.show_policies(
            policy_file, fingerprints=prints, digests={"l12": "d1"}, generation=2
        )
        infos = {
            (sample.labels["policy"], sample.labels["fingerprint"])
            for family in registry.collect()
            for sample in family.samples
            if sample.name == "guard_policy_info"
        }
        assert infos == set(prints.items())
    assert read("fails_open") == 1
    assert read("hook_points") == 1
    assert read("policy_generation") == 2
    assert read("certificate_info", policy="default", certificate="c1") is None
    assert read("sae_info", sae="l12", hook_point=AT, sha256="d1") == 1
    wanted = {"mode": "enforce", "action": "allow"}
    assert read("requests_total", policy="new", **wanted) == 0
    assert read("requests_total", policy="default", **wanted) == 1


def show(metrics: Metrics, generation: int, **parts: str) -> None:
    """Reload a file of one policy, one clamp and one monitor, of these names."""
    policy = SimpleNamespace(
        mode=parts.get("mode", "enforce"),
        clamps=[SimpleNamespace(name=parts.get("clamp", "jailbreak"))],
        monitors=[
            SimpleNamespace(name=parts.get("monitor", "recovery"), on_alarm="block")
        ],
    )
    name = parts.get("policy", "default")
    policy_file: Any = SimpleNamespace(
        policies={name: policy}, saes={}, on_error="closed"
    )
    metrics.show_policies(
        policy_file,
        fingerprints={name: f"f{generation}"},
        digests={},
        generation=generation,
    )


def count_series(registry: CollectorRegistry) -> int:
    return sum(len(family.samples) for family in registry.collect())


@pytest.mark.parametrize("part", ["policy", "clamp", "monitor"])
def test_however_often_names_change_there_are_those_of_two_generations(
    part: str, metrics, registry
):
    counted = []
    for generation in range(2, 102):
        show(metrics, generation, **{part: f"new-{generation}"})
        counted.append(count_series(registry))
    assert set(counted[2:]) == {counted[2]}
    names = [
        sample.labels[part]
        for family in registry.collect()
        for sample in family.samples
        if part in sample.labels
    ]
    assert set(names) == {"new-100", "new-101"}


def test_what_is_counted_under_the_generation_before_stays_until_the_next(
    metrics, registry
):
    def read(policy: str, mode: str = "enforce") -> float | None:
        labels = {"policy": policy, "mode": mode, "action": "allow"}
        return registry.get_sample_value("guard_requests_total", labels)

    metrics.finish(make_verdict(), {})
    show(metrics, 2, policy="new")
    # An API server may be told twice of what it serves.
    show(metrics, 2, policy="new")
    metrics.finish(make_verdict(), {})
    assert read("default") == 2
    show(metrics, 3)
    assert (read("default"), read("new")) == (2, 0)
    show(metrics, 4, mode="observe")
    show(metrics, 5, mode="observe")
    # What a policy that is still there counted in another mode is no less true.
    assert (read("default"), read("default", "observe")) == (2, 0)
    assert read("new") is None
    show(metrics, 6, policy="new")
    show(metrics, 7, policy="new")
    assert read("default") is None


def test_several_processes_keep_what_they_share(metrics, registry, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    for generation in (2, 3, 4):
        show(metrics, generation, policy=f"new-{generation}")
    wanted = {"policy": "new-2", "mode": "enforce", "action": "allow"}
    assert registry.get_sample_value("guard_requests_total", wanted) == 0
    printed = {"policy": "new-2", "fingerprint": "f2"}
    assert registry.get_sample_value("guard_policy_info", printed) == 0


def test_reloads_are_counted_by_what_became_of_them(metrics, registry):
    def read(result):
        return registry.get_sample_value(
            "guard_policy_reloads_total", {"result": result}
        )

    def last():
        return registry.get_sample_value("guard_policy_last_reload_successful")

    assert (read("success"), read("refused")) == (0, 0)
    metrics.count_reload("refused")
    assert (read("success"), read("refused"), last()) == (0, 1, 0)
    metrics.count_reload("success")
    assert (read("success"), read("refused"), last()) == (1, 1, 1)
    metrics.count_reload("busy")
    assert (read("busy"), read("refused"), last()) == (1, 1, 1)
    metrics.count_reload("unanswered")
    assert (read("unanswered"), last()) == (1, 0)
    metrics.count_reload("busy")
    assert last() == 0
    at = "guard_policy_last_reload_success_timestamp_seconds"
    assert abs(registry.get_sample_value(at) - time.time()) < 60


def test_readiness_age_and_the_audit_log_are_shown(metrics, registry):
    def read(name, **labels):
        return registry.get_sample_value(f"guard_{name}", labels)

    metrics.show_ready(ready=True)
    metrics.show_snapshot_age(3.5)
    assert (read("ready"), read("snapshot_age_seconds")) == (1, 3.5)
    metrics.show_ready(ready=False)
    assert read("ready") == 0
    metrics.count_audit("dropped")
    results = ("written", "dropped", "failed")
    assert [read("audit_events_total", result=r) for r in results] == [0, 1, 0]


def test_the_page_on_scale_says_of_every_gauge_what_stands_for_a_sum(
    metrics, registry
) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    table = page.split("What does not add up:")[1].split("\n\n")[1]
    gauges = {f.name for f in registry.collect() if f.type == "gauge"}
    # Those of several servers do add up.
    gauges.remove("guard_open_requests")
    assert set(re.findall("`(guard_[a-z_]+)`", table)) == gauges


def test_a_replica_has_as_many_series_as_the_page_on_scale_says() -> None:
    """Or a person who plans for them plans wrongly."""

    def count(policies: int, monitors: int, clamps: int) -> int:
        policy = make_policy("enforce")
        policy.monitors = [
            SimpleNamespace(name=f"m{n}", on_alarm="block") for n in range(monitors)
        ]
        policy.clamps = [SimpleNamespace(name=f"c{n}") for n in range(clamps)]
        names = [f"p{n}" for n in range(policies)]
        policy_file: Any = SimpleNamespace(
            policies=dict.fromkeys(names, policy),
            saes={},
            on_error="closed",
            hook_points=(AT,),
        )
        registry = CollectorRegistry()
        Metrics(
            policy_file,
            fingerprints=dict.fromkeys(names, "f"),
            digests={},
            registry=registry,
        )
        lines = generate_latest(registry).decode().splitlines()
        return sum(not line.startswith("#") for line in lines)

    bare = count(1, 0, 0)
    assert count(2, 0, 0) - bare == 7
    assert count(1, 1, 0) - bare == 22
    assert count(1, 0, 1) - bare == 2
    assert bare - 7 < 120
    assert count(4, 9, 4) < 1000


def test_the_page_on_scale_counts_series_and_bytes_of_the_organism(registry) -> None:
    policy_file = load_policy(ROOT / "guard/demo/organism/policy.yaml")
    Metrics(
        policy_file,
        fingerprints=dict.fromkeys(policy_file.policies, "f" * 64),
        digests=dict.fromkeys(policy_file.saes, "d" * 64),
        registry=registry,
    )
    text = generate_latest(registry)
    series = [line for line in text.splitlines() if not line.startswith(b"#")]
    page = (ROOT / "docs" / "scale.md").read_text()
    assert f"That is {len(series)} and {len(text) // 1000} kB a scrape" in page
