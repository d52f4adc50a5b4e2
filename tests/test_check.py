"""Whatever can be known of a policy file without an engine is known at once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specimens import (
    AT,
    make_calibration,
    make_monitor,
    make_policy_file,
    write_certificate,
)

from guard.calibration import Calibration, save_calibration
from guard.check import (
    check_calibrations,
    check_origin,
    check_policy,
    digest_model,
    load_calibrations,
    load_saes,
)
from guard.drill import RecoveryEdit, save_edit
from guard.errors import (
    CalibrationError,
    CertificateError,
    DrillError,
    GuardError,
    SaeError,
)
from guard.fingerprint import fingerprint
from guard.policy import Policy, PolicyFile, Rule, load_policy
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
{certificate}
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
        wanted |= {"drills": "", "certificate": ""}
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


def test_a_certificate_must_be_that_of_the_policy_with_all_it_stands_on(
    write: Callable[..., PolicyFile], tmp_path: Path
) -> None:
    policy_file = write(certificate="    certificate: c.json")
    write_certificate(tmp_path / "c.json", fingerprint(policy_file, "default"))
    check_policy(policy_file)
    with pytest.raises(CertificateError, match=r"c\.json: was issued for .* 'default'"):
        check_policy(write(certificate="    certificate: c.json", latent=4))


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


LATE = "layers.5.resid_post"


def hold(**values: Any) -> Rule:
    wanted = {"name": "hold", "sae": "a", "latents": (1,), "law": "ablate"}
    return Rule.model_validate(wanted | values)


def watched(*clamps: Rule, **values: Any) -> PolicyFile:
    """Return a policy file whose one monitor is called `watch`."""
    policy = Policy(clamps=clamps, monitors=(make_monitor(**values),))
    return make_policy_file({"p": policy}, saes={"a": AT, "b": LATE})


def check(policy_file: PolicyFile, calibration: Calibration) -> None:
    check_calibrations(policy_file, {"calibration": calibration})


USUAL: dict[str, Any] = {"score": "error", "stage": "output", "window": 4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": "error_norm"}, "score 'error'; expected 'error_norm'"),
        ({"sae": "b"}, f"hook_point '{AT}'; expected '{LATE}'"),
        ({"stage": "prompt"}, "stage 'output'; expected 'prompt'"),
        ({"stage": None}, "stage 'output'; expected None"),
        ({"window": 1}, "window 4; expected 1"),
        ({"window": 1, "drift": 0.5}, "window 4; expected 1"),
    ],
)
def test_a_monitor_that_was_calibrated_as_another_is_refused_by_name(
    change: dict[str, Any], words: str
) -> None:
    calibration = make_calibration(watched(**USUAL))
    check(watched(**USUAL), calibration)
    with pytest.raises(CalibrationError) as caught:
        check(watched(**USUAL | change), calibration)
    assert str(caught.value) == (
        f"calibration: monitor 'watch' was calibrated with {words}. Calibrate again."
    )


@pytest.mark.parametrize(("was", "now"), [(None, 0.5), (0.5, None), (0.5, 0.25)])
def test_a_monitor_that_was_calibrated_with_another_drift_is_refused(
    was: float | None, now: float | None
) -> None:
    calibration = make_calibration(watched(drift=was))
    check(watched(drift=was), calibration)
    words = f"drift {was!r}; expected {now!r}. Calibrate again."
    with pytest.raises(CalibrationError, match=words):
        check(watched(drift=now), calibration)


@pytest.mark.parametrize("score", ["error", "error_norm", "clamp_residual"])
def test_a_calibration_for_another_sae_is_refused(score: str) -> None:
    policy_file = watched(score=score)
    calibration = make_calibration(policy_file)
    entry = replace(calibration.entries["watch"], sae_sha256="f" * 64)
    with pytest.raises(CalibrationError, match=f"sae_sha256 '{'f' * 64}'; expected"):
        check(policy_file, replace(calibration, entries={"watch": entry}))


def test_a_score_of_the_stream_alone_does_not_care_whose_sae_is_there() -> None:
    by_place = watched(score="density", hook_point=AT)
    by_sae = watched(score="density")
    check(by_place, make_calibration(by_sae))
    check(by_sae, make_calibration(by_place))
    with pytest.raises(CalibrationError, match=f"'{AT}'; expected '{LATE}'"):
        check(watched(score="density", hook_point=LATE), make_calibration(by_sae))


def test_a_monitor_that_is_not_in_the_calibration_is_refused() -> None:
    calibration = make_calibration(watched())
    with pytest.raises(
        CalibrationError, match="no monitor 'other'; expected one of wa"
    ):
        check(watched(name="other"), calibration)


@pytest.mark.parametrize(
    "clamps",
    [
        (),
        (hold(latents=(1, 2)),),
        (hold(law="cap", value=0.0),),
        (hold(sae="b"),),
        (hold(), hold(name="more", latents=(5,))),
    ],
)
def test_a_calibration_made_under_other_clamps_is_refused(
    clamps: tuple[Rule, ...],
) -> None:
    calibration = make_calibration(watched(hold()))
    check(watched(hold(name="renamed")), calibration)
    with pytest.raises(CalibrationError, match="other clamps than those of policy 'p'"):
        check(watched(*clamps), calibration)


def test_every_policy_of_a_file_is_checked_against_its_own_calibration() -> None:
    monitors = (make_monitor(),)
    several = {
        "p": Policy(monitors=monitors),
        "q": Policy(clamps=(hold(),), monitors=monitors),
    }
    policy_file = make_policy_file(several, saes={"a": AT})
    with pytest.raises(CalibrationError, match="other clamps than those of policy 'q'"):
        check(policy_file, make_calibration(policy_file, "p"))
    with pytest.raises(CalibrationError, match="other clamps than those of policy 'p'"):
        check(policy_file, make_calibration(policy_file, "q"))


def test_monitors_that_share_a_budget_need_requests_for_one_budget() -> None:
    monitors = tuple(make_monitor(f"m{i}", target_fpr=0.05) for i in range(3))
    policy_file = make_policy_file({"p": Policy(monitors=monitors)}, saes={"a": AT})
    check(policy_file, make_calibration(policy_file, maxima=[torch.arange(6.0)]))
    with pytest.raises(
        CalibrationError, match=r"0.15, the sum over m0, m1, m2, .* 6\."
    ):
        check(policy_file, make_calibration(policy_file, maxima=[torch.arange(5.0)]))


ORIGIN = {"model_digest": "abc", "dtype": "bfloat16"}


def test_a_calibration_made_for_another_model_or_dtype_is_refused() -> None:
    def calibrations(**provenance: object) -> dict[str, Calibration]:
        return {
            "good": make_calibration(watched(), provenance=ORIGIN),
            "c": make_calibration(watched(), provenance=provenance),
        }

    check_origin(calibrations(**ORIGIN), model="abc", dtype="bfloat16")
    # A model without files at hand has no digest to compare.
    check_origin(calibrations(**ORIGIN), model=None, dtype="bfloat16")
    check_origin(
        calibrations(**ORIGIN | {"model_digest": None}), model=None, dtype="bfloat16"
    )
    for change, key, found, wanted in (
        ({"model_digest": "xyz"}, "model_digest", "'xyz'", "'abc'"),
        ({"model_digest": None}, "model_digest", "None", "'abc'"),
        ({"dtype": "float32"}, "dtype", "'float32'", "'bfloat16'"),
    ):
        with pytest.raises(CalibrationError) as caught:
            check_origin(calibrations(**ORIGIN | change), model="abc", dtype="bfloat16")
        assert str(caught.value) == (
            f"c: was made for {key} {found}; this server has {wanted}. Calibrate again."
        )
    with pytest.raises(CalibrationError, match="dtype None; this server has"):
        check_origin(calibrations(model_digest="abc"), model="abc", dtype="bfloat16")


def write_model(folder: Path, *, weights: bytes = bytes(10_000)) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_digest_tells_models_apart_by_config_name_size_and_content(
    tmp_path: Path,
) -> None:
    big = bytes(9 << 20)
    folders = [write_model(tmp_path / f"{i}", weights=big) for i in range(6)]
    (folders[1] / "config.json").write_text('{"hidden_size": 1}')
    (folders[2] / "model.safetensors").write_bytes(big + b"0")
    (folders[3] / "model.safetensors").write_bytes(b"1" + big[1:])
    (folders[4] / "model.safetensors").rename(folders[4] / "other.safetensors")
    (folders[5] / "README.md").write_text("says nothing")
    digests = [digest_model(folder) for folder in folders]
    assert len(set(digests[:5])) == 5
    assert digests[5] == digests[0]
    small = [write_model(tmp_path / name, weights=big[:100]) for name in "ab"]
    (small[1] / "model.safetensors").write_bytes(big[:99] + b"1")
    assert digest_model(small[0]) != digest_model(small[1])


def test_a_folder_that_is_no_model_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be read .* expected a model"):
        digest_model(tmp_path)
