"""The reference pages and the published schema: they are what the code does."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from specimens import AT, make_policy_file, policies

from guard.errors import PolicyError
from guard.policy import Policy, PolicyFile, load_policy
from guard.schema import policy_schema

ROOT = Path(__file__).parents[1]
POLICY = """\
# yaml-language-server: $schema=policy.schema.json
version: 1
saes:
  s: {path: sae, format: guard, hook_point: layers.1.resid_post, sha256: "SHA"}
policies:
  default:
    clamps: [{name: hold, sae: s, latents: [1], law: ablate}]
    monitors:
      - {name: watch, sae: s, score: error_norm, calibration: c.safetensors,
         target_fpr: 0.01, on_alarm: flag}
default_policy: default
""".replace("SHA", "0" * 64)
MISTAKES = {
    "an unknown key": ("on_alarm: flag", "on_alarm: flag, when: never"),
    "a missing key": (", law: ablate", ""),
    "a law that is not built": ("law: ablate", "law: project"),
    "no law": ("law: ablate", "law: ablatte"),
    "a bound": ("target_fpr: 0.01", "target_fpr: 0.6"),
    "an open bound": ("target_fpr: 0.01", "target_fpr: 0"),
    "no hook point": ("layers.1.resid_post", "layers.01.resid_post"),
    "no digest": ("0" * 64, "0" * 63),
    "no name": ("  default:\n", "  a b:\n"),
    "an empty list": ("[1]", "[]"),
    "what is not built": ("version: 1", "version: 1\nrequire_stable: true"),
}


@pytest.fixture(scope="module")
def reference() -> Any:
    path = ROOT / ".ci" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_valid(content: object) -> bool:
    return bool(jsonschema.Draft202012Validator(policy_schema()).is_valid(content))


def test_the_pages_are_what_the_code_says(
    reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("policy.md", "Slots that the engine reserves"),
        ("metrics.md", "Tokens that a clamp changed"),
        ("http.md", "Name of the policy asked for"),
        ("policy.schema.json", "Slots that the engine reserves"),
        ("threat-model.md", "0 of 39, at most 0.07"),
    ],
)
def test_a_page_that_says_something_else_is_named_and_mended(
    page: str,
    said: str,
    reference: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    path = tmp_path / "docs" / page
    right = path.read_text()
    path.write_text(right.replace(said, "Something else"))
    assert reference.main(["--check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"docs/{page} is stale; expected what `make docs` writes.\n"
    )
    assert reference.main(["--root", str(tmp_path)]) == 0
    assert path.read_text() == right


def test_every_key_of_a_policy_file_is_explained() -> None:
    schema = policy_schema()
    for part in (schema, *schema["$defs"].values()):
        assert part["description"]
        for key, value in part["properties"].items():
            assert value.get("description"), key


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(policy_schema())


def test_a_policy_file_that_names_the_schema_is_read(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    assert load_policy(tmp_path / "policy.yaml").default_policy == "default"
    assert is_valid(yaml.safe_load(POLICY))


def test_the_organism_follows_the_schema() -> None:
    path = ROOT / "guard" / "demo" / "organism" / "policy.yaml"
    assert is_valid(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_the_loader_refuses_at_one_key_the_schema_refuses(
    mistake: str, tmp_path: Path
) -> None:
    before, after = MISTAKES[mistake]
    assert before in POLICY
    text = POLICY.replace(before, after, 1)
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(PolicyError, match=r"policy.yaml:\d"):
        load_policy(tmp_path / "policy.yaml")
    assert not is_valid(yaml.safe_load(text))


@given(policy=policies())
def test_what_the_models_take_the_schema_takes(policy: Policy) -> None:
    policy_file = make_policy_file({"default": policy}, saes={"a": AT})
    content = json.loads(policy_file.model_dump_json())
    assert PolicyFile.model_validate_json(json.dumps(content)) == policy_file
    assert is_valid(content)
