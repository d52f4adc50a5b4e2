"""The bill of materials: complete, repeatable, and honest about licences."""

import importlib.util
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "sbom.py"


@pytest.fixture(scope="module")
def sbom() -> Any:
    spec = importlib.util.spec_from_file_location("sbom", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bom(sbom: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bom") / "build" / "sbom.json"
    assert sbom.main([str(path)]) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_it_is_cyclonedx_about_this_package(bom: dict[str, Any]) -> None:
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(
        r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bom["serialNumber"]
    )
    main = bom["metadata"]["component"]
    assert (main["name"], main["type"]) == ("vllm-guard", "application")
    refs = [main["bom-ref"], *(part["bom-ref"] for part in bom["components"])]
    assert len(set(refs)) == len(refs)
    assert {one["ref"] for one in bom["dependencies"]} == set(refs)
    assert all(set(one["dependsOn"]) <= set(refs) for one in bom["dependencies"])


def test_what_is_required_is_in_it_as_installed_and_what_is_not_is_not(
    bom: dict[str, Any],
) -> None:
    versions = {part["name"]: part["version"] for part in bom["components"]}
    for name in ("torch", "safetensors", "pydantic", "pyyaml", "pydantic-core"):
        assert versions[name] == metadata.version(name)
    assert not {"pytest", "ruff", "hypothesis", "schemathesis"} & versions.keys()
    main = bom["metadata"]["component"]["bom-ref"]
    needs = {one["ref"]: one["dependsOn"] for one in bom["dependencies"]}
    assert f"torch@{versions['torch']}" in needs[main]


def test_the_same_environment_gives_the_same_bill(
    sbom: Any, bom: dict[str, Any]
) -> None:
    found = sbom.walk(sbom.ROOT_PACKAGE, sbom.EXTRAS)
    assert sbom.make_bom(found, sbom.ROOT_PACKAGE) == bom


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 AND BSD-3-Clause", True),
        ("GPL-2.0-or-later OR MIT", True),
        ("MPL-2.0 AND MIT", False),
        ("LGPL-2.1-only", False),
        ("Other/Proprietary License", False),
        ("NVIDIA Proprietary Software", False),
        ("SUBMIT to us", False),
        ("", False),
    ],
)
def test_what_is_not_surely_permissive_is_not_called_so(
    sbom: Any, licence: str, permissive: bool
) -> None:
    assert sbom.is_permissive(licence) is permissive
