"""An engine without a server: what `guard calibrate` and `guard probe` run prompts on.

Runs in the process of the command, which is that of the API server here.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from safetensors.torch import load_file

from guard.errors import EngineError
from guard.prompt import Prompt
from guard.recording import Recording
from guard.traffic import Told
from vllm_guard import compat, context

__all__ = ["GuardedEngine", "RecordingEngine"]

_CHUNK = 128
"""Requests whose recordings are in memory at once."""


class _Engine:
    """`vllm.LLM` under a policy file, fed with lines of a prompt file."""

    def __init__(
        self,
        model: str,
        policy: Path,
        name: str,
        *,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        """Start the engine.

        Args:
            model: What vLLM takes: a folder or a name.
            policy: The policy file.
            name: The policy of it that requests run under.
            options: Of `vllm.LLM`.
            environment: Set for all processes of the engine.
        """
        context.reset()
        os.environ.update(environment)
        os.environ[context.POLICY_VARIABLE] = str(policy.resolve())
        os.environ["VLLM_PLUGINS"] = "guard"
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        import vllm_guard

        vllm_guard.register()
        # Nobody scrapes these, and a process may start a second engine.
        context.get_board(CollectorRegistry())
        from vllm import LLM

        self._name = name
        with tempfile.TemporaryDirectory(prefix="guard-") as folder:
            fault = Path(folder, "fault")
            os.environ[context.FAULT_VARIABLE] = str(fault)
            try:
                self._llm = LLM(model, seed=0, **options)
            except Exception as error:  # vLLM raises any kind
                if fault.exists():
                    raise EngineError(fault.read_text(encoding="utf-8")) from error
                message = f"vLLM cannot run {model!r} this way: {error}"
                raise EngineError(message) from error
            finally:
                del os.environ[context.FAULT_VARIABLE]
        config = self._llm.llm_engine.vllm_config.model_config
        self.model_digest = compat.digest(config)
        self.dtype = compat.dtype_name(config)
        self._tokenizer = self._llm.get_tokenizer()
        self._max_model_len = config.max_model_len

    def _encode(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt, and of the response that stands with it."""
        tokenizer = self._tokenizer
        if prompt.text is not None:
            ids = tokenizer(prompt.text)["input_ids"]
        else:
            text = tokenizer.apply_chat_template(
                prompt.conversation, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        given = prompt.response
        if given is None:
            return list(ids), []
        return list(ids), list(tokenizer(given, add_special_tokens=False)["input_ids"])

    def _generate(self, prompts: Sequence[Prompt], **extra: Any) -> Iterator[Any]:
        """Answer prompts and yield each result with the sizes of its parts."""
        from vllm import SamplingParams, TokensPrompt

        asked, params, sizes = [], [], []
        for prompt in prompts:
            ids, response = self._encode(prompt)
            whole = [*ids, *response]
            room = self._max_model_len - len(whole)
            if room < 1:
                message = (
                    f"A prompt of {len(whole)} tokens does not fit into the model's "
                    f"{self._max_model_len}; expected a shorter one."
                )
                raise EngineError(message)
            given = prompt.response is not None
            wanted = 1 if given else min(prompt.max_tokens, room)
            asked.append(TokensPrompt(prompt_token_ids=whole))
            params.append(SamplingParams(temperature=0, max_tokens=wanted, **extra))
            total = len(ids) + (len(response) if given else wanted)
            sizes.append((len(ids), total))
        results = self._llm.generate(asked, params, use_tqdm=False)
        yield from zip(results, sizes, strict=True)


class RecordingEngine(_Engine):
    """Runs prompts under a policy's clamps, and records what its monitors would see."""

    def __init__(self, model: str, policy: Path, name: str, **options: Any) -> None:
        """Start the engine, compiled, without anything that would skip the hooks.

        Args:
            model: What vLLM takes: a folder or a name.
            policy: The policy file; its calibrations need not exist.
            name: The policy of it that requests run under.
            options: Of `vllm.LLM`.
        """
        fixed: dict[str, Any] = {
            # A cached prefix is not computed, and a replayed graph calls nobody.
            "enable_prefix_caching": False,
            "compilation_config": {"cudagraph_mode": "NONE"},
        }
        super().__init__(
            model,
            policy,
            name,
            options={**options, **fixed},
            environment={context.RECORD_VARIABLE: "1"},
        )

    def record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
        """Answer prompts and yield one recording each, in order."""
        import vllm_guard

        extra = vllm_guard.sampling_args(self._name, trace="none")
        for start in range(0, len(prompts), _CHUNK):
            share = prompts[start : start + _CHUNK]
            results = list(self._generate(share, extra_args=extra))
            with tempfile.TemporaryDirectory(prefix="guard-") as folder:
                path = Path(folder, "recordings.safetensors")
                self._llm.collective_rpc("guard_write_recordings", args=(str(path),))
                tensors = load_file(path)
            kept: dict[str, dict[str, Any]] = {}
            for name, resid in tensors.items():
                request_id, at = name.split("/", 1)
                # Behind its last dash stands what vLLM made it unique with.
                kept.setdefault(request_id.rpartition("-")[0], {})[at] = resid
            for result, (prompt_length, total_length) in results:
                seen = kept[result.request_id]
                rows = len(next(iter(seen.values())))
                # The last token was sampled, but not run.
                answered = len(result.outputs[0].token_ids) - 1
                exempt = len(result.prompt_token_ids) + answered - rows
                yield Recording(seen, prompt_length - exempt, total_length)


class GuardedEngine(_Engine):
    """Runs prompts like a server would, and tells what the guard made of each."""

    def __init__(self, model: str, policy: Path, name: str, **options: Any) -> None:
        """Start the engine.

        Args:
            model: What vLLM takes: a folder or a name.
            policy: The policy file, with its calibrations.
            name: The policy of it that requests run under.
            options: Of `vllm.LLM`.
        """
        super().__init__(model, policy, name, options=options, environment={})

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[Told]:
        """Answer prompts and yield what the guard told of each, in order."""
        import vllm_guard

        extra = vllm_guard.sampling_args(self._name, trace="summary")
        for start in range(0, len(prompts), _CHUNK):
            share = prompts[start : start + _CHUNK]
            for result, (_, total) in self._generate(share, extra_args=extra):
                yield Told.of(result.outputs[0].guard, total)
