"""A pod as its manifest describes it, without a cluster.

Its file system can only be read, its user has no name, its volumes are in their places.
Needs root, for a mount namespace of its own; nothing outside of it changes.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from deploy.dockerfile import FOLDER, ROOT, read_environment, read_stages
from deploy.manifest import Object, guard_of, of_kind, pod_of
from e2e.serving import THREADS, Server

from guard.demo import __path__ as demo_path
from guard.redteam.server import find_free_port

KEY = "sk-of-the-application"
SECRETS = {
    "admin-token": "token-of-the-administrator",
    "client-key": KEY,
    "keys.yaml": f"api-key: [{KEY}, sk-of-somebody-else]\n",
}


class Volumes:
    """What the volumes of a pod hold, each a folder here."""

    def __init__(self, folder: Path, objects: list[Object]) -> None:
        """Fill them.

        Args:
            folder: Empty.
            objects: Those of a variant.
        """
        self.folder = folder
        (self._key,) = of_kind(objects, "ConfigMap")["data"]
        for volume in pod_of(objects)["volumes"]:
            (folder / volume["name"]).mkdir()
        (demo,) = demo_path
        shutil.copytree(Path(demo, "organism"), folder / "models", dirs_exist_ok=True)
        (folder / "keys" / "keys.yaml").write_text(SECRETS["keys.yaml"])
        (folder / "keys" / "keys.yaml").chmod(0o440)
        (folder / "cache").chmod(0o775)
        (folder / "policy" / self._key).symlink_to(f"..data/{self._key}")
        self.show_policy(of_kind(objects, "ConfigMap")["data"][self._key])

    def show_policy(self, text: str) -> None:
        """Bring another content of the ConfigMap as the kubelet does: all at once."""
        mount = self.folder / "policy"
        version = mount / f"..{time.monotonic_ns()}"
        version.mkdir()
        (version / self._key).write_text(text)
        (mount / "..data_tmp").symlink_to(version.name)
        (mount / "..data_tmp").rename(mount / "..data")


def start_pod(folder: Path, objects: list[Object], volumes: Volumes) -> Server:
    """Start the guard of a variant as its container is described."""
    guard = guard_of(objects)
    port = find_free_port()
    places = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=8000": f"--port={port}"}
    arguments = [places.get(word, word) for word in guard["args"]]
    command = [sys.executable, "-m", "guard", "serve", *arguments]
    user = pod_of(objects)["securityContext"]
    system = folder / "system"
    system.mkdir()
    chroot = shlex.join([_find("chroot"), str(system / "fs")])
    script = "\n".join(
        [
            *_mount_root(system),
            *_mount_volumes(system / "fs", volumes, guard),
            f"exec {chroot} setpriv --reuid {user['runAsUser']} "
            f"--regid {user['runAsGroup']} --clear-groups --no-new-privs "
            f"--bounding-set=-all --inh-caps=-all {shlex.join(command)}",
        ]
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(guard),
            cwd="/",
            start_new_session=True,
        )
    return Server(f"http://127.0.0.1:{port}", folder / "log", process)


def check_namespaces(folder: Path) -> None:
    """Skip where a pod cannot be imitated.

    Args:
        folder: Empty.
    """
    script = "\n".join(_mount_root(folder))
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = tried.stderr if tried.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"no file system of its own for a pod, which needs root: {reason}")


def _find(name: str) -> str:
    """Return where a program of the system is; not every user has all on his PATH."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found is not None, f"expected {name} to be installed"
    return found


def _environment(guard: Object) -> Mapping[str, str]:
    """Return what image and manifest set, and what finds the code under test."""
    image = read_environment(read_stages(FOLDER / "Dockerfile.cpu")[-1])
    given = {
        one["name"]: one["value"]
        if "value" in one
        else SECRETS[one["valueFrom"]["secretKeyRef"]["key"]]
        for one in guard["env"]
    }
    inherited = ("PATH", "PYTHONPATH", *THREADS)
    return {
        **{name: os.environ[name] for name in inherited if name in os.environ},
        **image,
        **given,
        "HF_HUB_OFFLINE": "1",
    }


def _mount_root(root: Path) -> Iterator[str]:
    """Yield how a file system is made of this one, to be changed and thrown away."""
    yield f"mount -t tmpfs tmpfs {root}"
    yield f"mkdir {root}/upper {root}/work {root}/fs"
    options = f"lowerdir=/,upperdir={root}/upper,workdir={root}/work"
    yield f"mount -t overlay overlay -o {options} {root}/fs"
    for name in ("dev", "proc", "sys"):
        yield f"mount --rbind /{name} {root}/fs/{name}"
    for path in _code():
        # Whose home it lies in is of no matter to the user of an image.
        for parent in path.parents:
            yield f"chmod a+x {root}/fs{parent}"


def _mount_volumes(root: Path, volumes: Volumes, guard: Object) -> Iterator[str]:
    mounts = {one["mountPath"]: one for one in guard["volumeMounts"]}
    for path in mounts:
        yield f"mkdir -p {root}{path}"
    yield f"mount -o remount,ro {root}"
    # As Docker mounts it: nothing in it can be run.
    yield f"mount -t tmpfs -o noexec,nosuid,nodev,mode=1777 tmpfs {root}/tmp"
    for path, mount in mounts.items():
        if path in {"/tmp", "/dev/shm"}:
            continue
        yield f"mount --bind {volumes.folder / mount['name']} {root}{path}"
        if mount.get("readOnly"):
            yield f"mount -o remount,bind,ro {root}{path}"
    for path in _code():
        if Path("/tmp") in path.parents:
            yield f"mkdir -p {root}{path} && mount --bind {path} {root}{path}"


def _code() -> set[Path]:
    return {ROOT, Path(sys.prefix), Path(sys.base_prefix)}
