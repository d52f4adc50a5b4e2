"""The adapter to vLLM's first model runner, and the runner it was written for."""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm_guard import context, runner_v1
from vllm_guard.rows import DRILL_KEY, SLOT_KEY, StepRows

from guard.errors import EngineError
from guard.pipeline import StepBuffers

BOS, BLOCK_SIZE = 1, 4


class FakeRunner:
    """What the adapter sees of the runner: a batch of requests, and their blocks."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(
            hf_text_config=SimpleNamespace(bos_token_id=BOS)
        )
        self.device = torch.device("cpu")
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
            num_prompt_tokens=np.zeros(4, dtype=np.int32),
            token_ids_cpu=np.zeros((4, 32), dtype=np.int32),
            is_token_ids=np.zeros((4, 32), dtype=bool),
            block_table=SimpleNamespace(block_tables=[table]),
        )

    def put(
        self,
        name: str,
        *,
        first: int,
        start: int,
        blocks: list[int],
        slot: int = 1,
        prompt: int = 4,
        **extra_args: int,
    ) -> None:
        """Put a request into the next row of the batch."""
        batch, row = self.input_batch, len(self.input_batch.req_ids)
        batch.req_ids.append(name)
        batch.num_computed_tokens_cpu[row] = first
        batch.num_prompt_tokens[row] = prompt
        batch.token_ids_cpu[row, 0] = start
        batch.is_token_ids[row] = True
        self.table.block_table.np[row, : len(blocks)] = blocks
        params = SimpleNamespace(extra_args={SLOT_KEY: slot, **extra_args})
        self.requests[name] = SimpleNamespace(sampling_params=params)


def make_output(
    *, new: Sequence[str] = (), resumed: Sequence[str] = (), **values: Any
) -> Any:
    wanted: dict[str, Any] = {
        "scheduled_new_reqs": [SimpleNamespace(req_id=name) for name in new],
        "scheduled_cached_reqs": SimpleNamespace(resumed_req_ids=set(resumed)),
        "finished_req_ids": set(),
        "preempted_req_ids": None,
        "kv_cache_block_copies": None,
        "new_block_ids_to_zero": None,
    }
    return SimpleNamespace(**(wanted | values))


@pytest.fixture
def rows(state: context.Context) -> StepRows:
    """The row map of this process, on buffers for two requests."""
    step = StepBuffers(
        max_tokens=32, max_requests=2, num_columns=len(state.current.layout)
    )
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
    slot, place, start, _ = rows.step.rows_in[:5].T.tolist()
    assert slot == [0, 2, 2, 1, 0]
    assert start == [0, 0, 0, 3, 0]
    assert place[0] == place[2] != place[3]


def test_a_drill_stands_at_the_last_token_of_the_prompt(rows: StepRows) -> None:
    drill = {DRILL_KEY: 1}
    runner = FakeRunner()
    runner.put("a", first=0, start=BOS, blocks=[3], prompt=3, **drill)
    runner.put("b", first=0, start=BOS, blocks=[4], prompt=3)
    prepare(runner, make_output(new=("a", "b")), [3, 3])
    assert rows.step.drills_of(7).tolist() == [0, 0, 1, 0, 0, 0, 0]
    rows.finish()
    rows.release(["a", "b"])
    runner = FakeRunner()
    runner.put("c", first=2, start=BOS, blocks=[5], prompt=3, **drill)
    runner.put("d", first=3, start=BOS, blocks=[6], prompt=3, **drill)
    prepare(runner, make_output(), [2, 1])
    assert rows.step.drills_of(4).tolist() == [1, 0, 0, 0]


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


def test_readings_ride_on_the_output_of_the_step(
    rows: StepRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(runner_v1.ranks, "agree", asked.append)
    runner = FakeRunner()
    runner.put("a", first=0, start=9, blocks=[0])
    prepare(runner, make_output(new=("a",)), [2])
    hidden_states = torch.tensor([[1.0, 2.0], [1.0, torch.nan]])
    runner.execute_model_state = SimpleNamespace(hidden_states=hidden_states)
    output = runner_v1.sample_tokens(lambda *_: SimpleNamespace(), runner, None)
    assert output.guard["a"].scores.shape == (2, rows.step.scores.shape[1])
    assert output.guard["a"].broken == 1
    inner = SimpleNamespace()
    prepare(runner, make_output(), [2])
    outer = SimpleNamespace(_model_runner_output=inner)
    assert runner_v1.sample_tokens(lambda *_: outer, runner, None) is outer
    assert list(inner.guard) == ["a"]
    assert asked == [rows, rows]


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_readings_come_out_of_an_asynchronous_output(
    runner: str, rows: StepRows
) -> None:
    """vLLM's own classes, as they are once the device has copied everything."""
    outer: Any = make_async_output(runner)
    runner_v1.attach(outer, {"a": "readings"}, [0.5])  # type: ignore[dict-item]
    sent = outer.get_output()
    assert sent.sampled_token_ids == [[7]]
    assert sent.guard == {"a": "readings"}
    assert sent.guard_seconds == [0.5]


