"""One engine on the organism, in one way to run it: what it was asked, and answered.

`python -m benchmarks.mode NAME FILE` is a process of its own, in which scheduler,
worker and guard are all at hand, and writes what was seen to a JSON file.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from guard.demo.grammar import KINDS, Kind, prompts
from guard.demo.measure import ORGANISM
from guard.demo.tokenizer import encode_prompt

__all__ = ["MODES", "Answer", "Mode", "Seen", "draw", "lengthen"]

PER_KIND = 50
SEED = 9_000_000
"""Of the prompts; those of `tests/e2e/test_parity.py`."""
MAX_TOKENS = 20
ALONE = 20
"""Prompts that are also asked one by one: a graph of their own size, no neighbour."""
LONG, LONG_TOKENS, LONG_ANSWER = 8, 95, 30
"""Requests of several blocks: found in the cache when they come again, and cut up and
put off by a tight engine."""
DRILL = "last-large"


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to run the engine."""

    name: str
    runner: Literal["V1", "V2"]
    """Which of vLLM's model runners."""
    graphs: bool
    """Compiled and in captured CUDA graphs, full and piecewise; eager without."""
    tight: bool = False
    """So few blocks and tokens of a step that requests wait, come in pieces and are
    preempted."""

    @property
    def options(self) -> dict[str, Any]:
        """Of `vllm.LLM`."""
        options: dict[str, Any] = {
            "model": str(ORGANISM / "model"),
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 64,
            "seed": 0,
            "disable_log_stats": False,
            "block_size": 32,
        }
        if self.tight:
            options |= {
                "max_num_seqs": 8,
                "max_num_batched_tokens": 64,
                "num_gpu_blocks_override": 11,
            }
        if self.graphs:
            options["compilation_config"] = {"cudagraph_mode": "FULL_AND_PIECEWISE"}
        else:
            options["enforce_eager"] = True
        if torch.cuda.is_available():
            # Modes run side by side, and none may take the memory for itself.
            options |= {
                "attention_backend": "TRITON_ATTN",
                "gpu_memory_utilization": 0.05,
                "kv_cache_memory_bytes": 1 << 28,
            }
        return options

    @property
    def environment(self) -> dict[str, str]:
        """What the process needs to be told before it imports anything."""
        return {
            "GUARD_POLICY": str(ORGANISM / "policy.yaml"),
            "GUARD_ALLOW_V2_RUNNER": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1" if self.runner == "V2" else "0",
            "VLLM_PLUGINS": "guard",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            # Triton would multiply what is fp32 in tf32, and transformers does not.
            "TRITON_F32_DEFAULT": "ieee",
        }


