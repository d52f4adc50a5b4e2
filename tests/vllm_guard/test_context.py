"""One process's state: entered once, the same in every process, and forgotten."""

import logging
import os
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from specimens import make_calibration, write_certificate
from vllm_guard import context

from guard.calibration import save_calibration
from guard.errors import (
    CalibrationError,
    CertificateError,
    DrillError,
    EngineError,
    PolicyError,
)
from guard.policy import load_policy
from guard.request import TICKET_KEY, read_ticket
from guard.sae.load import weights_digest


@pytest.mark.usefixtures("clean_process")
def test_without_a_policy_the_process_is_inert_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_told_inert", False)
    with caplog.at_level("INFO", "vllm_guard"):
        assert not context.enter()
        assert not context.enter()
    assert [record.message for record in caplog.records] == [
        "vllm-guard is inert: GUARD_POLICY is not set."
    ]
    with pytest.raises(RuntimeError, match="inert"):
        context.get()
    assert "GUARD_SECRET" not in os.environ


def test_entering_twice_is_entering_once(state: context.Context) -> None:
    assert context.enter()
    assert context.get() is state


def test_a_child_process_reads_the_same_file_with_the_same_secret(
    state: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = dict(os.environ)
    context.reset()
    assert "GUARD_SECRET" not in os.environ
    for name in ("GUARD_SECRET", "GUARD_FINGERPRINT"):
        monkeypatch.setenv(name, inherited[name])
    assert context.enter()
    assert context.get().secret == state.secret
    assert context.get().current.fingerprint == state.current.fingerprint


def test_every_start_has_its_own_secret(state: context.Context) -> None:
    context.reset()
    context.enter()
    assert context.get().secret != state.secret
    assert len(state.secret) == 32


def test_a_file_that_changes_while_the_server_starts_stops_it(
    state: context.Context,
    write_policy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context.reset()
    monkeypatch.setenv("GUARD_FINGERPRINT", state.current.fingerprint)
    write_policy("on_error: open")
    with pytest.raises(PolicyError, match="changed while the server started"):
        context.enter()
    with pytest.raises(RuntimeError):
        context.get()


@pytest.mark.usefixtures("clean_process")
def test_a_calibration_that_is_too_small_stops_the_start(
    write_policy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_policy()
    path.write_text(path.read_text().replace("0.1,", "0.01,"))
    monkeypatch.setenv("GUARD_POLICY", str(path))
    with pytest.raises(CalibrationError, match="at least 99"):
        context.enter()


@pytest.mark.usefixtures("clean_process")
def test_a_drill_that_does_not_fit_stops_the_start(
    write_policy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "drills: [{name: d, sae: s, delta: all_prompt.safetensors}]"
    monkeypatch.setenv("GUARD_POLICY", str(write_policy(wrong)))
    with pytest.raises(DrillError, match="was found for position all_prompt"):
        context.enter()


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("issued_for", ["f" * 64, None])
def test_a_certificate_of_nobody_or_of_another_policy_stops_the_start(
    issued_for: str | None,
    write_policy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_policy(certificate="certificate: r.json")
    if issued_for is not None:
        write_certificate(path.with_name("r.json"), issued_for)
    monkeypatch.setenv("GUARD_POLICY", str(path))
    words = "cannot be read" if issued_for is None else "was issued for .* 'research'"
    with pytest.raises(CertificateError, match=rf"r\.json: {words}"):
        context.enter()
    with pytest.raises(RuntimeError):
        context.get()


def test_a_certificate_that_is_renewed_while_the_server_starts_stops_it(
    certified: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.reset()
    monkeypatch.setenv("GUARD_FINGERPRINT", certified.current.fingerprint)
    assert context.enter()
    context.reset()
    monkeypatch.setenv("GUARD_FINGERPRINT", certified.current.fingerprint)
    path = certified.current.policy_file.policies["research"].certificate
    assert path is not None
    write_certificate(
        path, certified.current.fingerprints["research"], issued="2026-08-01"
    )
    with pytest.raises(PolicyError, match="changed while the server started"):
        context.enter()


def test_metrics_show_which_certificate_a_policy_has(
    certified: context.Context,
) -> None:
    registry = CollectorRegistry()
    context.get_board(registry)
    found = certified.current.certificates["research"].id
    labels = {"policy": "research", "certificate": found}
    assert registry.get_sample_value("guard_certificate_info", labels) == 1.0


def test_drills_are_counted_from_one_in_file_order(drilled: context.Context) -> None:
    assert [drilled.current.drill(name) for name in (None, "last", "whole")] == [
        0,
        1,
        2,
    ]


def test_slots_are_counted_from_one_in_file_order(state: context.Context) -> None:
    assert [state.current.slot(name) for name in ("default", "research", "open")] == [
        1,
        2,
        3,
    ]


def test_a_fault_is_left_where_the_launcher_finds_it(
    tmp_path: Path, clean_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = tmp_path / "fault"
    monkeypatch.setenv("GUARD_FAULT_FILE", str(fault))
    with pytest.raises(EngineError), context.reporting():
        raise EngineError("No such layer.")
    assert fault.read_text() == "No such layer."


def test_an_operator_gets_a_ticket_for_any_policy_of_the_file(
    state: context.Context,
) -> None:
    args = context.sampling_args("research", trace="none")
    ticket = read_ticket(args[TICKET_KEY], state.secret, now=time.time())
    assert ticket is not None
    assert ticket.policy == "research"
    with pytest.raises(PolicyError, match="'x'; expected one of default, research"):
        context.sampling_args("x", trace="none")


def test_an_operator_gets_a_ticket_for_any_drill_of_the_file(
    drilled: context.Context,
) -> None:
    args = context.sampling_args("open", trace="none", drill="whole")
    ticket = read_ticket(args[TICKET_KEY], drilled.secret, now=time.time())
    assert ticket is not None
    assert (ticket.policy, ticket.drill) == ("open", "whole")
    with pytest.raises(PolicyError, match="'x'; expected one of last, whole"):
        context.sampling_args("open", trace="none", drill="x")


def test_a_salt_depends_on_the_policy_and_on_the_client_and_never_mixes_them() -> None:
    salts = [
        context.cache_salt(policy, client)
        for policy in ("ab", "cd")
        for client in (None, "x", "y", "cd|x")
    ]
    assert len(set(salts)) == len(salts)
    assert context.cache_salt("ab", "x") == context.cache_salt("ab", "x")
    assert context.cache_salt("ab", None) == context.cache_salt("ab", "")


SEVERAL = """
version: 1
saes:
  s: {{path: sae, format: guard, hook_point: layers.1.resid_post, sha256: {digest}}}
policies:
  default:
    monitors:
      - {{name: a, sae: s, score: error_norm, calibration: c.safetensors,
          target_fpr: 0.1, on_alarm: flag}}
      - {{name: b, sae: s, score: error_norm, calibration: d.safetensors,
          target_fpr: 0.1, on_alarm: block}}
      - {{name: c, sae: s, score: error_norm, calibration: c.safetensors,
          target_fpr: 0.1, on_alarm: flag}}
  open: {{}}
default_policy: default
"""


@pytest.mark.usefixtures("clean_process")
def test_thresholds_are_those_of_each_calibration_in_the_order_of_the_monitors(
    write_policy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_policy()
    digest = weights_digest(path.parent / "sae", "guard")
    path.write_text(SEVERAL.format(digest=digest))
    policy_file = load_policy(path)
    numbers = torch.arange(1.0, 20.0)
    columns = torch.stack([numbers, 10 * numbers, 100 * numbers], 1)
    for name, lengths in (("c", (16, 64)), ("d", (32, 64))):
        calibration = make_calibration(
            policy_file, maxima=(columns, 1000 * columns), lengths=lengths
        )
        save_calibration(calibration, path.with_name(f"{name}.safetensors"))
    monkeypatch.setenv("GUARD_POLICY", str(path))
    assert context.enter()
    state = context.get()
    calibrations = state.current.calibrations
    for length, buckets in ((10, (0, 0)), (20, (1, 0)), (40, (1, 1)), (10, (0, 0))):
        pairs = calibrations[str(path.with_name("c.safetensors"))].thresholds(
            (16, 64)[buckets[0]], targets={"a": Fraction("0.1"), "c": Fraction("0.1")}
        )
        alone = calibrations[str(path.with_name("d.safetensors"))].thresholds(
            (32, 64)[buckets[1]], targets={"b": Fraction("0.1")}
        )
        expected = (pairs["a"], alone["b"], pairs["c"])
        assert state.current.thresholds("default", length) == expected
        assert alone["b"] == 180.0 * 1000 ** buckets[1]
    assert state.current.thresholds("open", 10) == ()


@pytest.mark.usefixtures("clean_process")
def test_a_recording_process_needs_no_calibration_or_certificate_and_watches_nothing(
    write_policy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_policy(certificate="certificate: nowhere.json")
    path.with_name("c.safetensors").unlink()
    monkeypatch.setenv("GUARD_POLICY", str(path))
    monkeypatch.setenv("GUARD_RECORD", "1")
    assert context.enter()
    state = context.get()
    assert state.recorder is not None
    assert state.current.layout == ()
    assert (state.current.calibrations, state.current.certificates) == ({}, {})
    assert [str(at) for at in state.hook_points] == ["layers.1.resid_post"]
    assert len(state.current.policy_file.policies["default"].clamps) == 2
    context.reset()
    assert "GUARD_RECORD" not in os.environ


@pytest.mark.parametrize("own", [logging.NOTSET, logging.ERROR])
def test_warnings_are_seen_though_vllm_quietens_the_root_logger(
    own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("", "guard", "vllm_guard")
    for name, level in zip(names, (logging.ERROR, own, own), strict=True):
        monkeypatch.setattr(logging.getLogger(name), "level", level)
    context.keep_warnings()
    wanted = own or logging.WARNING
    for name in ("guard.policy", "vllm_guard.board"):
        assert logging.getLogger(name).getEffectiveLevel() == wanted
