"""The adapter to vLLM's first model runner, and the runner it was written for."""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm_guard import context, runner_v1
from vllm_guard.rows import SLOT_KEY, StepRows

from guard.errors import EngineError
from guard.pipeline import StepBuffers

BOS, BLOCK_SIZE = 1, 4


class FakeRunner:
    """What the adapter sees of the runner: a batch of requests, and their blocks."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(
            hf_text_config=SimpleNamespace(bos_token_id=BOS)
        )
        self.requests: dict[str, Any] = {}
        self.execute_model_state: object | None = None
        table = SimpleNamespace(
            block_size=BLOCK_SIZE,
            block_table=SimpleNamespace(np=np.zeros((4, 8), dtype=np.int32)),
            slot_mapping=SimpleNamespace(gpu=torch.zeros(32, dtype=torch.int64)),
        )
        self.table = table
        self.input_batch = SimpleNamespace(
            req_ids=[],
            num_computed_tokens_cpu=np.zeros(4, dtype=np.int32),
            token_ids_cpu=np.zeros((4, 32), dtype=np.int32),
            is_token_ids=np.zeros((4, 32), dtype=bool),
            block_table=SimpleNamespace(block_tables=[table]),
        )

    def put(
        self, name: str, *, first: int, start: int, blocks: list[int], slot: int = 1
    ) -> None:
        """Put a request into the next row of the batch."""
        batch, row = self.input_batch, len(self.input_batch.req_ids)
        batch.req_ids.append(name)
        batch.num_computed_tokens_cpu[row] = first
        batch.token_ids_cpu[row, 0] = start
        batch.is_token_ids[row] = True
        self.table.block_table.np[row, : len(blocks)] = blocks
        params = SimpleNamespace(extra_args={SLOT_KEY: slot})
        self.requests[name] = SimpleNamespace(sampling_params=params)


def make_output(
    *, new: Sequence[str] = (), resumed: Sequence[str] = (), **values: Any
) -> Any:
    wanted: dict[str, Any] = {
        "scheduled_new_reqs": [SimpleNamespace(req_id=name) for name in new],
        "scheduled_cached_reqs": SimpleNamespace(resumed_req_ids=set(resumed)),
        "finished_req_ids": set(),
        "preempted_req_ids": None,
    }
    return SimpleNamespace(**(wanted | values))


@pytest.fixture
def rows(state: context.Context) -> StepRows:
    """The row map of this process, on buffers for two requests."""
    step = StepBuffers(max_tokens=32, max_requests=2, num_columns=len(state.columns))
    state.rows = StepRows(step, num_hooks=1, default_slot=1)
    return state.rows


def prepare(runner: FakeRunner, output: Any, counts: list[int]) -> Any:
    done = object()
    found = runner_v1._prepare_inputs(
        lambda *_: done, runner, output, np.array(counts, dtype=np.int32)
    )
    assert found is done
    return found


def test_rows_are_written_as_the_batch_has_them(rows: StepRows) -> None:
    runner = FakeRunner()
    runner.put("a", first=0, start=BOS, blocks=[3], slot=2)
    runner.put("b", first=5, start=BOS, blocks=[6, 7])
    prepare(runner, make_output(new=("a",)), [3, 1])
    slot, place, start = rows.step.rows_in[:5].T.tolist()
    assert slot == [0, 2, 2, 1, 0]
    assert start == [0, 0, 0, 3, 0]
    assert place[0] == place[2] != place[3]


@pytest.mark.parametrize("how", ["new", "resumed"])
def test_a_request_that_comes_with_a_prefix_says_where_it_lies(
    rows: StepRows, how: str
) -> None:
    runner = FakeRunner()
    runner.put("a", first=5, start=9, blocks=[6, 2])
    counts = np.array([1], dtype=np.int32)
    admitting = make_output(new="a") if how == "new" else make_output(resumed="a")
    (request,) = runner_v1.list_requests(runner, admitting, counts, rows)
    assert request.admitted
    assert request.prefix_slots is not None
    assert request.prefix_slots.tolist() == [24, 25, 26, 27, 8]
    (request,) = runner_v1.list_requests(runner, make_output(), counts, rows)
    assert not request.admitted
    assert request.prefix_slots is None


def test_what_lies_under_a_prompt_of_embeddings_is_no_bos(rows: StepRows) -> None:
    runner = FakeRunner()
    runner.put("a", first=0, start=BOS, blocks=[3])
    runner.input_batch.is_token_ids[0] = False
    prepare(runner, make_output(new=("a",)), [2])
    assert rows.step.rows_in[:2, 0].tolist() == [1, 1]


@pytest.mark.parametrize("field", ["finished_req_ids", "preempted_req_ids"])
def test_a_step_without_tokens_still_frees_places(rows: StepRows, field: str) -> None:
    for number in range(9):
        runner, name = FakeRunner(), f"r{number}"
        runner.put(name, first=0, start=9, blocks=[0])
        runner_v1._update_states(lambda *_: None, runner, make_output(new=(name,)))
        prepare(runner, make_output(new=(name,)), [1])
        rows.finish()
        # The engine goes idle: vLLM tells the runner, and prepares no inputs.
        gone = make_output()
        setattr(gone, field, {name})
        runner_v1._update_states(lambda *_: None, runner, gone)


def test_readings_ride_on_the_output_of_the_step(rows: StepRows) -> None:
    runner = FakeRunner()
    runner.put("a", first=0, start=9, blocks=[0])
    prepare(runner, make_output(new=("a",)), [2])
    runner.execute_model_state = object()
    output = runner_v1.sample_tokens(lambda *_: SimpleNamespace(), runner, None)
    assert output.guard["a"].scores.shape == (2, rows.step.scores.shape[1])
    inner = SimpleNamespace()
    prepare(runner, make_output(), [2])
    outer = SimpleNamespace(_model_runner_output=inner)
    assert runner_v1.sample_tokens(lambda *_: outer, runner, None) is outer
    assert list(inner.guard) == ["a"]


def test_an_empty_step_carries_nothing(rows: StepRows) -> None:
    output = SimpleNamespace()
    runner_v1.sample_tokens(lambda *_: output, FakeRunner(), None)
    assert not hasattr(output, "guard")


def test_a_dummy_pass_finds_no_rows(rows: StepRows) -> None:
    rows.step.rows_in.fill_(1)

    def dummy_run(_runner: object, num_tokens: int) -> None:
        assert num_tokens == 3
        assert not rows.step.rows_in.any()

    runner_v1.dummy_run(dummy_run, FakeRunner(), 3)


def test_readings_are_kept_beside_every_kv_slot(rows: StepRows) -> None:
    windowed, whole = make_specs()
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in (windowed, whole)]
    config = SimpleNamespace(kv_cache_groups=groups, num_blocks=7)
    runner_v1.initialize_kv_cache(lambda *_: None, FakeRunner(), config)
    # A window gives blocks back, and with them what is kept beside them.
    assert rows.kv_group == 1
    assert rows._kept_scores is not None
    assert len(rows._kept_scores) == 7 * BLOCK_SIZE


@pytest.mark.usefixtures("rows")
def test_a_model_that_keeps_no_whole_request_is_refused() -> None:
    group = SimpleNamespace(kv_cache_spec=make_specs()[0])
    config = SimpleNamespace(kv_cache_groups=[group], num_blocks=7)
    with pytest.raises(EngineError, match="sliding_window only; expected full"):
        runner_v1.initialize_kv_cache(lambda *_: None, FakeRunner(), config)


def make_specs() -> tuple[Any, Any]:
    """Return how a layer with a sliding window keeps its KV, and one without."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    size = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    return (
        SlidingWindowSpec(block_size=2 * BLOCK_SIZE, sliding_window=64, **size),
        FullAttentionSpec(block_size=BLOCK_SIZE, **size),
    )


