"""Words of the manifests among which Kubernetes lets one choose.

Its schemas call most of them strings; a wrong one would only be seen by a cluster.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.manifest import VARIANTS, Object, copy_deploy, read_objects, render

CHOICES: Mapping[str, set[str]] = {
    "Deployment.spec.strategy.type": {"RollingUpdate", "Recreate"},
    "*.template.spec.restartPolicy": {"Always"},
    "*.initContainers.restartPolicy": {"Always"},
    "Pod.spec.restartPolicy": {"Always", "OnFailure", "Never"},
    "*.imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "*.capabilities.drop": {"ALL"},
    "*.seccompProfile.type": {"RuntimeDefault", "Localhost"},
    "*.httpGet.scheme": {"HTTP", "HTTPS"},
    "*.emptyDir.medium": {"", "Memory"},
    "*.protocol": {"TCP", "UDP", "SCTP"},
    "NetworkPolicy.spec.policyTypes": {"Ingress", "Egress"},
    "Service.spec.type": {"ClusterIP", "NodePort", "LoadBalancer"},
    "Service.spec.clusterIP": {"None"},
    "Secret.type": {"Opaque"},
    "PersistentVolumeClaim.spec.accessModes": {
        *("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"),
    },
    "Kustomization.patches.patch.op": {
        *("add", "remove", "replace", "move", "copy", "test"),
    },
    "Kustomization.configMapGenerator.behavior": {"create", "replace", "merge"},
}
"""Kind and fields, or the end of them, to what may stand there; no word for a list."""


def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield each value of an object that holds no others, with its path."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from walk(child, f"{path}.{key}")
    elif isinstance(value, list):
        for child in value:
            yield from walk(child, path)
    else:
        yield path, value


def find_wrong(objects: list[Object]) -> list[str]:
    """Return what stands where something else must, with its path."""
    return [
        f"{path}: {value}"
        for one in objects
        for path, value in walk(one, one["kind"])
        for pattern, allowed in CHOICES.items()
        if fnmatchcase(path, pattern) and value not in allowed
    ]


@pytest.fixture
def objects(tmp_path: Path) -> list[Object]:
    """Everything that is applied, and the kustomizations themselves."""
    folder = copy_deploy(tmp_path) / "kubernetes"
    found = [one for name in VARIANTS for one in render(folder / name)]
    found += render(folder / "monitoring")
    for name in ("secret.example.yaml", "loader.yaml"):
        found += read_objects(folder / "base" / name)
    for path in folder.glob("*/kustomization.yaml"):
        found += read_objects(path)
    for patch in (patch for one in found for patch in one.get("patches", ())):
        patch["patch"] = yaml.safe_load(patch["patch"])
    return found


def test_every_choice_is_one_that_there_is(objects: list[Object]) -> None:
    assert find_wrong(objects) == []


@pytest.mark.parametrize(
    ("kind", "fields", "word"),
    [
        ("NetworkPolicy", ["spec", "policyTypes", 0], "ingress"),
        ("PersistentVolumeClaim", ["spec", "accessModes", 0], "ReadWriteAll"),
        ("Pod", ["spec", "restartPolicy"], "never"),
        ("Service", ["spec", "type"], "Clusterip"),
        ("Kustomization", ["patches", 0, "patch", 0, "op"], "tset"),
    ],
)
def test_a_choice_that_there_is_not_is_named(
    kind: str, fields: list[str | int], word: str, objects: list[Object]
) -> None:
    at: Any = next(o for o in objects if o["kind"] == kind and fields[0] in o)
    for field in fields[:-1]:
        at = at[field]
    at[fields[-1]] = word
    assert [one.split(": ")[1] for one in find_wrong(objects)] == [word]
