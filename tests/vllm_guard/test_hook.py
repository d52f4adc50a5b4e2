"""Where the guard is attached, and what kind of model it refuses."""

import contextlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm_guard import hook
from vllm_guard.hook import find_layers, split_output

from guard.errors import EngineError

NUM_LAYERS = 3
ROWS = torch.zeros(5, 8)


class Attention(nn.Module):
    """What vLLM lists by its full name."""


def make_model(num_layers: int) -> nn.Module:
    """Return a model whose attention lies where vLLM's usually does."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(num_layers))
    for layer in model.layers:
        layer.attn = Attention()
    return model


def list_attention(model: nn.Module, *, prefix: str = "") -> dict[str, nn.Module]:
    return {
        prefix + name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    }


def make_config(listed: dict[str, nn.Module]) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=listed),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: NUM_LAYERS),
    )


def test_layers_are_found_in_their_order() -> None:
    model = make_model(NUM_LAYERS)
    listed = dict(reversed(list_attention(model).items()))
    assert find_layers(model, make_config(listed)) == list(model.layers)


@pytest.mark.parametrize(
    ("first", "prefix"),
    [
        (0, "draft_model."),  # a draft model of its own, or EAGLE
        (NUM_LAYERS, ""),  # MTP: numbered on from the model's last layer
    ],
)
def test_the_layers_of_a_draft_model_are_not_taken_for_the_models(
    first: int, prefix: str
) -> None:
    model, draft = make_model(NUM_LAYERS), make_model(first + 1)
    drafted = list(list_attention(draft, prefix=prefix).items())[first:]
    listed = list_attention(model) | dict(drafted)
    assert len(listed) == NUM_LAYERS + 1
    assert find_layers(model, make_config(listed)) == list(model.layers)


def test_a_layer_without_attention_is_not_passed_over() -> None:
    model = make_model(NUM_LAYERS)
    listed = list_attention(model)
    del listed["layers.1.attn"]
    with pytest.raises(EngineError, match="cannot be guarded"):
        find_layers(model, make_config(listed))


def test_a_model_with_two_stacks_of_layers_is_refused() -> None:
    model = nn.Module()
    model.one, model.two = make_model(NUM_LAYERS), make_model(NUM_LAYERS)
    with pytest.raises(EngineError, match="cannot be guarded"):
        find_layers(model, make_config(list_attention(model)))


@pytest.mark.parametrize(
    "output", [ROWS, (ROWS, None), (ROWS, ROWS), (ROWS, ROWS, "more")]
)
def test_a_stream_in_one_part_or_two_is_read(output: Any) -> None:
    hidden_states, residual = split_output(output)
    assert hidden_states is ROWS
    assert residual is None or residual is ROWS


@pytest.mark.parametrize(
    "output",
    [
        ROWS[:, None].repeat(1, 4, 1),  # hyper-connections: [tokens, streams, width]
        ROWS[None].repeat(4, 1, 1),  # AltUp: [streams, tokens, width]
        (ROWS, ROWS[None]),
        (ROWS,),
        {"hidden_states": ROWS},
    ],
)
def test_several_streams_are_never_taken_for_one(output: Any) -> None:
    with pytest.raises(EngineError, match="expected a model with one residual stream"):
        split_output(output)


def test_saes_are_there_before_memory_is_profiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are attached within `load_model`, and vLLM profiles only after that."""
    done: list[str] = []
    monkeypatch.setattr(hook, "attach", lambda *_: done.append("attached"))
    monkeypatch.setattr(hook.compat, "check_engine", lambda _: None)
    runner = SimpleNamespace(
        model=None,
        vllm_config=None,
        device=None,
        lora_config=None,
        maybe_select_dummy_loras=lambda *_: contextlib.nullcontext(),
    )
    hook._load_model(lambda _: done.append("loaded"), runner)
    assert done == ["loaded", "attached"]
    start = inspect.getsource(EngineCore.__init__)
    assert start.index("executor_class(") < start.index("_initialize_kv_caches(")
    sizing = inspect.getsource(EngineCore._initialize_kv_caches)
    assert "determine_available_memory()" in sizing
    for executor in (UniProcExecutor, WorkerProc):
        assert ".load_model()" in inspect.getsource(executor)


class Layer(nn.Module):
    """A decoder layer that adds one, as vLLM's are called."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: None
    ) -> torch.Tensor:
        return hidden_states + 1


@pytest.mark.parametrize("named", [True, False])
def test_what_the_first_layer_reads_passes_the_guard_before_it(
    monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(hook.ops, "call_guard", lambda *given: seen.append(given))
    layer = Layer()
    hook._hook_input(layer, 0)
    hook._hook_layer(layer, 1)
    positions = torch.arange(5)
    if named:
        output = layer(positions=positions, hidden_states=ROWS, residual=None)
    else:
        output = layer(positions, ROWS, None)
    assert torch.equal(output, ROWS + 1)
    assert [index for _, _, index in seen] == [0, 1]
    assert seen[0][0] is ROWS


def test_a_first_layer_that_names_no_input_is_refused() -> None:
    with pytest.raises(EngineError, match="no argument hidden_states"):
        hook._hook_input(nn.Linear(8, 8), 0)
