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
    check: Any, registry: CollectorRegistry, *, seconds: float, age: float = 0.0
) -> Pulse:
    client = SimpleNamespace(guard_answered=time.monotonic() - age)
    pulse = Pulse(
        client,
        check,
        metrics=context.get_board(registry).metrics,
        ask_seconds=0.01,
        age_seconds=0.01,
    )
    pulse.start()
    await asyncio.sleep(seconds)
    return pulse


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
        assert pulse is not None
        return seen

    assert asyncio.run(follow()) == [0, 1, 0]


def test_the_age_grows_while_a_question_waits(
    state: context.Context, registry: CollectorRegistry
) -> None:
    async def check(_client: Any) -> None:
        await asyncio.sleep(60)

    async def follow() -> None:
        await watch(check, registry, seconds=0.1, age=100.0)
        before = read(registry)[1]
        await asyncio.sleep(0.2)
        after = read(registry)[1]
        assert before is not None
        assert after is not None
        assert 100 <= before < after < 110

    asyncio.run(follow())


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
