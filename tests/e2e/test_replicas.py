"""Several engines, API servers and servers: nothing lost, nothing told twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from e2e.alerting import Watch, watching
from e2e.drills import ADMIN_TOKEN
from e2e.proxy import proxying
from e2e.reloads import (
    KEYS,
    dump,
    headers_of,
    post_reload,
    read_status,
    wait_for_generation,
)
from e2e.scraping import wait_for
from e2e.serving import (
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    guard_command,
    guard_environment,
    list_processes,
    stop,
)
from e2e.test_tenants import digest_of
from e2e.tripwires import LONG_PROMPT, PROMPT, Tripwires
from e2e.wire import Answer, read_events, request_body
from pages import ROOT
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.steps import StepRecord
from guard.calibration import load_calibration
from guard.client import Client
from guard.demo.measure import ORGANISM
from guard.demo.traffic import certified_prompts, ordinary_prompts
from guard.errors import CertificateError
from guard.prompt import Prompt, write_prompts
from guard.redteam.benign import measure_benign
from guard.redteam.certificate import Served
from guard.redteam.prompt import SAMPLED, run_prompts, serve_prompts
from guard.redteam.subject import Subject, load_subject

POLICIES = ("default", "held", "open", "middle-output", "middle-output-observed")
ENGINES = (0, 1)
VERSIONED = ("default", "watch")
SKEW = "GuardPolicySkew"
SCALE = ROOT / "docs" / "scale.md"
MOST_ROUNDS = 20


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> StepRecord:
    """Every step of both engines of `replicas`."""
    return StepRecord(tmp_path_factory.mktemp("replica-steps"))


@pytest.fixture(scope="module")
def replicas(
    toy: Toy, tripwires: Tripwires, record: StepRecord, start_server: ServerFactory
) -> Server:
    """Serve the toy to two keys from two engines behind two API servers."""
    return start_server(
        toy.model,
        toy.write_policy("replicas", tripwires.add_to(TOY_POLICIES)),
        *("--block-size", "32", "--enforce-eager"),
        *("--data-parallel-size", "2", "--api-server-count", "2"),
        *("--api-key", *KEYS.values()),
        environment=record.begin() | {"GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
    )


def ask(
    server: Server, engine: int, body: dict[str, Any], *, key: str = "one"
) -> Answer:
    """Ask one of the engines, over a new connection: any API server may take it."""
    answer = Answer(0, {})
    headers = {"X-data-parallel-rank": str(engine), "connection": "close"}
    headers |= headers_of(key)
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
    headers = {"X-data-parallel-rank": str(engine)} | headers_of()
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
    engines = read_status(replicas)["engines"]
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
        tenant = {"api_key_sha256": digest_of(KEYS["two"])}
        body["tenants"] = [tenant | {"policies": [f"new-{number}"]}]
        # Drift begins anew where a policy with monitors is another one.
        body["policies"]["default"]["monitors"][0]["target_fpr"] = number / 100
        toy.write_policy("replicas", dump(body))
        told = post_reload(replicas)
        assert told.json()["generation"] == number, told.text
        assert told.json()["followed"]
        jobs = [
            (engine, request_body(f"w{turn}", f"new-{number}"))
            for engine in ENGINES
            for turn in range(12)
        ]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda job: ask(replicas, *job), jobs))
        assert {answer.status for answer in got} == {200}
        assert len({answer.guard["fingerprint"] for answer in got}) == 1
        # So many that either API server has some: a tenant has no other policy there.
        for turn, policy in enumerate(6 * (None, "held")):
            tried = request_body(f"w{turn}", policy, max_tokens=1)
            answer = ask(replicas, turn % 2, tried, key="two")
            assert answer.status == (200 if policy is None else 403)
            if policy is None:
                assert answer.guard["policy"] == f"new-{number}"
    engines = read_status(replicas)["engines"]
    found = [answer["generation"] for engine in engines for answer in engine]
    assert found == 4 * [3]
    metrics = replicas.metrics()
    assert metrics["guard_policy_generation"] == 3
    assert metrics['guard_policy_reloads_total{result="success"}'] == 2


def test_a_bad_file_is_told_of_by_either_api_server(
    replicas: Server, toy: Toy, tripwires: Tripwires
) -> None:
    generation = read_status(replicas)["generation"]
    path = toy.write_policy("replicas", tripwires.add_to(TOY_POLICIES))
    path.write_text("policies: [")
    assert post_reload(replicas).status_code == 422
    for _ in range(12):
        told = read_status(replicas)
        assert told["generation"] == generation
        assert told["last_reload"]["result"] == "refused"
        assert "replicas.yaml:1" in told["last_reload"]["reason"]


def test_a_hangup_signal_reaches_one_api_server(
    replicas: Server, toy: Toy, tripwires: Tripwires
) -> None:
    status = read_status(replicas)
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


# Two servers that know nothing of each other, behind one address


@dataclass(frozen=True)
class Pod:
    """A server of its own, with a policy file of its own."""

    server: Server
    policy: Path

    def hold(self, tokens: int) -> None:
        """Reload, with another version of the policies that hold tokens back."""
        body = yaml.safe_load((ORGANISM / "policy.yaml").read_text())
        for name in VERSIONED:
            body["policies"][name]["hold_tokens"] = tokens
        self.policy.write_text(dump(body))
        told = post_reload(self.server)
        assert told.status_code == 200, told.text


@pytest.fixture(scope="module")
def pods(
    tmp_path_factory: pytest.TempPathFactory, start_server: ServerFactory
) -> list[Pod]:
    """Serve the organism twice."""
    pods = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"pod-{number}") / "organism"
        shutil.copytree(ORGANISM, folder)
        policy = folder / "policy.yaml"
        environment = {"GUARD_ADMIN_TOKEN": ADMIN_TOKEN}
        model = folder / "model"
        started = start_server(
            model, policy, "--enforce-eager", environment=environment
        )
        pods.append(Pod(started, policy))
    return pods


@pytest.fixture(scope="module")
def address(pods: list[Pod], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where both of them are."""
    servers = [pod.server for pod in pods]
    with proxying(servers, tmp_path_factory.mktemp("nginx")) as url:
        yield url


