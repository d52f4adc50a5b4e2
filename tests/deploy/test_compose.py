"""The composition: valid, provisioned with what is there, open to this machine only.

That the configurations work is seen in tests/e2e/test_deploy.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.conftest import ASK_SECONDS, Tool
from deploy.dockerfile import FOLDER, ROOT
from deploy.manifest import copy_deploy

from guard.demo import __path__ as demo_path

COMPOSE = ROOT / "deploy" / "compose"


@pytest.fixture(scope="module")
def composition() -> dict[str, Any]:
    return dict(yaml.safe_load((COMPOSE / "compose.yaml").read_text()))


@pytest.fixture(scope="module")
def services(composition: dict[str, Any]) -> dict[str, Any]:
    return dict(composition["services"])


def test_the_composition_follows_its_schema(tool: Tool, tmp_path: Path) -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    path = COMPOSE / "compose.yaml"
    assert tool("check-jsonschema", *schema, str(path)).returncode == 0
    broken = tmp_path / "compose.yaml"
    broken.write_text(path.read_text().replace("cap_drop:", "cap_drops:"))
    assert "'cap_drops'" in tool("check-jsonschema", *schema, str(broken)).stdout


def test_prometheus_and_alertmanager_read_their_configurations(tool: Tool) -> None:
    config = str(COMPOSE / "prometheus.yml")
    judged = tool("promtool", "check", "config", "--syntax-only", config)
    assert judged.returncode == 0, judged.stderr
    judged = tool("amtool", "check-config", str(COMPOSE / "alertmanager.yml"))
    assert judged.returncode == 0, judged.stderr


def test_every_file_that_is_mounted_is_there(
    services: dict[str, Any], composition: dict[str, Any], tmp_path: Path
) -> None:
    deploy = copy_deploy(tmp_path)
    (demo,) = demo_path
    mounted = 0
    for service in services.values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(.+?)\}", r"\1", volume).split(":")[0]
            if not source.startswith("."):
                assert source in composition["volumes"]
            elif source == "../../guard/demo/organism":
                assert (ROOT / "deploy" / "compose" / source).samefile(
                    Path(demo, "organism")
                )
            else:
                assert (deploy / "compose" / source).exists(), source
                mounted += 1
    assert mounted == 5


def test_prometheus_finds_the_guard_and_grafana_finds_prometheus(
    services: dict[str, Any],
) -> None:
    config = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    name, port = target.split(":")
    for variant in ("guard-cpu", "guard-gpu"):
        assert name in services[variant]["networks"]["default"]["aliases"]
        assert services[variant]["ports"] == [f"127.0.0.1:{port}:{port}"]
    (manager,) = config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert manager.split(":")[0] in services
    grafana = COMPOSE / "grafana" / "provisioning"
    source = yaml.safe_load((grafana / "datasources/prometheus.yaml").read_text())
    (datasource,) = source["datasources"]
    host, port = datasource["url"].removeprefix("http://").split(":")
    assert services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    boards = yaml.safe_load((grafana / "dashboards/guard.yaml").read_text())
    (folder,) = (one["options"]["path"] for one in boards["providers"])
    targets = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert f"{folder}/guard.json" in targets


def test_rules_are_where_prometheus_looks_for_them(services: dict[str, Any]) -> None:
    config = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())
    (pattern,) = config["rule_files"]
    targets = [volume.split(":")[1] for volume in services["prometheus"]["volumes"]]
    found = [Path(one) for one in targets]
    assert any(one.match(f"/etc/prometheus/{pattern}") for one in found)


def test_only_this_machine_reaches_what_runs(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name


def test_one_of_the_two_guards_runs_when_nothing_is_said(
    services: dict[str, Any],
) -> None:
    (line,) = re.findall(
        "^COMPOSE_PROFILES=(.*)$", (COMPOSE / ".env").read_text(), re.M
    )
    running = [n for n, s in services.items() if line in s.get("profiles", [line])]
    assert running == ["guard-cpu", "prometheus", "alertmanager", "grafana"]


def test_a_health_check_asks_no_more_often_than_the_server_itself(
    services: dict[str, Any],
) -> None:
    for name in ("guard-cpu", "guard-gpu"):
        interval = services[name]["healthcheck"]["interval"]
        assert float(interval.removesuffix("s")) >= ASK_SECONDS


def test_secrets_come_from_the_environment(services: dict[str, Any]) -> None:
    for name in ("guard-cpu", "guard-gpu"):
        environment = services[name]["environment"]
        assert environment["HF_TOKEN"] is None  # passed on where it is set
        for secret in ("GUARD_ADMIN_TOKEN", "VLLM_API_KEY"):
            assert environment[secret] == f"${{{secret}:-}}"


def test_both_guards_keep_an_audit_log_in_a_volume(services: dict[str, Any]) -> None:
    for name in ("guard-cpu", "guard-gpu"):
        (path,) = (one for one in services[name]["command"] if "--audit-log=" in one)
        folder = str(Path(path.removeprefix("--audit-log=")).parent)
        assert f"cache:{folder}" in services[name]["volumes"]


def test_images_are_built_from_files_that_exist_or_are_of_one_version(
    services: dict[str, Any],
) -> None:
    for service in services.values():
        if "build" in service:
            built = ROOT / "deploy/compose" / service["build"]["context"]
            assert (built / service["build"]["dockerfile"]).parent.samefile(FOLDER)
        else:
            assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", service["image"])
