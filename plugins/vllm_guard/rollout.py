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
from typing import Any

from guard.errors import GuardError
from guard.generation import Generation, load_generation
from guard.http.keys import KeyRing
from guard.metrics import ReloadResult
from guard.policy import PolicyFile, parse_policy, read_policy
from vllm_guard import context
from vllm_guard.lookout import Lookout
from vllm_guard.question import answer_seconds, ask, await_answer, share
from vllm_guard.reload import Offer, adopt, write_notice

__all__ = ["WAIT_SECONDS", "Outcome", "Rollout", "read_keys"]

logger = logging.getLogger(__name__)

WAIT_SECONDS = 30.0
"""How long a reload waits for requests that began before the last one."""
_FOLLOW_SECONDS = 0.5
_WATCH_SECONDS = 1.0
_RETRY_SECONDS = 0.05
_FOLLOWED_SECONDS = 10.0
"""How long an answer waits for the other API servers."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a reload."""

    result: ReloadResult
    generation: int
    """That new requests run under."""
    fingerprint: str
    """Of its policy file."""
    reason: str | None = None
    """Why the policies stay, in one line."""
    at: float = 0.0
    """Unix time in seconds."""
    followed: bool = True
    """Whether every API server is known to let requests in under it."""


class _BusyError(Exception):
    """It cannot be done yet."""