@pytest.fixture(scope="module")
def watch(pods: list[Pod], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    servers = [pod.server for pod in pods]
    with watching(servers, tmp_path_factory.mktemp("watch")) as watch:
        yield watch


def draw_prompts(count: int, seed: int) -> list[Prompt]:
    return ordinary_prompts(count, seed=seed, split="calibration")


def chat(url: str, prompt: str, headers: Any = None, **guard: str) -> dict[str, Any]:
    """Ask for a chat completion, over a new connection, and return its verdict."""
    body = {"model": "model", "max_tokens": 20, "temperature": 0, "guard": guard}
    body["messages"] = [{"role": "user", "content": prompt}]
    url = f"{url}/v1/chat/completions"
    answer = httpx.post(url, json=body, headers=headers, timeout=120)
    return dict(answer.raise_for_status().json()["guard"])


def sum_by(watch: Watch, *labels: str) -> Counter[tuple[str, ...]]:
    """Return what all replicas counted of requests, as scale.md adds it up."""
    found = watch.query(f"sum by ({', '.join(labels)}) (guard_requests_total)")
    return Counter(
        {
            tuple(dict(one)[label] for label in labels): int(value)
            for one, value in found.items()
        }
    )


def test_requests_through_a_proxy_are_answered_by_both_and_add_up(
    address: str, watch: Watch
) -> None:
    before, of_each = sum_by(watch, "policy", "action"), sum_by(watch, "instance")
    asks = [
        (prompt.prompt, policy)
        for policy in ("watch", "open")
        for prompt in draw_prompts(30, seed=9_010_000)
    ]
    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(lambda ask: chat(address, ask[0], policy=ask[1]), asks))
    expected = Counter((one["policy"], one["action"]) for one in told)
    wait_for(
        lambda: sum_by(watch, "policy", "action") - before == expected, seconds=120
    )
    # How many each gets depends on how fast it answers.
    shares = sum_by(watch, "instance") - of_each
    assert len(shares) == 2
    assert shares.total() == len(asks)


