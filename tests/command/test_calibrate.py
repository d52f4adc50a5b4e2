"""`guard calibrate` without an engine: what is written, shown and refused."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from rich.console import Console
from specimens import draw_probe, make_calibration

from guard.calibration import load_calibration, save_calibration
from guard.check import check_calibrations, check_origin, check_policy
from guard.cli import main
from guard.command.calibrate import (
    check_calibration,
    check_target,
    renew_thresholds,
)
from guard.command.calibrate import (
    make_calibration as write_calibration,
)
from guard.errors import CalibrationError, GuardError
from guard.policy import PolicyFile, load_policy
from guard.probe import save_probe
from guard.prompt import Prompt
from guard.recording import Recording
from guard.sae.load import weights_digest
from guard.testing import save_toy_sae
from guard.traffic import Told

AT = "layers.1.resid_post"
LATE = "layers.2.resid_post"
POLICY = """\
version: 1
saes:
  s: {{path: sae, format: guard, hook_point: {at}, sha256: "{digest}"}}
policies:
  default:
    clamps: [{{name: hold, sae: s, latents: [1], law: ablate}}]
    monitors:
      - {{name: far, sae: s, score: density, calibration: c/c.safetensors,
         target_fpr: 0.1, on_alarm: {action}}}
      - {{name: content, hook_point: {late}, score: probe, probe: probe.safetensors,
         calibration: c/c.safetensors, target_fpr: 0.1, on_alarm: {action}}}
  two:
    monitors:
      - {{name: a, sae: s, score: density, calibration: c/c.safetensors,
         target_fpr: 0.1, on_alarm: flag}}
      - {{name: b, sae: s, score: density, calibration: other.safetensors,
         target_fpr: 0.1, on_alarm: flag}}
  open: {{}}
default_policy: default
"""
PROMPTS = [Prompt(prompt=f"{i}", max_tokens=2) for i in range(30)]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with an SAE, a probe for it and a policy that watches both."""
    save_toy_sae(tmp_path / "sae", hook_point=AT)
    save_wide_probe(tmp_path)
    write_policy(tmp_path)
    return tmp_path


def save_wide_probe(folder: Path, *, seed: int = 0) -> None:
    """Write a random probe of the toy's stream."""
    weights = draw_probe(seed=seed)
    weights["weight"] = weights["weight"].repeat(6)[:64]
    weights["inward"] = weights["inward"].repeat(6, 1)[:64]
    save_probe(folder / "probe.safetensors", weights, {})


def write_policy(folder: Path, *, action: str = "flag") -> PolicyFile:
    digest = weights_digest(folder / "sae", "guard")
    text = POLICY.format(at=AT, late=LATE, digest=digest, action=action)
    (folder / "policy.yaml").write_text(text)
    return load_policy(folder / "policy.yaml")


@dataclass
class Engine:
    """Records made-up requests."""

    model_digest: str | None = "digest"
    dtype: str = "bfloat16"
    recorded: list[Prompt] = field(default_factory=list)

    def record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
        for prompt in prompts:
            self.recorded.append(prompt)
            generator = torch.Generator().manual_seed(int(str(prompt.prompt)))
            rows = {at: torch.randn(7, 64, generator=generator) for at in (AT, LATE)}
            yield Recording(rows, 5, 8)


@dataclass
class Server:
    """Tells the same of every prompt, but of the first few an alarm."""

    alarms: int = 0

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[Told]:
        for number, _ in enumerate(prompts):
            alarmed = frozenset({"far"} if number < self.alarms else ())
            yield Told({"far": 1.0 + number, "content": -3.0}, alarmed, 8)


def show() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def write(shop: Path, start: Callable[[], Engine], **values: object) -> Path:
    policy_file = load_policy(shop / "policy.yaml")
    wanted = {"name": "default", "prompts": PROMPTS, "console": show()} | values
    return write_calibration(  # type: ignore[misc]
        policy_file,
        wanted.pop("name"),
        wanted.pop("prompts"),
        start=start,
        model="toy",
        **wanted,
    )


def fail() -> Engine:
    raise AssertionError("the engine was started")


