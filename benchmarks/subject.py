"""One variant of the engine in a process of its own, measured when it is told to.

`Subject` is the parent's side. Between its turns a subject is stopped as a whole
(SIGSTOP), so that nothing of it, not even a polling loop, disturbs the others.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from benchmarks.shape import IDLE_POLICY, Shape

__all__ = ["Subject", "SubjectError", "Task", "Timing", "Variant"]

Variant = Literal["unguarded", "idle", "clamp", "monitor", "eager_hook"]
"""`unguarded`: the plugin is installed and inert. `idle`: guarded, and the request's
policy has no rule. `clamp`. `monitor`: the clamp and both scores. `eager_hook`: the
same clamp as a plain PyTorch forward hook, without the guard, which needs an engine
that compiles nothing."""

_START_SECONDS = 900
_TASK_SECONDS = 600
_MANY_TOKENS = 64
"""Random tokens of a prompt among which the organism's clamp surely finds work."""


class SubjectError(Exception):
    """A subject did not start, died, or did not do what its variant is for."""


@dataclass(frozen=True, slots=True)
class Task:
    """A batch of requests with random prompts."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    policy: str | None = None
    """Policy the requests ask for; None asks for nothing."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a task took, and what proves that the variant did its part."""

    seconds: float
    output_tokens: int
    guarded_tokens: int
    """Tokens that the requests' verdicts speak of; 0 without the guard."""
    clamped_tokens: int
    """Tokens that the guard, or the eager hook, changed."""


@dataclass(frozen=True, slots=True)
class _Setup:
    shape: Shape
    policy_file: Path | None
    eager_hook: bool
    max_length: int
    max_batch: int
    log: Path


class Subject:
    """A process that holds an engine; use as a context manager."""

    def __init__(
        self, shape: Shape, variant: Variant, *, max_length: int, max_batch: int
    ) -> None:
        """Start the process; `wait_until_ready` waits for its engine.

        Args:
            shape: What to run.
            variant: How; `idle` is another policy on the engine of `clamp`.
            max_length: Longest request, in tokens.
            max_batch: Most requests at once.
        """
        self.variant = variant
        self._always_clamps = shape.load_format == "dummy"
        files = {"clamp": shape.clamp_policy, "monitor": shape.monitor_policy}
        self.log = shape.clamp_policy.parent / f"{variant}.log"
        setup = _Setup(
            shape=shape,
            policy_file=files.get(variant),
            eager_hook=variant == "eager_hook",
            max_length=max_length,
            max_batch=max_batch,
            log=self.log,
        )
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(setup, theirs))
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait for the engine, then stop the process until its first turn.

        Raises:
            SubjectError: The engine did not start.
        """
        self._receive(_START_SECONDS)
        self._signal(signal.SIGSTOP)

    def run(self, task: Task) -> Timing:
        """Wake the process, warm it up with one token, and time a task.

        Raises:
            SubjectError: The process died, or the guard was not as it should be.
        """
        self._signal(signal.SIGCONT)
        warm_up = Task(1, prompt_tokens=1, output_tokens=2, policy=task.policy)
        self._pipe.send(warm_up)
        self._receive(_TASK_SECONDS)
        self._pipe.send(task)
        timing: Timing = self._receive(_TASK_SECONDS)
        self._signal(signal.SIGSTOP)
        self._check(task, timing)
        return timing

    def _check(self, task: Task, timing: Timing) -> None:
        """Hold what a variant did against what it is for."""
        rows = task.batch * (task.prompt_tokens + task.output_tokens - 1)
        guarded = rows if task.policy is not None else 0
        clamps = self.variant != "unguarded" and task.policy != IDLE_POLICY
        # The organism's latents mean something: a few random tokens may miss them.
        if clamps and not timing.clamped_tokens:
            clamps = self._always_clamps or task.prompt_tokens >= _MANY_TOKENS
        found = timing.output_tokens, timing.guarded_tokens, timing.clamped_tokens > 0
        wanted = task.batch * task.output_tokens, guarded, clamps
        if found != wanted:
            message = (
                f"Variant {self.variant!r}: (output tokens, guarded tokens, any "
                f"clamped) are {found} in {task}; expected {wanted}."
            )
            raise SubjectError(message)

    def _receive(self, seconds: float) -> Any:
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except EOFError:
            pass
        tail = self.log.read_text("utf-8", errors="replace").splitlines()[-15:]
        message = f"Variant {self.variant!r} died or hangs; its log ends:\n"
        raise SubjectError(message + "\n".join(tail))

    def _signal(self, number: int) -> None:
        # It leads a process group of its own, in which vLLM's processes are too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, number)

    def __enter__(self) -> "Subject":
        return self

    def __exit__(self, *_exception: object) -> None:
        """End the process and all that it started."""
        self._signal(signal.SIGCONT)
        self._pipe.close()
        self._process.join(10)
        self._signal(signal.SIGKILL)
        self._process.join()


def _serve(setup: _Setup, pipe: Connection) -> None:
    """Run in the child: start an engine, then answer tasks until the pipe closes."""
    os.setsid()
    log = os.open(setup.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "guard",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    os.environ.pop("GUARD_POLICY", None)
    if setup.policy_file is not None:
        os.environ["GUARD_POLICY"] = str(setup.policy_file)
    if setup.eager_hook:
        # Lets `apply_model` send a function of this module to the worker.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    llm = _start(setup)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            task: Task = pipe.recv()
            pipe.send(_measure(llm, setup, task))


def _start(setup: _Setup) -> Any:
    from vllm import LLM

    shape = setup.shape
    llm = LLM(
        str(shape.model),
        dtype=shape.dtype,
        load_format=shape.load_format,
        skip_tokenizer_init=True,
        max_model_len=setup.max_length,
        max_num_seqs=setup.max_batch,
        max_num_batched_tokens=max(2048, setup.max_length),
        enable_prefix_caching=False,
        enforce_eager=setup.eager_hook,
        seed=0,
        **_size_cache(setup),
    )
    if setup.eager_hook:
        llm.apply_model(EagerHook(shape))
    return llm


def _size_cache(setup: _Setup) -> dict[str, Any]:
    """Return how much KV cache an engine gets, for four share the memory."""
    import torch

    if torch.cuda.is_available():
        return {"kv_cache_memory_bytes": 4 << 30, "gpu_memory_utilization": 0.2}
    # No more than the requests can fill.
    return {
        "num_gpu_blocks_override": 1 + setup.max_batch * -(-setup.max_length // 128)
    }


def _measure(llm: Any, setup: _Setup, task: Task) -> Timing:
    from vllm import SamplingParams

    extra_args = None
    if setup.policy_file is not None and task.policy is not None:
        import vllm_guard

        extra_args = vllm_guard.sampling_args(task.policy)
    params = SamplingParams(
        temperature=0,
        max_tokens=task.output_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra_args,
    )
    prompts = list(_draw_prompts(task))
    before = _count_eager(llm, setup)
    start = time.perf_counter()
    results = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    completions = [result.outputs[0] for result in results]
    verdicts = [getattr(completion, "guard", None) for completion in completions]
    known = [verdict for verdict in verdicts if verdict is not None]
    return Timing(
        seconds=seconds,
        output_tokens=sum(len(completion.token_ids) for completion in completions),
        guarded_tokens=sum(verdict["tokens_seen"] for verdict in known),
        clamped_tokens=sum(sum(v["clamped_tokens"].values()) for v in known)
        + _count_eager(llm, setup)
        - before,
    )


def _draw_prompts(task: Task) -> Iterator[dict[str, list[int]]]:
    """Yield prompts of ordinary tokens: no end, no BOS, the organism's included."""
    draw = random.Random(0)
    for _ in range(task.batch):
        tokens = [draw.randrange(10, 120) for _ in range(task.prompt_tokens)]
        yield {"prompt_token_ids": tokens}


