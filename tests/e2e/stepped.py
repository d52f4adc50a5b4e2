"""An offline engine in a process of its own, driven step by step.

Scheduler, worker and guard share that process, and nothing runs between two steps: what
is in a batch is the test's choice, never a race, and what the scheduler did is read off
the scheduler.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import prometheus_client
from e2e.serving import guard_environment

BLOCK_SIZE = 32
MAX_MODEL_LEN = 1024
SECONDS = 300


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: list[int]
    policy: str
    max_tokens: int = 1
    n: int = 1
    """Choices; several are sampled, one is greedy."""
    salt: str | None = None
    """The client's own cache salt."""
    drill: str | None = None
    """Fire drill that it is."""
    adapter: str | None = None
    """Folder of a LoRA adapter."""
    arrives: int = 0
    """Step before which it is added."""
    aborts: int | None = None
    """Step before which its client hangs up."""


@dataclass(frozen=True)
class Answer:
    """What came of one choice of a request."""

    tokens: list[int]
    finish_reason: str | None
    """None where the client hung up."""
    guard: dict[str, Any] | None
    scores: npt.NDArray[np.float32]
    """What the guard took in, position by position, `[tokens_seen, num_columns]`."""
    clamped: npt.NDArray[np.int32]
    """Bit r is set where rule r changed the token, `[tokens_seen]`."""
    clearances: list[float]
    """Logprob of each token above that of the second best."""
    cached: int
    """Positions found in the cache when it was first admitted."""
    preemptions: int
    blocks: list[int]
    """KV blocks it held last."""
    block_steps: list[int]
    """Step in which each of them came to it."""


@dataclass(frozen=True)
class Counts:
    """What an engine has done since it began."""

    drafted: int
    accepted: int
    """Of the drafted tokens."""
    compilations: dict[str, int]
    """By stage of the compiler."""
    guard: dict[str, float]
    """The guard's own metrics, keyed `name{label="value"}`."""


@dataclass
class SteppedEngine:
    """A handle on the process."""

    process: "subprocess.Popen[bytes]"
    connection: Connection
    log: Path

    def run(self, asks: Sequence[Ask], *, chunk: int | None = None) -> list[Answer]:
        """Answer requests that come at once, unless they say otherwise.

        Args:
            asks: In the order in which they come.
            chunk: Most tokens of a step, as `--max-num-batched-tokens` sets it.

        Returns:
            One answer per choice, in order.
        """
        answers: list[Answer] = self._call("run", list(asks), chunk)
        return answers

    def count(self) -> Counts:
        counts: Counts = self._call("count")
        return counts

    def _call(self, *message: object) -> Any:
        try:
            self.connection.send(message)
            if self.connection.poll(SECONDS):
                return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.wait(timeout=30)
        tail = self.log.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"The engine does not answer:\n{tail}")


def python_path() -> str:
    """Return a PYTHONPATH on which the process finds this module."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(Path(__file__).parents[1]), *inherited])


@contextlib.contextmanager
def step_engine(
    model: Path,
    policy_file: Path,
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[SteppedEngine]:
    """Start an engine, eager unless told otherwise; end it with the context.

    Args:
        model: Its folder.
        policy_file: What `GUARD_POLICY` names.
        folder: Where its log goes.
        environment: Added to that of a small guarded engine.
        options: Of `vllm.LLM`.
    """
    ours, theirs = Pipe()
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from e2e.stepped import main; main()"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            env=guard_environment(
                {
                    "GUARD_POLICY": str(policy_file),
                    # The drafter's threads would wait for each other.
                    "NUMBA_NUM_THREADS": "1",
                    "PYTHONPATH": python_path(),
                    "STEPPED_ENGINE": json.dumps(
                        [theirs.fileno(), {"model": str(model), **options}]
                    ),
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_PLUGINS": "guard",
                    **(environment or {}),
                }
            ),
        )
    theirs.close()
    engine = SteppedEngine(process, ours, log)
    try:
        engine.count()
        yield engine
    finally:
        ours.close()
        process.kill()
        process.wait()


def main() -> None:
    """Be the process: answer calls until the other end is closed."""
    number, options = json.loads(os.environ["STEPPED_ENGINE"])
    stepper = Stepper(options)
    calls = {"run": stepper.run, "count": stepper.count}
    with Connection(number) as connection, contextlib.suppress(EOFError):
        while True:
            name, *arguments = connection.recv()
            connection.send(calls[name](*arguments))


@dataclass
class Running:
    """A choice of a request while the engine has it."""

    request: Any
    """The scheduler's own."""
    output: Any = None
    finish_reason: str | None = None
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    block_steps: list[int] = field(default_factory=list)

    def hold(self, blocks: list[int], step: int) -> None:
        """Note which blocks it holds after a step."""
        known = dict(zip(self.blocks, self.block_steps, strict=True))
        self.block_steps = [known.get(block, step) for block in blocks]
        self.blocks = blocks

    def answer(self) -> Answer:
        completion, watch = self.output, self.request.guard.watch
        began = self.request.prefill_stats
        steps = completion and zip(
            completion.token_ids, completion.logprobs or [], strict=True
        )
        rows, marks = zip(*getattr(watch, "trace", [([], [])]), strict=True)
        return Answer(
            tokens=list(completion.token_ids) if completion else [],
            finish_reason=self.finish_reason,
            guard=completion.guard if completion else None,
            scores=np.concatenate(rows),
            clamped=np.concatenate(marks),
            clearances=[_clearance(token, step) for token, step in steps or ()],
            # A request that is blocked at once never tells how it began.
            cached=began.num_cached_tokens if began else self.cached,
            preemptions=self.request.num_preemptions,
            blocks=self.blocks,
            block_steps=self.block_steps,
        )


