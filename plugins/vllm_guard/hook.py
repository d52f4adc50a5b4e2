"""Find the decoder layers of a loaded model and attach the guard to their outputs.

Runs in the worker, while the model is loaded and before it is compiled or profiled.
"""

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.check import check_origin, load_saes
from guard.errors import EngineError, SaeError
from guard.generation import Generation
from guard.hook import HookPoint
from guard.pipeline import Guard, StepBuffers, build_guards
from guard.sae.model import Sae
from vllm_guard import compat, context, ops, selftest
from vllm_guard.patch import wrap
from vllm_guard.rows import StepRows

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["check_layer", "check_widths", "find_layers", "install"]

logger = logging.getLogger(__name__)

_LAYER_NAME = re.compile(r"(.*?\.(\d+))\.")


def install() -> None:
    """Wrap the loading and the warm-up of every worker's model.

    vLLM has no seam for a module that lives beside the model's own; `load_model` is
    the last moment before memory is profiled and the model compiled, the end of the
    warm-up the first one at which it must have run. Remove when vLLM offers a hook
    on decoder outputs that survives compilation.
    """
    for runner in compat.list_runners():
        wrap(runner, "load_model", _load_model)
    for worker in compat.list_workers():
        wrap(worker, "compile_or_warm_up_model", _warm_up)
        worker.guard_status = _guard_status
        worker.guard_write_recordings = _write_recordings


def _load_model(
    original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any
) -> None:
    with context.reporting():
        compat.check_engine(runner.vllm_config)
        original(runner, *args, **kwargs)
        rows = np.array([selftest.NUM_ROWS], dtype=np.int32)
        # The self-test runs a layer, and until the first step its LoRA adapters
        # read whatever memory held before.
        with runner.maybe_select_dummy_loras(runner.lora_config, rows):
            attach(runner.model, runner.vllm_config, runner.device)


def attach(model: nn.Module, config: "VllmConfig", device: torch.device) -> None:
    """Load the SAEs, compile the policies, and hook the layers they name.

    Raises:
        GuardError: Something does not fit, or the hook does not do what it should.
    """
    state = context.get()
    start = state.start
    layers = find_layers(model, config)
    step = StepBuffers(
        max_tokens=config.scheduler_config.max_num_batched_tokens,
        max_requests=config.scheduler_config.max_num_seqs,
        num_columns=len(start.layout),
        # Whoever records serves nobody, and will not be asked to serve others.
        num_slots=None if state.recorder else start.num_slots,
    )
    saes = load_saes(start.policy_file)
    hidden_size = config.model_config.get_hidden_size()
    check_widths(saes, hidden_size)
    check_origin(
        start.calibrations,
        model=compat.digest(config.model_config),
        dtype=compat.dtype_name(config.model_config),
    )
    guards = build_guards(
        start.policy_file,
        saes,
        start.calibrations,
        step,
        d_model=hidden_size,
        edits=start.edits,
        hook_points=state.hook_points,
    )
    for at in guards:
        check_layer(at, len(layers))
    parts = list(guards.values())
    # Buffers of the model: what moves, saves or restores the model takes them along.
    home = nn.Module()
    home.guards, home.step = nn.ModuleList(parts), step
    model.add_module("vllm_guard", home.to(device))
    ops.bind(parts, recorder=state.recorder)
    for index, guard in enumerate(parts):
        place = guard.hook_point.layer
        if place < 0:
            _hook_input(layers[0], index)
        else:
            selftest.check_stream(
                layers[place:],
                config,
                allow_unverified=start.policy_file.allow_unverified_model,
            )
            _hook_layer(layers[place], index)
        selftest.check_canary(
            guard,
            start,
            dtype=config.model_config.dtype,
            width=hidden_size,
        )
    state.rows = StepRows(
        step,
        num_hooks=len(parts),
        default_slot=start.slot(start.policy_file.default_policy),
        whole_prompt=list_whole(start),
    )
    _salt_compile_cache(config, parts)


def list_whole(generation: Generation) -> set[int]:
    """Return the numbers of those drills that go to every row of a prompt."""
    drills = generation.policy_file.drills
    whole = (drill.name for drill in drills if drill.position == "all_prompt")
    return set(map(generation.drill, whole))


def check_widths(saes: Mapping[str, Sae], hidden_size: int) -> None:
    """Refuse SAEs that are not as wide as the model.

    Raises:
        SaeError: Names the first one.
    """
    for name, sae in saes.items():
        if sae.d_model != hidden_size:
            message = (
                f"SAE {name!r} has d_model {sae.d_model}; "
                f"expected {hidden_size}, the hidden size of the model."
            )
            raise SaeError(message)