def make_async_output(runner: str) -> Any:
    """Return what a runner's `sample_tokens` returns on a GPU, without one."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput

    inner = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    event = SimpleNamespace(synchronize=lambda: None)
    if runner == "V1":
        fields = {
            "_model_runner_output": inner,
            "_invalid_req_indices": [],
            "_logprobs_tensors": None,
            "_logprobs_tensors_cpu": None,
            "_num_nans": None,
            "_num_nans_cpu": None,
            "_has_fault": None,
            "_sampled_token_ids": torch.tensor([[7]]),
            "sampled_token_ids_cpu": torch.tensor([[7]]),
            "async_copy_ready_event": event,
        }
        outer: Any = object.__new__(AsyncGPUModelRunnerOutput)
    else:
        fields = {
            "model_runner_output": inner,
            "sampled_token_ids": np.array([[7, -1]]),
            "num_sampled_tokens_np": np.array([1]),
            "sampling_mask_tensors": None,
            "num_nans": None,
            "logprobs_tensors": None,
            "prompt_logprobs_dict": {},
            "prompt_token_id_logprobs_dict": {},
            "pending_aux_output": None,
            "_has_fault": None,
            "copy_event": event,
        }
        outer = object.__new__(AsyncOutput)
    vars(outer).update(fields)
    return outer


def test_readings_go_along_where_blocks_are_copied(rows: StepRows) -> None:
    rows.allocate_column(16 * BLOCK_SIZE)
    runner = FakeRunner()
    runner.put("a", first=0, start=9, blocks=[3])
    runner.table.slot_mapping.gpu[:4] = torch.arange(12, 16)
    prepare(runner, make_output(new=("a",)), [4])
    rows.step.scores[:4, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows.step.marks[1, 0] = 0b1
    rows.step.marks_of(4).visits.fill_(rows.num_hooks)
    rows.finish()
    runner = FakeRunner()
    runner.put("b", first=3, start=9, blocks=[5])
    runner.table.slot_mapping.gpu[0] = 23
    output = make_output(new=("b",), kv_cache_block_copies=[(3, 5)])
    runner_v1._update_states(lambda *_: None, runner, output)
    prepare(runner, output, [1])
    rows.step.scores[0, 0] = 9.0
    read = rows.finish()["b"]
    assert read.scores[:, 0].tolist() == [1.0, 2.0, 3.0, 9.0]
    assert read.clamped.tolist() == [0, 0b1, 0, 0]


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
    assert rows._kept is not None
    assert len(rows._kept) == 7 * BLOCK_SIZE


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
    from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner

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
    assert "hidden_states" in ExecuteModelState._fields
    body = inspect.getsource(GPUModelRunner.execute_model)
    # Rows are known between these two, and a step without tokens ends between them.
    assert body.index("_update_states(") < body.index("_prepare_inputs(")
    source = inspect.getsource(InputBatch.__init__)
    for name in (
        "token_ids_cpu",
        "is_token_ids",
        "num_computed_tokens_cpu",
        "num_prompt_tokens",
    ):
        assert f"self.{name} = " in source
    assert "self.block_table = " in source
    # Outputs so far come after the prompt, of a resumed request too.
    source = inspect.getsource(InputBatch.add_request)
    assert "self.num_prompt_tokens[req_index] = num_prompt_tokens" in source
    source = inspect.getsource(BlockTable.__init__)
    for name in ("block_table", "slot_mapping", "block_size"):
        assert f"self.{name} = " in source
    fields = set(SchedulerOutput.__dataclass_fields__)
    assert fields >= {"finished_req_ids", "preempted_req_ids", "scheduled_new_reqs"}
    assert fields >= {"kv_cache_block_copies", "new_block_ids_to_zero"}
    assert "resumed_req_ids" in CachedRequestData.__dataclass_fields__


def test_an_idle_data_parallel_step_goes_through_the_dummy_pass() -> None:
    """Only models with experts step in lockstep, and no CPU can run those so."""
    from vllm.v1.engine.core import DPEngineCoreProc
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    assert "self.execute_dummy_batch()" in inspect.getsource(DPEngineCoreProc)
    assert CPUWorker.execute_dummy_batch is Worker.execute_dummy_batch
    assert "self.model_runner._dummy_run(" in inspect.getsource(
        Worker.execute_dummy_batch
    )
    body = inspect.getsource(GPUModelRunner._dummy_run)
    assert "_prepare_inputs(" not in body
    assert "sample_tokens(" not in body


def test_a_step_between_two_idle_ones_is_read_as_if_they_were_not(
    rows: StepRows,
) -> None:
    runner = FakeRunner()
    runner.put("a", first=0, start=9, blocks=[0])

    def pass_through(_runner: object, num_tokens: int) -> None:
        rows.step.marks_of(num_tokens).visits.add_(1)
        assert not rows.step.rows_in.any()

    runner_v1.dummy_run(pass_through, runner, 8)
    prepare(runner, make_output(new=("a",)), [2])
    rows.step.marks_of(2).visits.add_(1)
    read = rows.finish()["a"]
    assert (read.guarded, read.first) == (2, 0)
    runner_v1.dummy_run(pass_through, runner, 8)
    prepare(runner, make_output(), [2])
    assert rows.finish()["a"].guarded == 0


def test_asynchronous_scheduling_ends_where_the_guard_looks() -> None:
    """Tokens reach the engine core with their readings, and before anything stops."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.executor.multiproc_executor import WorkerProc

    assert AsyncScheduler.update_from_output is Scheduler.update_from_output
    assert "output = output.get_output()" in inspect.getsource(
        WorkerProc.enqueue_output
    )
    body = inspect.getsource(Scheduler.update_from_output)
    steps = [
        # A request that was blocked a step ago has a step in flight: it is dropped.
        "request is None or request.is_finished()",
        "_update_request_with_output(",
        "logprobs.slice_request(req_index, len(new_token_ids))",
        "prompt_logprobs_dict.get(req_id)",
        "EngineCoreOutput(",
    ]
    found = [body.index(step) for step in steps]
    assert found == sorted(found)


def test_only_the_first_rank_answers_for_a_step() -> None:
    """Why the ranks must agree among themselves: see `vllm_guard.ranks`."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

    assert "unique_reply_rank=self.output_rank" in inspect.getsource(
        MultiprocExecutor.sample_tokens
    )
    body = inspect.getsource(WorkerProc._execute_worker_rpc)
    assert "output_rank is None or self.rank == output_rank" in body
