"""A guarded process without an engine: a policy folder, read as a server would."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from specimens import make_calibration, write_certificate
from vllm_guard import context

from guard.calibration import save_calibration
from guard.drill import RecoveryEdit, save_edit
from guard.fingerprint import fingerprint
from guard.policy import load_policy
from guard.sae.load import weights_digest
from guard.testing import save_toy_sae

POLICY = """
version: 1
saes:
  s: {{path: sae, format: guard, hook_point: layers.1.resid_post, sha256: {digest}}}
policies:
  default:
    clamps:
      - {{name: hold, sae: s, latents: [1, 2], law: set, value: 3.0}}
      - {{name: late, sae: s, latents: [3], law: ablate,
          when: {{latents: [5], above: 0.5, scope: request}}}}
    monitors:
      - {{name: watch, sae: s, score: error_norm, calibration: c.safetensors,
          target_fpr: 0.1, on_alarm: block}}
  research:
    clamps: [{{name: other, sae: s, latents: [4], law: ablate}}]
    {certificate}
  open: {{}}
  free: {{constrained_decoding: refuse}}
default_policy: default
public_policies: [default, research, open, free]
{extra}
"""


DRILLS = """
drills:
  - {name: last, sae: s, delta: last_prompt.safetensors}
  - {name: whole, sae: s, delta: all_prompt.safetensors, position: all_prompt}
"""


@pytest.fixture
def write_policy(tmp_path: Path) -> Callable[..., Path]:
    """Write a policy folder, with `extra` lines at the end of its file.

    `certificate` is a line of the policy `research`.
    """
    save_toy_sae(tmp_path / "sae")
    digest = weights_digest(tmp_path / "sae", "guard")
    delta = torch.linspace(-1, 1, 64)
    for position in ("last_prompt", "all_prompt"):
        edit = RecoveryEdit(delta, f"w1 {position}", "w2", 0.5, position, digest)
        save_edit(tmp_path / f"{position}.safetensors", edit)

    def write(extra: str = "", *, certificate: str = "") -> Path:
        path = tmp_path / "policy.yaml"
        text = POLICY.format(digest=digest, extra=extra, certificate=certificate)
        path.write_text(text)
        calibration = make_calibration(
            load_policy(path),
            lengths=(16, 64),
            maxima=(torch.arange(1.0, 20.0), 100 * torch.arange(1.0, 20.0)),
        )
        save_calibration(calibration, tmp_path / "c.safetensors")
        return path

    return write


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without any state, and leave none."""
    for name in ("POLICY", "SECRET", "FINGERPRINT", "RECORD", "FAULT_FILE"):
        monkeypatch.delenv(f"GUARD_{name}", raising=False)
    context.reset()
    yield
    context.reset()


@pytest.fixture
def state(
    write_policy: Callable[..., Path],
    clean_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> context.Context:
    """Enter under the policy folder; slots are default 1, research 2, open 3."""
    monkeypatch.setenv("GUARD_POLICY", str(write_policy()))
    assert context.enter()
    return context.get()


@pytest.fixture
def certified(
    write_policy: Callable[..., Path],
    clean_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> context.Context:
    """Enter under the same folder, with a certificate for `research`."""
    path = write_policy(certificate="certificate: r.json")
    issued_for = fingerprint(load_policy(path), "research")
    write_certificate(path.with_name("r.json"), issued_for)
    monkeypatch.setenv("GUARD_POLICY", str(path))
    assert context.enter()
    return context.get()


@pytest.fixture
def drilled(
    write_policy: Callable[..., Path],
    clean_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> context.Context:
    """Enter under the same folder with two drills: last 1, whole 2."""
    monkeypatch.setenv("GUARD_POLICY", str(write_policy(DRILLS)))
    assert context.enter()
    return context.get()