def check_layer(at: HookPoint, num_layers: int) -> None:
    """Refuse a hook point behind a layer that is not there.

    Raises:
        EngineError: The model has fewer layers.
    """
    if at.layer >= num_layers:
        message = (
            f"Hook point '{at}' is not in this model of {num_layers} layers; "
            f"expected layers.0 to layers.{num_layers - 1}."
        )
        raise EngineError(message)


def find_layers(model: nn.Module, config: "VllmConfig") -> list[nn.Module]:
    """Return the decoder layers in order, found through their attention.

    Raises:
        EngineError: They cannot be told apart, or are not as many as configured.
    """
    # A draft model's layers stand in the same list; they are not in this one.
    own = {id(module) for module in model.modules()}
    found: dict[int, set[str]] = {}
    for name, module in config.compilation_config.static_forward_context.items():
        match = _LAYER_NAME.match(name)
        if match and id(module) in own:
            found.setdefault(int(match[2]), set()).add(match[1])
    expected = config.model_config.get_total_num_hidden_layers()
    unclear = any(len(paths) > 1 for paths in found.values())
    if sorted(found) != list(range(expected)) or unclear:
        message = (
            f"Found decoder layers {sorted(found)} by their attention; expected one "
            f"for each of {expected}. This model class cannot be guarded."
        )
        raise EngineError(message)
    return [model.get_submodule(found[i].pop()) for i in range(expected)]


def split_output(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return `hidden_states` and `residual` of what a decoder layer returned.

    Raises:
        EngineError: The layer returned something else.
    """
    halves = output if isinstance(output, tuple) else (output, None)
    if len(halves) >= 2:
        hidden_states, residual = halves[0], halves[1]
        # One row per token: several streams have a dimension of their own.
        if _is_rows(hidden_states) and (residual is None or _is_rows(residual)):
            return hidden_states, residual
    message = (
        "A decoder layer returned neither rows nor (hidden_states, residual) of rows; "
        "expected a model with one residual stream."
    )
    raise EngineError(message)


def _is_rows(half: Any) -> bool:
    return isinstance(half, Tensor) and half.dim() == 2


def _hook_layer(layer: nn.Module, index: int) -> None:
    """Let a layer's output pass through the guard."""
    plain = type(layer)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = plain.forward(self, *args, **kwargs)
        hidden_states, residual = split_output(output)
        ops.call_guard(hidden_states, residual, index)
        return output

    _replace_forward(layer, forward)


def _hook_input(layer: nn.Module, index: int) -> None:
    """Let what the first layer reads pass through the guard.

    Raises:
        EngineError: The layer does not say which of its arguments that is.
    """
    plain = type(layer)
    names = list(inspect.signature(plain.forward).parameters)[1:]
    if "hidden_states" not in names:
        message = (
            f"{plain.__name__} has no argument hidden_states; expected one to read "
            f"'{HookPoint(-1)}'."
        )
        raise EngineError(message)
    place = names.index("hidden_states")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        named = "hidden_states" in kwargs
        embedded = kwargs["hidden_states"] if named else args[place]
        ops.call_guard(embedded, None, index)
        return plain.forward(self, *args, **kwargs)

    _replace_forward(layer, forward)


def _replace_forward(layer: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one layer a `forward` of its own, which the compiler can trace."""
    plain = type(layer)
    layer.__class__ = type(f"Guarded{plain.__name__}", (plain,), {"forward": forward})


def _salt_compile_cache(config: "VllmConfig", guards: list[Guard]) -> None:
    """Keep code compiled with these hooks apart from code compiled without."""
    topology = [str(guard.hook_point) for guard in guards]
    if isinstance(config.additional_config, dict):
        config.additional_config["vllm_guard"] = json.dumps(
            [compat.PLUGIN_VERSION, topology]
        )


def _warm_up(
    original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any
) -> Any:
    result = original(worker, *args, **kwargs)
    with context.reporting():
        selftest.check_hooks_ran(worker.model_runner, context.get().rows)
    return result


def _write_recordings(worker: Any, path: str) -> None:
    """Write what was recorded; called through `collective_rpc`, one rank writes."""
    recorder = context.get().recorder
    if recorder is not None and worker.rank == 0:
        recorder.write(Path(path))


def _guard_status(worker: Any) -> dict[str, Any]:
    """Return what this worker can say of itself; called through `collective_rpc`."""
    state = context.get()
    return {
        "role": "worker",
        "rank": worker.rank,
        "fingerprint": state.current.fingerprint,
        "generation": state.current.number,
        "hooks": [str(guard.hook_point) for guard in ops.bound()],
        "ready": state.rows is not None,
        "requests": 0 if state.rows is None else state.rows.num_places,
    }
