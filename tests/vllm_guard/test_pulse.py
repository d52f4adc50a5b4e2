"""An engine that hangs or is not guarded shows in the metrics, without a request."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm_guard import context, server
from vllm_guard.pulse import Pulse

from guard.errors import EngineError


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def read(registry: CollectorRegistry) -> tuple[float | None, float | None]:
    """Return whether it is ready, and the age of the last answer."""
    value = registry.get_sample_value
    return value("guard_ready"), value("guard_snapshot_age_seconds")


async def watch(
    check: Any,
    registry: CollectorRegistry,
    *,
    seconds: float,
    age: float = 0.0,
    patience: float = 60.0,
    age_seconds: float = 0.01,
) -> tuple[Pulse, list[Any]]:
    """Return it, and where the client appears that it gives up."""
    client = SimpleNamespace(guard_answered=time.monotonic() - age)
    given_up: list[Any] = []
    pulse = Pulse(
        client,
        check,
        metrics=context.get_board(registry).metrics,
        patience=patience,
        give_up=given_up.append,
        ask_seconds=0.01,
        age_seconds=age_seconds,
    )
    pulse.start()
    await asyncio.sleep(seconds)
    return pulse, given_up


async def say_nothing(_client: Any) -> None:
    await asyncio.sleep(60)


def test_an_engine_that_is_not_guarded_is_not_ready_until_it_is(
    state: context.Context, registry: CollectorRegistry
) -> None:
    guarded = [False]

    async def check(_client: Any) -> None:
        if not guarded[-1]:
            raise EngineError("no")

    async def follow() -> list[float | None]:
        pulse = await watch(check, registry, seconds=0.1)
        seen = [read(registry)[0]]
        for now in (True, False):
            guarded.append(now)
            await asyncio.sleep(0.2)
            seen.append(read(registry)[0])
        assert pulse
        return seen

    assert asyncio.run(follow()) == [0, 1, 0]


def test_the_age_grows_while_a_question_waits(
    state: context.Context, registry: CollectorRegistry
) -> None:
    async def follow() -> None:
        kept = await watch(say_nothing, registry, seconds=0.1, age=100.0)
        assert kept
        before = read(registry)[1]
        await asyncio.sleep(0.2)
        after = read(registry)[1]
        assert before is not None
        assert after is not None
        assert 100 <= before < after < 110

    asyncio.run(follow())


def test_an_engine_that_hangs_for_good_is_given_up_once(
    state: context.Context,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def follow() -> list[Any]:
        _, early = await watch(say_nothing, registry, seconds=0.1)
        _, late = await watch(say_nothing, registry, seconds=0.5, patience=0.1)
        assert early == []
        return late

    assert len(asyncio.run(follow())) == 1
    assert "it is taken for dead, and the server ends" in caplog.text


def test_an_engine_that_answers_slowly_is_kept(
    state: context.Context, registry: CollectorRegistry
) -> None:
    async def answer(client: Any) -> None:
        await asyncio.sleep(0.1)
        client.guard_answered = time.monotonic()

    async def follow() -> list[Any]:
        _, given_up = await watch(answer, registry, seconds=1.0, patience=0.4)
        return given_up

    assert asyncio.run(follow()) == []


def test_where_this_process_stood_still_no_engine_is_given_up(
    state: context.Context, registry: CollectorRegistry
) -> None:
    async def follow() -> list[Any]:
        _, given_up = await watch(
            *(say_nothing, registry),
            **{"seconds": 0.3, "age": 3600.0, "patience": 10.0, "age_seconds": 0.1},
        )
        return given_up

    assert asyncio.run(follow()) == []


def test_an_answer_of_all_engines_makes_the_age_start_anew(
    state: context.Context,
) -> None:
    async def answer(*_call: Any) -> list[Any]:
        return []

    client = SimpleNamespace(
        engine_core=SimpleNamespace(call_utility_all_async=answer), guard_answered=0.0
    )
    asyncio.run(server.ask_engines(client))
    assert time.monotonic() - client.guard_answered < 10


def test_an_answer_that_nobody_waited_for_is_noted_all_the_same(
    state: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARD_ANSWER_SECONDS", "0.05")

    async def answer(*_call: Any) -> list[Any]:
        await asyncio.sleep(0.4)
        return []

    client = SimpleNamespace(
        engine_core=SimpleNamespace(call_utility_all_async=answer), guard_answered=0.0
    )

    async def ask() -> None:
        with pytest.raises(TimeoutError):
            await server.ask_engines(client)
        await asyncio.sleep(0.6)

    asyncio.run(ask())
    assert time.monotonic() - client.guard_answered < 10
