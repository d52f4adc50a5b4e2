"""The manifests as a cluster would get them: kustomize, as far as it is used here."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from deploy.dockerfile import ROOT

Object = dict[str, Any]

VARIANTS = ("service", "sidecar")
KEYS = {"apiVersion", "kind", "resources", "configMapGenerator", "generatorOptions"}
"""Of a kustomization: nothing that would change what is written in a manifest."""

RULES = """\
groups:
  - name: placeholder
    rules:
      - alert: GuardMissing
        expr: up == 1 unless on (instance) guard_info
        labels: {severity: critical}
"""


def copy_deploy(folder: Path) -> Path:
    """Copy what is deployed, with a stand-in for what is not there yet.

    Rules and dashboard are made elsewhere.
    """
    deploy = folder / "deploy"
    shutil.copytree(ROOT / "deploy", deploy)
    rules, dashboard = deploy / "prometheus/rules.yml", deploy / "grafana/guard.json"
    for path, text in ((rules, RULES), (dashboard, '{"uid": "guard"}')):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(text)
    if not (deploy / "kubernetes/monitoring/rules.yaml").exists():
        build = deploy / "kubernetes" / "build.py"
        subprocess.run([sys.executable, str(build)], check=True)
    return deploy


def render(folder: Path) -> list[Object]:
    """Return the objects that `kubectl kustomize` would show of a folder."""
    found = read_kustomization(folder)
    objects: list[Object] = []
    for name in found.get("resources", ()):
        path = folder / name
        objects += render(path) if path.is_dir() else read_objects(path)
    labels = found.get("generatorOptions", {}).get("labels", {})
    for generator in found.get("configMapGenerator", ()):
        data = {name: (folder / name).read_text() for name in generator["files"]}
        metadata = {"name": generator["name"], "labels": labels}
        objects.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
            | {"data": data}
        )
    return objects


def read_kustomization(folder: Path) -> Object:
    (found,) = read_objects(folder / "kustomization.yaml")
    assert found.keys() <= KEYS
    options = found.get("generatorOptions", {"disableNameSuffixHash": True})
    assert options["disableNameSuffixHash"] is True
    return found


def read_objects(path: Path) -> list[Object]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def of_kind(objects: list[Object], kind: str) -> Object:
    """Return the one object of a kind."""
    (found,) = (one for one in objects if one["kind"] == kind)
    return found


def pod_of(objects: list[Object]) -> Object:
    """Return the specification of the pods of a variant."""
    pod: Object = of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    return pod


def guard_of(objects: list[Object]) -> Object:
    """Return the container that serves under the guard."""
    pod = pod_of(objects)
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    (found,) = (one for one in containers if one["name"] == "guard")
    return dict(found)
