"""How an API server brings a file to engines that refuse, wait, hang or fall behind."""

import asyncio
import json
import os
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm_guard import context, rollout
from vllm_guard.question import ANSWER_VARIABLE
from vllm_guard.rollout import Outcome, Rollout

BUSY = {"busy": "requests are still in flight"}
CHANGED = "on_error: open"


class Engine:
    """An engine core that takes its calls in turn, and answers as it is told to."""

    def __init__(self) -> None:
        self.answer: dict[str, str] | Exception = {}
        """What it says to an offer."""
        self.hangs_at: str | None = None
        """The call before which it hangs."""
        self.awake = asyncio.Event()
        self.generation = 1
        self.staged = ""
        self.notice = ""
        self.outcome = ""
        self.behind: int | None = None
        """What another API server lets requests in under, if there is one."""
        self.calls: list[str] = []
        self._turn = asyncio.Lock()

    async def call(self, method: str, *args: Any) -> Any:
        self.calls.append(method)
        # Whoever asked may be gone by then: the call is not.
        return await asyncio.shield(asyncio.ensure_future(self._take(method, args)))

    async def _take(self, method: str, args: tuple[Any, ...]) -> Any:
        async with self._turn:
            if method == self.hangs_at:
                await self.awake.wait()
            return getattr(self, method.removeprefix("guard_"))(*args)

    def stage(self, fields: tuple[Any, ...]) -> dict[str, str]:
        if isinstance(self.answer, Exception):
            raise self.answer
        if not self.answer:
            self.staged = fields[0]
        return self.answer

    def abandon(self, owner: str) -> None:
        self.staged = "" if self.staged == owner else self.staged

    def commit(self, owner: str, notice: str) -> None:
        assert self.staged == owner
        self.staged, self.notice = "", notice
        self.generation += 1

    def note(self, outcome: str) -> None:
        self.outcome = outcome

    def follow(self, _rank: int, seen: int, _oldest: int) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "slowest": seen if self.behind is None else min(seen, self.behind),
            "outcome": self.outcome,
            "notice": self.notice if seen < self.generation else "",
        }


Scene = Callable[..., Any]
"""Runs a story over two engines and the reloads of an API server."""


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def play(
    state: context.Context,
    registry: CollectorRegistry,
    write_policy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Scene]:
    """Change the policy file, and tell a story of what becomes of it."""
    monkeypatch.setenv(ANSWER_VARIABLE, "0.3")
    monkeypatch.setattr(rollout, "_WATCH_SECONDS", 0.05)
    context.get_board(registry)
    write_policy(CHANGED)

    def run(story: Callable[[list[Engine], Rollout], Any]) -> Any:
        async def tell() -> Any:
            engines = [Engine(), Engine()]

            async def call_all(*call: Any) -> list[Any]:
                return await asyncio.gather(*(one.call(*call) for one in engines))

            parallel = SimpleNamespace(_api_process_rank=-1)
            client = SimpleNamespace(
                engine_core=SimpleNamespace(call_utility_all_async=call_all),
                vllm_config=SimpleNamespace(parallel_config=parallel),
            )
            one = Rollout(client, Namespace(api_key=None))
            return await asyncio.wait_for(story(engines, one), 20)

        return asyncio.run(tell())

    yield run
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def count(registry: CollectorRegistry, result: str) -> float | None:
    return registry.get_sample_value("guard_policy_reloads_total", {"result": result})


def last_successful(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("guard_policy_last_reload_successful")


async def check_untouched(
    engines: list[Engine], one: Rollout, outcome: Outcome, state: context.Context
) -> None:
    """Nothing is staged or committed anywhere, and whoever asks is told why."""
    await one.follow()  # engines have taken by then what they were told before
    await one.follow()
    assert state.current is state.start
    assert [engine.generation for engine in engines] == [1, 1]
    assert [engine.staged for engine in engines] == ["", ""]
    assert (outcome.generation, outcome.fingerprint) == (1, state.start.fingerprint)
    assert one.last == asdict(outcome)
    if outcome.result != "unanswered":
        told = [json.loads(engine.outcome) for engine in engines]
        assert told == [one.last, one.last]


def test_what_all_engines_have_staged_is_in_force(
    play: Scene, state: context.Context, registry: CollectorRegistry
) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        outcome = await one.reload()
        assert (outcome.result, outcome.generation) == ("success", 2)
        assert outcome.followed
        assert state.current.number == 2
        assert outcome.fingerprint == state.current.fingerprint
        assert [engine.generation for engine in engines] == [2, 2]

    play(story)
    assert (count(registry, "success"), last_successful(registry)) == (1, 1)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    ("answer", "result", "successful"),
    [
        ({"error": "the disk is on fire"}, "refused", 0),
        (BUSY, "busy", 1),
        (Exception("Call to guard_stage\nfailed"), "unanswered", 0),
    ],
)
def test_what_one_engine_does_not_stage_is_in_force_nowhere(
    answer: dict[str, str] | Exception,
    result: str,
    successful: int,
    odd: int,
    play: Scene,
    state: context.Context,
    registry: CollectorRegistry,
) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        engines[odd].answer = answer
        outcome = await one.reload(wait=0.1)
        assert outcome.result == result
        said = answer if isinstance(answer, Exception) else "".join(answer.values())
        assert " ".join(str(said).split()) in str(outcome.reason)
        for engine in engines:
            assert engine.calls.count("guard_abandon") == engine.calls.count(
                "guard_stage"
            )
            assert "guard_commit" not in engine.calls
        await check_untouched(engines, one, outcome, state)

    play(story)
    assert (count(registry, result), last_successful(registry)) == (1, successful)


