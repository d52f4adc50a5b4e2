"""What an API server asks its engines, and how long it waits for an answer.

Runs in each API server.
"""

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

__all__ = ["ANSWER_VARIABLE", "answer_seconds", "ask", "await_answer", "share"]

ANSWER_VARIABLE = "GUARD_ANSWER_SECONDS"
"""How long engines may take to answer for the guard, where 10 seconds are not right: a
step that is under way comes first."""
_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 0.1

_T = TypeVar("_T")


def answer_seconds() -> float:
    """Return how long engines may take to answer."""
    return float(os.environ.get(ANSWER_VARIABLE) or _ANSWER_SECONDS)


def share(
    question: asyncio.Future[_T] | None, begin: Callable[[], Awaitable[_T]]
) -> asyncio.Future[_T]:
    """Return the question that is under way, or begin one.

    All who ask meanwhile wait for the same answer: an engine that hangs is not left
    with a queue of them.
    """
    if question is not None and not question.done():
        return question
    return asyncio.ensure_future(begin())


async def ask(
    client: Any, method: str, *args: Any, seconds: float = math.inf
) -> list[Any]:
    """Return what each engine answers to a utility call.

    An engine that does not answer in time has the call all the same, before any later
    one.

    Raises:
        TimeoutError: They are dead, or did not answer in time.
    """
    core = client.engine_core
    to_all = hasattr(core, "call_utility_all_async")
    call = core.call_utility_all_async if to_all else core.call_utility_async
    question = asyncio.ensure_future(call(method, *args))
    try:
        found = await await_answer(client, question, seconds=seconds)
    finally:
        question.cancel()
    answers: list[Any] = found if to_all else [found]
    return answers


async def await_answer(
    client: Any, question: asyncio.Future[_T], *, seconds: float = math.inf
) -> _T:
    """Return what engines answer, or do not wait for it any longer.

    vLLM never answers for an engine that died; whoever waited for it would keep the
    server, which waits for every request, from ending.

    Args:
        client: vLLM's engine client.
        question: A call on its way to them; left alone where it is not answered.
        seconds: How long they may take.

    Raises:
        TimeoutError: They are dead, or did not answer in time.
    """
    deadline = time.monotonic() + seconds
    while not question.done():
        if getattr(client, "errored", False) or time.monotonic() > deadline:
            message = "an engine hangs, or is dead: it did not answer in time"
            raise TimeoutError(message)
        await asyncio.wait({question}, timeout=_PAUSE_SECONDS)
    return question.result()
