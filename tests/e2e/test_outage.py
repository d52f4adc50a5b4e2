"""What breaks under a running stream: it ends clearly, unseen by nobody, and soon."""

import contextlib
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from e2e import ledger as pages
from e2e.faults import Faults
from e2e.ledger import Ledger
from e2e.outage import (
    Caller,
    Operator,
    ask_ready,
    find_owner,
    find_processes,
    first_free_descriptor,
    limited,
    seconds_until_not_ready,
    stopped,
    wait_for_end,
    wait_until,
)
from e2e.serving import (
    THREADS,
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    launch,
    stop,
)
from vllm_guard.board import SILENT_SECONDS

POLICIES = TOY_POLICIES.replace(
    "default_policy:",
    """\
  strict:
    monitors:
      - {name: recovery, sae: s, score: density, calibration: density.safetensors,
         target_fpr: 0.01, on_alarm: block}
default_policy:""",
).replace("[default,", "[strict, default,")
NOT_READY_SECONDS = 10
ANSWER_SECONDS = 2
STORM = 100
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"

FAULTS = {
    "a hook stops running": "op-stops",
    "a step's readings are lost": "readings-lost",
    "a step's readings come with the next step": "readings-late",
    "verdicts are lost on their way to the API server": "verdicts-lost",
    "each verdict comes with the tokens of the next step": "verdicts-late",
}
DELAYS = {
    "every step and its readings are late": "slow-steps",
    "tokens and their verdicts are late on their way to the API server": "outputs-late",
}
OPEN_FAULTS = {
    "`on_error: open`, a hook stops running": "op-stops",
    "`on_error: open`, a step's readings are lost": "readings-lost",
    "`on_error: open`, the model computes NaN, no monitor": "not-a-number",
}
NAN_POLICIES = {
    "the model computes NaN, a monitor blocks": "strict",
    "the model computes NaN, a monitor flags": "default",
    "the model computes NaN, no monitor": "open",
}
HUNG = {"the engine core hangs": "EngineCor", "a worker hangs": "Worker"}
"""Name of the process."""
LIMIT = ", at most `VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS` (300)"
"""How long vLLM lets a worker hang, and the guard an engine core."""


def start(
    toy: Toy,
    start_server: ServerFactory,
    faults: Faults,
    name: str,
    *flags: str,
    policies: str = POLICIES,
    **environment: str,
) -> Server:
    own = {"GUARD_ANSWER_SECONDS": str(ANSWER_SECONDS)}
    return start_server(
        toy.model,
        toy.write_policy(name, policies),
        *("--enforce-eager", *flags),
        environment=faults.environment | own | environment,
    )


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("outage"))


@pytest.fixture(scope="module")
def server(toy: Toy, faults: Faults, start_server: ServerFactory) -> Server:
    """Serve the toy until the last test kills its engine core."""
    return start(toy, start_server, faults, "outage")


@pytest.fixture(scope="module")
def open_faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("open-outage"))


@pytest.fixture(scope="module")
def open_server(toy: Toy, open_faults: Faults, start_server: ServerFactory) -> Server:
    """Serve with `on_error: open`, until the last test kills the worker."""
    policies = POLICIES + "on_error: open\n"
    return start(toy, start_server, open_faults, "open-outage", policies=policies)


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


@pytest.mark.parametrize("fault", DELAYS)
def test_what_is_late_is_late_and_whole(
    fault: str, server: Server, faults: Faults, ledger: Ledger
) -> None:
    calm = Caller(server, max_tokens=40).begin().end()
    operator = Operator(server)
    with faults.on(DELAYS[fault]):
        caller = Caller(server, max_tokens=40).begin().end()
    assert caller.text == calm.text
    assert caller.guard["tokens_seen"] == calm.guard["tokens_seen"] == 4 + 39
    ledger.enter(
        fault,
        client=f"the same tokens, later: {caller.describe()}",
        operator=operator.describe(),
    )


@pytest.mark.parametrize("fault", OPEN_FAULTS)
def test_where_the_operator_lets_it_go_on_it_goes_on_loudly(
    fault: str, open_server: Server, open_faults: Faults, ledger: Ledger
) -> None:
    operator = Operator(open_server)
    policy = "open" if OPEN_FAULTS[fault] == "not-a-number" else "default"
    with open_faults.on("slow-steps"):
        caller = Caller(open_server, policy, max_tokens=300).begin()
        with open_faults.on(OPEN_FAULTS[fault]):
            wait_until(operator.grown, "a metric of the fault")
            assert caller.is_alive()
            # To the end: what is scored behind a gap depends on where the gap was.
            caller.end()
    ledger.enter(fault, client=caller.describe(), operator=operator.describe())