def _labels(labels: dict[str, str]) -> str:
    written = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{{{written}}}" if written else ""


def _clearance(token: int, step: Any) -> float:
    own = step[token].logprob
    return float(own - max(step[other].logprob for other in step if other != token))


class Stepper:
    """The engine, inside its process."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        defaults = {
            "dtype": "float32",
            "seed": 0,
            "block_size": BLOCK_SIZE,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": 8192,
            "max_num_seqs": 32,
            "enforce_eager": True,
            "disable_log_stats": False,
        }
        trace_watches()
        self.engine = LLM(**(defaults | options)).llm_engine
        self.core = self.engine.engine_core.engine_core
        self.chunk = self.core.scheduler.max_num_scheduled_tokens
        self.asked = 0
        self.adapters: dict[str, int] = {}

    def run(self, asks: list[Ask], chunk: int | None) -> list[Answer]:
        scheduler = self.core.scheduler
        scheduler.max_num_scheduled_tokens = chunk or self.chunk
        running: dict[str, list[Running]] = {}
        hang_ups: dict[str, int | None] = {}
        waiting, step = dict(enumerate(asks)), 0
        while waiting or self.engine.has_unfinished_requests():
            for index, ask in list(waiting.items()):
                if ask.arrives <= step:
                    name, choices = self._add(waiting.pop(index))
                    running[name], hang_ups[name] = choices, ask.aborts
            gone = [name for name, end in hang_ups.items() if end == step]
            self.engine.abort_request(gone)
            for result in self.engine.step():
                for output in result.outputs:
                    known = running[result.request_id][output.index]
                    known.output, known.cached = output, result.num_cached_tokens
                    known.finish_reason = output.finish_reason
            for known in (one for several in running.values() for one in several):
                if known.request.request_id in scheduler.requests:
                    (blocks,) = scheduler.kv_cache_manager.get_block_ids(
                        known.request.request_id
                    )
                    known.hold(list(blocks), step)
            step += 1
        return [one.answer() for several in running.values() for one in several]

    def _add(self, ask: Ask) -> tuple[str, list[Running]]:
        import vllm_guard
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        self.asked += 1
        requests = self.core.scheduler.requests
        before = set(requests)
        prompt = TokensPrompt(prompt_token_ids=ask.prompt)
        if ask.salt is not None:
            prompt["cache_salt"] = ask.salt
        params = SamplingParams(
            n=ask.n,
            temperature=0.0 if ask.n == 1 else 1.0,
            seed=0,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            logprobs=2,
            extra_args=vllm_guard.sampling_args(
                ask.policy, trace="summary", drill=ask.drill
            ),
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        adapter = None
        if ask.adapter is not None:
            number = self.adapters.setdefault(ask.adapter, len(self.adapters) + 1)
            adapter = LoRARequest(f"adapter-{number}", number, ask.adapter)
        name = str(self.asked)
        self.engine.add_request(name, prompt, params, lora_request=adapter)
        return name, [Running(requests[key]) for key in requests if key not in before]

    def count(self) -> Counts:
        from dataclasses import asdict

        from torch._dynamo.utils import counters
        from vllm.compilation.counter import compilation_counter

        values = {m.name: getattr(m, "value", 0) for m in self.engine.get_metrics()}
        return Counts(
            drafted=values.get("vllm:spec_decode_num_draft_tokens", 0),
            accepted=values.get("vllm:spec_decode_num_accepted_tokens", 0),
            compilations=asdict(compilation_counter)
            | {f"dynamo {name}": n for name, n in counters["stats"].items()}
            | {f"frames {name}": n for name, n in counters["frames"].items()},
            guard={
                f"{sample.name}{_labels(sample.labels)}": sample.value
                for family in prometheus_client.REGISTRY.collect()
                for sample in family.samples
                if sample.name.startswith("guard_")
            },
        )


def trace_watches() -> None:
    """Let every watch keep what it takes in, position by position."""
    from guard.watch import Watch

    observe = Watch.observe

    def traced(watch: Any, first: int, scores: Any, clamped: Any) -> None:
        before = watch.tokens_seen
        observe(watch, first, scores, clamped)
        new = slice(before - first, watch.tokens_seen - first)
        if watch.tokens_seen > before:
            kept = scores[new].copy(), clamped[new].copy()
            watch.__dict__.setdefault("trace", []).append(kept)

    Watch.observe = traced  # type: ignore[method-assign]
