"""A block in which NaN was left is zeroed before anybody else has it.

The cache is vLLM's own.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.scheduler import Scheduler
from vllm_guard import residue

NUM_BLOCKS = 6


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> BlockPool:
    """Return vLLM's blocks under the guard; number 0 is nobody's."""
    for owner, name in [
        (BlockPool, "get_new_blocks"),
        (Scheduler, "_get_new_block_ids_to_zero"),
    ]:
        # So that what `install` wraps is as before when the test is over.
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    residue.install()
    return BlockPool(NUM_BLOCKS, enable_caching=True, hash_block_size=16)


def end_step(pool: BlockPool, *, vllm: list[int] | None = None) -> list[int] | None:
    """Return what the worker is told to zero; `vllm` is what vLLM wants by itself."""
    manager = SimpleNamespace(
        block_pool=pool, take_new_block_ids=lambda: list(vllm or ())
    )
    scheduler: Any = SimpleNamespace(
        kv_cache_manager=manager, needs_kv_cache_zeroing=vllm is not None
    )
    return Scheduler._get_new_block_ids_to_zero(scheduler)


def test_blocks_are_zeroed_once_and_when_somebody_gets_them(pool: BlockPool) -> None:
    held = pool.get_new_blocks(2)
    residue.leave(pool, [block.block_id for block in held])
    assert end_step(pool) is None
    pool.get_new_blocks(2)
    assert end_step(pool) is None
    pool.free_blocks(held)
    again = pool.get_new_blocks(2)
    assert {block.block_id for block in again} == {1, 2}
    assert end_step(pool) == [1, 2]
    assert end_step(pool) is None
    pool.free_blocks(again)
    pool.get_new_blocks(2)
    assert end_step(pool) is None


def test_what_vllm_zeroes_by_itself_stays_so(pool: BlockPool) -> None:
    residue.leave(pool, [2])
    pool.get_new_blocks(3)
    assert end_step(pool, vllm=[1, 3]) == [1, 2, 3]
    assert end_step(pool, vllm=[4]) == [4]


class Runner:
    """A runner that has laid nothing out."""

    def __init__(self, device: str) -> None:
        self.device = SimpleNamespace(type=device)
        self.kv_block_zeroer: object | None = None
        self.asked = 0

    def _init_kv_zero_meta(self) -> None:
        self.asked += 1
        self.kv_block_zeroer = object()


@pytest.mark.parametrize(("device", "asked"), [("cuda", 1), ("cpu", 0)])
def test_a_runner_lays_out_what_it_needs_when_it_is_needed(
    device: str, asked: int
) -> None:
    runner = Runner(device)
    residue.prepare(runner, SimpleNamespace(new_block_ids_to_zero=None))
    assert runner.asked == 0
    for _ in range(2):
        residue.prepare(runner, SimpleNamespace(new_block_ids_to_zero=[1]))
    assert runner.asked == asked


def test_both_runners_zero_what_the_scheduler_tells_them() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu import model_runner as v2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "_get_new_block_ids_to_zero()" in inspect.getsource(Scheduler.schedule)
    for owner, name, zeroer in [
        (GPUModelRunner, "_update_states", "self._kv_block_zeroer = "),
        (v2.GPUModelRunner, "update_requests", "self.kv_block_zeroer = "),
    ]:
        body = inspect.getsource(getattr(owner, name))
        assert "scheduler_output.new_block_ids_to_zero" in body
        assert zeroer in inspect.getsource(owner._init_kv_zero_meta)
    body = inspect.getsource(v2.GPUModelRunner.execute_model)
    assert body.index("self.add_requests(") < body.index("self.update_requests(")
    assert ".zero_()" in inspect.getsource(CPUModelRunner._zero_block_ids)