def read_keys(args: Namespace, policy_file: PolicyFile) -> KeyRing:
    """Return the keys that vLLM's own check accepts, and whose they are.

    Raises:
        PolicyError: The key of a tenant is not among them.
    """
    given = args.api_key or [os.environ.get("VLLM_API_KEY")]
    return KeyRing(policy_file.tenants, accepted=[key for key in given if key])


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
        self._hangup = asyncio.Event()
        self._question: asyncio.Future[None] | None = None
        self._slowest = 1
        self._tasks: set[asyncio.Task[None]] = set()
        self.last: dict[str, Any] | None = None
        """The outcome of the last reload, whichever API server was asked for it."""

    def start(self) -> None:
        """Follow the engines, and reload on SIGHUP and where the file is watched."""
        self._spawn(self._keep_following())
        self._spawn(self._heed_hangups())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        if os.environ.get(context.WATCH_VARIABLE) and self._rank == 0:
            self._spawn(self._watch())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def reload(self, *, wait: float = WAIT_SECONDS) -> Outcome:
        """Bring the policy file as it is now to every rank of every engine, or to none.

        An engine that hangs is waited for as long as it may take to answer, and not at
        all for good.

        Args:
            wait: Seconds to wait for requests that began before the last reload.
        """
        deadline = time.monotonic() + wait
        try:
            async with asyncio.timeout(wait):
                await self._lock.acquire()
        except TimeoutError:
            return self._conclude("busy", "another reload is under way")
        result: ReloadResult = "success"
        reason = None
        try:
            await self.follow(seconds=answer_seconds())
            await self._bring(deadline)
        except _BusyError as error:
            result, reason = "busy", str(error)
        except GuardError as error:
            result, reason = "refused", str(error)
        except TimeoutError as error:
            result, reason = "unanswered", str(error)
        except Exception as error:  # vLLM raises bare Exceptions for a failed call
            logger.exception("An engine did not answer for a reload.")
            result, reason = "unanswered", f"an engine did not answer: {error}"
        finally:
            self._lock.release()
        outcome = self._conclude(result, reason)
        if result == "success":
            outcome = replace(outcome, followed=await self._wait_for_followers())
        self.last = asdict(outcome)
        if result != "unanswered":  # nor would this be, and it would wait there
            await self._tell("guard_note", json.dumps(self.last))
        return outcome

    def _conclude(self, result: ReloadResult, reason: str | None) -> Outcome:
        """Count what became of a reload, and log why the policies stay."""
        context.get_board().metrics.count_reload(result)
        current = context.get().current
        if reason is not None:
            reason = " ".join(reason.split())
            logger.error("The policies stay as they are: %s", reason)
        number, fingerprint = current.number, current.fingerprint
        return Outcome(result, number, fingerprint, reason, time.time())

    async def _tell(self, method: str, *args: Any) -> None:
        """Tell every engine something; one that hangs hears of it when it answers."""
        try:
            await ask(self._client, method, *args, seconds=answer_seconds())
        except Exception as error:  # vLLM raises bare Exceptions for a failed call
            logger.warning("Not every engine has answered %s: %s", method, error)

    async def _bring(self, deadline: float) -> None:
        """Check, stage and commit; where nothing has changed, do nothing.

        Raises:
            GuardError: The file is refused, by whichever process.
            TimeoutError: An engine did not answer.
        """
        state = context.get()
        # Not in the loop that streams tokens: statistics are read and checked.
        content, generation = await asyncio.to_thread(self._load, state.current.number)
        if generation.fingerprint == state.current.fingerprint:
            return
        keys = read_keys(self._args, generation.policy_file)
        offer = Offer(
            owner=uuid.uuid4().hex,
            number=generation.number,
            path=str(self._path),
            content=content,
            fingerprint=generation.fingerprint,
        )
        await self._stage(offer, deadline)
        await self._commit(offer, write_notice(generation, offer))
        self._show(generation, keys)

    def _load(self, current: int) -> tuple[bytes, Generation]:
        content = read_policy(self._path)
        policy_file = parse_policy(content, self._path)
        start = context.get().start
        return content, load_generation(policy_file, number=current + 1, start=start)

    async def _stage(self, offer: Offer, deadline: float) -> None:
        """Have every engine stage an offer, or none.

        Raises:
            GuardError: One of them refuses it.
            TimeoutError: One of them did not answer.
        """
        while True:
            errors, busy = await self._offer(offer, deadline)
            if not errors and not busy:
                return
            await self._tell("guard_abandon", offer.owner)
            if errors:
                raise GuardError(errors[0])
            if time.monotonic() > deadline:
                raise _BusyError(busy[0])
            await asyncio.sleep(_RETRY_SECONDS)
            await self.follow(seconds=answer_seconds())

    async def _offer(
        self, offer: Offer, deadline: float
    ) -> tuple[list[str], list[str]]:
        """Return why engines refuse an offer, and why they cannot stage it yet."""
        # No longer, or those that have staged it take it for abandoned.
        seconds = min(deadline - time.monotonic(), WAIT_SECONDS)
        seconds = max(seconds, answer_seconds())
        try:
            answers = await ask(
                self._client, "guard_stage", tuple(offer), seconds=seconds
            )
        except Exception as error:
            await self._tell("guard_abandon", offer.owner)
            message = f"{error}; what it still stages it lets go of"
            raise TimeoutError(message) from error
        errors = [answer["error"] for answer in answers if "error" in answer]
        return errors, [answer["busy"] for answer in answers if "busy" in answer]

    async def _commit(self, offer: Offer, notice: str) -> None:
        """Have every engine make current what all have staged.

        Raises:
            TimeoutError: One of them did not say that it has; `follow` sees when it
                does.
        """
        call = "guard_commit", offer.owner, notice
        try:
            await ask(self._client, *call, seconds=answer_seconds())
        except Exception as error:
            message = (
                f"{error}; all have staged the new ones, which are in force once every "
                "engine says so"
            )
            raise TimeoutError(message) from error

    def _show(self, generation: Generation, keys: KeyRing) -> None:
        """Let requests in under a generation that every engine has made current."""
        state = context.get()
        # A request that was let in a moment ago may only now be counted.
        if state.current.number != generation.number:
            state.previous = state.current
        # What only an engine needs is not kept a second time.
        state.current = replace(generation, calibrations={})
        context.get_board().show(generation, keys=keys)

    async def follow(self, *, seconds: float = math.inf) -> None:
        """Tell every engine how far this API server is, and catch up with them.

        One question at a time, which all who ask meanwhile share.

        Args:
            seconds: How long they may take.

        Raises:
            TimeoutError: They are dead, or did not answer in time.
        """
        self._question = share(self._question, self._follow)
        await await_answer(self._client, self._question, seconds=seconds)

    async def _follow(self) -> None:
        state, board = context.get(), context.get_board()
        told = self._rank, state.current.number, board.desk.oldest_generation
        answers = await ask(self._client, "guard_follow", *told)
        self._slowest = min(answer["slowest"] for answer in answers)
        outcomes = [json.loads(a["outcome"]) for a in answers if a["outcome"]]
        outcomes += [self.last] if self.last else []
        self.last = max(outcomes, key=lambda outcome: outcome["at"], default=None)
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

    async def _wait_for_followers(self) -> bool:
        """Wait until every API server lets requests in under the new generation.

        Returns:
            Whether they do; one that is late follows by itself.
        """
        number = context.get().current.number
        deadline = time.monotonic() + _FOLLOWED_SECONDS
        while time.monotonic() < deadline:
            try:
                await self.follow(seconds=answer_seconds())
            except Exception as error:  # vLLM raises bare Exceptions
                logger.warning("An engine did not say who follows it: %s", error)
                return False
            if self._slowest >= number:
                return True
            await asyncio.sleep(_RETRY_SECONDS)
        return False

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

    async def _heed_hangups(self) -> None:
        """Reload on SIGHUP; one that comes meanwhile is one more, and so are many."""
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            await self._reload_at_last("SIGHUP")

    async def _reload_at_last(self, why: str) -> None:
        """Reload, however long requests of an earlier generation take, or engines."""
        logger.info("Reloading the policies: %s.", why)
        while (await self.reload()).result in ("busy", "unanswered"):
            await asyncio.sleep(_WATCH_SECONDS)


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
