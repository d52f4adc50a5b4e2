"""What a worker checks before it serves: that the guard does what it says, here.

Runs in the worker, once, eagerly, at load and after the warm-up.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guard.clamp import clamp_resid
from guard.errors import EngineError
from guard.generation import Generation
from guard.pipeline import Guard, read_resid
from vllm_guard import ops
from vllm_guard.rows import StepRows

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["NUM_ROWS", "check_canary", "check_hooks_ran", "check_stream"]

logger = logging.getLogger(__name__)

NUM_ROWS = 8
"""Of each pass of the self-test."""
_TOLERANCE = 0.05
"""Share of the stream's norm that rounding may explain, in bf16; a wrong convention
changes it by as much as the stream itself."""


def check_stream(
    layers: Sequence[nn.Module], config: "VllmConfig", *, allow_unverified: bool
) -> None:
    """Check that what the next layer reads of a layer's two halves is their sum.

    Some model classes return an already summed stream together with a residual, and
    summing again would double it. So the next layer is run twice on the same sum,
    split in two ways, its attention silenced: it must return the same stream.

    Args:
        layers: The hooked layer and those behind it.
        config: Of the engine.
        allow_unverified: Whether a layer that cannot be run this way may pass.

    Raises:
        EngineError: The stream is not the sum, or nothing could be learned.
    """
    if len(layers) == 1:
        # Nothing but the final norm reads the last layer; its class is the same.
        return
    layer = layers[1]
    names = set(inspect.signature(type(layer).forward).parameters)
    if not {"positions", "hidden_states", "residual"} <= names:
        if allow_unverified:
            logger.warning("The stream of %s was not verified.", type(layer).__name__)
            return
        message = (
            f"Cannot check what {type(layer).__name__} reads as its residual stream; "
            "expected forward(positions, hidden_states, residual). Set "
            "allow_unverified_model: true to serve it all the same."
        )
        raise EngineError(message)
    hidden_size = config.model_config.get_hidden_size()
    parameter = next(layer.parameters())
    first, second, moved = torch.randn(
        3, NUM_ROWS, hidden_size, generator=torch.Generator().manual_seed(0)
    ).to(device=parameter.device, dtype=config.model_config.dtype)
    one = _run_layer(layer, first, second, config)
    other = _run_layer(layer, first + moved, second - moved, config)
    difference = (one - other).norm() / one.norm()
    if not difference < _TOLERANCE:
        message = (
            f"{type(layer).__name__} does not read hidden_states + residual "
            f"(relative difference {difference:.2f}); this model class cannot be "
            "guarded."
        )
        raise EngineError(message)


def _run_layer(
    layer: nn.Module, hidden_states: Tensor, residual: Tensor, config: "VllmConfig"
) -> Tensor:
    from vllm.forward_context import set_forward_context

    positions = torch.arange(NUM_ROWS, device=hidden_states.device)
    with (
        torch.inference_mode(),
        _silent_attention(layer),
        set_forward_context(None, config, num_tokens=NUM_ROWS),
    ):
        output = layer(
            positions=positions,
            hidden_states=hidden_states.clone(),
            residual=residual.clone(),
        )
    hidden, rest = output if isinstance(output, tuple) else (output, None)
    return read_resid(hidden, rest)


@contextlib.contextmanager
def _silent_attention(layer: nn.Module) -> Iterator[None]:
    """Let attention return zeros: it has no KV cache yet."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    silenced = [m for m in layer.modules() if isinstance(m, AttentionLayerBase)]
    for module in silenced:
        module.forward = lambda query, *_args, **_kwargs: torch.zeros_like(query)
    try:
        yield
    finally:
        for module in silenced:
            del module.forward


