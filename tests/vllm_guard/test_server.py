"""The server opens once every rank of every engine has answered for the guard."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_guard import context, server

from guard.errors import EngineError


def make_client(engines: list[list[Any]]) -> Any:
    """Return a client of so many engines, as data parallelism has it."""

    async def answer_all(*_call: Any) -> list[list[Any]]:
        return engines

    async def answer_first(*call: Any) -> list[Any]:
        return (await answer_all(*call))[0]

    core = SimpleNamespace(
        call_utility_all_async=answer_all, call_utility_async=answer_first
    )
    return SimpleNamespace(engine_core=core)


def make_engine(
    state: context.Context, *ranks: int, world_size: int = 2, **of_last: Any
) -> list[dict[str, Any]]:
    """Return what an engine says: its workers, the last of them odd, and its core."""
    about = {"fingerprint": state.fingerprint}
    workers = [about | {"role": "worker", "rank": n, "ready": True} for n in ranks]
    workers[-1] |= of_last
    return [*workers, about | {"role": "engine_core", "world_size": world_size}]


def check(*engines: list[dict[str, Any]]) -> None:
    asyncio.run(server.check_engines(make_client(list(engines))))


def test_a_server_whose_ranks_all_answer_is_ready(state: context.Context) -> None:
    check(make_engine(state, 0, 1), make_engine(state, 1, 0))
    check(make_engine(state, 0, world_size=1))


def test_a_rank_that_does_not_answer_is_missed(state: context.Context) -> None:
    with pytest.raises(
        EngineError, match=r"Engine 0 .* ranks \[1\]; expected \[0, 1\]"
    ):
        check(make_engine(state, 1))
    with pytest.raises(EngineError, match=r"ranks \[0, 0\]; expected \[0, 1\]"):
        check(make_engine(state, 0, 0))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"fingerprint": "other"}, "another policy file"),
        ({"ready": False}, "not ready"),
    ],
)
def test_the_last_rank_of_the_last_engine_counts_too(
    odd: dict[str, Any], said: str, state: context.Context
) -> None:
    with pytest.raises(EngineError, match=f"ngine 1 .*{said}"):
        check(make_engine(state, 0, 1), make_engine(state, 0, 1, **odd))


def test_an_engine_without_the_guard_is_missed(state: context.Context) -> None:
    with pytest.raises(EngineError, match="Engine 1 answers for nothing"):
        check(make_engine(state, 0, 1), [None, None])
