"""The adapter to vLLM's second model runner, which no CPU can run."""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm_guard import context, runner_v2
from vllm_guard.rows import DRILL_KEY, SLOT_KEY, StepRows

from guard.pipeline import StepBuffers

BOS, BLOCK_SIZE = 1, 4
GROUP = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK_SIZE))
RUNNER = SimpleNamespace(
    model_config=SimpleNamespace(hf_text_config=SimpleNamespace(bos_token_id=BOS)),
    kv_cache_config=SimpleNamespace(kv_cache_groups=[GROUP], num_blocks=16),
    device=torch.device("cpu"),
)


@pytest.fixture
def rows(state: context.Context) -> StepRows:
    """The row map of this process, on buffers for two requests and 16 blocks."""
    step = StepBuffers(
        max_tokens=32, max_requests=2, num_columns=len(state.current.layout)
    )
    state.rows = StepRows(step, num_hooks=1, default_slot=1)
    state.rows.allocate_column(16 * BLOCK_SIZE)
    RUNNER.guard_known = {}
    return state.rows


def make_data(name: str, tokens: list[int], blocks: list[int], **values: Any) -> Any:
    """Return what vLLM's `NewRequestData` says of an admitted request."""
    wanted = {
        "req_id": name,
        "sampling_params": SimpleNamespace(extra_args={SLOT_KEY: 2}),
        "block_ids": (blocks,),
        "prefill_token_ids": tokens,
        "prompt_len": len(tokens),
        "prompt_embeds": None,
    }
    return SimpleNamespace(**(wanted | values))


def run_step(
    *,
    new: list[Any] | None = None,
    cached: dict[str, list[int] | None] | None = None,
    rows_of: dict[str, tuple[int, int]],
    **values: Any,
) -> None:
    """Call the adapter as the runner would: admissions first, then inputs."""
    known = cached or {}
    output = SimpleNamespace(
        scheduled_new_reqs=new or [],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(known),
            new_block_ids=[None if ids is None else (ids,) for ids in known.values()],
        ),
        **(
            {
                "finished_req_ids": set(),
                "preempted_req_ids": None,
                "kv_cache_block_copies": None,
                "new_block_ids_to_zero": None,
            }
            | values
        ),
    )
    runner_v2._add_requests(lambda *_: None, RUNNER, output)
    if not rows_of:
        return
    batch = SimpleNamespace(
        req_ids=list(rows_of),
        num_computed_tokens_np=np.array([first for first, _ in rows_of.values()]),
        num_scheduled_tokens=np.array([count for _, count in rows_of.values()]),
    )
    found = runner_v2._prepare_inputs(lambda *_: batch, RUNNER, output, None, None)
    assert found is batch


def compute(rows: StepRows, scores: list[float]) -> dict[str, list[float]]:
    rows.step.scores[: len(scores), 0] = torch.tensor(scores)
    rows.step.marks_of(len(scores)).visits.fill_(rows.num_hooks)
    return {name: r.scores[:, 0].tolist() for name, r in rows.finish().items()}


def test_what_the_runner_forgets_is_remembered_over_steps(rows: StepRows) -> None:
    run_step(new=[make_data("a", [BOS, 5, 6], [3])], rows_of={"a": (0, 3)})
    assert rows.step.rows_in[:3, 0].tolist() == [0, 2, 2]
    assert rows._kv_slots is not None
    assert rows._kv_slots.tolist() == [12, 13, 14]
    compute(rows, [1.0, 2.0, 3.0])
    run_step(cached={"a": None}, rows_of={"a": (3, 1)})
    assert rows.step.rows_in[0, 0] == 2
    assert rows._kv_slots.tolist() == [15]
    compute(rows, [4.0])
    run_step(cached={"a": [9]}, rows_of={"a": (4, 1)})
    assert rows._kv_slots.tolist() == [36]


