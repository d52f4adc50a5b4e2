"""Runs prompts through an offline `vllm.LLM` in a process of its own.

`python offline.py JOB.json`: reads a `Job`, writes one `Generation` per prompt.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from e2e.serving import guard_environment


@dataclass(frozen=True)
class Job:
    """What to run."""

    model: str
    prompts: list[list[int]]
    dtype: str
    policy: str | None
    """Name of a policy of the file; None leaves the plugin inert."""
    policy_file: str
    max_tokens: int
    out: str


@dataclass(frozen=True)
class Generation:
    """What came out for one prompt."""

    tokens: list[int]
    logprobs: list[float]
    """Of the generated tokens."""
    prompt_logprobs: list[float]
    """Of the prompt's tokens but the first."""
    guard: dict[str, Any] | None


def run_offline(job: Job, folder: Path) -> list[Generation]:
    path = folder / f"job-{job.dtype}-{job.policy}.json"
    path.write_text(json.dumps(asdict(job)))
    tests = str(Path(__file__).parents[1])
    environment = guard_environment({"VLLM_PLUGINS": "guard", "PYTHONPATH": tests})
    if job.policy is not None:
        environment["GUARD_POLICY"] = job.policy_file
    subprocess.run(
        [sys.executable, __file__, str(path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=500,
    )
    return [Generation(**entry) for entry in json.loads(Path(job.out).read_text())]


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(job.model, dtype=job.dtype, max_model_len=256, max_num_seqs=64, seed=0)
    extra = {}
    if job.policy is not None:
        import vllm_guard

        extra = vllm_guard.sampling_args(job.policy, trace="summary")
    params = SamplingParams(
        temperature=0,
        max_tokens=job.max_tokens,
        logprobs=0,
        prompt_logprobs=0,
        extra_args=extra,
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job.prompts]
    found = []
    for result in llm.generate(prompts, params, use_tqdm=False):
        answer = result.outputs[0]
        tokens = list(answer.token_ids)
        steps = zip(tokens, answer.logprobs or [], strict=True)
        prompt_steps = zip(
            result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True
        )
        found.append(
            Generation(
                tokens=tokens,
                logprobs=[step[token].logprob for token, step in steps],
                prompt_logprobs=[step[t].logprob for t, step in prompt_steps],
                guard=getattr(answer, "guard", None),
            )
        )
    Path(job.out).write_text(json.dumps([asdict(entry) for entry in found]))


if __name__ == "__main__":
    main()
