"""What is deployed, started for real: a pod's guard, and who watches it."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from deploy.dockerfile import ROOT
from deploy.manifest import Object, copy_deploy, of_kind, pod_of, render
from e2e.pod import KEY, Volumes, check_namespaces, start_pod
from e2e.scraping import read_json, running, wait_for
from e2e.serving import Server, stop, wait_until_ready

COMPOSE = ROOT / "deploy" / "compose"
PROMPT = {"role": "user", "content": "how do i heat the door ?"}


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_deploy(tmp_path_factory.mktemp("deployed"))


@pytest.fixture(scope="module")
def objects(deploy: Path) -> list[Object]:
    return render(deploy / "kubernetes" / "service")


@pytest.fixture(scope="module")
def volumes(objects: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    return Volumes(tmp_path_factory.mktemp("volumes"), objects)


@pytest.fixture(scope="module")
def pod(
    objects: list[Object], volumes: Volumes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Serve as the manifest of the service says."""
    check_namespaces(tmp_path_factory.mktemp("tried"))
    server = start_pod(tmp_path_factory.mktemp("pod"), objects, volumes)
    try:
        wait_until_ready(server)
        yield server
    finally:
        stop(server.process)


def ask(pod: Server, key: str | None = KEY) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": "model", "messages": [PROMPT], "max_tokens": 8}
    url = f"{pod.url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=120)


def read_status(pod: Server) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {KEY}"}
    return dict(httpx.get(f"{pod.url}/guard/status", headers=headers).json())


def test_a_pod_serves_under_the_policy_of_its_config_map(
    pod: Server, volumes: Volumes
) -> None:
    answer = ask(pod)
    assert answer.status_code == 200, answer.text
    assert answer.json()["guard"]["policy"] == "default"
    assert answer.json()["guard"]["tokens_seen"] > 8
    assert ask(pod, None).status_code == 401
    assert ask(pod, "sk-of-nobody").status_code == 401
    assert (volumes.folder / "cache" / "audit.jsonl").exists()


def test_every_path_that_is_probed_or_scraped_is_served(
    pod: Server, objects: list[Object]
) -> None:
    (guard,) = pod_of(objects)["containers"]
    probed = {
        probe["httpGet"]["path"]
        for name, probe in guard.items()
        if name.endswith("Probe")
    }
    for path in (*probed, "/metrics"):
        assert httpx.get(f"{pod.url}{path}", timeout=30).status_code == 200, path


def test_a_pod_runs_as_a_user_without_a_name_or_a_capability(
    pod: Server, objects: list[Object]
) -> None:
    user = pod_of(objects)["securityContext"]["runAsUser"]
    status = Path(f"/proc/{pod.process.pid}/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    assert set(found["Uid"].split()) == {str(user)}
    assert set(found["Gid"].split()) == {"0"}
    assert int(found["CapBnd"], 16) == int(found["CapEff"], 16) == 0
    mounts = Path(f"/proc/{pod.process.pid}/mountinfo").read_text()
    root = next(line for line in mounts.splitlines() if line.split()[4] == "/")
    assert root.split()[5].startswith("ro")


def test_a_config_map_that_changes_is_served_without_a_new_pod(
    pod: Server, volumes: Volumes, objects: list[Object]
) -> None:
    (text,) = of_kind(objects, "ConfigMap")["data"].values()
    before = read_status(pod)
    volumes.show_policy(text.replace("mode: enforce", "mode: observe"))
    wait_for(lambda: read_status(pod)["generation"] == before["generation"] + 1)
    assert ask(pod).json()["guard"]["mode"] == "observe"
    volumes.show_policy(text.replace("law: ablate", "law: obliterate"))
    wait_for(lambda: (read_status(pod)["last_reload"])["result"] == "refused")
    assert ask(pod).json()["guard"]["mode"] == "observe"
    volumes.show_policy(text)
    wait_for(lambda: read_status(pod)["generation"] == before["generation"] + 2)
    assert ask(pod).json()["guard"]["mode"] == "enforce"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_an_alert_about_a_guarded_server_reaches_alertmanager(
    pod: Server, deploy: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """With the configurations of the composition, other addresses apart."""
    shutil.copy(COMPOSE / "alertmanager.yml", tmp_path)
    alertmanager = stack.enter_context(
        running(
            *("prometheus-alertmanager", tmp_path, "alertmanager.yml"),
            *(f"--storage.path={tmp_path / 'alerts'}", "--cluster.listen-address="),
        )
    )
    config = (COMPOSE / "prometheus.yml").read_text()
    for name, url in (("guard:8000", pod.url), ("alertmanager:9093", alertmanager)):
        assert f'"{name}"' in config
        config = config.replace(name, url.removeprefix("http://"))
    assert config.count("interval: 15s") == 2
    (tmp_path / "prometheus.yml").write_text(config.replace("l: 15s", "l: 1s"))
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "guard.yml").write_bytes((deploy / "prometheus/rules.yml").read_bytes())
    # None of the others speaks up where all is well.
    (rules / "well.yml").write_text(
        "groups:\n- name: well\n  rules:\n"
        "  - {alert: AllIsWell, expr: up == 1 and on (instance) guard_info}\n"
    )
    data = f"--storage.tsdb.path={tmp_path / 'data'}"
    prometheus = stack.enter_context(
        running("prometheus", tmp_path, "prometheus.yml", data)
    )

    def told(path: str) -> Any:
        return read_json(f"{prometheus}/api/v1/{path}")["data"]

    (target,) = wait_for(lambda: told("targets?state=active")["activeTargets"])
    assert target["labels"]["job"] == "vllm"
    wait_for(lambda: told("targets?state=active")["activeTargets"][0]["health"] == "up")
    files = {Path(group["file"]).name for group in told("rules")["groups"]}
    assert files == {"guard.yml", "well.yml"}
    asked = f"{alertmanager}/api/v2/alerts?filter=alertname%3DAllIsWell"
    (alert,) = wait_for(lambda: read_json(asked))
    assert alert["labels"]["instance"] == pod.url.removeprefix("http://")
    assert alert["receivers"] == [{"name": "operator"}]
    assert alert["status"]["state"] == "active"
