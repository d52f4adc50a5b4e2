"""What of a request constrains which tokens may be decoded.

Monitors are calibrated on answers that a model gives freely. A client who constrains
how one begins gets answers that none of them has seen the like of, so a policy may
refuse him. Runs in the API server, on request bodies, and in the engine core.
"""

from collections.abc import Mapping
from typing import Any

from guard.errors import RequestError

__all__ = ["constraint_error", "find_constraint", "find_param_constraint"]

_FIELDS = (
    "structured_outputs",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "thinking_token_budget",
    "trace_decode_token_ids",
)
"""What a body and vLLM's `SamplingParams` name alike. A budget for thinking forces its
end wherever the client likes; a trace forces every token."""
_OWN_PREFIX = "guard_"
_CARRIED = frozenset(
    {"ec_transfer_params", "kv_transfer_params", "kv_cache_report_mode"}
)
"""Extra arguments that move or report a cache. All others are there for samplers and
logits processors, whatever is installed of them."""
_EXPECTED = {
    "response_format": "the type 'text'",
    "tool_choice": "'auto' or 'none'",
    "stop_token_ids": "none beside 'min_tokens'",
}
"""What would be right, where that is not to leave the field out."""


def find_constraint(body: Mapping[str, Any]) -> str | None:
    """Return the first field of a request body that constrains decoding, if any."""
    shape = body.get("response_format")
    if shape is not None and not (isinstance(shape, dict) and _is_text(shape)):
        return "response_format"
    if body.get("tool_choice") not in (None, "auto", "none"):
        return "tool_choice"
    # Until so many tokens are there, vLLM samples none of those that would end it.
    if body.get("min_tokens") and _is_set(body.get("stop_token_ids")):
        return "stop_token_ids"
    if _has_extra(body.get("vllm_xargs")):
        return "vllm_xargs"
    return next((name for name in _FIELDS if _is_set(body.get(name))), None)


def find_param_constraint(params: object) -> str | None:
    """Return the first of a request's sampling params that constrains it, if any.

    Tokens that end an answer are not looked at: the model's own are among them here.

    Args:
        params: vLLM's `SamplingParams`, or None.
    """
    if _has_extra(getattr(params, "extra_args", None)):
        return "extra_args"
    found = (name for name in _FIELDS if _is_set(getattr(params, name, None)))
    return next(found, None)


def constraint_error(name: str) -> RequestError:
    """Return what is said of a constraint under a policy that refuses it.

    Args:
        name: The field or sampling param.
    """
    expected = _EXPECTED.get(name, "a request without it")
    return RequestError(
        f"'{name}' constrains which tokens may be decoded, which the policy of this "
        f"request refuses; expected {expected}.",
        param=name,
    )


def _is_text(shape: Mapping[str, Any]) -> bool:
    return shape.get("type") == "text"


def _is_set(value: object) -> bool:
    # -1 is vLLM's word for a budget without a limit.
    return value is not None and value not in ([], {}, -1)


def _has_extra(extra: Mapping[str, Any] | None) -> bool:
    return any(
        key not in _CARRIED and not key.startswith(_OWN_PREFIX) for key in extra or {}
    )