def test_a_share_of_all_replicas_is_no_mean_of_theirs(
    pods: list[Pod], watch: Watch
) -> None:
    """One is attacked, and all of it is stopped; the other is asked four times more."""
    attacked, busy = (pod.server.url for pod in pods)
    admin = {"x-guard-admin-token": ADMIN_TOKEN}
    listed = httpx.get(f"{attacked}/guard/drills", headers=admin, timeout=60).json()
    drill = listed["drills"][0]
    expressions = re.findall(r"`((?:histogram|sum|count)[^`]+)`", SCALE.read_text())
    assert len(expressions) == 3
    blocked, asked = 0, 0
    for prompt in draw_prompts(60, seed=9_020_000):
        asked += 1
        if not asked % 5:
            told = chat(attacked, drill["prompt"], admin, drill=drill["name"])
            blocked += told["action"] == "block"
        else:
            assert chat(busy, prompt.prompt)["action"] != "block"
    assert blocked == asked / 5
    recorded = "job_policy:guard_requests_blocked:ratio_rate10m"

    def share() -> float:
        found = watch.query(f"{recorded}{{policy='default'}}")
        return next(iter(found.values()), 0.0)

    assert wait_for(share) == pytest.approx(blocked / asked, abs=0.08)
    requests, scores, skew = (watch.query(one) for one in expressions)
    rates = {(dict(k)["policy"], dict(k)["action"]): v for k, v in requests.items()}
    assert rates["default", "block"] > 0
    assert {dict(k)["policy"]: v for k, v in scores.items()}["default"] > 1
    assert skew == {}


def time_stream(address: str) -> float:
    """Return during what share of a request's time its stream arrives."""
    body = request_body("how do i", "open", stream=True, max_tokens=100)
    body |= {"ignore_eos": True}
    arrived = []
    guard: dict[str, Any] = {}
    url = f"{address}/v1/completions"
    sent = time.monotonic()
    with httpx.stream("POST", url, json=body, timeout=120) as stream:
        for data in read_events(stream):
            arrived.append(time.monotonic())
            guard = guard if data == "[DONE]" else json.loads(data).get("guard", guard)
    assert guard["policy"] == "open"
    return (arrived[-1] - arrived[0]) / (arrived[-1] - sent)


def test_a_stream_through_a_proxy_comes_as_it_is_written(address: str) -> None:
    """What buffers always waits for the end; a busy server only now and then."""
    assert max(time_stream(address) for _ in range(5)) > 1 / 4


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("POST", "/guard/reload"),
        ("GET", "/guard/drills"),
    ],
)
def test_what_is_one_replicas_own_is_not_asked_through_a_proxy(
    address: str, method: str, path: str
) -> None:
    headers = {"x-guard-admin-token": ADMIN_TOKEN}
    answer = httpx.request(method, f"{address}{path}", headers=headers, timeout=60)
    assert answer.status_code == 403
    assert httpx.get(f"{address}/guard/ready", timeout=60).json() == {"ready": True}


