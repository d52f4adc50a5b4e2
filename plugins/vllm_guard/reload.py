"""The next generation of policies: staged on every rank, made current between steps.

Runs in the engine core, whose generation number is the one that counts, and in its
workers, which hold the tables. Nothing that a request in flight reads is touched: the
new generation takes the slots, columns and tables of the one before the current, and is
staged only once nobody uses those any more. `rollout` is the API server's part.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from guard.certificate import Attestation
from guard.check import check_origin
from guard.drill import RecoveryEdit
from guard.errors import GuardError, PolicyError
from guard.generation import Generation, load_generation
from guard.monitor import assign_columns
from guard.pipeline import read_statistics
from guard.policy import parse_policy
from vllm_guard import compat, context, hook, ops, selftest

__all__ = ["Offer", "ReloadBook", "adopt", "install", "write_notice"]

logger = logging.getLogger(__name__)

_ABANDONED_SECONDS = 60.0
"""After so long nobody will come back for what was staged."""


class Offer(NamedTuple):
    """What an API server wants every process to load."""

    owner: str
    """Names the attempt: two API servers may try at once."""
    number: int
    """Of the generation that it becomes."""
    path: str
    content: bytes
    """Of the policy file as it was read once: it may change again."""
    fingerprint: str
    """What that amounts to, with all the files it names."""


class _Follower(NamedTuple):
    """What an API server last said of itself."""

    seen: int
    """Generation that it lets requests in under."""
    oldest: int
    """Oldest generation of a request that it has not finished."""


@dataclass(slots=True)
class ReloadBook:
    """What an engine core knows of reloads."""

    owner: str = ""
    """Whose attempt is staged."""
    since: float = 0.0
    """Monotonic time at which it was."""
    notice: str = ""
    """`write_notice` of the current generation, for API servers that have not seen it;
    empty before the first reload."""
    followers: dict[int, _Follower] = field(default_factory=dict)
    """API servers by rank."""
    outcome: str = ""
    """JSON of what became of the last reload, whoever asked for it."""


def install() -> None:
    """Give engine core and workers the calls that a reload is made of.

    The core takes utility calls between two steps, and so does a worker.
    """
    from vllm.v1.engine.core import EngineCore

    for worker in compat.list_workers():
        worker.guard_stage = _stage_rank
        worker.guard_commit = _commit_rank
        worker.guard_abandon = _abandon_rank
    EngineCore.guard_stage = _stage
    EngineCore.guard_commit = _commit
    EngineCore.guard_abandon = _abandon
    EngineCore.guard_follow = _follow
    EngineCore.guard_note = _note


def read_offer(offer: Offer) -> Generation:
    """Load the generation that an API server offers, once in each process.

    Raises:
        GuardError: It does not load here, or is another one here.
    """
    state = context.get()
    wanted = offer.number, offer.fingerprint
    staged = state.staged
    if staged and (staged.number, staged.fingerprint) == wanted:
        return staged
    policy_file = parse_policy(offer.content, Path(offer.path))
    found = load_generation(policy_file, number=offer.number, start=state.start)
    if found.fingerprint != offer.fingerprint:
        message = (
            f"{offer.path}: a file that it names changed while it was read; expected "
            "every process to read the same one. Reload again."
        )
        raise PolicyError(message)
    return found


def _stage(core: Any, fields: Any) -> dict[str, str]:
    """Prepare a generation in the core and on every rank of the engine.

    Returns:
        Why it cannot be: `busy` where it is worth waiting, `error` where it is not;
        neither where it is staged.
    """
    offer = Offer(*fields)
    state, book = context.get(), _book()
    if busy := _find_busy(core, offer):
        return {"busy": busy}
    # Its slots are about to be overwritten: a late ticket finds it gone.
    state.previous = None
    book.owner, book.since = offer.owner, time.monotonic()
    try:
        state.staged = read_offer(offer)
        # For as long as it takes: vLLM's executor would take the answer of a rank that
        # is late for that to its next call.
        answers = core.model_executor.collective_rpc(
            "guard_stage", args=(tuple(offer),)
        )
    except GuardError as error:
        answers = [str(error)]
    except Exception as error:  # vLLM raises bare Exceptions for a failed call
        logger.exception("A rank did not answer for a reload.")
        answers = [f"a rank did not answer: {error}"]
    errors = [answer for answer in answers if answer]
    if errors:
        _abandon(core, offer.owner)
        return {"error": errors[0]}
    return {}


def _find_busy(core: Any, offer: Offer) -> str:
    """Return why a generation cannot be staged yet; empty if it can."""
    state, book = context.get(), _book()
    current = state.current.number
    age = time.monotonic() - book.since
    if book.owner not in ("", offer.owner) and age < _ABANDONED_SECONDS:
        return "another reload is under way"
    if offer.number != current + 1:
        return "another reload came first"
    begun = [one.guard.generation.number for one in core.scheduler.requests.values()]
    begun += [follower.oldest for follower in book.followers.values()]
    if min(begun, default=current) < current:
        return (
            "requests are still in flight that began before the last reload, and two "
            "generations of policies are all that there is room for"
        )
    return ""


def _commit(core: Any, owner: str, notice: str) -> None:
    """Let requests that come from now on run under what was staged.

    Args:
        core: The engine core.
        owner: Whose attempt it is.
        notice: What `write_notice` says of it.
    """
    state, book = context.get(), _book()
    if book.owner != owner or state.staged is None:
        message = "Nothing of this reload is staged; expected to commit it at once."
        raise PolicyError(message)
    staged = state.staged
    core.model_executor.collective_rpc("guard_commit", args=(staged.number,))
    _make_current(staged.number)
    book.owner, book.notice = "", notice


def _abandon(core: Any, owner: str) -> None:
    """Forget what was staged; everything goes on as it was."""
    state, book = context.get(), _book()
    if book.owner == owner:
        core.model_executor.collective_rpc("guard_abandon")
        book.owner, state.staged = "", None


def _follow(_core: Any, rank: int, seen: int, oldest: int) -> dict[str, Any]:
    """Hear how far an API server is, and tell it how far the engine is.

    Args:
        rank: Of the API server.
        seen: Generation that it lets requests in under.
        oldest: Oldest generation of a request that it has not finished.

    Returns:
        `generation`; `slowest`, what the last of all API servers has seen; `outcome`
        of the last reload; and `notice`, where the asker has not seen the generation.
    """
    book, current = _book(), context.get().current
    book.followers[rank] = _Follower(seen, oldest)
    return {
        "generation": current.number,
        "slowest": min(follower.seen for follower in book.followers.values()),
        "outcome": book.outcome,
        "notice": book.notice if seen < current.number else "",
    }


def _note(_core: Any, outcome: str) -> None:
    """Keep what became of a reload, for every API server to tell."""
    _book().outcome = outcome


def _book() -> ReloadBook:
    state = context.get()
    if state.reloads is None:
        state.reloads = ReloadBook()
    return state.reloads


def _stage_rank(worker: Any, fields: tuple[Any, ...]) -> str:
    """Write a generation into the tables of one rank, and try it.

    Returns:
        Why not, in one line; empty where it is staged.
    """
    try:
        stage_tables(worker.model_runner, Offer(*fields))
    except GuardError as error:
        return str(error)
    except Exception as error:
        # Whatever it is, this rank is not ready, and all others must know.
        logger.exception("Rank %s could not stage a reload.", worker.rank)
        return f"rank {worker.rank}: {type(error).__name__}: {error}"
    return ""


def stage_tables(runner: Any, offer: Offer) -> None:
    """Write a generation into the tables of this process, and try it.

    Raises:
        GuardError: It does not fit, or does something else than it should.
    """
    state = context.get()
    generation = state.staged = read_offer(offer)
    config = runner.vllm_config.model_config
    check_origin(
        generation.calibrations,
        model=compat.digest(config),
        dtype=compat.dtype_name(config),
    )
    width = config.get_hidden_size()
    statistics = {
        generation.numbers[column]: values
        for column, values in read_statistics(
            generation.policy_file, generation.calibrations, d_model=width
        ).items()
    }
    with torch.inference_mode():
        for guard in ops.bound():
            guard.write(
                generation.policy_file,
                statistics,
                generation.edits,
                bank=generation.bank,
            )
            selftest.check_canary(guard, generation, dtype=config.dtype, width=width)


def _commit_rank(_worker: Any, number: int) -> None:
    _make_current(number)


def _abandon_rank(_worker: Any) -> None:
    context.get().staged = None


def _make_current(number: int) -> None:
    """Commit in this process, in which core and worker may be one."""
    state = context.get()
    if state.staged is not None and state.staged.number == number:
        state.commit()
        if state.rows is not None:
            current = state.current
            state.rows.default_slot = current.slot(current.policy_file.default_policy)
            state.rows.whole_prompt = hook.list_whole(current) | (
                hook.list_whole(state.previous) if state.previous else set()
            )


def write_notice(generation: Generation, offer: Offer) -> str:
    """Return what an API server must know of a generation, as JSON.

    All of it: the files may change again before the last of them asks.
    """
    return json.dumps(
        {
            "number": generation.number,
            "path": offer.path,
            "content": offer.content.decode("latin-1"),
            "fingerprint": generation.fingerprint,
            "fingerprints": dict(generation.fingerprints),
            "certificates": {n: asdict(c) for n, c in generation.certificates.items()},
            "edits": {
                name: {
                    "prompt": edit.prompt,
                    "gold": edit.gold,
                    "budget": edit.budget,
                    "position": edit.position,
                    "sae_sha256": edit.sae_sha256,
                }
                for name, edit in generation.edits.items()
            },
        }
    )


def adopt(notice: str, start: Generation) -> Generation:
    """Return the generation that `write_notice` told of, without tensors.

    Args:
        notice: What it returned.
        start: What this process started with.
    """
    about: Mapping[str, Any] = json.loads(notice)
    content = about["content"].encode("latin-1")
    policy_file = parse_policy(content, Path(about["path"]))
    nothing = torch.zeros(0)
    return Generation(
        number=about["number"],
        policy_file=policy_file,
        fingerprint=about["fingerprint"],
        fingerprints=about["fingerprints"],
        layout=start.layout,
        numbers=assign_columns(start.layout, policy_file),
        num_slots=start.num_slots,
        calibrations={},
        certificates={n: Attestation(**c) for n, c in about["certificates"].items()},
        edits={n: RecoveryEdit(nothing, **e) for n, e in about["edits"].items()},
        saes=start.saes,
    )
