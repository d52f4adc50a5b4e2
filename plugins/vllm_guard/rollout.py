"""How an API server brings a changed policy file to every engine, and follows them.

Runs in each API server. Whoever is asked, by an administrator, a signal or a file that
changed, checks the file, has every engine stage it and commits only when all have. All
API servers ask every engine now and then which generation is current.
"""

import asyncio
import json
import logging
import math
import os
import signal
import time
import uuid
from argparse import Namespace
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from guard.errors import GuardError
from guard.generation import Generation, load_generation
from guard.http.keys import KeyRing
from guard.policy import PolicyFile, parse_policy, read_policy
from vllm_guard import context
from vllm_guard.lookout import Lookout
from vllm_guard.reload import Offer, adopt, write_notice

__all__ = ["WAIT_SECONDS", "Outcome", "Rollout", "await_answer", "read_keys"]

logger = logging.getLogger(__name__)

WAIT_SECONDS = 30.0
"""How long a reload waits for requests that began before the last one."""
_FOLLOW_SECONDS = 0.5
_WATCH_SECONDS = 1.0
_RETRY_SECONDS = 0.05
_FOLLOWED_SECONDS = 10.0
"""How long an answer waits for the other API servers."""
_PAUSE_SECONDS = 0.1

Result = Literal["success", "refused", "busy"]
"""`busy` is a refusal that has nothing to do with the file: later it may succeed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a reload."""

    result: Result
    generation: int
    """That new requests run under."""
    fingerprint: str
    """Of its policy file."""
    reason: str | None = None
    """Why it was refused, in one line."""
    at: float = 0.0
    """Unix time in seconds."""


class _BusyError(Exception):
    """It cannot be done yet."""


def read_keys(args: Namespace, policy_file: PolicyFile) -> KeyRing:
    """Return the keys that vLLM's own check accepts, and whose they are.

    Raises:
        PolicyError: The key of a tenant is not among them.
    """
    given = args.api_key or [os.environ.get("VLLM_API_KEY")]
    return KeyRing(policy_file.tenants, accepted=[key for key in given if key])


async def await_answer(
    client: Any, question: asyncio.Future[Any], *, seconds: float = math.inf
) -> Any:
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
            message = "The engines are dead, or did not answer in time."
            raise TimeoutError(message)
        await asyncio.wait({question}, timeout=_PAUSE_SECONDS)
    return question.result()


