"""The manifests as a cluster would get them: kustomize, as far as it is used here."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from deploy.dockerfile import ROOT

Object = dict[str, Any]

VARIANTS = ("service", "sidecar", "gpu")
KEYS = {
    *("apiVersion", "kind", "resources", "configMapGenerator", "generatorOptions"),
    *("images", "patches"),
}
"""Of a kustomization: those that are understood here."""


def copy_deploy(folder: Path) -> Path:
    """Copy what is deployed."""
    return Path(shutil.copytree(ROOT / "deploy", folder / "deploy"))


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
    for image in found.get("images", ()):
        set_image(objects, image)
    for patch in found.get("patches", ()):
        apply_patch(objects, patch)
    return objects


def set_image(objects: list[Object], image: Object) -> None:
    """Give every container of an image another tag, and where told another name."""
    for container in containers_of(objects):
        if container["image"].startswith(f"{image['name']}:"):
            name = image.get("newName", image["name"])
            container["image"] = f"{name}:{image['newTag']}"


def apply_patch(objects: list[Object], patch: Object) -> None:
    """Apply a JSON patch (RFC 6902) of operations test, add, replace and remove."""
    target = patch["target"]
    (found,) = (
        one
        for one in objects
        if (one["kind"], one["metadata"]["name"]) == (target["kind"], target["name"])
    )
    for step in yaml.safe_load(patch["patch"]):
        *above, last = (word.replace("~1", "/") for word in step["path"].split("/")[1:])
        at: Any = found
        for word in above:
            at = at[int(word) if isinstance(at, list) else word]
        key: Any = int(last) if isinstance(at, list) else last
        match step["op"]:
            case "test":
                assert at[key] == step["value"], step["path"]
            case "remove":
                del at[key]
            case "replace" | "add" as op:
                assert isinstance(at, dict)
                assert (key in at) == (op == "replace"), step["path"]
                at[key] = step["value"]
            case other:
                raise AssertionError(other)


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


def containers_of(objects: list[Object]) -> list[Object]:
    pod = pod_of(objects)
    return [*pod.get("initContainers", ()), *pod["containers"]]


def guard_of(objects: list[Object]) -> Object:
    """Return the container that serves under the guard."""
    (found,) = (one for one in containers_of(objects) if one["name"] == "guard")
    return found
