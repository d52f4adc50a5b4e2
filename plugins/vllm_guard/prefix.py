"""Which cached prefix a request may stand on.

Runs in the scheduler. vLLM registers a block when it schedules the tokens that fill it,
so a request can be admitted on blocks that a neighbour computes in the same step. Their
readings are merged after the step, but a clamp with `when.scope: request` must know
within it what held before. Such a request stands on what earlier steps computed.
"""

from collections.abc import Callable
from typing import Any

from guard.policy import Policy
from vllm_guard import context
from vllm_guard.patch import wrap

__all__ = ["install", "remembers"]


def install() -> None:
    """Wrap the lookup of cached prefixes, where any policy needs it.

    vLLM has no notion of a block that is cached but not yet computed. Remove when a
    lookup can be told to leave those out.
    """
    if not any(map(remembers, context.get().start.policy_file.policies.values())):
        return
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    wrap(KVCacheManager, "new_step_starts", _new_step_starts)
    wrap(KVCacheManager, "get_computed_blocks", _get_computed_blocks)
    wrap(BlockPool, "_insert_block_hash", _insert_block_hash)


def remembers(policy: Policy) -> bool:
    """Whether a clamp depends on what an earlier token of the request showed."""
    return any(rule.when and rule.when.scope == "request" for rule in policy.clamps)


def _new_step_starts(original: Callable[..., Any], manager: Any) -> Any:
    manager.block_pool.guard_uncomputed = set()
    return original(manager)


def _insert_block_hash(
    original: Callable[..., Any], pool: Any, key: Any, block: Any, **kwargs: Any
) -> Any:
    uncomputed: set[int] = getattr(pool, "guard_uncomputed", set())
    uncomputed.add(block.block_id)
    return original(pool, key, block, **kwargs)


def _get_computed_blocks(
    original: Callable[..., Any], manager: Any, request: Any
) -> Any:
    found = original(manager, request)
    blocks, num_tokens, boundary = found
    watched = getattr(request, "guard", None)
    if not num_tokens or watched is None or not remembers(watched.watch.policy):
        return found
    while (end := _computed_end(manager, blocks.blocks)) < num_tokens:
        # Asked again and not cut off, so that all groups of blocks agree on the end.
        groups, num_tokens, _ = manager.coordinator.find_longest_cache_hit(
            request.block_hashes, end
        )
        blocks, boundary = manager.create_kv_cache_blocks(groups), 0
    return blocks, num_tokens, boundary


def _computed_end(manager: Any, groups: Any) -> float:
    """Return how many tokens from the start lie in blocks of earlier steps."""
    uncomputed: set[int] = getattr(manager.block_pool, "guard_uncomputed", set())
    ends = [
        index * kind.block_size
        for kind, blocks in zip(
            manager.coordinator.single_type_managers, groups, strict=True
        )
        for index, block in enumerate(blocks)
        if block.block_id in uncomputed
    ]
    return min(ends, default=float("inf"))