class Rollout:
    """The reloads of one API server."""

    def __init__(self, client: Any, args: Namespace) -> None:
        """Know the engines; `start` begins to follow them.

        Args:
            client: vLLM's engine client.
            args: Of `vllm serve`, for the keys that it accepts.
        """
        self._client = client
        self._args = args
        self._rank = max(client.vllm_config.parallel_config._api_process_rank, 0)
        self._path = Path(os.environ[context.POLICY_VARIABLE])
        self._lock = asyncio.Lock()
        self._slowest = 1
        self._tasks: set[asyncio.Task[None]] = set()
        self.last: dict[str, Any] | None = None
        """The outcome of the last reload, whichever API server was asked for it."""

    def start(self) -> None:
        """Follow the engines, and reload on SIGHUP and where the file is watched."""
        self._spawn(self._keep_following())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(
            signal.SIGHUP, lambda: self._spawn(self._reload_at_last("SIGHUP"))
        )
        if os.environ.get(context.WATCH_VARIABLE) and self._rank == 0:
            self._spawn(self._watch())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def reload(self, *, wait: float = WAIT_SECONDS) -> Outcome:
        """Bring the policy file as it is now to every rank of every engine, or to none.

        Args:
            wait: Seconds to wait for requests that began before the last reload.
        """
        deadline = time.monotonic() + wait
        board = context.get_board()
        result: Result = "success"
        notice, reason = "", None
        try:
            async with asyncio.timeout(wait):
                await self._lock.acquire()
        except TimeoutError:
            return self._tell("busy", "another reload is under way")
        try:
            await self.follow()
            notice = await self._bring(deadline)
        except _BusyError as error:
            result, reason = "busy", str(error)
        except GuardError as error:
            result, reason = "refused", str(error)
        except Exception as error:  # vLLM raises bare Exceptions for a failed call
            logger.exception("An engine did not answer for a reload.")
            result, reason = "refused", f"an engine did not answer: {error}"
        finally:
            self._lock.release()
        board.metrics.count_reload("success" if result == "success" else "refused")
        outcome = self._tell(result, reason)
        await self._call("guard_note", json.dumps(asdict(outcome)), notice)
        if notice:
            await self._wait_for_followers()
        return outcome

    def _tell(self, result: Result, reason: str | None) -> Outcome:
        current = context.get().current
        if reason is not None:
            reason = " ".join(reason.split())
            logger.error("The policies stay as they are: %s", reason)
        number, fingerprint = current.number, current.fingerprint
        return Outcome(result, number, fingerprint, reason, time.time())

    async def _bring(self, deadline: float) -> str:
        """Check, stage and commit.

        Returns:
            What other API servers must know; empty where nothing had changed.

        Raises:
            GuardError: The file is refused, by whichever process.
        """
        state = context.get()
        # Not in the loop that streams tokens: statistics are read and checked.
        content, generation = await asyncio.to_thread(self._load, state.current.number)
        if generation.fingerprint == state.current.fingerprint:
            return ""
        keys = read_keys(self._args, generation.policy_file)
        offer = Offer(
            owner=uuid.uuid4().hex,
            number=generation.number,
            path=str(self._path),
            content=content,
            fingerprint=generation.fingerprint,
        )
        await self._stage(offer, deadline)
        notice = write_notice(generation, offer)
        await self._call("guard_commit", offer.owner)
        self._show(generation, keys)
        return notice

    def _load(self, current: int) -> tuple[bytes, Generation]:
        content = read_policy(self._path)
        policy_file = parse_policy(content, self._path)
        start = context.get().start
        return content, load_generation(policy_file, number=current + 1, start=start)

    async def _stage(self, offer: Offer, deadline: float) -> None:
        """Have every engine stage an offer, or none.

        Raises:
            GuardError: One of them refuses it.
        """
        while True:
            answers = await self._call("guard_stage", tuple(offer))
            errors = [answer["error"] for answer in answers if "error" in answer]
            busy = [answer["busy"] for answer in answers if "busy" in answer]
            if not errors and not busy:
                return
            await self._call("guard_abandon", offer.owner)
            if errors:
                raise GuardError(errors[0])
            if time.monotonic() > deadline:
                raise _BusyError(busy[0])
            await asyncio.sleep(_RETRY_SECONDS)
            await self.follow()

    def _show(self, generation: Generation, keys: KeyRing) -> None:
        """Let requests in under a generation that every engine has made current."""
        state = context.get()
        # A request that was let in a moment ago may only now be counted.
        if state.current.number != generation.number:
            state.previous = state.current
        # What only an engine needs is not kept a second time.
        state.current = replace(generation, calibrations={})
        context.get_board().show(generation, keys=keys)

    async def follow(self) -> None:
        """Tell every engine how far this API server is, and catch up with them."""
        state, board = context.get(), context.get_board()
        oldest = board.desk.oldest_generation
        answers = await self._call(
            "guard_follow", self._rank, state.current.number, oldest
        )
        self._slowest = min(answer["slowest"] for answer in answers)
        told = [json.loads(a["outcome"]) for a in answers if a["outcome"]]
        self.last = max(told, key=lambda outcome: outcome["at"], default=None)
        # Until the last engine has committed, the others do not count.
        slowest = min(answers, key=lambda answer: answer["generation"])
        if slowest["generation"] > state.current.number and slowest["notice"]:
            generation = await asyncio.to_thread(_load_adopted, slowest["notice"])
            # Somebody else may have caught up meanwhile.
            if generation.number > state.current.number:
                self._show(generation, read_keys(self._args, generation.policy_file))

    async def _keep_following(self) -> None:
        while True:
            try:
                await self.follow()
            except Exception as error:  # vLLM raises bare Exceptions for a failed call
                logger.warning(
                    "An engine did not say which policies it runs: %s", error
                )
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def _wait_for_followers(self) -> None:
        """Wait until every API server lets requests in under the new generation."""
        number = context.get().current.number
        deadline = time.monotonic() + _FOLLOWED_SECONDS
        await self.follow()
        while self._slowest < number and time.monotonic() < deadline:
            await asyncio.sleep(_RETRY_SECONDS)
            await self.follow()

    async def _watch(self) -> None:
        """Reload when a file of the policies is another one, and stays so a moment."""
        lookout = Lookout(self._path)
        done = before = await asyncio.to_thread(lookout.look)
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            found = await asyncio.to_thread(lookout.look)
            if found == before and found != done:
                await self._reload_at_last("a file changed")
                done = found
            before = found

    async def _reload_at_last(self, why: str) -> None:
        """Reload, however long requests of an earlier generation take."""
        logger.info("Reloading the policies: %s.", why)
        while (await self.reload()).result == "busy":
            await asyncio.sleep(_WATCH_SECONDS)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Return what each engine answers to a utility call.

        Raises:
            TimeoutError: One of them died.
        """
        core = self._client.engine_core
        to_all = hasattr(core, "call_utility_all_async")
        call = core.call_utility_all_async if to_all else core.call_utility_async
        question = asyncio.ensure_future(call(method, *args))
        try:
            found = await await_answer(self._client, question)
        finally:
            question.cancel()
        answers: list[Any] = found if to_all else [found]
        return answers


def _load_adopted(notice: str) -> Generation:
    """Return the generation of a notice, with its calibrations if they are still there.

    They are what drift is held against. The files may have changed again since.
    """
    start = context.get().start
    told = adopt(notice, start)
    try:
        found = load_generation(told.policy_file, number=told.number, start=start)
    except GuardError:
        return told
    return found if found.fingerprint == told.fingerprint else told