def test_a_fault_that_nobody_can_let_through_ends_the_stream_under_open_too(
    open_server: Server, open_faults: Faults, ledger: Ledger
) -> None:
    operator = Operator(open_server)
    with open_faults.on("slow-steps"):
        caller = Caller(open_server).begin()
        with open_faults.on("verdicts-lost"):
            caller.end()
    ledger.enter(
        "`on_error: open`, verdicts are lost on their way to the API server",
        client=caller.describe(),
        operator=operator.describe(),
    )


SAID_AT_START = "on_error is open: requests go on where nobody vouches for them."
SAID_OF_A_REQUEST = "Answered although nobody vouches for them:"


def test_a_server_that_fails_open_says_so_before_anything_fails(
    open_server: Server, server: Server
) -> None:
    for one, on_error in ((open_server, "open"), (server, "closed")):
        is_open = on_error == "open"
        assert json.loads(one.get("/guard/status"))["on_error"] == on_error
        assert one.metrics()["guard_fails_open"] == is_open
        assert (SAID_AT_START in one.log.read_text()) == is_open


def test_who_is_let_through_is_in_the_log_and_cannot_flood_it(
    open_server: Server, open_faults: Faults, server: Server, faults: Faults
) -> None:
    before = open_server.log.read_text().count(SAID_OF_A_REQUEST)
    operator = Operator(open_server)
    started = time.monotonic()
    with open_faults.on("op-stops"):
        for _ in range(20):
            Caller(open_server, max_tokens=4).begin().end()
    windows = 1 + (time.monotonic() - started) // SILENT_SECONDS
    name = 'guard_requests_let_through_total{fault="unguarded"}'
    assert operator.grown()[name] == 20
    lines = open_server.log.read_text().count(SAID_OF_A_REQUEST)
    assert 1 <= lines <= before + windows
    with faults.on("op-stops"):
        assert Caller(server, max_tokens=4).begin().end().guard["action"] == "block"
    assert SAID_OF_A_REQUEST not in server.log.read_text()


@pytest.mark.parametrize("fault", HUNG)
def test_what_hangs_is_not_ready_and_goes_on_where_it_was(
    fault: str, server: Server, faults: Faults, ledger: Ledger
) -> None:
    calm = Caller(server, max_tokens=200).begin().end()
    operator = Operator(server)
    with faults.on("slow-steps"):
        caller = Caller(server, max_tokens=200).begin()
        with stopped(*find_processes(server, HUNG[fault])):
            limit = time_not_ready(server)
            assert seconds_until_not_ready(server, time.monotonic()) < limit
            hung = operator.describe()
            assert json.loads(server.get("/guard/status"))["engines"] is None
            arrived = len(caller.chunks)
            time.sleep(0.2)
            assert len(caller.chunks) == arrived < 200
            # Engines are asked now and then.
            wait_until(lambda: server.metrics()["guard_ready"] == 0, "shown as hung")
            assert server.metrics()["guard_snapshot_age_seconds"] > 1
    caller.end()
    assert caller.text == calm.text
    wait_until(lambda: operator.ready() == 200, "ready again")
    wait_until(lambda: server.metrics()["guard_ready"] == 1, "shown as ready")
    ledger.enter(
        fault,
        client=f"waits until it goes on{LIMIT}: {caller.describe()}",
        operator=f"while it hangs: {hung}",
    )


def test_a_full_disk_takes_nothing_from_anybody(
    server: Server, faults: Faults, ledger: Ledger
) -> None:
    operator, numbers = Operator(server), find_processes(server)
    with contextlib.ExitStack() as stack:
        with faults.on("slow-steps"):
            caller = Caller(server, max_tokens=200).begin()
            size = server.log.stat().st_size
            sizes = [0] * len(numbers)
            stack.enter_context(limited(numbers, resource.RLIMIT_FSIZE, sizes))
            assert caller.is_alive()
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
        caller = Caller(server, max_tokens=200).begin()
        limits = [first_free_descriptor(number) for number in numbers]
        with limited(numbers, resource.RLIMIT_NOFILE, limits):
            assert known.post(url, json=body).json()["guard"]["action"] == "allow"
            with pytest.raises(httpx.TransportError):
                httpx.post(url, json=body, timeout=3)
            assert caller.is_alive()
            caller.end()
    ledger.enter(
        "no process has a file descriptor left",
        client=f"{caller.describe()}; a new connection is not answered",
        operator=operator.describe(),
    )


