"""Two API servers in front of two engines: nothing lost, nothing told twice."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from e2e.drills import ADMIN_TOKEN
from e2e.reloads import dump, post_reload, wait_for_generation
from e2e.serving import (
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    list_processes,
    stop,
)
from e2e.tripwires import LONG_PROMPT, PROMPT, Tripwires
from e2e.wire import Answer, read_events, request_body
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.steps import StepRecord

POLICIES = ("default", "held", "open", "middle-output", "middle-output-observed")
ENGINES = (0, 1)
MOST_ROUNDS = 20


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> StepRecord:
    """Every step of both engines of `replicas`."""
    return StepRecord(tmp_path_factory.mktemp("replica-steps"))


@pytest.fixture(scope="module")
def replicas(
    toy: Toy, tripwires: Tripwires, record: StepRecord, start_server: ServerFactory
) -> Iterator[Server]:
    """Serve the toy from two data-parallel engines behind two API servers."""
    server = start_server(
        toy.model,
        toy.write_policy("replicas", tripwires.add_to(TOY_POLICIES)),
        *("--block-size", "32", "--enforce-eager"),
        *("--data-parallel-size", "2", "--api-server-count", "2"),
        environment=record.begin() | {"GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
    )
    yield server
    stop(server.process)


def ask(server: Server, engine: int, body: dict[str, Any]) -> Answer:
    """Ask one of the engines, over a new connection: any API server may take it."""
    answer = Answer(0, {})
    headers = {"X-data-parallel-rank": str(engine), "connection": "close"}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as stream:
        answer.status = stream.status_code
        if body.get("stream"):
            for data in read_events(stream):
                if data != "[DONE]":
                    answer.take(json.loads(data))
        else:
            answer.body = json.loads(stream.read())
            answer.take(answer.body)
    return answer


def hang_up(server: Server, engine: int) -> None:
    """Leave a stream after its first tokens."""
    body = request_body(PROMPT, "open", stream=True, max_tokens=500, ignore_eos=True)
    headers = {"X-data-parallel-rank": str(engine)}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as stream:
        assert len(list(islice(read_events(stream), 2))) == 2


def draw_bodies(round_number: int) -> list[dict[str, Any]]:
    """Return requests of every kind, under every policy, for either engine."""
    return [
        request_body(
            f"w{round_number} " + (LONG_PROMPT if number % 3 == 0 else PROMPT),
            policy,
            stream=bool(number % 2),
            max_tokens=40,
            **({"n": 2, "temperature": 1.0} if number == 4 else {}),
        )
        for number, policy in enumerate(POLICIES)
    ]


def count(metrics: dict[str, float], name: str) -> float:
    return sum(v for k, v in metrics.items() if k.startswith(name + "{"))


def requests_by_api_server(server: Server) -> dict[int, float]:
    """Return how many requests each API server has counted, by its process."""
    from prometheus_client.mmap_dict import MmapedDict

    counted = {}
    for entry in list_processes(server):
        number = int(entry.split(" ")[0])
        folder = _metrics_folder(number)
        path = folder and folder / f"counter_{number}.db"
        if path and path.exists():
            rows = MmapedDict.read_all_values_from_file(str(path))
            own = [v for key, v, *_ in rows if '"guard_requests_total"' in key]
            if own:
                counted[number] = sum(own)
    return counted


def _metrics_folder(process: int) -> Path | None:
    with suppress(OSError):
        for entry in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == b"PROMETHEUS_MULTIPROC_DIR":
                return Path(os.fsdecode(value))
    return None


@pytest.fixture(scope="module")
def answers(replicas: Server) -> list[tuple[dict[str, Any], Answer]]:
    """Ask until both API servers have answered for both engines, and hang up twice."""
    found: list[tuple[dict[str, Any], Answer]] = []
    for round_number in range(MOST_ROUNDS):
        jobs = [
            (engine, body) for engine in ENGINES for body in draw_bodies(round_number)
        ]
        with ThreadPoolExecutor(len(jobs)) as pool:
            got = pool.map(lambda job: ask(replicas, *job), jobs)
            found += [
                (body, answer) for (_, body), answer in zip(jobs, got, strict=True)
            ]
        busy = [n for n in requests_by_api_server(replicas).values() if n]
        if len(busy) == 2 and round_number:
            break
    for engine in ENGINES:
        hang_up(replicas, engine)
        # What the last step before an abort computed is told with the next output.
        body = request_body("w9", "open", max_tokens=1)
        found.append((body, ask(replicas, engine, body)))
    return found


def test_every_rank_of_every_engine_answers(replicas: Server) -> None:
    assert json.loads(replicas.get("/guard/ready")) == {"ready": True}
    engines = json.loads(replicas.get("/guard/status"))["engines"]
    assert [[answer["role"] for answer in engine] for engine in engines] == 2 * [
        ["worker", "engine_core"]
    ]
    assert len({answer["fingerprint"] for engine in engines for answer in engine}) == 1


def test_either_engine_takes_the_ticket_of_either_api_server(
    replicas: Server, answers: list[tuple[dict[str, Any], Answer]]
) -> None:
    for body, answer in answers:
        assert answer.status == 200
        assert answer.guard["policy"] == body["guard"]["policy"]
    served = requests_by_api_server(replicas)
    assert len(served) == 2
    assert all(served.values())
    tokens = {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(replicas.get("/metrics"))
        for sample in family.samples
        if sample.name == "vllm:prompt_tokens_total"
    }
    assert tokens.keys() == {"0", "1"}
    assert all(tokens.values())


def test_requests_of_both_api_servers_add_up_to_those_that_were_sent(
    replicas: Server, answers: list[tuple[dict[str, Any], Answer]]
) -> None:
    choices = sum(body.get("n", 1) for body, _ in answers)
    metrics = replicas.metrics()
    assert count(metrics, "guard_requests_total") == choices + len(ENGINES)
    blocked = (
        'guard_requests_total{action="block",mode="enforce",policy="middle-output"}'
    )
    assert metrics[blocked] == sum(
        answer.guard["action"] == "block" for _, answer in answers
    )
    assert metrics[blocked] > 0
    ratios = 'guard_score_ratio_count{monitor="recovery",policy="default"}'
    assert metrics[ratios] == sum(
        body["guard"]["policy"] == "default" for body, _ in answers
    )


def test_tokens_of_both_engines_add_up_to_those_that_were_scheduled(
    replicas: Server,
    answers: list[tuple[dict[str, Any], Answer]],
    record: StepRecord,
) -> None:
    metrics = replicas.metrics()
    assert count(metrics, "guard_tokens_total") == record.count_tokens()
    assert count(metrics, "guard_unscored_tokens_total") == 0
    for clamp, policy in (("hold", "default"), ("hold", "held"), ("lift", "default")):
        name = f'guard_clamped_tokens_total{{clamp="{clamp}",policy="{policy}"}}'
        told = sum(
            answer.guard["clamped_tokens"][clamp]
            for body, answer in answers
            if body["guard"]["policy"] == policy
        )
        assert metrics[name] == told > 0


def test_several_processes_show_one_set_of_series(replicas: Server) -> None:
    text = replicas.get("/metrics")
    own = [line for line in text.splitlines() if line.startswith("guard_")]
    names = [line.rpartition(" ")[0] for line in own]
    assert len(names) == len(set(names))
    assert not [name for name in names if "pid=" in name]
    metrics = replicas.metrics()
    infos = {name: value for name, value in metrics.items() if "_info{" in name}
    assert set(infos.values()) == {1.0}
    assert any(name.startswith("guard_policy_info{") for name in infos)
    # Nobody has used it, and its series is there.
    assert (
        metrics['guard_requests_total{action="flag",mode="observe",policy="staff"}']
        == 0
    )


def test_a_reload_reaches_both_engines_and_both_api_servers(
    replicas: Server, toy: Toy, tripwires: Tripwires
) -> None:
    body = yaml.safe_load(tripwires.add_to(TOY_POLICIES))
    for number in (2, 3):
        # Every API server knows a policy by its name, or answers 400.
        body["policies"] |= {f"new-{number}": body["policies"]["held"]}
        body["public_policies"].append(f"new-{number}")
        # Drift begins anew where a policy with monitors is another one.
        body["policies"]["default"]["monitors"][0]["target_fpr"] = number / 100
        toy.write_policy("replicas", dump(body))
        told = post_reload(replicas)
        assert told.json()["generation"] == number, told.text
        jobs = [
            (engine, request_body(f"w{turn}", f"new-{number}"))
            for engine in ENGINES
            for turn in range(12)
        ]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda job: ask(replicas, *job), jobs))
        assert {answer.status for answer in got} == {200}
        assert len({answer.guard["fingerprint"] for answer in got}) == 1
    engines = json.loads(replicas.get("/guard/status"))["engines"]
    found = [answer["generation"] for engine in engines for answer in engine]
    assert found == 4 * [3]
    metrics = replicas.metrics()
    assert metrics["guard_policy_generation"] == 3
    assert metrics['guard_policy_reloads_total{result="success"}'] == 2


def test_a_bad_file_is_told_of_by_either_api_server(
    replicas: Server, toy: Toy, tripwires: Tripwires
) -> None:
    generation = json.loads(replicas.get("/guard/status"))["generation"]
    path = toy.write_policy("replicas", tripwires.add_to(TOY_POLICIES))
    path.write_text("policies: [")
    assert post_reload(replicas).status_code == 422
    for _ in range(12):
        told = httpx.get(f"{replicas.url}/guard/status", timeout=60).json()
        assert told["generation"] == generation
        assert told["last_reload"]["result"] == "refused"
        assert "replicas.yaml:1" in told["last_reload"]["reason"]


def test_a_hangup_signal_reaches_one_api_server(
    replicas: Server, toy: Toy, tripwires: Tripwires
) -> None:
    status = json.loads(replicas.get("/guard/status"))
    toy.write_policy("replicas", tripwires.add_to(TOY_POLICIES))
    os.kill(replicas.process.pid, signal.SIGHUP)
    wait_for_generation(replicas, status["generation"] + 1)
    assert json.loads(replicas.get("/guard/ready")) == {"ready": True}


def test_nothing_is_left_of_several_processes(replicas: Server) -> None:
    assert len(list_processes(replicas)) >= 7
    replicas.process.terminate()
    replicas.process.wait(timeout=60)
    deadline = time.monotonic() + 20
    while (left := list_processes(replicas)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