def test_a_cached_prefix_is_found_at_admission_and_only_then(rows: StepRows) -> None:
    run_step(new=[make_data("a", [5] * 5, [3, 7])], rows_of={"a": (0, 5)})
    compute(rows, [1.0, 2.0, 3.0, 4.0, 5.0])
    run_step(
        new=[make_data("b", [5] * 6, [3, 8])],
        cached={"a": None},
        rows_of={"a": (5, 1), "b": (4, 2)},
    )
    assert compute(rows, [6.0, 7.0, 8.0]) == {
        "a": [6.0],
        "b": [1.0, 2.0, 3.0, 4.0, 7.0, 8.0],
    }
    run_step(cached={"b": None}, rows_of={"b": (6, 1)})
    assert compute(rows, [9.0]) == {"b": [9.0]}


def test_a_preempted_request_comes_back_as_a_new_one(rows: StepRows) -> None:
    run_step(new=[make_data("a", [5, 6], [3])], rows_of={"a": (0, 2)})
    compute(rows, [1.0, 2.0])
    run_step(rows_of={}, preempted_req_ids={"a"})
    run_step(new=[make_data("a", [5, 6, 7], [4])], rows_of={"a": (0, 3)})
    assert rows._kv_slots is not None
    assert rows._kv_slots.tolist() == [16, 17, 18]


def test_a_drill_stands_at_the_last_token_of_the_prompt_and_again_after_preemption(
    rows: StepRows,
) -> None:
    params = SimpleNamespace(extra_args={SLOT_KEY: 2, DRILL_KEY: 1})
    known = {"prompt_len": 3, "sampling_params": params}
    run_step(new=[make_data("a", [BOS, 5, 6], [3], **known)], rows_of={"a": (0, 2)})
    assert rows.step.drills_of(2).tolist() == [0, 0]
    compute(rows, [1.0, 2.0])
    run_step(cached={"a": None}, rows_of={"a": (2, 1)})
    assert rows.step.drills_of(1).tolist() == [1]
    compute(rows, [3.0])
    run_step(cached={"a": None}, rows_of={"a": (3, 1)})
    assert rows.step.drills_of(1).tolist() == [0]
    compute(rows, [4.0])
    run_step(rows_of={}, preempted_req_ids={"a"})
    again = make_data("a", [BOS, 5, 6, 7, 8], [4, 5], **known)
    run_step(new=[again], rows_of={"a": (0, 5)})
    assert rows.step.drills_of(5).tolist() == [0, 0, 1, 0, 0]


def test_rejected_drafts_take_their_conditions_back_and_no_others(
    rows: StepRows,
) -> None:
    run_step(new=[make_data("a", [5] * 3, [3])], rows_of={"a": (0, 3)})
    rows.step.marks[1, 1] = 0b1
    compute(rows, [1.0, 2.0, 3.0])
    # Two drafts: at the second one, rejected later, another condition is met.
    run_step(cached={"a": [7]}, rows_of={"a": (3, 3)})
    place = rows.step.rows_in[0, 1]
    rows.step.state[place, :2] = 1
    rows.step.marks[2, 1] = 0b10
    compute(rows, [4.0, 5.0, 6.0])
    run_step(cached={"a": None}, rows_of={"a": (5, 1)})
    assert rows.step.state[place, :3].tolist() == [1, 0, 0]
    assert compute(rows, [7.0]) == {"a": [7.0]}


def test_readings_go_along_where_blocks_are_copied(rows: StepRows) -> None:
    run_step(new=[make_data("a", [5] * 5, [3, 7])], rows_of={"a": (0, 5)})
    compute(rows, [1.0, 2.0, 3.0, 4.0, 5.0])
    run_step(
        new=[make_data("b", [5] * 6, [3, 8])],
        rows_of={"b": (5, 1)},
        kv_cache_block_copies=[(7, 8)],
    )
    assert compute(rows, [9.0]) == {"b": [1.0, 2.0, 3.0, 4.0, 5.0, 9.0]}


