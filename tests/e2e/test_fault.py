"""Whatever breaks inside the guard, no request is ever answered unguarded."""

import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e.faults import Faults
from e2e.serving import (
    START_SECONDS,
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    launch,
    list_processes,
    stop,
)
from e2e.tripwires import LONG_PROMPT

from guard.http.openai import REFUSAL

UNGUARDED = ("op-stops", "readings-lost")
"""Faults after which nothing vouches for a token."""
WORKER_ERRORS = 'guard_errors_total{component="worker"}'
ENGINE_ERRORS = 'guard_errors_total{component="engine"}'
UNSCORED = 'guard_unscored_tokens_total{reason="no_reading"}'
GUARDED = 'guard_tokens_total{phase="prefill"}'

START_FAULTS = {
    "no-hooks": "A pass through the model ran 0 of 1 hooks; expected each of them",
    "unimportable": "A worker does not answer for the guard; expected the plugin",
    "sae": "sae.safetensors: sha256 is",
    "policy": "the policy file changed while the server started",
}
"""By what goes wrong during a start, what the one line says."""


@dataclass(frozen=True)
class Ending:
    """How a server ended that must not start."""

    code: int | None
    """None where it had to be stopped."""
    log: str
    answers: frozenset[int]
    """HTTP statuses it gave to a completion while it started."""
    left_behind: tuple[str, ...]
    """Processes that were still there afterwards."""


@pytest.fixture(scope="module")
def endings(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ending]:
    """Return how servers ended, one for each of `START_FAULTS`."""

    def run(name: str) -> Ending:
        return _end(name, toy, tmp_path_factory.mktemp(name))

    # Two at once: each of them is a process that mostly waits for another.
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(START_FAULTS, pool.map(run, START_FAULTS), strict=True))


def _end(name: str, toy: Toy, folder: Path) -> Ending:
    """Start a server with a fault and watch it until it ends."""
    faults = Faults(folder)
    own = Toy(folder, toy.digest)
    shutil.copytree(toy.model, own.model)
    shutil.copytree(toy.folder / "sae", folder / "sae")
    shutil.copy(toy.folder / "density.safetensors", folder)
    policy = own.write_policy("policy", TOY_POLICIES)
    if name == "sae":
        weights = folder / "sae" / "sae.safetensors"
        faults.switch_on("file-changes", f"{weights}\n ")
    elif name == "policy":
        faults.switch_on("file-changes", f"{policy}\non_error: open\n")
    else:
        faults.switch_on(name)
    flags = [] if name == "no-hooks" else ["--enforce-eager"]
    server = launch(toy.model, policy, flags, folder, faults.environment)
    answers = set()
    try:
        deadline = time.monotonic() + START_SECONDS
        while server.process.poll() is None and time.monotonic() < deadline:
            answers |= _try(server)
            if not answers <= {503}:
                break
            time.sleep(0.2)
        code = server.process.poll()
        left_behind = _wait_for_end(server)
    finally:
        stop(server.process)
    return Ending(code, server.log.read_text(), frozenset(answers), left_behind)