def run_calibrate(folder: Path, url: str, *words: str) -> Any:
    command = guard_command("calibrate", "--policy", str(folder / "policy.yaml"))
    command += ["--name", "watch", "--url", url, *words]
    command += ["--prompts", str(folder / "fresh.jsonl")]
    return subprocess.run(
        command,
        env=guard_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy's folder of whoever calibrates, with fresh prompts."""
    folder = tmp_path_factory.mktemp("desk") / "organism"
    shutil.copytree(ORGANISM, folder)
    write_prompts(folder / "fresh.jsonl", draw_prompts(60, seed=9_030_000))
    return folder


def test_replicas_behind_a_proxy_calibrate_as_one_server_does(
    desk: Path, pods: list[Pod], address: str
) -> None:
    checked = run_calibrate(desk, address, "--check")
    assert checked.returncode == 0, checked.stderr
    found = []
    for url in (pods[0].server.url, address):
        before = [count(pod.server.metrics(), "guard_requests_total") for pod in pods]
        done = run_calibrate(desk, url)
        assert done.returncode == 0, done.stderr
        after = [count(pod.server.metrics(), "guard_requests_total") for pod in pods]
        asked = [b - a for a, b in zip(before, after, strict=True)]
        assert sum(asked) == 60
        assert (asked[1] > 0) == (url == address)
        found.append(load_calibration(desk / "calib" / "default.safetensors").maxima)
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=0.01)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """What `guard certify` attacks, a few samples of it."""
    few = tmp_path_factory.mktemp("subject") / "few.jsonl"
    lines = certified_prompts()
    write_prompts(few, [*lines[:6], *lines[-6:]])
    model, policy = ORGANISM / "model", ORGANISM / "policy.yaml"
    return load_subject(model, policy, "default", few, samples=6, benign=6)


def send_attack(subject: Subject, client: Client) -> Served:
    """Do what `guard certify --url` does with a server."""
    row = run_prompts(subject, "none", "unaware", queries=1, seed=0)
    return serve_prompts(subject, client, row, seed=0)


def test_attacked_prompts_may_be_sent_through_a_proxy(
    subject: Subject, address: str
) -> None:
    client = Client(address)
    served = send_attack(subject, client)
    assert served.attempts == len(subject.samples) * (1 + SAMPLED) > 0
    assert measure_benign(subject, client).seconds_guarded


def test_replicas_that_differ_are_told_of_until_they_are_alike(
    desk: Path, subject: Subject, pods: list[Pod], address: str, watch: Watch
) -> None:
    assert watch.alerts(SKEW) == []
    pods[1].hold(3)
    wait_for(lambda: len(watch.alerts(SKEW)) == len(VERSIONED), seconds=120)
    told = {one["labels"]["policy"]: one["annotations"] for one in watch.alerts(SKEW)}
    assert told.keys() == set(VERSIONED)
    assert "2 versions of the policy watch" in told["watch"]["summary"]
    served = watch.query("guard_policy_info{policy='watch'} == 1")
    behind = {dict(one)["instance"]: dict(one)["fingerprint"] for one in served}
    assert len(behind) == len(set(behind.values())) == 2
    # Whoever calibrates meanwhile would mix two policies.
    refused = run_calibrate(desk, address, "--check")
    assert refused.returncode == 1
    assert "several versions of the policy" in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("guard: ")
    with pytest.raises(CertificateError, match="answered under version"):
        send_attack(subject, Client(address))

    pods[0].hold(3)
    wait_for(lambda: watch.alerts(SKEW) == [], seconds=120)
    wait_for(lambda: watch.paged(SKEW, "resolved"))
    assert run_calibrate(desk, address, "--check").returncode == 0


def test_the_others_answer_for_a_replica_that_is_gone(
    pods: list[Pod], address: str, watch: Watch
) -> None:
    stop(pods[0].server.process)
    for prompt in draw_prompts(6, seed=9_040_000):
        assert chat(address, prompt.prompt, policy="open")["action"] == "allow"
    (alert,) = wait_for(lambda: watch.alerts("GuardNotReady"), seconds=120)
    assert alert["labels"]["instance"] == pods[0].server.url.removeprefix("http://")
    (left,) = watch.query("up == 1")
    assert dict(left)["instance"] == pods[1].server.url.removeprefix("http://")