def test_a_calibration_is_written_that_its_policy_accepts(shop: Path) -> None:
    engine, console = Engine(), show()
    path = write(shop, lambda: engine, console=console, lengths=(8, 16)[:1])
    assert path == shop / "c" / "c.safetensors"
    calibration = load_calibration(path)
    policy_file = load_policy(shop / "policy.yaml")
    alone = policy_file.model_copy(
        update={"policies": {"default": policy_file.policies["default"]}}
    )
    check_policy(alone)
    check_calibrations(alone, {str(path): calibration})
    check_origin({"c": calibration}, model="digest", dtype="bfloat16")
    # A third goes into statistics, the rest into thresholds; nobody into both.
    assert len(calibration.maxima[0]) == 20
    assert sorted(engine.recorded, key=PROMPTS.index) == PROMPTS
    about = calibration.provenance
    assert (about["model"], about["prompts"], about["fitting_requests"]) == (
        "toy",
        30,
        10,
    )
    assert about["probes"].keys() == {"content"}
    assert "any that would flag" in shown(console)
    assert "up to 8 tokens (20 requests)" in shown(console)
    assert list(path.parent.iterdir()) == [path]


def test_groups_are_never_split_between_statistics_and_thresholds(shop: Path) -> None:
    engine = Engine()
    prompts = [
        p.model_copy(update={"group": f"{i % 6}"}) for i, p in enumerate(PROMPTS)
    ]
    write(shop, lambda: engine, prompts=prompts)
    fitting = {prompt.group for prompt in engine.recorded[:10]}
    assert len(fitting) == 2
    assert not fitting & {prompt.group for prompt in engine.recorded[10:]}


def test_what_is_wrong_is_known_before_an_engine_starts(shop: Path) -> None:
    for values, words in (
        ({"prompts": PROMPTS[:5]}, r"5 prompts leave 3 .* at least 4 .* 7 prompts"),
        ({"name": "open"}, "'open' name 0 calibrations; expected one for all"),
        ({"name": "two"}, "'two' name 2 calibrations; expected one for all"),
        ({"lengths": (16, 8)}, "do not ascend"),
    ):
        with pytest.raises(CalibrationError, match=words):
            write(shop, fail, **values)
    (shop / "probe.safetensors").unlink()
    with pytest.raises(CalibrationError, match="no such probe"):
        write(shop, fail)
    shop.joinpath("sae", "sae.safetensors").write_bytes(b"")
    save_probe(shop / "probe.safetensors", draw_probe(), {})
    with pytest.raises(GuardError, match="sha256"):
        write(shop, fail)


def test_a_run_that_is_cut_off_goes_on_and_leaves_nothing_behind(shop: Path) -> None:
    class Flaky(Engine):
        def record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
            if self.recorded:
                raise KeyboardInterrupt
            yield from super().record(prompts)

    with pytest.raises(KeyboardInterrupt):
        write(shop, Flaky)
    assert (shop / "c" / "c.safetensors.partial").is_dir()
    again = Engine()
    path = write(shop, lambda: again)
    assert len(again.recorded) == 20
    assert list(path.parent.iterdir()) == [path]
    # Under another probe nothing of it could be used.
    with pytest.raises(KeyboardInterrupt):
        write(shop, Flaky)
    save_wide_probe(shop, seed=3)
    another = Engine()
    write(shop, lambda: another)
    assert len(another.recorded) == 30


def test_thresholds_are_renewed_from_a_server(shop: Path) -> None:
    path = write(shop, Engine)
    before = load_calibration(path)
    policy_file, console = load_policy(shop / "policy.yaml"), show()
    renewed = renew_thresholds(
        policy_file, "default", PROMPTS[:12], server=Server(), console=console
    )
    after = load_calibration(renewed)
    assert renewed == path
    assert after.maxima[0].tolist() == [[1.0 + i, -3.0] for i in range(12)]
    assert after.provenance["thresholds"]["prompts"] == 12
    assert after.provenance["prompts"] == 30
    means = [one.entries["far"].statistics["mean"] for one in (before, after)]
    assert torch.equal(*means)
    assert "(12 requests)" in shown(console)
    with pytest.raises(CalibrationError, match=r"3 prompts leave 3 .* at least 4"):
        renew_thresholds(
            policy_file, "default", PROMPTS[:3], server=Server(), console=show()
        )
    blocking = write_policy(shop, action="block")
    with pytest.raises(CalibrationError, match="Monitors far, content block"):
        renew_thresholds(blocking, "default", PROMPTS, server=Server(), console=show())