def test_places_are_freed_by_steps_without_tokens_too(rows: StepRows) -> None:
    for number in range(9):
        name = f"r{number}"
        run_step(new=[make_data(name, [5], [number])], rows_of={name: (0, 1)})
        compute(rows, [1.0])
        run_step(rows_of={}, finished_req_ids={name})
    assert not RUNNER.guard_known


def test_a_prompt_of_embeddings_has_no_bos(rows: StepRows) -> None:
    data = make_data("a", [BOS, 0], [3], prompt_embeds=torch.ones(2, 8))
    run_step(new=[data], rows_of={"a": (0, 2)})
    assert rows.step.rows_in[:2, 0].tolist() == [2, 2]


def test_without_a_slot_the_default_applies(rows: StepRows) -> None:
    data = make_data("a", [5], [3], sampling_params=None)
    run_step(new=[data], rows_of={"a": (0, 1)})
    assert rows.step.rows_in[0, 0] == rows.default_slot


def test_the_second_runner_still_is_what_the_adapter_was_written_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    wrapped: list[tuple[type, str]] = []
    monkeypatch.setattr(
        runner_v2, "wrap", lambda owner, name, _: wrapped.append((owner, name))
    )
    runner_v2.install()
    for owner, name in wrapped:
        assert owner is GPUModelRunner
        assert name in vars(owner)

    def parameters(name: str) -> list[str]:
        return list(inspect.signature(getattr(GPUModelRunner, name)).parameters)

    assert parameters("add_requests") == ["self", "scheduler_output"]
    assert parameters("prepare_inputs")[:2] == ["self", "scheduler_output"]
    assert parameters("initialize_kv_cache")[:2] == ["self", "kv_cache_config"]
    assert parameters("sample_tokens")[:2] == ["self", "grammar_output"]
    assert parameters("_dummy_run")[:2] == ["self", "num_tokens"]
    assert parameters("load_model")[0] == "self"
    source = inspect.getsource(GPUModelRunner)
    for name in ("execute_model_state", "kv_cache_config", "model_config", "device"):
        assert f"self.{name}" in source
    body = inspect.getsource(GPUModelRunner.execute_model)
    order = ["finish_requests(", "add_requests(", "total_num_scheduled_tokens == 0"]
    order.append("self.prepare_inputs(")
    assert [body.index(part) for part in order] == sorted(
        body.index(part) for part in order
    )
    fields = set(InputBatch.__dataclass_fields__)
    assert fields >= {"req_ids", "num_computed_tokens_np", "num_scheduled_tokens"}
    fields = set(NewRequestData.__dataclass_fields__)
    assert fields >= {"req_id", "sampling_params", "block_ids", "prefill_token_ids"}
    assert "prompt_embeds" in fields
    # Of the prompt alone, also where `prefill_token_ids` holds outputs.
    assert isinstance(NewRequestData.prompt_len, property)
    assert NewRequestData.prompt_len.fget is not None
    assert "prefill" not in inspect.getsource(NewRequestData.prompt_len.fget)
    fields = set(SchedulerOutput.__dataclass_fields__)
    assert fields >= {"preempted_req_ids", "kv_cache_block_copies"}
    # What was preempted comes back to it as a new request.
    scheduling = inspect.getsource(Scheduler.schedule)
    at = scheduling.index("if self.use_v2_model_runner:")
    assert "scheduled_new_reqs.extend(scheduled_resumed_reqs)" in scheduling[at:]


def test_an_idle_data_parallel_step_goes_through_the_dummy_pass() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    assert "self.model_runner._dummy_run(" in inspect.getsource(
        Worker.execute_dummy_batch
    )
    # It reaches the model without `add_requests` and `prepare_inputs`.
    assert "dummy_run=True" in inspect.getsource(GPUModelRunner._dummy_run)
    body = inspect.getsource(GPUModelRunner.execute_model)
    assert "if not dummy_run:" in body[: body.index("self.add_requests(")]
