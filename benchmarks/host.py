"""What a decoding step costs the host besides the forward pass, piece by piece.

The guard's own code runs on the objects it meets in vLLM, without an engine around
them: so the numbers are what the guard adds and nothing else. `make bench` runs it.
"""

import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm_guard import admission, context, engine, outputs, runner_v1
from vllm_guard.rows import SLOT_KEY, StepRows

from benchmarks.shape import MONITORS, write_calibration
from guard.pipeline import StepBuffers
from guard.policy import load_policy
from guard.provenance import ROOT, describe_run
from guard.sae.load import weights_digest
from guard.testing import save_toy_sae

__all__ = ["Row", "measure"]

RESULTS = ROOT / "benchmarks" / "results" / "host.json"
BATCHES = (1, 8, 32, 64, 128, 256)
POLICIES = (1, 4, 16)
PROMPT_TOKENS = 64
BLOCK_SIZE = 16
STEPS = 100
"""Timed steps per case, after as many that only warm up."""
BLOCKS = -(-(PROMPT_TOKENS + 2 * STEPS) // BLOCK_SIZE)
"""Of each request."""
HOOK_POINT = "layers.1.resid_post"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `rows`: medians over steps, in microseconds."""

    batch: int
    policies: int
    worker_rows_us: float
    """Whose rows these are, written and copied to the device."""
    worker_readings_us: float
    """Readings copied from the device, kept beside the KV, cut up by request."""
    engine_us: float
    """Readings held against thresholds; verdicts put on the outputs."""
    server_us: float
    """Verdicts taken off the outputs, and counted."""
    wire_us: float
    """What pickling and MessagePack take longer, both ways, for what was put on."""
    total_us: float
    per_request_us: float


@dataclass(slots=True)
class _Batch:
    """A decoding batch as each of the three processes sees it."""

    runner: Any
    scheduled: Any
    scheduler: Any
    processor: Any
    counts: np.ndarray[Any, Any]
    position: int = PROMPT_TOKENS
    times: dict[str, list[float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.runner.requests)


def enter(folder: Path, policies: int) -> context.Context:
    """Be a process guarded by so many policies, each with two clamps and monitors."""
    save_toy_sae(folder / "sae", hook_point=HOOK_POINT)
    source = {
        "path": "sae",
        "format": "guard",
        "hook_point": HOOK_POINT,
        "sha256": weights_digest(folder / "sae", format="guard"),
    }
    policy = {
        "clamps": [
            {"name": f"c{i}", "sae": "s", "latents": [i], "law": "ablate"}
            for i in (1, 2)
        ],
        "monitors": MONITORS,
    }
    content = {
        "version": 1,
        "saes": {"s": source},
        "policies": {f"p{i}": policy for i in range(policies)},
        "default_policy": "p0",
    }
    path = folder / "policy.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    write_calibration(load_policy(path), d_model=64, provenance={})
    context.reset()
    os.environ[context.POLICY_VARIABLE] = str(path)
    context.enter()
    return context.get()


def make_batch(state: context.Context, size: int) -> _Batch:
    """Admit so many requests, their policies in turn, and put them into a batch."""
    names = [f"request-{i}" for i in range(size)]
    admitted = [_admit(state, name, index) for index, name in enumerate(names)]
    requests = dict(zip(names, admitted, strict=True))
    scheduled = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(names, 1),
        scheduled_spec_decode_tokens={},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(
            resumed_req_ids=set(),
            req_ids=names,
            num_computed_tokens=[PROMPT_TOKENS] * len(names),
        ),
        finished_req_ids=set(),
        preempted_req_ids=None,
    )
    states = {
        name: SimpleNamespace(parent_req=None, external_req_id=name, request_index=0)
        for name in names
    }
    return _Batch(
        runner=_make_runner(requests),
        scheduled=scheduled,
        scheduler=SimpleNamespace(
            requests={name: _make_request(name, *of) for name, of in requests.items()}
        ),
        processor=SimpleNamespace(request_states=states),
        counts=np.ones(size, dtype=np.int32),
    )


def _make_runner(
    requests: dict[str, tuple[SamplingParams, admission.Watched]],
) -> SimpleNamespace:
    size = len(requests)
    table = SimpleNamespace(
        block_size=BLOCK_SIZE,
        block_table=SimpleNamespace(
            np=np.arange(size * BLOCKS, dtype=np.int32).reshape(size, BLOCKS)
        ),
        slot_mapping=SimpleNamespace(gpu=torch.arange(size) * BLOCKS * BLOCK_SIZE),
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(bos_token_id=1)),
        requests={
            name: SimpleNamespace(sampling_params=params)
            for name, (params, _) in requests.items()
        },
        input_batch=SimpleNamespace(
            req_ids=list(requests),
            num_computed_tokens_cpu=np.full(size, PROMPT_TOKENS, dtype=np.int32),
            num_prompt_tokens=np.full(size, PROMPT_TOKENS, dtype=np.int32),
            token_ids_cpu=np.ones((size, 4), dtype=np.int32),
            is_token_ids=np.ones((size, 4), dtype=bool),
            block_table=SimpleNamespace(block_tables=[table]),
        ),
    )


def _admit(
    state: context.Context, name: str, index: int
) -> tuple[SamplingParams, admission.Watched]:
    policies = list(state.current.policy_file.policies)
    args = context.sampling_args(policies[index % len(policies)], trace="none")
    request = SimpleNamespace(
        request_id=name,
        sampling_params=SamplingParams(extra_args=args, max_tokens=1024),
        prompt_token_ids=[1] * PROMPT_TOKENS,
        prompt_embeds=None,
        cache_salt=None,
    )
    kept = admission.admit(request, max_model_len=2048)
    zeros = np.zeros((PROMPT_TOKENS, len(state.current.layout)), dtype=np.float32)
    kept.watch.observe(0, zeros, np.zeros(PROMPT_TOKENS, dtype=np.int32))
    assert SLOT_KEY in request.sampling_params.extra_args
    return request.sampling_params, kept


def _make_request(
    name: str, params: SamplingParams, watched: admission.Watched
) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name,
        guard=watched,
        num_prompt_tokens=PROMPT_TOKENS,
        num_output_tokens=0,
        max_tokens=1024,
        sampling_params=params,
        is_finished=lambda: False,
    )


def run_step(batch: _Batch, rows: StepRows) -> Iterator[tuple[str, float]]:
    """Take one token of every request from the worker to the API server."""
    names, columns = batch.names, rows.step.scores.shape[1]
    batch.runner.input_batch.num_computed_tokens_cpu[:] = batch.position
    cached = batch.scheduled.scheduled_cached_reqs
    cached.num_computed_tokens = [batch.position] * len(names)
    batch.position += 1

    seconds, _ = _time(
        lambda: runner_v1._prepare_inputs(
            lambda *_: None, batch.runner, batch.scheduled, batch.counts
        )
    )
    yield "worker_rows_us", seconds
    rows.step.marks[: len(names), 2] = 1
    rows.step.scores[: len(names), :columns] = 0.5
    seconds, readings = _time(rows.finish)
    yield "worker_readings_us", seconds
    output = ModelRunnerOutput(
        names, {n: i for i, n in enumerate(names)}, [[7]] * len(names)
    )
    plain_wire, _ = _time(lambda: pickle.loads(pickle.dumps(output)))
    output.guard, output.guard_seconds = readings, []
    wire, output = _time(lambda: pickle.loads(pickle.dumps(output)))

    made = {
        0: EngineCoreOutputs(
            outputs=[EngineCoreOutput(request_id=n, new_token_ids=[7]) for n in names]
        )
    }
    more_plain, _ = _time(lambda: _over_wire(made[0]))
    seconds, _ = _time(
        lambda: engine._update_from_output(
            lambda *_: made, batch.scheduler, batch.scheduled, output
        )
    )
    yield "engine_us", seconds
    more, received = _time(lambda: _over_wire(made[0]))
    yield "wire_us", wire - plain_wire + more - more_plain
    seconds, _ = _time(
        lambda: outputs._process_outputs(
            lambda *_: SimpleNamespace(reqs_to_abort=[]),
            batch.processor,
            received.outputs,
        )
    )
    yield "server_us", seconds


def _over_wire(outputs: EngineCoreOutputs) -> Any:
    return MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs))


def _time(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return 1e6 * (time.perf_counter() - start), result


def measure(batch_size: int, policies: int, *, steps: int = STEPS) -> Row:
    """Return what the guard adds to a decoding step of this size."""
    with tempfile.TemporaryDirectory() as folder:
        state = enter(Path(folder), policies)
        step = StepBuffers(
            max_tokens=max(BATCHES),
            max_requests=max(BATCHES),
            num_columns=len(state.current.layout),
        )
        rows = state.rows = StepRows(step, num_hooks=1, default_slot=1)
        batch = make_batch(state, batch_size)
        rows.allocate_column(batch_size * BLOCKS * BLOCK_SIZE)
        times: dict[str, list[float]] = {}
        for number in range(2 * steps):
            for name, microseconds in run_step(batch, rows):
                if number >= steps:
                    times.setdefault(name, []).append(microseconds)
        context.reset()
    medians = {name: round(statistics.median(all_), 1) for name, all_ in times.items()}
    total = sum(medians.values())
    return Row(
        batch=batch_size,
        policies=policies,
        **medians,
        total_us=round(total, 1),
        per_request_us=round(total / batch_size, 2),
    )


def main(
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
) -> None:
    """Measure the host's part of a decoding step against batch and policies."""
    torch.set_num_threads(1)
    about = describe_run()
    cases = [(batch, count) for count in POLICIES for batch in BATCHES]
    # A fork each: the state of a guarded process, its metrics too, is made once.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        measured = pool.starmap(measure, cases, chunksize=1)
    table = Table(*asdict(measured[0]))
    for row in measured:
        table.add_row(*map(str, asdict(row).values()))
    Console(stderr=True).print(table)
    result = about | {"rows": [asdict(row) for row in measured]}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
