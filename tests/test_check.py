"""Whatever can be known of a policy file without an engine is known at once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from specimens import make_calibration

from guard.calibration import save_calibration
from guard.check import check_policy, load_calibrations, load_saes
from guard.drill import RecoveryEdit, save_edit
from guard.errors import CalibrationError, DrillError, GuardError, SaeError
from guard.policy import Policy, PolicyFile, load_policy
from guard.sae.load import weights_digest
from guard.testing import save_toy_sae

POLICY = """
version: 1
saes:
  used: {{path: used, format: guard, hook_point: {at}, sha256: {digest}}}
  unused: {{path: nowhere, format: guard, hook_point: {at}, sha256: {zeros}}}
policies:
  default:
    clamps:
      - {{name: hold, sae: used, latents: [{latent}], law: ablate}}
    monitors:
      - {{name: watch, sae: used, score: error_norm, calibration: c.safetensors,
          target_fpr: {target}, on_alarm: block}}
default_policy: default
{drills}
"""
DRILL = "drills: [{name: fire, sae: used, delta: fire.safetensors}]"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., PolicyFile]:
    """Write a whole policy folder, with one thing or another changed."""
    save_toy_sae(tmp_path / "used")
    digest = weights_digest(tmp_path / "used", "guard")

    def write(*, at: str = "layers.1.resid_post", **values: object) -> PolicyFile:
        path = tmp_path / "policy.yaml"
        wanted = {"latent": 3, "target": 0.2, "digest": digest, "zeros": "a" * 64}
        wanted["drills"] = ""
        path.write_text(POLICY.format(at=at, **(wanted | values)))
        policy_file = load_policy(path)
        calibration = make_calibration(
            policy_file,
            lengths=(10, 20),
            maxima=(torch.arange(9.0), torch.arange(5.0)),
        )
        save_calibration(calibration, tmp_path / "c.safetensors")
        return policy_file

    return write


def test_a_whole_policy_folder_passes(write: Callable[..., PolicyFile]) -> None:
    check_policy(write())


def test_an_sae_that_no_policy_uses_is_not_loaded(
    write: Callable[..., PolicyFile],
) -> None:
    assert list(load_saes(write())) == ["used"]


def test_calibrations_are_found_by_their_path(
    write: Callable[..., PolicyFile], tmp_path: Path
) -> None:
    assert list(load_calibrations(write())) == [str(tmp_path / "c.safetensors")]


@pytest.mark.parametrize(
    ("values", "fault", "words"),
    [
        ({"digest": "b" * 64}, SaeError, "sha256"),
        ({"latent": 96}, SaeError, "latent 96.*expected 0 to 95"),
        ({"at": "layers.2.resid_post"}, SaeError, "layers.2.resid_post"),
        # 9 requests would do for one in ten, but the second bucket holds only 5.
        ({"target": 0.1}, CalibrationError, "up to 20 tokens.*at least 9"),
    ],
)
def test_the_first_fault_is_one_clear_line(
    write: Callable[..., PolicyFile],
    values: dict[str, object],
    fault: type[GuardError],
    words: str,
) -> None:
    with pytest.raises(fault, match=words) as caught:
        check_policy(write(**values))
    assert "\n" not in str(caught.value)


def test_a_missing_calibration_is_one_clear_line(
    write: Callable[..., PolicyFile], tmp_path: Path
) -> None:
    policy_file = write()
    (tmp_path / "c.safetensors").unlink()
    with pytest.raises(CalibrationError, match="no such calibration"):
        check_policy(policy_file)


def save_drill(folder: Path, *, width: int = 64, **values: object) -> None:
    wanted: dict[str, object] = {
        "delta": torch.ones(width),
        "prompt": "w1",
        "gold": "w2",
        "budget": 0.5,
        "position": "last_prompt",
        "sae_sha256": weights_digest(folder / "used", "guard"),
    }
    edit = RecoveryEdit(**(wanted | values))  # type: ignore[arg-type]
    save_edit(folder / "fire.safetensors", edit)


def test_a_drill_that_fits_passes_and_loads_the_sae_it_names(
    write: Callable[..., PolicyFile], tmp_path: Path
) -> None:
    save_drill(tmp_path)
    policy_file = write(drills=DRILL)
    check_policy(policy_file)
    bare = policy_file.model_copy(update={"policies": {"default": Policy()}})
    assert list(load_saes(bare)) == ["used"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 63}, "its delta is 63 wide; expected 64, as SAE 'used' is"),
        ({"sae_sha256": "b" * 64}, f"was found for an SAE of sha256 {'b' * 64}; exp"),
        ({"position": "all_prompt"}, "for position all_prompt; expected last_prompt"),
    ],
)
def test_a_drill_that_does_not_fit_is_one_clear_line(
    write: Callable[..., PolicyFile],
    tmp_path: Path,
    values: dict[str, object],
    words: str,
) -> None:
    save_drill(tmp_path, **values)
    with pytest.raises(DrillError, match=words) as caught:
        check_policy(write(drills=DRILL))
    assert str(caught.value).startswith(f"{tmp_path / 'fire.safetensors'}: ")
    assert "\n" not in str(caught.value)
