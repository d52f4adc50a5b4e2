"""Traffic through a policy: interrupted, continued, asked of a server, and judged."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specimens import (
    AT,
    assert_same_calibration,
    draw_probe,
    draw_rows,
    make_calibration,
    make_monitor,
    make_policy_file,
    watch_everything,
)

from guard.calibration import Calibration, excess_probability
from guard.errors import CalibrationError
from guard.policy import Policy
from guard.prompt import Prompt
from guard.recording import Reader, Recording
from guard.traffic import (
    Plan,
    Told,
    calibrate,
    check_sample,
    judge_alarms,
    recalibrate,
)

FITTING, HELD_OUT, CHUNK = 12, 17, 5


class CutOffError(Exception):
    """What ends a run in the middle."""


@dataclass
class Played:
    """A recorder that makes up what a prompt shows, and may be interrupted."""

    stop_at: int | None = None
    """How many requests it records before it is interrupted."""
    recorded: list[int] = field(default_factory=list)

    def record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
        for prompt in prompts:
            if len(self.recorded) == self.stop_at:
                raise CutOffError
            number = int(str(prompt.prompt))
            self.recorded.append(number)
            yield record(number)


def record(number: int) -> Recording:
    prompt, output = 3 + number % 4, 1 + number % 3
    return Recording(
        resid={
            f"layers.{layer}.resid_post": draw_rows(
                prompt + output, seed=10 * number + layer
            )
            for layer in (1, 3, 5)
        },
        prompt_length=prompt,
        total_length=prompt + output + 1,
    )


@pytest.fixture(scope="module")
def reader() -> Reader:
    policy_file, saes = watch_everything()
    return Reader(policy_file, "p", saes)


def make_plan(*, held_out: int = HELD_OUT, lengths: tuple[int, ...] = (7, 10)) -> Plan:
    numbers = [Prompt(prompt=f"{i}") for i in range(FITTING + held_out)]
    return Plan(
        numbers[:FITTING],
        numbers[FITTING:],
        lengths=lengths,
        probes={"content": draw_probe()},
    )


def run(
    reader: Reader,
    recorder: Played,
    work: Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    done: list[int] | None = None,
) -> Calibration:
    return calibrate(
        reader,
        recorder,
        plan or make_plan(),
        provenance=provenance or {"model": "toy", "date": "2026-01-01"},
        work=work,
        on_requests=[].append if done is None else done.append,
    )


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.traffic._CHUNK", CHUNK)


def test_a_calibration_keeps_the_maxima_of_held_out_requests_alone(
    reader: Reader, tmp_path: Path
) -> None:
    recorder = Played()
    calibration = run(reader, recorder, tmp_path)
    assert recorder.recorded == list(range(FITTING + HELD_OUT))
    held_out = [record(number) for number in range(FITTING, FITTING + HELD_OUT)]
    expected: list[list[torch.Tensor]] = [[], []]
    for one in held_out:
        maxima = reader.maxima(calibration.entries, one)
        expected[one.total_length > 7].append(maxima)
    assert calibration.lengths == (7, 10)
    for found, wanted in zip(calibration.maxima, expected, strict=True):
        assert torch.equal(found, torch.stack(wanted))
    assert list(calibration.entries) == [m.name for m in reader.policy.monitors]
    assert calibration.provenance == {"model": "toy", "date": "2026-01-01"}


def test_without_lengths_there_is_one_bucket_for_all(
    reader: Reader, tmp_path: Path
) -> None:
    calibration = run(reader, Played(), tmp_path, plan=make_plan(lengths=()))
    assert calibration.lengths == (10,)
    assert len(calibration.maxima[0]) == HELD_OUT


def finished(stop_at: int) -> list[int]:
    """Return the requests whose part of a run is done after so many of them."""
    if stop_at < FITTING:
        return []
    chunks = (stop_at - FITTING) // CHUNK
    return list(range(FITTING + chunks * CHUNK))


@pytest.mark.parametrize("stop_at", range(FITTING + HELD_OUT))
def test_a_run_goes_on_where_it_was_interrupted(
    reader: Reader, tmp_path: Path, stop_at: int
) -> None:
    whole = run(reader, Played(), tmp_path / "whole")
    with pytest.raises(CutOffError):
        run(reader, Played(stop_at), tmp_path / "work")
    again, done = Played(), []
    calibration = run(reader, again, tmp_path / "work", done=done)
    assert_same_calibration(calibration, whole)
    everything = list(range(FITTING + HELD_OUT))
    assert again.recorded == everything[len(finished(stop_at)) :]
    assert sum(done) == len(everything)


def test_a_run_that_is_interrupted_again_and_again_ends(
    reader: Reader, tmp_path: Path
) -> None:
    whole = run(reader, Played(), tmp_path / "whole")
    recorded: list[int] = []
    # As many requests a time as the fit takes, which is done in one piece.
    for _ in range(5):
        recorder = Played(FITTING)
        try:
            calibration = run(reader, recorder, tmp_path / "work")
        except CutOffError:
            continue
        finally:
            recorded += recorder.recorded
        break
    assert_same_calibration(calibration, whole)
    assert len(recorded) < 3 * (FITTING + HELD_OUT)


def test_what_was_half_written_is_not_taken_for_done(
    reader: Reader, tmp_path: Path
) -> None:
    whole = run(reader, Played(), tmp_path / "whole")
    work = tmp_path / "work"
    with pytest.raises(CutOffError):
        run(reader, Played(3), work)
    (work / "fit.new").write_bytes(b"half")
    (work / "chunk-0.new").write_bytes(b"half")
    assert_same_calibration(run(reader, Played(), work), whole)


@pytest.mark.parametrize(
    ("provenance", "kept"),
    [
        ({"model": "toy", "date": "2026-01-01"}, True),
        ({"date": "2026-01-01", "model": "toy"}, True),
        # A run over midnight is one run.
        ({"model": "toy", "date": "2026-01-02"}, True),
        ({"model": "another", "date": "2026-01-01"}, False),
        ({"model": "toy", "date": "2026-01-01", "clamps": "x"}, False),
    ],
)
def test_what_was_done_for_another_calibration_is_done_anew(
    reader: Reader, tmp_path: Path, provenance: dict[str, str], kept: bool
) -> None:
    with pytest.raises(CutOffError):
        run(reader, Played(25), tmp_path)
    again = Played()
    calibration = run(reader, again, tmp_path, provenance=provenance)
    done = finished(25) if kept else []
    assert again.recorded == list(range(FITTING + HELD_OUT))[len(done) :]
    assert calibration.provenance == provenance


def test_too_few_held_out_requests_are_refused_with_the_number_needed(
    reader: Reader, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"holds 2 requests .* needs at least 3"):
        run(reader, Played(), tmp_path, plan=make_plan(held_out=2, lengths=()))
    run(reader, Played(), tmp_path / "3", plan=make_plan(held_out=3, lengths=()))


def test_every_bucket_must_hold_enough() -> None:
    policy = Policy(monitors=(make_monitor(target_fpr=0.1),))
    policy_file = make_policy_file({"p": policy}, saes={"a": AT})

    def check(*counts: int) -> None:
        maxima = [torch.arange(float(count)) for count in counts]
        lengths = range(10, 10 * len(counts) + 1, 10)
        check_sample(
            make_calibration(policy_file, maxima=maxima, lengths=lengths), policy
        )

    check(9, 9)
    with pytest.raises(CalibrationError, match="8 requests of up to 20 tokens"):
        check(9, 8)


WATCHED = (make_monitor("far", on_alarm="flag"), make_monitor("late", on_alarm="flag"))


@dataclass
class Asked:
    """A server that tells what it was given."""

    told: Sequence[Told]
    asked: list[Prompt] = field(default_factory=list)

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[Told]:
        self.asked += prompts
        yield from self.told


def tell(length: int, *, alarms: Sequence[str] = (), **scores: float) -> Told:
    return Told(scores or {"far": 1.0, "late": 2.0}, frozenset(alarms), length)


def old_calibration(policy: Policy) -> Calibration:
    policy_file = make_policy_file({"p": policy}, saes={"a": AT})
    calibration = make_calibration(
        policy_file,
        maxima=[torch.zeros(50, 2), torch.zeros(50, 2)],
        lengths=(10, 20),
        provenance={"model": "toy", "thresholds": "old"},
    )
    scales = tuple(torch.tensor([[3.0, 4.0], [5.0, 6.0]]) for _ in range(2))
    return replace(calibration, scales=scales)


def renew(
    policy: Policy, told: Sequence[Told], *, known: Policy | None = None
) -> Calibration:
    return recalibrate(
        old_calibration(known or policy),
        policy,
        Asked(told),
        [Prompt(prompt="x")] * len(told),
        provenance={"thresholds": "new"},
    )


def test_a_server_sets_thresholds_anew_and_nothing_else() -> None:
    policy = Policy(monitors=WATCHED)
    told = [tell(7 + i, far=float(i), late=-float(i)) for i in range(13)]
    fresh, old = renew(policy, told), old_calibration(policy)
    assert fresh.maxima[0].tolist() == [[i, -i] for i in range(4)]
    assert fresh.maxima[1].tolist() == [[i, -i] for i in range(4, 13)]
    assert fresh.lengths == old.lengths
    assert fresh.entries == old.entries
    assert all(map(torch.equal, fresh.scales, old.scales))
    assert fresh.provenance == {**old.provenance, "thresholds": "new"}


def test_a_request_without_tokens_of_a_stage_counts_for_the_other_monitors() -> None:
    told = [tell(7, far=float(i), late=-math.inf if i else 1.0) for i in range(9)]
    told += [tell(12, far=1.0, late=1.0)] * 9
    fresh = renew(Policy(monitors=WATCHED), told)
    assert fresh.maxima[0][1].tolist() == [1.0, -math.inf]


def test_a_benign_request_that_is_not_finite_sets_no_threshold() -> None:
    told = [tell(7), tell(7, far=math.inf, late=1.0)] * 9
    with pytest.raises(CalibrationError, match="not finite; expected numbers"):
        renew(Policy(monitors=WATCHED), told)


def test_monitors_that_block_hide_how_far_scores_go() -> None:
    blocking = (make_monitor("far"), make_monitor("late", on_alarm="flag"))
    told = [tell(n) for n in (7, 12)] * 9
    with pytest.raises(CalibrationError, match=r"Monitors far block, .* monitors flag"):
        renew(Policy(monitors=blocking), told)
    # Under observe they only report.
    renew(Policy(mode="observe", monitors=blocking), told)


def test_other_monitors_than_the_policy_has_are_refused() -> None:
    policy = Policy(monitors=WATCHED)
    with pytest.raises(CalibrationError, match="server's policy has the monitors far;"):
        renew(policy, [tell(7, far=1.0)] * 9)
    more = make_monitor("more", on_alarm="flag")
    with pytest.raises(
        CalibrationError, match="calibration has the monitors far, late"
    ):
        renew(Policy(monitors=(*WATCHED, more)), [], known=policy)


def test_too_little_traffic_of_a_server_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"3 requests .* needs at least 4"):
        renew(Policy(monitors=WATCHED), [*[tell(7)] * 9, *[tell(12)] * 3])
    with pytest.raises(CalibrationError, match="No held-out request falls into"):
        renew(Policy(monitors=WATCHED), [tell(7)] * 9)


def test_what_a_server_tells_is_read_from_its_verdict() -> None:
    readings = [
        {"monitor": "far", "score": 3, "position": 4},
        {"monitor": "odd", "score": None, "position": 4},
        {"monitor": "late", "score": None, "position": None},
    ]
    alarms = [{"monitor": "odd", "score": None, "position": 4}]
    told = Told.of({"readings": readings, "alarms": alarms}, 12)
    assert told == Told(
        {"far": 3.0, "odd": math.inf, "late": -math.inf}, frozenset({"odd"}), 12
    )


def test_alarms_are_judged_by_bucket_and_action_against_their_joint_promise() -> None:
    monitors = (
        make_monitor("far", target_fpr=0.05),
        make_monitor("late", target_fpr=0.15),
        make_monitor("left", target_fpr=0.3, on_alarm="flag"),
    )
    policy = Policy(monitors=monitors)
    policy_file = make_policy_file({"p": policy}, saes={"a": AT})
    calibration = make_calibration(
        policy_file,
        maxima=[torch.arange(19.0), torch.arange(30.0)],
        lengths=(10, 20),
    )
    told = [
        *[tell(10)] * 6,
        tell(9, alarms=["far", "late"]),
        tell(9, alarms=["left"]),
        *[tell(15, alarms=["late", "left"])] * 2,
        # Longer than every bucket: the last one judges it.
        tell(99, alarms=["far"]),
    ]
    cells = judge_alarms(calibration, policy, told)
    found = [(c.length, c.action, c.target, c.requests, c.alarms) for c in cells]
    assert found == [
        (10, "block", 0.2, 8, 1),
        (10, "flag", 0.3, 8, 1),
        (20, "block", 0.2, 3, 3),
        (20, "flag", 0.3, 3, 2),
    ]
    for cell in cells:
        assert cell.p_value == excess_probability(
            cell.alarms,
            requests=cell.requests,
            held_out=19 if cell.length == 10 else 30,
            target_fpr=cell.target,
        )
    assert cells[2].p_value < 0.05 < cells[0].p_value


def test_a_bucket_that_nobody_asked_is_not_judged() -> None:
    policy = Policy(monitors=WATCHED)
    cells = judge_alarms(old_calibration(policy), policy, [tell(7)])
    assert [(cell.length, cell.alarms) for cell in cells] == [(10, 0)]
    assert cells[0].p_value == 1.0
