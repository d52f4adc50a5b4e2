"""What is not finite in the KV cache, and how it is kept from who comes next.

Runs in the scheduler. An attention kernel may multiply what lies behind the end of a
sequence by 0, and 0 * NaN is NaN: whoever is given a block in which NaN was left
computes NaN as well. vLLM zeroes a block that it hands out where the kernels of a model
need it; here it is told to where a request has left what is not finite.
"""

from collections.abc import Callable, Iterable
from typing import Any

from vllm_guard.patch import wrap

__all__ = ["install", "leave", "prepare"]


def install() -> None:
    """Wrap the handing out of blocks.

    vLLM has no notion of a block that must be zeroed once. Remove when it has.
    """
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(BlockPool, "get_new_blocks", _get_new_blocks)
    wrap(Scheduler, "_get_new_block_ids_to_zero", _get_new_block_ids_to_zero)


def leave(pool: Any, blocks: Iterable[int]) -> None:
    """Have blocks zeroed before anybody else is given them.

    Args:
        pool: vLLM's `BlockPool`.
        blocks: Their ids, of whatever group; whoever holds them now keeps them.
    """
    pool.guard_residue = getattr(pool, "guard_residue", set()).union(blocks)


def _get_new_blocks(original: Callable[..., Any], pool: Any, num_blocks: int) -> Any:
    blocks = original(pool, num_blocks)
    residue: set[int] = getattr(pool, "guard_residue", set())
    if residue:
        found = residue.intersection(block.block_id for block in blocks)
        residue -= found
        pool.guard_to_zero = getattr(pool, "guard_to_zero", set()) | found
    return blocks


def _get_new_block_ids_to_zero(
    original: Callable[..., list[int] | None], scheduler: Any
) -> list[int] | None:
    found = original(scheduler)
    pool = scheduler.kv_cache_manager.block_pool
    if wanted := getattr(pool, "guard_to_zero", None):
        pool.guard_to_zero = set()
        return sorted(wanted.union(found or ()))
    return found


def prepare(runner: Any, scheduler_output: Any) -> None:
    """Let a runner zero blocks where vLLM did not expect that it must.

    Both runners lay out what they need for it at the start, and only for some models;
    on a CPU nothing is needed. Runs in the worker.
    """
    if not scheduler_output.new_block_ids_to_zero or runner.device.type == "cpu":
        return
    known = ("_kv_block_zeroer", "kv_block_zeroer")
    if all(getattr(runner, name, None) is None for name in known):
        runner._init_kv_zero_meta()