def _try(server: Server) -> set[int]:
    """Ask for a completion; return the status, if anybody answered."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=b'{"model": "model", "prompt": "w1", "max_tokens": 2}',
        headers={"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return {answer.status}
    except urllib.error.HTTPError as error:
        return {error.code}
    except OSError:
        return set()


def _wait_for_end(server: Server) -> tuple[str, ...]:
    """Return what is left of a server's processes, given some time to go."""
    deadline = time.monotonic() + 20
    while (left := list_processes(server)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return tuple(left)


@pytest.mark.parametrize("name", START_FAULTS)
def test_a_server_that_would_be_unguarded_does_not_start(
    name: str, endings: Mapping[str, Ending]
) -> None:
    ending = endings[name]
    assert ending.code == 1
    last = ending.log.splitlines()[-1]
    assert last.startswith("guard: ")
    assert START_FAULTS[name] in last
    assert ending.answers <= {503}
    assert ending.left_behind == ()


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def server(toy: Toy, faults: Faults, start_server: ServerFactory) -> Server:
    """Serve the toy with all faults off, under an operator's own VLLM_PLUGINS."""
    policy = toy.write_policy("faulty", TOY_POLICIES)
    return start_server(
        toy.model, policy, "--enforce-eager", environment=faults.environment
    )


def complete(server: Server, **options: Any) -> Any:
    defaults = {"model": "model", "prompt": "w1 w2 w3", "max_tokens": 8}
    return server.client.completions.create(**(defaults | options))


def chat(server: Server, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": "w1 w2 w3"}]
    return server.client.chat.completions.create(
        model="model", messages=messages, **({"max_tokens": 8} | options)
    )


def grown(server: Server, act: Callable[[], Any]) -> dict[str, float]:
    """Return by how much each series grew while `act` ran."""
    before = server.metrics()
    act()
    return {name: value - before[name] for name, value in server.metrics().items()}


@pytest.fixture
def healthy(server: Server) -> Iterator[Server]:
    """Check that the server guards before a fault, and again after it."""
    assert complete(server).guard["action"] == "allow"
    yield server
    assert complete(server).guard["action"] == "allow"


def test_an_operators_own_plugin_list_does_not_unload_the_guard(
    server: Server,
) -> None:
    verdict = complete(server).guard
    assert verdict["action"] == "allow"
    assert verdict["clamped_tokens"]["hold"] > 0


@pytest.mark.parametrize("policy", ["default", "open"])
@pytest.mark.parametrize("fault", UNGUARDED)
def test_unguarded_tokens_never_leave(
    fault: str, policy: str, healthy: Server, faults: Faults
) -> None:
    options: dict[str, Any] = {
        "logprobs": 1,
        "extra_body": {"guard": {"policy": policy}},
    }
    with faults.on(fault):
        answer = complete(healthy, **options)
        *_, last = chunks = list(complete(healthy, stream=True, **options))
    for choice in (answer.choices[0], last.choices[0]):
        assert choice.finish_reason == "content_filter"
        assert not (choice.logprobs and choice.logprobs.tokens)
    assert answer.choices[0].text == ""
    assert [choice.text for chunk in chunks for choice in chunk.choices] == [""]
    for verdict in (answer.guard, last.guard):
        assert verdict["action"] == "block"
        assert verdict["reason"] == "unguarded"
        assert verdict["policy"] == policy


@pytest.mark.parametrize("fault", UNGUARDED)
def test_every_choice_of_an_unguarded_chat_is_refused(
    fault: str, healthy: Server, faults: Faults
) -> None:
    with faults.on(fault):
        answer = chat(healthy, n=2)
    assert [choice.finish_reason for choice in answer.choices] == 2 * ["content_filter"]
    assert [choice.message.refusal for choice in answer.choices] == 2 * [REFUSAL]
    assert not any(choice.message.content for choice in answer.choices)
    assert [choice["action"] for choice in answer.guard["choices"]] == 2 * ["block"]


@pytest.mark.parametrize("fault", UNGUARDED)
def test_unguarded_tokens_are_counted_as_such(
    fault: str, healthy: Server, faults: Faults
) -> None:
    with faults.on(fault):
        growth = grown(healthy, lambda: complete(healthy))
    assert growth[UNSCORED] == 4
    assert growth[WORKER_ERRORS] > 0
    assert growth[GUARDED] == 0
    blocked = 'guard_requests_total{action="block",mode="enforce",policy="default"}'
    assert growth[blocked] == 1


@pytest.mark.parametrize("fault", UNGUARDED)
def test_what_was_computed_without_the_guard_is_not_found_in_the_cache(
    fault: str, healthy: Server, faults: Faults
) -> None:
    prompt = f"w{UNGUARDED.index(fault)} {LONG_PROMPT}"
    with faults.on(fault):
        assert complete(healthy, prompt=prompt).guard["action"] == "block"
    again: list[Any] = []
    growth = grown(healthy, lambda: again.append(complete(healthy, prompt=prompt)))
    assert again[0].guard["action"] == "allow"
    assert growth[GUARDED] == again[0].usage.prompt_tokens > 128


@pytest.mark.parametrize("fault", UNGUARDED)
def test_a_stream_stops_where_its_tokens_are_no_longer_guarded(
    fault: str, healthy: Server, faults: Faults
) -> None:
    ids = {"return_token_ids": True, "ignore_eos": True}
    with faults.on("slow-steps"):
        stream = complete(healthy, max_tokens=1900, stream=True, extra_body=ids)
        chunks = [next(stream) for _ in range(3)]
        with faults.on(fault):
            chunks += list(stream)
    delivered = sum(
        len(choice.token_ids or ()) for chunk in chunks for choice in chunk.choices
    )
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    verdict = chunks[-1].guard
    assert verdict["reason"] == "unguarded"
    # The last token that was delivered is the one whose own row was not guarded.
    assert verdict["tokens_seen"] == 4 + delivered - 1
    assert 3 <= delivered < 1900


@pytest.mark.parametrize("ask", [chat, complete])
def test_tokens_without_a_verdict_become_an_error(
    ask: Callable[..., Any], healthy: Server, faults: Faults
) -> None:
    with faults.on("verdicts-lost"):
        with pytest.raises(openai.InternalServerError) as failed:
            ask(healthy)
        chunks = []
        with pytest.raises(openai.APIError):
            chunks.extend(ask(healthy, stream=True))
    assert failed.value.status_code == 500
    assert not re.search(r"w\d", failed.value.response.text)
    # A chat begins with a chunk that names the role.
    assert not any(re.search(r"w\d", chunk.model_dump_json()) for chunk in chunks)


def test_tokens_without_a_verdict_are_counted_as_an_error(
    healthy: Server, faults: Faults
) -> None:
    def fail() -> None:
        with faults.on("verdicts-lost"), pytest.raises(openai.InternalServerError):
            complete(healthy)

    assert grown(healthy, fail)[ENGINE_ERRORS] > 0


def test_a_stream_whose_verdicts_cease_ends_as_an_error(
    healthy: Server, faults: Faults
) -> None:
    endless = {"ignore_eos": True}
    with faults.on("slow-steps"):
        stream = complete(healthy, max_tokens=1900, stream=True, extra_body=endless)
        chunks = [next(stream) for _ in range(3)]
        with faults.on("verdicts-lost"), pytest.raises(openai.APIError):
            chunks.extend(stream)
    assert len(chunks) < 1900
    assert not any(choice.finish_reason for chunk in chunks for choice in chunk.choices)


def test_a_request_without_a_verdict_is_not_computed_to_its_end(
    healthy: Server, faults: Faults
) -> None:
    with faults.on("verdicts-lost"), pytest.raises(openai.InternalServerError):
        complete(healthy, max_tokens=1900, extra_body={"ignore_eos": True})
    complete(healthy, max_tokens=1)

    def wait() -> None:
        time.sleep(0.5)
        complete(healthy, max_tokens=1)

    assert grown(healthy, wait)['guard_tokens_total{phase="decode"}'] == 0


def test_a_terminated_server_leaves_no_process_behind(server: Server) -> None:
    assert len(list_processes(server)) > 1
    server.process.terminate()
    server.process.wait(timeout=60)
    assert _wait_for_end(server) == ()
