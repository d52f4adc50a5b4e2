"""A request that remembers stands on what earlier steps computed.

The cache is vLLM's own; only the requests are small.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request
from vllm_guard import context, prefix

BLOCK = 16
LONG = list(range(5 * BLOCK + 3))
SHORT = LONG[: 2 * BLOCK + 1]


@pytest.fixture
def cache(state: context.Context, monkeypatch: pytest.MonkeyPatch) -> KVCacheManager:
    """Return vLLM's cache under the guard, in which a step has just begun."""
    for owner, name in [
        (KVCacheManager, "new_step_starts"),
        (KVCacheManager, "get_computed_blocks"),
        (BlockPool, "_insert_block_hash"),
    ]:
        # So that what `install` wraps is as before when the test is over.
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    prefix.install()
    init_none_hash(sha256)
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    config = KVCacheConfig(
        num_blocks=64,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    manager = KVCacheManager(
        config, max_model_len=256, scheduler_block_size=BLOCK, hash_block_size=BLOCK
    )
    manager.new_step_starts()
    return manager


def make_request(name: str, tokens: list[int], policy: str) -> Request:
    request = Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    watch = SimpleNamespace(policy=context.get().current.policy_file.policies[policy])
    request.guard = SimpleNamespace(watch=watch)
    return request


def schedule(cache: KVCacheManager, request: Request) -> int:
    """Admit a request in this step; return how many tokens it found in the cache."""
    blocks, found, _ = cache.get_computed_blocks(request)
    assert len(blocks.blocks[0]) * BLOCK == found
    new = request.num_tokens - found
    assert cache.allocate_slots(request, new, found, blocks) is not None
    return found


def test_blocks_of_the_same_step_are_shared_unless_a_policy_remembers(
    cache: KVCacheManager,
) -> None:
    found = [
        schedule(cache, make_request(str(i), LONG, policy))
        for i, policy in enumerate(["open", "open", "default", "default"])
    ]
    assert found == [0, 80, 0, 0]


def test_blocks_of_an_earlier_step_are_shared_by_all(cache: KVCacheManager) -> None:
    schedule(cache, make_request("first", LONG, "default"))
    cache.new_step_starts()
    assert schedule(cache, make_request("second", LONG, "default")) == 80


def test_a_policy_that_remembers_stands_on_the_part_that_was_computed_before(
    cache: KVCacheManager,
) -> None:
    schedule(cache, make_request("first", SHORT, "default"))
    cache.new_step_starts()
    assert schedule(cache, make_request("second", LONG, "open")) == 32
    assert schedule(cache, make_request("third", LONG, "default")) == 32
    cache.new_step_starts()
    assert schedule(cache, make_request("fourth", LONG, "default")) == 80
