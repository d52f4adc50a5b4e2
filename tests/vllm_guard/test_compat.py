"""What the guard cannot follow is refused by name; what is harmless is served."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm_guard import compat

from guard.check import digest_model
from guard.errors import EngineError
from guard.testing import make_toy_model

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}

BUILT: dict[str, dict[str, Any]] = {
    "--pipeline-parallel-size": {"pipeline_parallel_size": 2},
    "--enable-expert-parallel": {
        "model": "experts",
        "enable_expert_parallel": True,
        "tensor_parallel_size": 2,
        "data_parallel_size": 2,
    },
    "--enable-hc-sp": {"enable_hc_sp": True},
    "--kv-offloading-size": {"kv_offloading_size": 1.0},
    "--kv-transfer-config": {
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
        }
    },
    "--kv-sharing-fast-prefill": {"kv_sharing_fast_prefill": True},
    "--diffusion-config": {"diffusion_config": {"canvas_length": 4}},
    "synthetic acceptance": {
        "speculative_config": {
            **NGRAM,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": 2,
        }
    },
    "--scheduling-policy": {"scheduling_policy": "priority"},
    "--scheduler-cls": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "several residual streams": {"hf_overrides": {"hc_mult": 4}},
    "--runner pooling": {"runner": "pooling"},
    "--weight-transfer-config": {"weight_transfer_config": {"backend": "nccl"}},
}
"""By what the refusal names: options of a real engine that is built with them."""

SET: dict[str, dict[str, Any]] = {
    "--enable-dbo": {"parallel_config.ubatch_size": 2},
    "--decode-context-parallel-size": {
        "parallel_config.decode_context_parallel_size": 2
    },
    "--prefill-context-parallel-size": {
        "parallel_config.prefill_context_parallel_size": 2
    },
    "denoising": {"model_config.is_diffusion": True},
    "--enable-elastic-ep": {"parallel_config.enable_elastic_ep": True},
    "adaptive verification": {"speculative_config.enable_adaptive_verification": True},
    "asynchronous scheduling of drafts": {"scheduler_config.async_scheduling": True},
    "encoder-decoder": {"model_config.is_encoder_decoder": True},
    "--enable-sleep-mode": {"model_config.enable_sleep_mode": True},
    "--distributed-executor-backend ray": {
        "parallel_config.distributed_executor_backend": "ray"
    },
    "--data-parallel-backend ray": {"parallel_config.data_parallel_backend": "ray"},
}
"""The same for what a CPU refuses to build: set on a real configuration."""

ENVIRONMENT = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_USE_RUST_FRONTEND",
    "VLLM_USE_V2_MODEL_RUNNER",
)

HARMLESS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tensor parallelism": {"tensor_parallel_size": 2},
    "data parallelism": {"data_parallel_size": 2},
    "experts without sequence parallelism": {
        "model": "experts",
        "enable_expert_parallel": True,
        "tensor_parallel_size": 2,
    },
    "drafts": {"speculative_config": NGRAM},
    "asynchronous scheduling": {"async_scheduling": True},
    "LoRA": {"enable_lora": True},
    "KV events": {
        "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}
    },
    "encoder outputs from elsewhere": {
        "ec_transfer_config": {
            "ec_connector": "ECExampleConnector",
            "ec_role": "ec_both",
        }
    },
    "a KV cache of other numbers": {"kv_cache_dtype": "fp8_e4m3"},
}

Build = Callable[..., VllmConfig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of a dense model and of one with experts; the latter has no weights."""
    from transformers import MixtralConfig

    folder = tmp_path_factory.mktemp("models")
    make_toy_model(folder / "dense", num_layers=1)
    shutil.copytree(folder / "dense", folder / "experts")
    MixtralConfig(
        vocab_size=124,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(folder / "experts")
    return {name: folder / name for name in ("dense", "experts")}


@pytest.fixture
def build(models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> Build:
    """Build the configuration of a real engine from options of `vllm serve`."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def make(*, model: str = "dense", **options: Any) -> VllmConfig:
        from vllm.engine.arg_utils import AsyncEngineArgs

        return AsyncEngineArgs(
            model=str(models[model]), dtype="float32", **options
        ).create_engine_config()

    return make


def refusal(config: VllmConfig) -> str:
    with pytest.raises(EngineError) as refused:
        compat.check_engine(config)
    return str(refused.value)


@pytest.mark.parametrize("option", BUILT)
def test_an_option_that_hides_tokens_is_refused_by_name(
    option: str, build: Build
) -> None:
    assert option in refusal(build(**BUILT[option]))


@pytest.mark.parametrize("option", SET)
def test_an_option_no_cpu_can_build_is_refused_by_name(
    option: str, build: Build
) -> None:
    config = build(speculative_config=NGRAM)
    compat.check_engine(config)
    for path, value in SET[option].items():
        owner: Any = config
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        assert hasattr(owner, name)
        setattr(owner, name, value)
    assert option in refusal(config)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_switch_in_the_environment_is_refused_by_name(
    name: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build()
    monkeypatch.setenv(name, "1")
    assert name in refusal(config)


def test_no_refusal_goes_without_a_test() -> None:
    cases = [*BUILT, *SET, *ENVIRONMENT]
    for option in compat.REFUSED:
        assert [case for case in cases if case in option], option


@pytest.mark.parametrize("name", HARMLESS)
def test_what_hides_nothing_is_served(name: str, build: Build) -> None:
    compat.check_engine(build(**HARMLESS[name]))


@pytest.mark.parametrize(
    "config",
    [
        {"hc_mult": 4},  # DeepSeek V4, HY V4
        {"hc_count": 2},  # Qwen4Exp
        {"altup_num_inputs": 4},  # Gemma 3n
        {"attn_res_block_size": 12},  # Kimi K3
    ],
)
def test_a_model_with_several_streams_is_refused_whatever_it_calls_them(
    config: dict[str, int], build: Build
) -> None:
    assert "several residual streams" in refusal(build(hf_overrides=config))


def test_one_hyper_connection_is_one_stream(build: Build) -> None:
    compat.check_engine(build(hf_overrides={"hc_mult": 1, "attn_res_block_size": None}))


def test_the_second_runner_can_be_allowed(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("GUARD_ALLOW_V2_RUNNER", "1")
    compat.check_engine(config)


def test_an_option_that_vllm_no_longer_has_is_not_taken_for_unused() -> None:
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace())
    with pytest.raises(EngineError, match="does not say whether it uses pipeline"):
        compat.check_engine(config)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--headless"], "--headless"),
        (["--grpc"], "--grpc"),
        (["--grpc-port", "50051"], "--grpc-port"),
        (
            ["--data-parallel-multi-port-external-lb"],
            "--data-parallel-multi-port-external-lb",
        ),
    ],
)
def test_a_front_end_without_the_guard_is_refused_by_name(
    arguments: list[str], named: str
) -> None:
    with pytest.raises(EngineError, match=named):
        compat.check_frontend(parse(arguments))


def test_an_ordinary_front_end_is_served() -> None:
    compat.check_frontend(parse(["--api-server-count", "2"]))


def parse(arguments: list[str]) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    return parsed


def test_an_old_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda _: "0.31.2+cpu")
    with pytest.raises(EngineError, match=r"too old; expected 0\.32"):
        compat.check_version()


def test_the_served_model_is_digested_where_its_files_are(tmp_path: Path) -> None:
    make_toy_model(tmp_path / "model")
    config = SimpleNamespace(model=str(tmp_path / "model"), revision=None)
    assert compat.digest(config) == digest_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["nobody/has-this", "no such/name/at all"])
def test_a_model_whose_files_are_not_at_hand_has_no_digest(name: str) -> None:
    assert compat.digest(SimpleNamespace(model=name, revision=None)) is None


def test_a_dtype_is_named_as_a_calibration_names_it() -> None:
    assert compat.dtype_name(SimpleNamespace(dtype=torch.bfloat16)) == "bfloat16"


REGISTER = """
import sys
import torch
import vllm_guard
from vllm.platforms import current_platform

event = torch.cuda.Event
for is_cpu in (False, True):
    current_platform.is_cpu = lambda: is_cpu
    vllm_guard.register()
    print(torch.cuda.Event is event, "vllm.v1.worker.cpu.shm" in sys.modules)
"""


def test_a_gpu_keeps_its_events(write_policy: Callable[..., Path]) -> None:
    """vLLM's CPU worker replaces them for the whole process when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", REGISTER],
        env=os.environ | {"GUARD_POLICY": str(write_policy()), "VLLM_PLUGINS": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
        timeout=500,
        text=True,
    )
    assert done.stdout.splitlines()[-2:] == ["True False", "False True"]
