"""The example policies do what they say."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from deploy.dockerfile import ROOT

from guard.http.keys import KeyRing
from guard.policy import load_policy

POLICIES = ROOT / "deploy" / "policies"
FILES = sorted(POLICIES.glob("*.yaml"))
BASE = ROOT / "deploy" / "kubernetes" / "base" / "policy.yaml"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_an_example_passes_the_check(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "guard", "check", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("default: ")


def test_there_are_examples() -> None:
    assert [path.stem for path in FILES] == ["observe-first", "tenants"]


@pytest.mark.parametrize("path", [*FILES, BASE], ids=lambda path: path.stem)
def test_an_example_fills_the_panels_about_the_sae(path: Path) -> None:
    policies = load_policy(path).policies.values()
    monitors = [one for policy in policies for one in policy.monitors]
    assert any(one.score == "error_norm" for one in monitors)
    assert {one.on_alarm for one in monitors if one.score == "error_norm"} == {"flag"}


def test_nothing_is_blocked_in_the_first_week() -> None:
    policy_file = load_policy(POLICIES / "observe-first.yaml")
    assert {policy.mode for policy in policy_file.policies.values()} == {"observe"}


def test_the_key_that_the_example_speaks_of_is_its_tenants() -> None:
    path = POLICIES / "tenants.yaml"
    policy_file = load_policy(path)
    (tenant,) = policy_file.tenants
    key = "sk-of-research"
    assert f"`{key}`" in path.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() == tenant.api_key_sha256
    keys = KeyRing(policy_file.tenants, accepted=[key])
    assert keys.tenant(f"Bearer {key}") == tenant
    assert tenant.policies[0] == "research"