def test_a_busy_engine_is_waited_for(play: Scene, state: context.Context) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        engines[1].answer = BUSY
        waiting = asyncio.ensure_future(one.reload(wait=10))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        engines[1].answer = {}
        assert (await waiting).result == "success"
        assert state.current.number == 2

    play(story)


def test_a_reload_that_waits_for_another_is_no_refusal(
    play: Scene, registry: CollectorRegistry
) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        engines[1].answer = BUSY
        first = asyncio.ensure_future(one.reload(wait=1))
        await asyncio.sleep(0.1)
        second = await one.reload(wait=0.1)
        assert (second.result, second.reason) == (
            "busy",
            "another reload is under way",
        )
        assert (await first).result == "busy"

    play(story)
    assert (count(registry, "busy"), count(registry, "refused")) == (2, 0)
    assert last_successful(registry) == 1


# Engines that hang


@pytest.mark.parametrize("hangs_at", ["guard_follow", "guard_stage"])
def test_a_reload_does_not_wait_for_an_engine_that_hangs(
    hangs_at: str, play: Scene, state: context.Context, registry: CollectorRegistry
) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        engines[1].hangs_at = hangs_at
        began = time.monotonic()
        outcome = await one.reload(wait=0.1)
        assert time.monotonic() - began < 5
        assert outcome.result == "unanswered"
        assert "an engine hangs, or is dead" in str(outcome.reason)
        assert not one._lock.locked()
        assert one.last is not None
        assert one.last["result"] == "unanswered"
        assert engines[0].staged == ""
        # It takes what waited for it in turn, and then everything is as it was.
        engines[1].awake.set()
        await check_untouched(engines, one, outcome, state)
        assert (await one.reload()).generation == 2

    play(story)
    assert count(registry, "unanswered") == 1


def test_what_an_engine_commits_late_is_let_in_by_itself(
    play: Scene, state: context.Context
) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        engines[1].hangs_at = "guard_commit"
        outcome = await one.reload(wait=0.1)
        assert (outcome.result, outcome.generation) == ("unanswered", 1)
        assert "in force once every engine says so" in str(outcome.reason)
        assert state.current is state.start
        assert [engine.generation for engine in engines] == [2, 1]
        engines[1].awake.set()
        await one.follow()
        assert state.current.number == 2
        assert [engine.generation for engine in engines] == [2, 2]
        # The file is not new any more.
        assert (await one.reload()).generation == 2

    play(story)


# API servers that fall behind, and questions of many


@pytest.mark.parametrize("follows", [True, False])
def test_an_answer_says_whether_every_api_server_follows(
    follows: bool, play: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "_FOLLOWED_SECONDS", 0.3)

    async def story(engines: list[Engine], one: Rollout) -> None:
        engines[1].behind = 2 if follows else 1
        outcome = await one.reload()
        assert outcome.result == "success"
        assert outcome.followed is follows
        # Nothing is new, and the other one may be behind all the same.
        assert (await one.reload()).followed is follows

    play(story)


def test_however_many_follow_engines_are_asked_once(play: Scene) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        engines[1].hangs_at = "guard_follow"
        asked = [one.follow(seconds=0.2) for _ in range(1000)]
        said = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, TimeoutError) for error in said)
        assert engines[0].calls == ["guard_follow"]
        engines[1].awake.set()
        await asyncio.gather(*(one.follow() for _ in range(1000)))
        assert engines[0].calls == ["guard_follow"]
        await one.follow()
        assert engines[0].calls == ["guard_follow", "guard_follow"]

    play(story)


# SIGHUP


def test_many_hangups_in_a_busy_reload_are_one_more_reload(
    play: Scene, registry: CollectorRegistry
) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        one.start()
        engines[1].hangs_at = "guard_stage"
        os.kill(os.getpid(), signal.SIGHUP)
        while "guard_stage" not in engines[1].calls:
            await asyncio.sleep(0.01)
        for _ in range(1000):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
        tasks = len(one._tasks)
        engines[1].awake.set()
        while count(registry, "success") != 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert len(one._tasks) <= tasks <= 5
        for task in list(one._tasks):
            task.cancel()

    play(story)
    assert count(registry, "success") == 2


def test_what_an_engine_hanged_at_is_reloaded_at_last(
    play: Scene, registry: CollectorRegistry
) -> None:
    async def story(engines: list[Engine], one: Rollout) -> None:
        engines[1].hangs_at = "guard_follow"
        waiting = asyncio.ensure_future(one._reload_at_last("a file changed"))
        while not count(registry, "unanswered"):
            await asyncio.sleep(0.01)
        engines[1].awake.set()
        await waiting
        assert [engine.generation for engine in engines] == [2, 2]

    play(story)
    assert last_successful(registry) == 1