MODES = tuple(
    Mode(f"{runner} {how}", runner, graphs=how == "graphs", tight=how == "tight")
    for runner in ("V1", "V2")
    for how in ("eager", "graphs", "tight")
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request."""

    tokens: list[int]
    finish_reason: str
    action: str
    position: int | None
    """Of the first alarm that blocks."""
    tokens_seen: int
    clamped: int
    scores: dict[str, float]
    """Largest score, by monitor; -inf where it saw no token of its stage."""


@dataclass(slots=True)
class Seen:
    """What one mode showed."""

    mode: str
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """By what was asked."""
    hooks: list[str] = field(default_factory=list)
    """What the worker says it guards, its self-test passed."""
    asynchronous: bool = False
    """Whether a step is scheduled before the one before it has been read."""
    steps: int = 0
    computed: int = 0
    """Token rows of all steps."""
    counted: int = 0
    """Those that the guard counted as guarded."""
    errors: dict[str, float] = field(default_factory=dict)
    """What the guard counted of errors and unscored tokens, where it is not 0."""
    hook_calls: int = 0
    """Of a hook, from Python: a replayed graph makes none."""
    preemptions: int = 0
    cached: int = 0
    """Prompt tokens found in the cache, of what was asked again."""
    seconds: dict[str, float] = field(default_factory=dict)
    """To start, and to answer."""


def draw(kinds: Sequence[Kind] = KINDS) -> list[tuple[Kind, str]]:
    """Return the prompts, and of which class each is."""
    return [
        (kind, one.text) for kind in kinds for one in prompts(kind, PER_KIND, seed=SEED)
    ]


def lengthen(asked: Sequence[list[int]]) -> list[list[int]]:
    """Return prompts of several blocks, each a run of short ones."""
    joined = list(chain.from_iterable(ids[1:] for ids in asked))
    room = LONG_TOKENS - 1
    parts = (joined[start : start + room] for start in range(0, LONG * room, room))
    return [[asked[0][0], *part] for part in parts]


class Engine:
    """vLLM with the guard, whose steps are counted from outside."""

    def __init__(self, mode: Mode) -> None:
        """Start it.

        Args:
            mode: How.
        """
        os.environ.update(mode.environment)
        start = time.perf_counter()
        from vllm import LLM
        from vllm_guard import context, ops

        self.llm = LLM(**mode.options)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.context = context.get()
        (worker,) = self.llm.collective_rpc("guard_status")[:1]
        self.seen = Seen(
            mode=mode.name,
            hooks=worker["hooks"] if worker["ready"] else [],
            asynchronous=bool(self.core.vllm_config.scheduler_config.async_scheduling),
        )
        self.seen.seconds["start"] = round(time.perf_counter() - start, 1)
        self._count_steps()
        self._handles = [
            guard.register_forward_pre_hook(self._count_call) for guard in ops.bound()
        ]

    def _count_steps(self) -> None:
        scheduler = self.core.scheduler
        update = scheduler.update_from_output

        def counting(scheduler_output: Any, *args: Any) -> Any:
            self.seen.steps += 1
            self.seen.computed += sum(scheduler_output.num_scheduled_tokens.values())
            return update(scheduler_output, *args)

        scheduler.update_from_output = counting

    def _count_call(self, *_: object) -> None:
        self.seen.hook_calls += 1

    def ask(
        self,
        what: str,
        asked: Sequence[list[int]],
        *,
        policy: str,
        drill: str | None = None,
        max_tokens: int = MAX_TOKENS,
        ignore_eos: bool = False,
    ) -> None:
        """Answer prompts greedily under a policy, and keep what came of each."""
        import vllm_guard
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            extra_args=vllm_guard.sampling_args(policy, trace="summary", drill=drill),
        )
        start = time.perf_counter()
        results = self.llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in asked],
            params,
            use_tqdm=False,
        )
        self.seen.seconds[what] = round(time.perf_counter() - start, 2)
        if what == "long, again":
            self.seen.cached = sum(result.num_cached_tokens for result in results)
        self.seen.answers.setdefault(what, []).extend(map(_read, results))

    def poison(self, *, zeroes: bool) -> None:
        """Leave NaN in every KV block, as whoever computed it would.

        Args:
            zeroes: Whether the guard is told, as it tells itself.
        """
        from vllm_guard import residue

        self.llm.reset_prefix_cache()
        executor = self.core.model_executor
        for kv in executor.driver_worker.worker.model_runner.kv_caches:
            kv.fill_(torch.nan)
        pool = self.core.scheduler.kv_cache_manager.block_pool
        if zeroes:
            residue.leave(pool, range(1, pool.num_gpu_blocks))

    def finish(self) -> Seen:
        """Return what was seen, all counts included."""
        values = {m.name: getattr(m, "value", 0) for m in self.llm.get_metrics()}
        del self.core.scheduler.update_from_output  # what comes now is not counted
        for handle in self._handles:
            handle.remove()
        self.seen.preemptions = values.get("vllm:num_preemptions", 0)
        told, waiting = _read_metrics(), self.context.uncounted
        self.seen.counted = int(
            sum(n for name, n in told.items() if name.startswith("guard_tokens_total"))
        )
        self.seen.counted += waiting["prefill"] + waiting["decode"]
        bad = ("guard_errors_total", "guard_unscored_tokens_total")
        self.seen.errors = {
            name: n for name, n in told.items() if n and name.startswith(bad)
        }
        return self.seen


def _read(result: Any) -> Answer:
    (completion,) = result.outputs
    verdict = completion.guard
    blocking = [a["position"] for a in verdict["alarms"]] or [None]
    scores = {
        r["monitor"]: -float("inf") if r["position"] is None else r["score"]
        for r in verdict.get("readings", ())
    }
    return Answer(
        tokens=list(completion.token_ids),
        finish_reason=completion.finish_reason,
        action=verdict["action"],
        position=blocking[0] if verdict["action"] == "block" else None,
        tokens_seen=verdict["tokens_seen"],
        clamped=sum(verdict["clamped_tokens"].values()),
        scores=scores,
    )


def _read_metrics() -> Counter[str]:
    from prometheus_client import REGISTRY

    found: Counter[str] = Counter()
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("guard_") and sample.name.endswith("_total"):
                labels = ",".join(sample.labels.values())
                found[f"{sample.name}{{{labels}}}"] += sample.value
    return found


def run(mode: Mode) -> Seen:
    """Start the engine of a mode, ask everything, and return what was seen."""
    engine = Engine(mode)
    tokenizer = engine.llm.get_tokenizer()
    drawn = [(kind, encode_prompt(tokenizer, text)) for kind, text in draw()]
    asked = [ids for _, ids in drawn]
    long = {"policy": "watch", "max_tokens": LONG_ANSWER, "ignore_eos": True}
    for what in ("long", "long, again"):
        engine.ask(what, lengthen(asked), **long)
    if mode.tight:
        return engine.finish()
    for policy in ("open", "watch", "default"):
        engine.ask(policy, asked, policy=policy)
    for ids in asked[:: len(asked) // ALONE]:
        engine.ask("alone", [ids], policy="watch")
    bad = [ids for kind, ids in drawn if kind == "hj"]
    engine.ask("drilled", bad, policy="default", drill=DRILL)
    engine.ask("drilled, watched", bad, policy="watch", drill=DRILL)
    seen = engine.finish()
    if not mode.graphs:
        for what, zeroes in (("NaN, zeroed", True), ("NaN, left", False)):
            engine.poison(zeroes=zeroes)
            engine.ask(what, asked, policy="watch")
    return seen


def main() -> None:
    """Be the process."""
    name, path = sys.argv[1:]
    (mode,) = (mode for mode in MODES if mode.name == name)
    Path(path).write_text(json.dumps(asdict(run(mode))), encoding="utf-8")


if __name__ == "__main__":
    main()