def test_a_storm_of_signals_changes_no_token(
    server: Server, faults: Faults, ledger: Ledger
) -> None:
    calm = Caller(server, max_tokens=300).begin().end()
    operator, numbers = Operator(server), find_processes(server)
    with faults.on("slow-steps"):
        caller = Caller(server, max_tokens=300).begin()
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
def test_what_is_not_a_number_ends_the_request(
    fault: str, server: Server, faults: Faults, ledger: Ledger
) -> None:
    operator = Operator(server)
    with faults.on("slow-steps"):
        caller = Caller(server, NAN_POLICIES[fault]).begin()
        with faults.on("not-a-number"):
            caller.end()
    ledger.enter(fault, client=caller.describe(), operator=operator.describe())


def test_what_is_not_a_number_is_left_to_nobody(
    server: Server, faults: Faults, ledger: Ledger
) -> None:
    """vLLM gives free blocks that are not cached to whoever comes next."""
    prompts = [f"w{i} w2 w3" for i in range(4, 8)]
    calm = [Caller(server, "open", 40, prompt).begin().end() for prompt in prompts]
    with faults.on("not-a-number"):
        spoilt = Caller(server, "open", 40, "w9 " * 600).begin().end()
    assert spoilt.guard["reason"] == "not_finite"
    operator = Operator(server)
    for prompt, known in zip(prompts, calm, strict=True):
        caller = Caller(server, "open", 40, prompt).begin().end()
        assert caller.text == known.text
    ledger.enter(
        "a request is given the KV blocks of one that computed NaN",
        client=f"the same tokens as ever: {caller.describe()}",
        operator=operator.describe(),
    )


def test_an_api_server_that_is_stopped_keeps_only_its_own_waiting(
    replicated: Server, replicated_faults: Faults, ledger: Ledger
) -> None:
    calm = Caller(replicated, max_tokens=600).begin().end()
    with replicated_faults.on("slow-steps"):
        callers = begin_at_both(replicated, max_tokens=600)
        (one, kept), (_, other) = callers.items()
        with stopped(one):
            replicated_faults.switch_off("slow-steps")
            other.end()
            arrived = len(kept.chunks)
            answers = [ask_ready(replicated, seconds=2) for _ in range(8)]
            assert set(answers) <= {0, 200}
            assert len(kept.chunks) == arrived < 600
        kept.end()
        replicated_faults.switch_on("slow-steps")
    assert kept.text == other.text == calm.text
    assert kept.guard["tokens_seen"] == calm.guard["tokens_seen"]
    ledger.enter(
        "an API server of two is stopped",
        client=f"at the other: {other.describe()}; at it: the same, once it goes on",
        operator="`/guard/ready` 200 at the other, no answer at it",
    )


def begin_at_both(server: Server, **options: int) -> dict[int, Caller]:
    """Begin a stream at each of two API servers; return them by process."""
    callers: dict[int, Caller] = {}

    def begin() -> bool:
        caller = Caller(server, **options).begin()
        callers.setdefault(find_owner(caller), caller)
        return len(callers) == 2

    wait_until(begin, "a stream at each API server")
    return callers


def test_a_server_that_is_told_to_end_leaves_nothing_and_nobody_waiting(
    toy: Toy, faults: Faults, start_server: ServerFactory, ledger: Ledger
) -> None:
    server = start(toy, start_server, faults, "outage")
    calm = Caller(server, max_tokens=100).begin().end()
    caller, seen, _ = break_down(server, faults, lambda _: server.process.terminate())
    assert calm.text.startswith(caller.text) or caller.text.startswith(calm.text)
    assert not caller.guard
    ledger.enter("SIGTERM", client=caller.describe(), operator=seen)


def test_a_start_that_is_told_to_end_leaves_nothing(
    toy: Toy, tmp_path: Path, ledger: Ledger
) -> None:
    path = toy.write_policy("outage", POLICIES)
    server = launch(toy.model, path, ["--enforce-eager"], tmp_path, THREADS)
    try:
        wait_until(lambda: find_processes(server, "EngineCor"), "an engine core")
        server.process.terminate()
        wait_for_end(server)
    finally:
        stop(server.process)
    assert "Traceback" not in server.log.read_text()
    ledger.enter(
        "SIGTERM during the start",
        client="no answer: nobody is let in yet",
        operator=f"the server ends with code {server.process.returncode}, "
        "no process stays",
    )


def test_a_storm_of_orders_to_end_leaves_nothing_and_nobody_waiting(
    toy: Toy, faults: Faults, start_server: ServerFactory, ledger: Ledger
) -> None:
    server = start(toy, start_server, faults, "outage")

    def order(_caller: Caller) -> None:
        for _ in range(STORM):
            for number in find_processes(server):
                for name in (signal.SIGTERM, signal.SIGINT):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number, name)
            time.sleep(0.02)

    caller, _, _ = break_down(server, faults, order)
    assert not caller.guard
    # Whether the last word leaves before the process does is chance, as is its code.
    ledger.enter(
        "a storm of SIGTERM and SIGINT to every process",
        client="200, tokens, then an `error` event or the connection ends",
        operator=f"not ready within {NOT_READY_SECONDS} s; no process stays",
    )