def check_canary(
    guard: Guard, generation: Generation, *, dtype: torch.dtype, width: int
) -> None:
    """Send rows of every policy through the op, and hold them against the reference.

    Between two steps, it leaves what requests have shown so far as it was.

    Args:
        guard: Bound to the op.
        generation: What its policies are.
        dtype: Of the stream.
        width: Of the stream.

    Raises:
        EngineError: The op did something else than the plain clamp, or than a drill.
    """
    _check_drills(guard, generation, dtype=dtype, width=width)
    for name, policy in generation.policy_file.policies.items():
        resid = _make_canary(guard, width).to(dtype)
        expected = resid.float()
        for part in guard.dictionaries:
            acting = policy.clamps if policy.mode == "enforce" else ()
            rules = [rule for rule in acting if rule.sae == part.name]
            expected = expected + clamp_resid(resid, part.sae, rules).resid - resid
        _hold(
            guard,
            resid,
            expected,
            rows=(generation.slot(name), 1, 0, 0),
            what=f"The clamp at '{guard.hook_point}' under policy {name!r}",
        )


def _check_drills(
    guard: Guard, generation: Generation, *, dtype: torch.dtype, width: int
) -> None:
    """Send rows of every drill through the op: each gets its own edit and no other.

    Raises:
        EngineError: A drill that does nothing would look like a policy that holds.
    """
    if guard.drills is None:
        return
    resid = _make_canary(guard, width).to(dtype)
    for number in (0, *map(generation.drill, generation.edits)):
        _hold(
            guard,
            resid,
            resid.float() + guard.drills[number],
            rows=(0, 1, 0, number),
            what=f"Drill {number} at '{guard.hook_point}'",
        )


def _hold(
    guard: Guard,
    resid: Tensor,
    expected: Tensor,
    *,
    rows: tuple[int, ...],
    what: str,
) -> None:
    """Send `resid` through the op, all of its rows alike, and hold it to the reference.

    Raises:
        EngineError: It is off by more than rounding.
    """
    step = guard.step
    met, banks = step.state.clone(), step.banks
    step.clear()
    step.state.zero_()
    step.rows_in[: len(resid)] = torch.tensor(rows, device=resid.device)
    step.banks = (step.bank_of(rows[0]),)
    hidden_states = resid.clone()
    ops.call_guard(hidden_states, None, ops.bound().index(guard))
    step.clear()
    step.state.copy_(met)
    step.banks = banks
    gap = (hidden_states.float() - expected).abs().max()
    bound = 4 * torch.finfo(resid.dtype).eps * expected.abs().max() + 1e-3
    if not gap <= bound:
        message = (
            f"{what} is off by {gap:.3g} from its reference; expected at most "
            f"{bound:.3g}."
        )
        raise EngineError(message)


def _make_canary(guard: Guard, width: int) -> Tensor:
    """Return rows in which the latents that matter are active, `[rows, d_model]`."""
    if not guard.dictionaries:
        # Nothing is clamped there: any row must come back as it was.
        generator = torch.Generator().manual_seed(0)
        plain = torch.randn(NUM_ROWS, width, generator=generator)
        return plain.to(guard.step.marks.device)
    rows = []
    for part in guard.dictionaries:
        sae = part.sae
        latents = torch.tensor(part.clamp.latents, device=sae.W_dec.device).long()
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(NUM_ROWS, len(latents), generator=generator)
        directions = sae.directions(latents)
        gain = (directions * sae.W_enc[:, latents].T).sum(1).abs().clamp(min=1e-3)
        reach = (sae.threshold[latents] - sae.b_enc[latents]).clamp(min=0) + 1.0
        strength = 2.0 * weights.to(gain.device) * reach / gain
        rows.append(sae.b_dec + strength @ directions)
    return torch.stack(rows).sum(0)


def check_hooks_ran(runner: Any, rows: StepRows | None) -> None:
    """Check that the warm-up, or a dummy pass, went through every hook.

    Raises:
        EngineError: The model was not loaded under the guard, or a hook is dead.
    """
    if rows is None:
        message = "The model was loaded without the guard; expected its hooks in place."
        raise EngineError(message)
    rows.clear()
    runner._dummy_run(NUM_ROWS)
    visits = rows.step.marks_of(NUM_ROWS).visits.tolist()
    expected = len(ops.bound())
    if any(visit != expected for visit in visits):
        message = (
            f"A pass through the model ran {min(visits)} of {expected} hooks; "
            "expected each of them once. Nothing is served unguarded."
        )
        raise EngineError(message)
    rows.clear()