class EagerHook:
    """The clamp as a plain forward hook; called on the model in the worker."""

    def __init__(self, shape: Shape) -> None:
        """Keep what the hook needs to know."""
        self.shape = shape

    def __call__(self, model: Any) -> None:
        """Load the SAE and attach the hook, with the clamped rows picked beforehand."""
        import torch

        from guard.hook import HookPoint
        from guard.sae.load import load_sae

        sae = load_sae(self.shape.sae, format=self.shape.sae_format)  # type: ignore[arg-type]
        layer = model.model.layers[HookPoint.parse(self.shape.hook_point).layer]
        sae = sae.to(next(layer.parameters()).device)
        latents = torch.tensor(self.shape.latents)
        encoder = sae.W_enc[:, latents].contiguous()
        bias, threshold = sae.b_enc[latents], sae.threshold[latents]
        decoder = sae.W_dec[latents]
        layer.clamped_tokens = 0

        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden_states, residual = output
            resid = hidden_states.float() + residual.float()
            latent_acts = torch.addmm(bias, resid, encoder)
            latent_acts = torch.where(latent_acts > threshold, latent_acts, 0.0)
            hidden_states.sub_((latent_acts @ decoder).to(hidden_states.dtype))
            layer.clamped_tokens += len(resid)

        layer.register_forward_hook(hook)


class EagerCount:
    """Reads how many tokens passed the eager hook; called on the model."""

    def __init__(self, shape: Shape) -> None:
        """Keep where the hook is."""
        self.shape = shape

    def __call__(self, model: Any) -> int:
        """Return the number of tokens so far."""
        from guard.hook import HookPoint

        layer = model.model.layers[HookPoint.parse(self.shape.hook_point).layer]
        return int(layer.clamped_tokens)


def _count_eager(llm: Any, setup: _Setup) -> int:
    if not setup.eager_hook:
        return 0
    return int(llm.apply_model(EagerCount(setup.shape))[0])