def test_a_core_that_hangs_for_good_ends_the_server_and_every_stream(
    toy: Toy, faults: Faults, start_server: ServerFactory, ledger: Ledger
) -> None:
    allowed = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "5"}
    server = start(toy, start_server, faults, "outage", **allowed)
    calm = Caller(server, max_tokens=100).begin().end()
    (number,) = find_processes(server, "EngineCor")
    caller, seen, _ = break_down(
        server, faults, lambda _: os.kill(number, signal.SIGSTOP)
    )
    assert calm.text.startswith(caller.text) or caller.text.startswith(calm.text)
    assert not caller.guard
    ledger.enter(
        "the engine core hangs for good",
        client=f"waits{LIMIT}: {caller.describe()}",
        operator=seen,
    )


def time_not_ready(server: Server) -> float:
    """Return within how many seconds a server must say that it is not ready.

    On a busy machine an answer takes its time, and so does a process that dies.
    """
    asked = time.monotonic()
    server.get("/health")
    return NOT_READY_SECONDS + 40 * (time.monotonic() - asked)


def break_down(
    server: Server, switches: Faults, act: Callable[[Caller], object]
) -> tuple[Caller, str, float]:
    """Let a server break down under a stream, and watch it end.

    Returns:
        The client, what the operator saw, and the seconds until it was not ready.
    """
    with switches.on("slow-steps"):
        caller = Caller(server).begin()
        limit = time_not_ready(server)
        since = time.monotonic()
        act(caller)
        seconds = seconds_until_not_ready(server, since)
        caller.end()
        wait_for_end(server)
    assert seconds < limit
    assert len(caller.chunks) < 1900
    seen = (
        f"not ready within {NOT_READY_SECONDS} s; the server ends with code "
        f"{server.process.returncode}, no process stays"
    )
    return caller, seen, seconds


@pytest.fixture(scope="module")
def replicated_faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("replicated-outage"))


@pytest.fixture(scope="module")
def replicated(
    toy: Toy, replicated_faults: Faults, start_server: ServerFactory
) -> Server:
    """Serve from two API servers, until the last test kills one of them."""
    flags = "--api-server-count", "2"
    return start(toy, start_server, replicated_faults, "outage", *flags)


@pytest.fixture
def two_ranks(toy: Toy, faults: Faults, start_server: ServerFactory) -> Server:
    """Serve from two tensor-parallel ranks, until the second one is killed."""
    flags, bound = ("--tensor-parallel-size", "2"), "0|1"
    return start(
        *(toy, start_server, faults, "outage", *flags), VLLM_CPU_OMP_THREADS_BIND=bound
    )


@dataclass(frozen=True)
class Victim:
    """Who is killed, of which server."""

    server: str
    """Name of its fixture."""
    name: str
    """Of the process."""
    index: int | None = 0
    """Among those of that name; None is the one that serves the client."""
    faults: str = "faults"


KILLED = {
    "a worker is killed": Victim("open_server", "Worker", faults="open_faults"),
    "one of two tensor-parallel ranks is killed": Victim("two_ranks", "Worker", 1),
    "the engine core is killed": Victim("server", "EngineCor"),
    "an API server of two is killed": Victim(
        "replicated", "APIServer", None, faults="replicated_faults"
    ),
}


@pytest.mark.parametrize("fault", KILLED)
def test_a_killed_part_ends_the_server_and_every_stream(
    fault: str, request: pytest.FixtureRequest, ledger: Ledger
) -> None:
    victim = KILLED[fault]
    server: Server = request.getfixturevalue(victim.server)
    switches: Faults = request.getfixturevalue(victim.faults)
    calm = Caller(server, max_tokens=100).begin().end()

    def kill(caller: Caller) -> None:
        if victim.index is None:
            number = find_owner(caller)
        else:
            number = sorted(find_processes(server, victim.name))[victim.index]
        os.kill(number, signal.SIGKILL)

    caller, seen, seconds = break_down(server, switches, kill)
    assert calm.text.startswith(caller.text) or caller.text.startswith(calm.text)
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
    # A process of pytest-xdist does not know how the run was started.
    command = "GUARD_WRITE_FAULTS=1 make test ARGS=tests/e2e/test_outage.py"
    found = {**describe_run(), "command": command, "seconds_until_not_ready": rows}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def test_the_page_has_a_row_for_every_fault_and_names_real_tests() -> None:
    rows = pages.read_page()
    assert tuple(rows) == pages.FAULTS
    for row in rows.values():
        file, name = re.findall(r"`(test_\w+\.py)::(\w+)`", row)[-1]
        assert f"def {name}(" in Path(__file__).with_name(file).read_text()
