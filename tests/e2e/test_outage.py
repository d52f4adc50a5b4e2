"""What breaks under a running stream: it ends clearly, unseen by nobody, and soon."""

import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from e2e import ledger as pages
from e2e.faults import Faults
from e2e.ledger import Ledger
from e2e.outage import (
    Caller,
    Operator,
    find_processes,
    first_free_descriptor,
    limited,
    seconds_until_not_ready,
    stopped,
    wait_for_end,
)
from e2e.serving import TOY_POLICIES, Server, ServerFactory, Toy

POLICIES = TOY_POLICIES.replace(
    "default_policy:",
    """\
  strict:
    monitors:
      - {name: recovery, sae: s, score: density, calibration: density.safetensors,
         target_fpr: 0.01, on_alarm: block}
default_policy:""",
).replace("[default,", "[strict, default,")
NOT_READY_SECONDS = 5
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"

FAULTS = {
    "a hook stops running": "op-stops",
    "a step's readings are lost": "readings-lost",
    "a step's readings come with the next step": "readings-late",
    "verdicts are lost on their way to the API server": "verdicts-lost",
}
OPEN_FAULTS = {
    f"`on_error: open`, {fault}": switch
    for fault, switch in FAULTS.items()
    if switch != "readings-late"
}
NAN_POLICIES = {
    "the model computes NaN, a monitor blocks": "strict",
    "the model computes NaN, a monitor flags": "default",
    "the model computes NaN, no monitor": "open",
}
HUNG = {"the engine core hangs": "EngineCor"}


def start(
    toy: Toy, start_server: ServerFactory, faults: Faults, name: str, policies: str
) -> Server:
    return start_server(
        toy.model,
        toy.write_policy(name, policies),
        "--enforce-eager",
        environment=faults.environment | {"GUARD_ANSWER_SECONDS": "1"},
    )


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("outage"))


@pytest.fixture(scope="module")
def server(toy: Toy, faults: Faults, start_server: ServerFactory) -> Server:
    """Serve the toy until the last test kills its engine core."""
    return start(toy, start_server, faults, "outage", POLICIES)


@pytest.fixture(scope="module")
def open_faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("open-outage"))


@pytest.fixture(scope="module")
def open_server(toy: Toy, open_faults: Faults, start_server: ServerFactory) -> Server:
    """Serve with `on_error: open`, until the last test kills the worker."""
    policies = POLICIES + "on_error: open\n"
    return start(toy, start_server, open_faults, "open-outage", policies)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stream_ends_where_nobody_vouches_for_it(
    fault: str, server: Server, faults: Faults, ledger: Ledger
) -> None:
    operator = Operator(server)
    with faults.on("slow-steps"):
        caller = Caller(server).begin()
        with faults.on(FAULTS[fault]):
            caller.end()
    assert len(caller.chunks) < 1000
    assert operator.grown()
    ledger.enter(fault, client=caller.describe(), operator=operator.describe())


def test_late_steps_are_late_and_whole(
    server: Server, faults: Faults, ledger: Ledger
) -> None:
    calm = Caller(server, max_tokens=40).begin().end()
    operator = Operator(server)
    with faults.on("slow-steps"):
        caller = Caller(server, max_tokens=40).begin().end()
    assert caller.text == calm.text
    assert caller.guard["tokens_seen"] == calm.guard["tokens_seen"] == 4 + 39
    ledger.enter(
        "every step and its readings are late",
        client=f"the same tokens, later: {caller.describe()}",
        operator=operator.describe(),
    )


@pytest.mark.parametrize("fault", OPEN_FAULTS)
def test_where_the_operator_lets_it_go_on_it_goes_on_loudly(
    fault: str, open_server: Server, open_faults: Faults, ledger: Ledger
) -> None:
    operator = Operator(open_server)
    with open_faults.on("slow-steps"):
        caller = Caller(open_server, max_tokens=60).begin()
        with open_faults.on(OPEN_FAULTS[fault]):
            time.sleep(0.3)
            if OPEN_FAULTS[fault] == "verdicts-lost":
                caller.end()
    caller.end()
    ledger.enter(fault, client=caller.describe(), operator=operator.describe())


def test_a_server_that_fails_open_says_so_before_anything_fails(
    open_server: Server, server: Server
) -> None:
    for one, on_error in ((open_server, "open"), (server, "closed")):
        assert json.loads(one.get("/guard/status"))["on_error"] == on_error
        assert one.metrics()["guard_fails_open"] == (on_error == "open")


@pytest.mark.parametrize("fault", HUNG)
def test_what_hangs_is_not_ready_and_goes_on_where_it_was(
    fault: str, server: Server, faults: Faults, ledger: Ledger
) -> None:
    calm = Caller(server, max_tokens=60).begin().end()
    operator = Operator(server)
    with faults.on("slow-steps"):
        caller = Caller(server, max_tokens=60).begin()
    with stopped(*find_processes(server, HUNG[fault])):
        waited = seconds_until_not_ready(server, time.monotonic())
        hung = operator.describe()
        arrived = len(caller.chunks)
        time.sleep(0.2)
        assert len(caller.chunks) == arrived
        assert wait_until_shown(server, ready=0)
        assert server.metrics()["guard_snapshot_age_seconds"] > 1
    assert waited < NOT_READY_SECONDS
    caller.end()
    assert caller.text == calm.text
    assert wait_until_ready_again(operator)
    assert wait_until_shown(server, ready=1)
    ledger.enter(
        fault,
        client=f"waits until it goes on, at most vLLM's own limit: {caller.describe()}",
        operator=f"while it hangs: {hung}",
    )