def test_there_is_nothing_to_renew_or_check_without_a_calibration(shop: Path) -> None:
    policy_file = load_policy(shop / "policy.yaml")
    for command in (renew_thresholds, check_calibration):
        with pytest.raises(CalibrationError, match="no such calibration"):
            command(policy_file, "default", PROMPTS, server=Server(), console=show())


def test_a_promise_that_is_kept_passes_and_one_that_is_not_does_not(
    shop: Path,
) -> None:
    write(shop, Engine)
    policy_file = load_policy(shop / "policy.yaml")
    fresh = [Prompt(prompt=f"fresh {i}") for i in range(40)]
    for alarms, kept, verdict in (
        (0, True, "as promised"),
        (8, True, "as promised"),
        (40, False, "MORE than promised"),
    ):
        console = show()
        found = check_calibration(
            policy_file, "default", fresh, server=Server(alarms), console=console
        )
        assert found == kept
        assert verdict in shown(console)
        assert " 0.2 " in shown(console)


def test_the_prompts_of_a_calibration_cannot_check_it(shop: Path) -> None:
    write(shop, Engine)
    with pytest.raises(CalibrationError, match="made the calibration; expected fresh"):
        check_calibration(
            load_policy(shop / "policy.yaml"),
            "default",
            PROMPTS,
            server=Server(),
            console=show(),
        )


def test_a_target_needs_as_many_prompts_as_are_left_for_thresholds() -> None:
    check_target(0.05, PROMPTS, recorded=True)
    check_target(0.04, PROMPTS, recorded=False)
    with pytest.raises(
        CalibrationError, match=r"30 prompts leave 20 .* at least 24 .* 36"
    ):
        check_target(0.04, PROMPTS, recorded=True)
    with pytest.raises(CalibrationError, match=r"30 prompts leave 30 .* at least 99"):
        check_target(0.01, PROMPTS, recorded=False)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[object, str]:
    """Run `guard` where no engine can be imported; return exit code and complaint."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(sys, "argv", ["guard", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "\n".join(p.model_dump_json(exclude_defaults=True) for p in PROMPTS)
    )
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--name", "strict"], "Unknown policy 'strict'; expected one of default, two"),
        ([], "No model was named; expected one, or --url of a running server."),
        (["--check"], "No model was named"),
        (["--target-fpr", "0.01", "model"], "30 prompts leave 20 for thresholds"),
        (["--target-fpr", "x", "model"], "Invalid value for '--target-fpr'"),
        (
            ["--lengths", "8,x", "model"],
            "--lengths '8,x' are not numbers",
        ),
        (["--lengths", "16,8", "model"], "do not ascend"),
        (["--name", "open", "model"], "name 0 calibrations"),
        (["--url", "http://127.0.0.1:9"], "no such calibration"),
        (["--check", "--url", "http://127.0.0.1:9"], "no such calibration"),
        (["--what"], "No such option"),
    ],
)
def test_a_command_that_cannot_work_is_one_line_before_the_engine(
    shop: Path,
    lines: Path,
    words: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--policy", shop / "policy.yaml", "--prompts", lines, *words]
    code, complaint = run(monkeypatch, capsys, "calibrate", *given)
    assert code not in (0, None)
    assert complaint.startswith("guard: ")
    assert complaint.count("\n") == 1
    assert expected in complaint


def test_a_server_that_is_not_there_is_one_line(
    shop: Path,
    lines: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy_file = load_policy(shop / "policy.yaml")
    path = policy_file.policies["default"].monitors[0].calibration
    assert path is not None
    save_calibration(make_calibration(policy_file), path)
    for words in ([], ["--check"]):
        given = ["--policy", shop / "policy.yaml", "--prompts", lines, *words]
        code, complaint = run(
            monkeypatch, capsys, "calibrate", *given, "--url", "http://127.0.0.1:9"
        )
        assert code == 1
        # Below the bar of progress, which is no complaint.
        assert complaint.splitlines()[-1].startswith(
            "guard: http://127.0.0.1:9 does not"
        )


def test_a_malformed_prompt_file_is_one_line(
    shop: Path,
    lines: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    given = ["--policy", shop / "policy.yaml", "--prompts", lines, "model"]
    for command in (["calibrate"], ["probe", "train"]):
        words = given if command == ["calibrate"] else ["model", *given[:-1]]
        code, complaint = run(monkeypatch, capsys, *command, *words)
        assert code == 1
        assert f"{lines}:2: promt" in complaint
        assert complaint.count("\n") == 1