def test_the_first_runner_still_is_what_the_adapter_was_written_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.worker.block_table import BlockTable
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrapped: list[tuple[type, str]] = []
    monkeypatch.setattr(
        runner_v1, "wrap", lambda owner, name, _: wrapped.append((owner, name))
    )
    runner_v1.install()
    for owner, name in wrapped:
        assert owner is GPUModelRunner
        assert name in vars(owner)
        # Where the CPU's runner has its own, it calls the one that is wrapped.
        if name in vars(CPUModelRunner):
            own = inspect.getsource(getattr(CPUModelRunner, name))
            assert f"super().{name}(" in own
    found = list(inspect.signature(GPUModelRunner._prepare_inputs).parameters)
    assert found == ["self", "scheduler_output", "num_scheduled_tokens"]
    found = list(inspect.signature(GPUModelRunner._update_states).parameters)
    assert found == ["self", "scheduler_output"]
    found = list(inspect.signature(GPUModelRunner._dummy_run).parameters)
    assert found[1] == "num_tokens"
    body = inspect.getsource(GPUModelRunner.execute_model)
    # Rows are known between these two, and a step without tokens ends between them.
    assert body.index("_update_states(") < body.index("_prepare_inputs(")
    source = inspect.getsource(InputBatch.__init__)
    for name in ("token_ids_cpu", "is_token_ids", "num_computed_tokens_cpu"):
        assert f"self.{name} = " in source
    assert "self.block_table = " in source
    source = inspect.getsource(BlockTable.__init__)
    for name in ("block_table", "slot_mapping", "block_size"):
        assert f"self.{name} = " in source
    fields = set(SchedulerOutput.__dataclass_fields__)
    assert fields >= {"finished_req_ids", "preempted_req_ids", "scheduled_new_reqs"}
    assert "resumed_req_ids" in CachedRequestData.__dataclass_fields__