def wait_until_ready_again(operator: Operator) -> bool:
    deadline = time.monotonic() + 10
    while operator.ready() != 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    return operator.ready() == 200


def wait_until_shown(server: Server, *, ready: int) -> bool:
    """Whether a scrape soon says so: engines are asked every few seconds."""
    deadline = time.monotonic() + 20
    while (shown := server.metrics()["guard_ready"]) != ready:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return shown == ready


def test_a_full_disk_takes_nothing_from_anybody(
    server: Server, faults: Faults, ledger: Ledger
) -> None:
    operator, numbers = Operator(server), find_processes(server)
    with faults.on("slow-steps"):
        caller = Caller(server, max_tokens=60).begin()
    size = server.log.stat().st_size
    with limited(numbers, resource.RLIMIT_FSIZE, [0] * len(numbers)):
        caller.end()
        assert Caller(server, max_tokens=8).begin().end().guard["action"] == "allow"
        seen = operator.describe()
        assert server.log.stat().st_size == size
    assert server.get("/health") == ""
    ledger.enter("the disk is full", client=caller.describe(), operator=seen)


def test_without_file_descriptors_who_is_served_stays_served(
    server: Server, faults: Faults, ledger: Ledger
) -> None:
    operator, numbers = Operator(server), find_processes(server)
    url, body = f"{server.url}/v1/completions", {"prompt": "w1", "max_tokens": 4}
    with httpx.Client(timeout=60) as known, faults.on("slow-steps"):
        assert known.post(url, json=body).status_code == 200
        caller = Caller(server, max_tokens=60).begin()
        limits = [first_free_descriptor(number) for number in numbers]
        with limited(numbers, resource.RLIMIT_NOFILE, limits):
            assert known.post(url, json=body).json()["guard"]["action"] == "allow"
            with pytest.raises(httpx.TransportError):
                httpx.post(url, json=body, timeout=3)
            caller.end()
    ledger.enter(
        "no process has a file descriptor left",
        client=f"{caller.describe()}; a new connection is not answered",
        operator=operator.describe(),
    )


def test_a_storm_of_signals_changes_no_token(
    server: Server, faults: Faults, ledger: Ledger
) -> None:
    calm = Caller(server, max_tokens=60).begin().end()
    operator, numbers = Operator(server), find_processes(server)
    with faults.on("slow-steps"):
        caller = Caller(server, max_tokens=60).begin()
        for _ in range(100):
            for number in numbers:
                for name in ("CHLD", "WINCH", "URG", "PIPE", "STOP", "CONT"):
                    os.kill(number, getattr(signal, f"SIG{name}"))
            time.sleep(0.005)
        caller.end()
    assert caller.text == calm.text
    ledger.enter(
        "a storm of harmless signals, stops and continues",
        client=f"the same tokens: {caller.describe()}",
        operator=operator.describe(),
    )


@pytest.mark.parametrize("fault", NAN_POLICIES)
def test_what_is_not_a_number_is_an_alarm_to_whoever_watches(
    fault: str, server: Server, faults: Faults, ledger: Ledger
) -> None:
    operator = Operator(server)
    with faults.on("slow-steps"):
        caller = Caller(server, policy=NAN_POLICIES[fault], max_tokens=60).begin()
        with faults.on("not-a-number"):
            caller.end()
    ledger.enter(fault, client=caller.describe(), operator=operator.describe())


def break_down(
    server: Server, switches: Faults, act: Callable[[], object]
) -> tuple[Caller, str, float]:
    """Let a server break down under a stream, and watch it end.

    Returns:
        The client, what the operator saw, and the seconds until it was not ready.
    """
    switches.switch_on("slow-steps")
    caller = Caller(server).begin()
    since = time.monotonic()
    act()
    seconds = seconds_until_not_ready(server, since)
    caller.end()
    left = wait_for_end(server)
    assert left == []
    assert seconds < NOT_READY_SECONDS
    assert not caller.is_done or "error" in caller.chunks[-1]
    seen = (
        f"not ready within {NOT_READY_SECONDS} s; the server ends with code "
        f"{server.process.returncode}, no process stays"
    )
    return caller, seen, seconds


KILLED = {"a worker is killed": "Worker", "the engine core is killed": "EngineCor"}


@pytest.mark.parametrize("fault", KILLED)
def test_a_killed_part_ends_the_server_and_every_stream(
    fault: str, request: pytest.FixtureRequest, ledger: Ledger
) -> None:
    name = "" if KILLED[fault] == "EngineCor" else "open_"
    server: Server = request.getfixturevalue(f"{name}server")
    switches: Faults = request.getfixturevalue(f"{name}faults")
    (number,) = find_processes(server, KILLED[fault])
    caller, seen, seconds = break_down(
        server, switches, lambda: os.kill(number, signal.SIGKILL)
    )
    assert not caller.guard
    record_seconds(fault, seconds)
    ledger.enter(fault, client=caller.describe(), operator=seen)


def record_seconds(fault: str, seconds: float) -> None:
    """Keep what was measured, where the page is written."""
    if not os.environ.get("GUARD_WRITE_FAULTS"):
        return
    from guard.provenance import describe_run

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = known.get("seconds_until_not_ready", {}) | {fault: round(seconds, 2)}
    found = {**describe_run(), "seconds_until_not_ready": rows}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def test_the_page_has_a_row_for_every_fault_and_names_real_tests() -> None:
    rows = pages.read_page()
    assert tuple(rows) == pages.FAULTS
    for row in rows.values():
        file, name = re.findall(r"`(test_\w+\.py)::(\w+)`", row)[-1]
        assert f"def {name}(" in Path(__file__).with_name(file).read_text()
