"""Real servers on real small models: what the end-to-end tests are made of."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from guard.calibration import Entry, load_calibration, save_calibration
from guard.check import digest_model
from guard.fingerprint import clamps_digest
from guard.policy import load_policy
from guard.recording import fit_calibration
from guard.redteam.server import find_free_port
from guard.sae.load import load_sae, weights_digest
from guard.sae.model import Sae
from guard.score import SCORES, Activations
from guard.testing import make_toy_model, save_toy_sae

HOOK_POINT = "layers.1.resid_post"
START_SECONDS = 420
THREADS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""One for each engine, wherever there is room: by itself vLLM puts all of them onto the
same first core."""


@dataclass(frozen=True)
class Toy:
    """A random model, an SAE for it, and calibrations on its own traffic."""

    folder: Path
    digest: str

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def provenance(self) -> dict[str, str]:
        """What a calibration must say that it was made for."""
        return {"model_digest": digest_model(self.model), "dtype": "float32"}

    def write_policy(self, name: str, body: str) -> Path:
        """Write a policy file whose SAE is called `s`; `body` is all that follows.

        Each policy gets a copy of the calibrations it names, for its own clamps.
        """
        path = self.folder / f"{name}.yaml"
        text = (
            "version: 1\n"
            f"saes:\n  s: {{path: sae, format: guard, hook_point: {HOOK_POINT}, "
            f'sha256: "{self.digest}"}}\n{body}'
        )
        content = yaml.safe_load(text)
        sources: dict[tuple[str, str], Path] = {}
        for policy, entry in content["policies"].items():
            for monitor in entry.get("monitors", ()):
                source = monitor["calibration"]
                sources[policy, monitor["name"]] = self.folder / source
                monitor["calibration"] = f"calibrations/{name}/{policy}/{source}"
        # Untouched where nothing is watched: some of these files are wrong on purpose.
        path.write_text(
            yaml.safe_dump(content, sort_keys=False) if sources else text,
            encoding="utf-8",
        )
        if sources:
            copy_calibrations(path, sources)
        return path


def copy_calibrations(path: Path, sources: Mapping[tuple[str, str], Path]) -> None:
    """Write the calibrations of a policy file, as if each was made for its policy.

    Args:
        path: Of the policy file.
        sources: By names of policy and monitor, the calibration of a score, alone.
    """
    policy_file = load_policy(path)
    for (name, watching), source in sources.items():
        calibration = load_calibration(source)
        (entry,) = calibration.entries.values()
        (monitor,) = (
            monitor
            for monitor in policy_file.policies[name].monitors
            if monitor.name == watching
        )
        digest = clamps_digest(policy_file, name)
        save_calibration(
            replace(
                calibration,
                entries={watching: entry},
                provenance={**calibration.provenance, "clamps": digest},
            ),
            monitor.calibration,
        )


def make_toy(folder: Path) -> Toy:
    """Make the toy and calibrate its scores on benign prompts."""
    make_toy_model(folder / "model")
    save_toy_sae(folder / "sae", hook_point=HOOK_POINT)
    toy = Toy(folder, weights_digest(folder / "sae", format="guard"))
    resids = list(benign_resids(toy, count=300))
    for score in ("density", "error_norm"):
        calibrate_score(toy, score, sae="sae", fitting=resids[:100], held=resids[100:])
    return toy


def calibrate_score(
    toy: Toy,
    score: str,
    *,
    sae: str,
    fitting: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    path: str = "",
) -> None:
    """Calibrate one score on benign requests, for `write_policy` to copy.

    Args:
        toy: Gets SCORE.safetensors.
        score: A key of `SCORES`.
        sae: Folder of the SAE.
        fitting: Streams of requests for the statistics, `[num_tokens, d_model]` each.
        held: Of others, for the thresholds.
        path: Another name of the file.
    """
    loaded = load_sae(toy.folder / sae, format="guard")
    benign = explain(loaded, torch.cat(list(fitting)))
    entry = Entry(
        score=score,
        hook_point=loaded.config.hook_point,
        stage=None,
        window=1,
        statistics=SCORES[score].fit(benign),
        sae_sha256=(
            weights_digest(toy.folder / sae, format="guard")
            if SCORES[score].needs_sae
            else None
        ),
    )

    def find_maxima(resids: Sequence[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        scores = [
            SCORES[score].apply(explain(loaded, resid), entry.statistics)
            for resid in resids
        ]
        return [(len(one), one.amax()[None]) for one in scores]

    calibration = fit_calibration(
        {score: entry},
        reference=find_maxima(fitting),
        held_out=find_maxima(held),
        lengths=[2048],
        provenance=toy.provenance,
    )
    save_calibration(calibration, toy.folder / (path or f"{score}.safetensors"))


def explain(sae: Sae, resid: torch.Tensor) -> Activations:
    """Return a stream with the error that an SAE makes of it."""
    return Activations(resid, resid - sae.decode(sae.encode(resid)))


def benign_resids(toy: Toy, *, count: int) -> Iterator[torch.Tensor]:
    """Yield the stream on random prompts, without BOS."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy.model)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(4, 124, (count, 25), generator=generator)
    prompts[:, 0] = 1
    with torch.no_grad():
        states = model(prompts, output_hidden_states=True).hidden_states
    yield from states[2][:, 1:]


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
    environment = inherited | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        **(extra or {}),
    }
    # Before, not instead of, where this process finds the code under test.
    paths = [given.get("PYTHONPATH") for given in (extra or {}, inherited)]
    if any(paths):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def launch(
    model: Path,
    policy: Path,
    flags: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
) -> Server:
    port = find_free_port()
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
  free: {constrained_decoding: refuse}
  staff: {mode: observe}
default_policy: default
public_policies: [default, held, open, free]
"""
