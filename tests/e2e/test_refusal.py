"""What the guard cannot work on is one line and a non-zero exit, before an engine runs.

What can be known without an engine is in tests/test_cli.py. Here vLLM is imported,
once: every case runs in a fork of a process that has done so.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from e2e.serving import Toy, guard_command, guard_environment

from guard.sae.load import weights_digest
from guard.testing import save_toy_sae

PLAIN = "policies: {default: {}}\ndefault_policy: default\n"

_FORKS = """
import importlib, json, os, sys
import transformers
import vllm.entrypoints.launchers.api_server.entry
from guard.cli import main
from vllm_guard import engine, hook, launch, runner_v1, runner_v2, server
for module in ("cpu_worker", "gpu_worker", "gpu.model_runner"):
    importlib.import_module(f"vllm.v1.worker.{module}")

for case in json.load(sys.stdin):
    if os.fork() == 0:
        os.environ.update(case["environment"])
        log = os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["guard", *case["arguments"]]
        main()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(code, flush=True)
"""


@dataclass(frozen=True)
class Refusal:
    code: int
    log: str

    @property
    def line(self) -> str:
        return self.log.splitlines()[-1]


CASES: dict[str, tuple[list[str], dict[str, str], str]] = {
    "model": (["--model", "nobody/nothing"], {}, "'nobody/nothing'"),
    "width": (
        ["--policy", "wide.yaml"],
        {},
        "SAE 's' has d_model 32; expected 64, the hidden size of the model.",
    ),
    "layer": (
        ["--policy", "deep.yaml"],
        {},
        "Hook point 'layers.99.resid_post' is not in this model of 4 layers; "
        "expected layers.0 to layers.3.",
    ),
    "option": (["--no-such-option"], {}, "unrecognized arguments: --no-such-option"),
    "value": (["--max-num-seqs", "many"], {}, "argument --max-num-seqs"),
    "length": (["--max-model-len", "1000000"], {}, "vLLM cannot serve"),
    "pipeline": (
        ["--pipeline-parallel-size", "2"],
        {},
        "(--pipeline-parallel-size)",
    ),
    "transfer": (
        [
            "--kv-transfer-config",
            '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}',
        ],
        {},
        "(--kv-transfer-config)",
    ),
    "headless": (["--headless"], {}, "(--headless)"),
    "development": ([], {"VLLM_SERVER_DEV_MODE": "1"}, "(VLLM_SERVER_DEV_MODE)"),
    "lora": (
        [],
        {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        "(VLLM_ALLOW_RUNTIME_LORA_UPDATING)",
    ),
    "sleep": (["--enable-sleep-mode"], {}, "leep mode"),
    "pooling": (["--runner", "pooling"], {}, "--runner pooling"),
    "admin": (
        [],
        {"GUARD_ADMIN_TOKEN": "too short"},
        "GUARD_ADMIN_TOKEN is no token; expected at least 16 printable",
    ),
    "tenants without keys": (
        ["--policy", "tenants.yaml"],
        {},
        "tenants: the server checks no API keys; expected --api-key",
    ),
    "tenant without a key": (
        ["--policy", "tenants.yaml"],
        {"VLLM_API_KEY": "sk-another"},
        "tenants[0].api_key_sha256: the server accepts no such key",
    ),
}


@pytest.fixture(scope="module")
def refusals(
    toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Refusal]:
    """Return how `guard serve` ended in each of `CASES`."""
    folder = tmp_path_factory.mktemp("refusals")
    save_toy_sae(folder / "wide", d_model=32, hook_point="layers.1.resid_post")
    save_toy_sae(folder / "deep", hook_point="layers.99.resid_post")
    for name, at in (("wide", "layers.1"), ("deep", "layers.99")):
        digest = weights_digest(folder / name, format="guard")
        (folder / f"{name}.yaml").write_text(
            "version: 1\n"
            f"saes: {{s: {{path: {name}, format: guard, "
            f'hook_point: {at}.resid_post, sha256: "{digest}"}}}}\n'
            "policies: {default: {clamps: [{name: hold, sae: s, latents: [1], "
            "law: ablate}]}}\n"
            "default_policy: default\n"
        )
    tenant = f"{{api_key_sha256: {'a' * 64}, policies: [default]}}"
    (folder / "tenants.yaml").write_text(f"version: 1\n{PLAIN}tenants: [{tenant}]\n")
    policy = toy.write_policy("plain", PLAIN)
    cases = []
    for name, (flags, environment, _) in CASES.items():
        arguments = ["serve", str(toy.model)]
        if flags[:1] == ["--model"]:
            arguments, flags = ["serve", flags[1]], flags[2:]
        if "--policy" in flags:
            flags = ["--policy", str(folder / flags[1])]
        else:
            flags = ["--policy", str(policy), *flags]
        cases.append(
            {
                "arguments": [*arguments, *flags],
                "environment": environment,
                "log": str(folder / f"{name}.log"),
            }
        )
    ran = subprocess.run(
        [sys.executable, "-c", _FORKS],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=guard_environment(),
        check=True,
    )
    ends = [json.loads(line) for line in ran.stdout.splitlines()[-len(cases) :]]
    return {
        name: Refusal(code, (folder / f"{name}.log").read_text())
        for name, code in zip(CASES, ends, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_what_the_guard_cannot_work_on_is_one_line(
    name: str, refusals: Mapping[str, Refusal]
) -> None:
    refusal = refusals[name]
    assert refusal.code == 1
    assert refusal.line.startswith("guard: ")
    assert CASES[name][2] in refusal.line
    assert "Traceback" not in refusal.log
    assert refusal.log.count("guard: ") == 1
    assert "EngineCore" not in refusal.log, "said before an engine starts"


def test_the_command_itself_refuses_in_one_line(toy: Toy) -> None:
    policy = toy.write_policy("typo", f"polices: {{}}\n{PLAIN}")
    command = guard_command("serve", str(toy.model), "--policy", str(policy))
    ran = subprocess.run(
        command, capture_output=True, text=True, env=guard_environment(), check=False
    )
    assert ran.returncode == 1
    assert ran.stderr == (
        f"guard: {policy}:4: polices: unknown key; did you mean 'policies'?\n"
    )
