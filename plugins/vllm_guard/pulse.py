"""Asks the engines now and then, for whoever looks at the metrics alone.

Runs in each API server, beside the requests: an engine that hangs says nothing by
itself, and a scrape cannot wait for it. One that hangs for good is given up.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from guard.errors import EngineError
from guard.metrics import Metrics

__all__ = ["Pulse"]

logger = logging.getLogger(__name__)

_ASK_SECONDS = 15.0
"""A worker that was asked looks out for the next word for a second, at a whole core's
cost: an idle one should rest."""
_AGE_SECONDS = 1.0


class Pulse:
    """Keeps `guard_ready` and `guard_snapshot_age_seconds` true."""

    def __init__(
        self,
        client: Any,
        check: Callable[[Any], Awaitable[None]],
        *,
        metrics: Metrics,
        patience: float,
        give_up: Callable[[Any], None],
        ask_seconds: float = _ASK_SECONDS,
        age_seconds: float = _AGE_SECONDS,
    ) -> None:
        """Know whom to ask; `start` begins.

        Args:
            client: vLLM's engine client; `guard_answered` on it is when every engine
                last answered, on the monotonic clock.
            check: Raises EngineError where an engine of the client is not guarded.
            metrics: Where it is shown.
            patience: How many seconds a question may wait.
            give_up: Called with the client where one has waited longer.
            ask_seconds: Between an answer and the next question.
            age_seconds: Between two looks at the age of the last answer.
        """
        self._client = client
        self._check = check
        self._metrics = metrics
        self._patience = patience
        self._give_up = give_up
        self._ask_seconds = ask_seconds
        self._age_seconds = age_seconds
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    def start(self) -> None:
        """Ask and look from now on, for as long as the event loop runs."""
        loop = asyncio.get_running_loop()
        # The loop itself keeps no reference.
        self._tasks = (
            loop.create_task(self._keep_asking()),
            loop.create_task(self._keep_looking()),
        )

    async def _keep_asking(self) -> None:
        while True:
            try:
                await self._check(self._client)
            except EngineError:
                self._metrics.show_ready(ready=False)
            else:
                self._metrics.show_ready(ready=True)
            await asyncio.sleep(self._ask_seconds)

    async def _keep_looking(self) -> None:
        """Let the age grow while a question waits: several processes share no clock."""
        silence = 0.0
        while True:
            age = time.monotonic() - self._client.guard_answered
            self._metrics.show_snapshot_age(age)
            # Where it was this process that stood still, no engine is to blame.
            silence = min(age, silence + 2 * self._age_seconds)
            if silence > self._ask_seconds + self._patience:
                logger.error(
                    "An engine has not answered for %d seconds: it is taken for dead, "
                    "and the server ends.",
                    silence,
                )
                self._give_up(self._client)
                return
            await asyncio.sleep(self._age_seconds)
