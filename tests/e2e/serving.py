"""Real servers on real small models: what the end-to-end tests are made of."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from guard.calibration import fit_calibration, save_calibration
from guard.monitor import Activations
from guard.sae.load import load_sae, weights_digest
from guard.testing import make_toy_model, save_toy_sae

HOOK_POINT = "layers.1.resid_post"
START_SECONDS = 420


@dataclass(frozen=True)
class Toy:
    """A random model, an SAE for it, and calibrations on its own traffic."""

    folder: Path
    digest: str

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def write_policy(self, name: str, body: str) -> Path:
        """Write a policy file whose SAE is called `s`; `body` is all that follows."""
        path = self.folder / f"{name}.yaml"
        path.write_text(
            "version: 1\n"
            f"saes:\n  s: {{path: sae, format: guard, hook_point: {HOOK_POINT}, "
            f'sha256: "{self.digest}"}}\n{body}',
            encoding="utf-8",
        )
        return path


def make_toy(folder: Path) -> Toy:
    """Make the toy and calibrate its scores on benign prompts."""
    make_toy_model(folder / "model")
    save_toy_sae(folder / "sae", hook_point=HOOK_POINT)
    toy = Toy(folder, weights_digest(folder / "sae", format="guard"))
    requests = list(benign_activations(toy, count=300))
    for score in ("density", "error_norm"):
        calibration = fit_calibration(
            score,
            hook_point=HOOK_POINT,
            fitting=Activations(
                torch.cat([request.resid for request in requests[:100]]),
                torch.cat([request.error for request in requests[:100]]),
            ),
            held_out=requests[100:],
            lengths=[2048],
            provenance={"sae_sha256": toy.digest},
        )
        save_calibration(calibration, folder / f"{score}.safetensors")
    return toy


def benign_activations(toy: Toy, *, count: int) -> Iterator[Activations]:
    """Yield the stream and the SAE's error on random prompts, without BOS."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy.model)
    sae = load_sae(toy.folder / "sae", format="guard")
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(4, 124, (count, 25), generator=generator)
    prompts[:, 0] = 1
    with torch.no_grad():
        states = model(prompts, output_hidden_states=True).hidden_states
    for resid in states[2][:, 1:]:
        yield Activations(resid, resid - sae.decode(sae.encode(resid)))


@dataclass(frozen=True)
class Server:
    """A running `guard serve`."""

    url: str
    log: Path
    process: "subprocess.Popen[bytes]"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def metrics(self) -> dict[str, float]:
        """Return every guard sample, keyed `name{label="value",...}`, labels sorted."""
        samples = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                labels = ",".join(
                    f'{k}="{v}"' for k, v in sorted(sample.labels.items())
                )
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = (
                    sample.value
                )
        return {k: v for k, v in samples.items() if k.startswith("guard_")}


ServerFactory = Callable[..., Server]


def guard_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "guard", *arguments]


def guard_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which small servers share this machine."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GUARD_")}
    return inherited | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **(extra or {}),
    }


def launch(
    model: Path,
    policy: Path,
    flags: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
) -> Server:
    port = free_port()
    log = folder / "log"
    command = guard_command(
        *("serve", str(model), "--policy", str(policy), "--port", str(port)),
        *("--host", "127.0.0.1", "--served-model-name", "model"),
        *("--dtype", "float32", "--max-num-seqs", "16", *flags),
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=guard_environment(environment),
            start_new_session=True,
        )
    return Server(f"http://127.0.0.1:{port}", log, process)


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError, ValueError):
            if json.loads(server.get("/guard/ready")).get("ready"):
                return
        time.sleep(0.5)
    tail = server.log.read_text(errors="replace")[-4000:]
    pytest.fail(f"The server did not become ready:\n{tail}")


def list_processes(server: Server) -> list[str]:
    """Return the server's processes that are alive, by number and name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (folder / "stat").read_text().rpartition(") ")
            state, _, _, session = rest.split()[:4]
            if int(session) == server.process.pid and state not in "ZX":
                found.append(f"{name})")
    return found


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TOY_POLICIES = """\
policies:
  default:
    clamps:
      - {name: hold, sae: s, latents: [1, 2], law: ablate}
      - {name: lift, sae: s, latents: [5], law: set, value: 4.0,
         when: {latents: [7, 8], above: 0.5, scope: request}}
    monitors:
      - {name: recovery, sae: s, score: density, calibration: density.safetensors,
         target_fpr: 0.01, on_alarm: flag}
  held:
    clamps:
      - {name: hold, sae: s, latents: [1, 2], law: ablate}
  open: {}
  staff: {mode: observe}
default_policy: default
public_policies: [default, held, open]
"""
