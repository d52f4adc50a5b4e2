"""The manifests, and what no schema sees: that they fit each other, and the code."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.conftest import ASK_SECONDS, Tool
from deploy.dockerfile import FOLDER, ROOT, find, read_environment, read_stages
from deploy.manifest import (
    VARIANTS,
    Object,
    containers_of,
    copy_deploy,
    guard_of,
    of_kind,
    pod_of,
    read_objects,
    render,
)

from guard.demo import __path__ as demo_path

KUBERNETES = ROOT / "deploy" / "kubernetes"
FOLDERS = ("compose", "kubernetes", "policies", "grafana/kustomization.yaml")
OTHERS = {"kustomization.yaml", "policy.yaml", "secret.example.yaml", "loader.yaml"}
"""Files that are no resource."""


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_deploy(tmp_path_factory.mktemp("manifests"))


@pytest.fixture(params=VARIANTS)
def objects(request: pytest.FixtureRequest, deploy: Path) -> list[Object]:
    """All objects of a variant."""
    return render(deploy / "kubernetes" / request.param)


@pytest.fixture
def monitoring(deploy: Path) -> list[Object]:
    return render(deploy / "kubernetes" / "monitoring")


@pytest.fixture
def secret() -> Object:
    (found,) = read_objects(KUBERNETES / "base" / "secret.example.yaml")
    return found


@pytest.fixture
def validate(tmp_path: Path, tool: Tool) -> Callable[[list[Object]], str]:
    """Hold objects against the schemas of Kubernetes; what is wrong is returned."""

    def run(objects: list[Object]) -> str:
        path = tmp_path / "objects.yaml"
        path.write_text(yaml.safe_dump_all(objects))
        judged = tool("kubernetes-validate", "--strict", str(path))
        said = judged.stdout + judged.stderr
        assert said.count("passed for resource") == len(objects) or judged.returncode
        return said if judged.returncode else ""

    return run


def test_every_file_is_yaml_as_it_should_be(tool: Tool) -> None:
    config = Path(__file__).with_name("yamllint.yaml")
    folders = [str(ROOT / "deploy" / name) for name in FOLDERS]
    judged = tool("yamllint", "--strict", "--config-file", str(config), *folders)
    assert (judged.stdout, judged.returncode) == ("", 0)


def test_kubernetes_knows_every_field(
    objects: list[Object],
    monitoring: list[Object],
    secret: Object,
    validate: Callable[[list[Object]], str],
) -> None:
    dashboard = of_kind(monitoring, "ConfigMap")
    assert validate([*objects, secret, dashboard]) == ""


def test_a_field_that_kubernetes_does_not_know_is_seen(
    objects: list[Object], validate: Callable[[list[Object]], str]
) -> None:
    broken = copy.deepcopy(objects)
    guard_of(broken)["resources"]["limit"] = {}
    assert "'limit' was unexpected" in validate(broken)


def test_every_manifest_is_a_resource_of_its_folder() -> None:
    for path in KUBERNETES.glob("*/kustomization.yaml"):
        (found,) = read_objects(path)
        written = {other.name for other in path.parent.glob("*.yaml")} - OTHERS
        named = {
            name for name in found["resources"] if "/" not in name and name != ".."
        }
        if path.parent.name == "monitoring":
            written.add("rules.yaml")  # made of the rules
        assert written == named


def test_selectors_find_the_pods_and_nothing_else_is_named(
    objects: list[Object], monitoring: list[Object]
) -> None:
    deployment = of_kind(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    service = of_kind(objects, "Service")
    selectors = [
        deployment["selector"]["matchLabels"],
        of_kind(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        of_kind(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
    ]
    for selector in selectors:
        # The whole of them: one label alone is that of both variants.
        assert selector.items() == labels
    monitor = of_kind(monitoring, "ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()


def test_ports_are_those_that_the_server_listens_on(
    objects: list[Object], monitoring: list[Object]
) -> None:
    guard = guard_of(objects)
    (port,) = guard["ports"]
    assert f"--port={port['containerPort']}" in guard["args"]
    assert "--host=0.0.0.0" in guard["args"]  # who probes comes from outside the pod
    (served,) = of_kind(objects, "Service")["spec"]["ports"]
    (scraped,) = of_kind(monitoring, "ServiceMonitor")["spec"]["endpoints"]
    (let_in,) = of_kind(objects, "NetworkPolicy")["spec"]["ingress"]
    # By number: of a sidecar's names Services know nothing before Kubernetes 1.33.
    numbers = {served["targetPort"], let_in["ports"][0]["port"]}
    assert numbers == {port["containerPort"]}
    probed = {one["httpGet"]["port"] for one in probes_of(guard).values()}
    assert probed == {port["name"]}
    assert scraped["port"] == served["name"]


def probes_of(container: Object) -> dict[str, Object]:
    return {key: one for key, one in container.items() if key.endswith("Probe")}


def test_the_guard_is_asked_whether_it_is_ready(objects: list[Object]) -> None:
    from fastapi import FastAPI
    from vllm_guard.server import GuardEndpoint

    app = FastAPI()
    GuardEndpoint().attach_router(app)
    routes = {getattr(route, "path", "") for route in app.routes}
    paths = {
        key: probe["httpGet"]["path"]
        for key, probe in probes_of(guard_of(objects)).items()
    }
    assert paths == {
        "startupProbe": "/guard/ready",
        "readinessProbe": "/guard/ready",
        "livenessProbe": "/health",  # vLLM's; the end-to-end test asks for it
    }
    assert paths["startupProbe"] in routes


def test_a_probe_asks_no_more_often_than_the_server_itself(
    objects: list[Object],
) -> None:
    """Each question keeps a worker busy; before it has started nobody is kept."""
    probe = guard_of(objects)["readinessProbe"]
    assert probe["periodSeconds"] >= ASK_SECONDS


def list_variables() -> Iterator[str]:
    """Yield the environment variables that the guard reads."""
    for folder in ("guard", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            yield from re.findall(r'"(GUARD_[A-Z_0-9]+)"', path.read_text())


def test_every_variable_is_one_that_somebody_reads(objects: list[Object]) -> None:
    from vllm import envs

    known = {*list_variables(), *envs.environment_variables}
    # Of libraries; what they do is seen where the image is run.
    known |= {"HOME", "USER", "LOGNAME", "TORCHINDUCTOR_CACHE_DIR"}
    named = {one["name"] for one in guard_of(objects)["env"]}
    assert named <= known
    for name in ("Dockerfile", "Dockerfile.cpu"):
        assert read_environment(read_stages(FOLDER / name)[-1]).keys() <= known


def test_mounts_are_volumes_and_the_other_way_round(objects: list[Object]) -> None:
    pod, guard = pod_of(objects), guard_of(objects)
    mounts = [one["name"] for one in guard["volumeMounts"]]
    assert sorted(mounts) == sorted(one["name"] for one in pod["volumes"])
    claims = of_kind(objects, "PersistentVolumeClaim")["metadata"]["name"]
    (models,) = (one for one in pod["volumes"] if one["name"] == "models")
    assert models["persistentVolumeClaim"] == {"claimName": claims, "readOnly": True}


def test_files_that_arguments_name_are_mounted(
    objects: list[Object], secret: Object
) -> None:
    pod, guard = pod_of(objects), guard_of(objects)
    mounts = {one["name"]: one for one in guard["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    config = of_kind(objects, "ConfigMap")
    assert volumes["policy"]["configMap"]["name"] == config["metadata"]["name"]
    (key,) = config["data"]
    assert f"--policy={mounts['policy']['mountPath']}/{key}" in guard["args"]
    assert "subPath" not in mounts["policy"]
    assert "--watch" in guard["args"]
    keys = volumes["keys"]["secret"]
    assert keys["secretName"] == secret["metadata"]["name"]
    (item,) = keys["items"]
    assert item["key"] in secret["stringData"]
    # In two words: vLLM overlooks --config=FILE, and would let everybody in.
    at = guard["args"].index("--config")
    assert guard["args"][at + 1] == f"{mounts['keys']['mountPath']}/{item['path']}"


def test_the_audit_log_is_written_to_a_volume(objects: list[Object]) -> None:
    guard = guard_of(objects)
    (path,) = (one for one in guard["args"] if one.startswith("--audit-log="))
    folder = str(Path(path.removeprefix("--audit-log=")).parent)
    mounts = {one["mountPath"]: one for one in guard["volumeMounts"]}
    assert not mounts[folder].get("readOnly")


def test_secrets_are_referred_to_by_keys_that_they_have(
    objects: list[Object], secret: Object
) -> None:
    named = [
        variable["valueFrom"]["secretKeyRef"]
        for container in containers_of(objects)
        for variable in container["env"]
        if "valueFrom" in variable
    ]
    assert {one["name"] for one in named} == {secret["metadata"]["name"]}
    assert {one["key"] for one in named} <= secret["stringData"].keys()
    assert of_kinds(objects, "Secret") == []


def of_kinds(objects: list[Object], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def test_nobody_serves_with_the_token_of_the_example(secret: Object) -> None:
    from guard.errors import EngineError
    from guard.http.keys import AdminToken

    with pytest.raises(EngineError, match="at least 16"):
        AdminToken(secret["stringData"]["admin-token"])


def test_a_container_may_do_nothing_but_serve(objects: list[Object]) -> None:
    pod = pod_of(objects)
    for container in containers_of(objects):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"].keys() == {"requests", "limits"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_pod_is_the_one_that_the_image_is_made_for(objects: list[Object]) -> None:
    final = read_stages(FOLDER / "Dockerfile.cpu")[-1]
    context = pod_of(objects)["securityContext"]
    user = find(final, "USER")[-1]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    guard = guard_of(objects)
    assert "command" not in guard
    writable = {
        one["mountPath"] for one in guard["volumeMounts"] if not one.get("readOnly")
    }
    assert writable == {*json.loads(find(final, "VOLUME")[0]), "/tmp", "/dev/shm"}
    environment = read_environment(final)
    assert f"--policy={environment['GUARD_POLICY']}" in guard["args"]


def test_a_sidecar_starts_before_the_application_and_outlives_it(deploy: Path) -> None:
    pod = pod_of(render(deploy / "kubernetes" / "sidecar"))
    (guard,) = pod["initContainers"]
    assert guard["restartPolicy"] == "Always"
    assert guard["startupProbe"]["httpGet"]["path"] == "/guard/ready"
    (application,) = pod["containers"]
    urls = [e["value"] for e in application["env"] if e["name"] == "OPENAI_BASE_URL"]
    assert urls == [f"http://localhost:{guard['ports'][0]['containerPort']}/v1"]


def test_both_variants_run_the_same_guard(deploy: Path) -> None:
    service, sidecar = (
        guard_of(render(deploy / "kubernetes" / name))
        for name in ("service", "sidecar")
    )
    assert sidecar == service | {"restartPolicy": "Always"}


def test_on_a_gpu_the_service_differs_in_image_and_resources(deploy: Path) -> None:
    cpu, gpu = (
        guard_of(render(deploy / "kubernetes" / name)) for name in ("service", "gpu")
    )
    changed = {key for key in cpu if cpu[key] != gpu[key]}
    assert changed == {"image", "resources", "args", "env"}
    # What is for the organism, and for a CPU, is gone.
    assert [one for one in cpu["args"] if one not in gpu["args"]] == ["--dtype=float32"]
    gone = [one["name"] for one in cpu["env"] if one not in gpu["env"]]
    assert gone == ["VLLM_CPU_KVCACHE_SPACE"]
    assert gpu["image"] == "vllm-guard:gpu"
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    composition = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())
    built = {
        service["image"]: Path(service["build"]["dockerfile"]).name
        for service in composition["services"].values()
        if "build" in service
    }
    assert built == {cpu["image"]: "Dockerfile.cpu", gpu["image"]: "Dockerfile"}


def test_a_kustomization_of_ones_own_names_the_image_and_changes_nothing_else(
    deploy: Path,
) -> None:
    folder = deploy / "kubernetes"
    own, service = (guard_of(render(folder / name)) for name in ("example", "service"))
    assert own == service | {"image": "registry.example.org/vllm-guard:1.0"}


def test_a_loader_writes_what_the_guard_may_only_read(
    deploy: Path, validate: Callable[[list[Object]], str]
) -> None:
    (loader,) = read_objects(KUBERNETES / "base" / "loader.yaml")
    assert validate([loader]) == ""
    pod = pod_of(render(deploy / "kubernetes" / "service"))
    assert loader["spec"]["securityContext"] == pod["securityContext"]
    (own,) = loader["spec"]["volumes"]
    (models,) = (one for one in pod["volumes"] if one["name"] == "models")
    claim = models["persistentVolumeClaim"]
    assert own["persistentVolumeClaim"] == {"claimName": claim["claimName"]}
    (container,), (guard,) = loader["spec"]["containers"], pod["containers"]
    assert container["securityContext"] == guard["securityContext"]
    (mount,) = container["volumeMounts"]
    assert mount | {"readOnly": True} in guard["volumeMounts"]


def test_the_policy_of_the_config_map_passes_the_check(
    objects: list[Object], tmp_path: Path
) -> None:
    """With the organism where the volume `models` is mounted."""
    (text,) = of_kind(objects, "ConfigMap")["data"].values()
    (demo,) = demo_path
    assert "/models/" in text
    path = tmp_path / "policy.yaml"
    path.write_text(text.replace("/models/", f"{demo}/organism/"))
    done = check(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("default: enforce, 1 clamps")
    path.write_text(path.read_text().replace("latents: [83,", "latents: [84,"))
    assert "other clamps" in check(path).stderr


def check(path: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "guard", "check", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_rules_are_those_of_prometheus(
    deploy: Path, monitoring: list[Object], tmp_path: Path, tool: Tool
) -> None:
    rule = of_kind(monitoring, "PrometheusRule")
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    source = yaml.safe_load((deploy / "prometheus" / "rules.yml").read_text())
    assert rule["spec"] == source
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    judged = tool("promtool", "check", "rules", str(path))
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_every_scrape_has_the_job_that_the_rules_are_about(
    deploy: Path, monitoring: list[Object]
) -> None:
    rules = (deploy / "prometheus" / "rules.yml").read_text()
    config = yaml.safe_load((deploy / "compose" / "prometheus.yml").read_text())
    (scraped,) = config["scrape_configs"]
    jobs = set(re.findall(r'job="(\w+)"', rules))
    (endpoint,) = of_kind(monitoring, "ServiceMonitor")["spec"]["endpoints"]
    assert jobs == {scraped["job_name"]}
    assert endpoint["relabelings"] == [
        {"targetLabel": "job", "replacement": scraped["job_name"]}
    ]


def test_rules_that_were_changed_on_one_side_only_are_seen(
    deploy: Path, tmp_path: Path
) -> None:
    def build(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(KUBERNETES / "build.py"), *arguments]
        paths = ["--source", str(source), "--target", str(target)]
        return subprocess.run(
            [*command, *paths], capture_output=True, text=True, check=False
        )

    source, target = tmp_path / "rules.yml", tmp_path / "rules.yaml"
    source.write_bytes((deploy / "prometheus" / "rules.yml").read_bytes())
    assert build("--check").returncode == 1
    assert build().returncode == 0
    assert build("--check").returncode == 0
    source.write_text(source.read_text() + "# one more\n")
    refused = build("--check")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1


def test_the_dashboard_is_found_by_its_label(
    deploy: Path, monitoring: list[Object]
) -> None:
    found: Any = of_kind(monitoring, "ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    (text,) = found["data"].values()
    assert json.loads(text) == json.loads((deploy / "grafana/guard.json").read_text())
