"""What of a body, and of sampling params, counts as a constraint on decoding."""

from typing import Any

import pytest

from guard.constraint import constraint_error, find_constraint, find_param_constraint

SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
CALL = {"type": "function", "function": {"name": "f"}}

CONSTRAINED: list[tuple[str, dict[str, Any]]] = [
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("response_format", {"response_format": SCHEMA}),
    ("response_format", {"response_format": {"type": "structural_tag"}}),
    ("response_format", {"response_format": "text"}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice", {"tool_choice": CALL}),
    ("structured_outputs", {"structured_outputs": {"regex": "a+"}}),
    ("structured_outputs", {"structured_outputs": {"choice": ["a"]}}),
    ("logit_bias", {"logit_bias": {"5": 100}}),
    ("allowed_token_ids", {"allowed_token_ids": [5]}),
    ("bad_words", {"bad_words": ["no"]}),
    ("thinking_token_budget", {"thinking_token_budget": 0}),
    ("trace_decode_token_ids", {"trace_decode_token_ids": [5, 6]}),
    ("stop_token_ids", {"stop_token_ids": [5], "min_tokens": 3}),
    ("vllm_xargs", {"vllm_xargs": {"whitelist_token_ids": "5"}}),
]
FREE: list[dict[str, Any]] = [
    {},
    {"response_format": None},
    {"response_format": {"type": "text"}},
    {"tool_choice": None},
    {"tool_choice": "auto", "tools": [CALL]},
    {"tool_choice": "none", "tools": [CALL]},
    {"structured_outputs": None, "logit_bias": {}, "bad_words": []},
    {"thinking_token_budget": -1},
    {"min_tokens": 3, "ignore_eos": True, "stop": ["a"]},
    {"stop_token_ids": [5]},
    {"stop_token_ids": [5], "min_tokens": 0},
    {"stop_token_ids": [], "min_tokens": 3},
    {"temperature": 1.5, "top_k": 1, "top_p": 0.1, "min_p": 0.1, "seed": 3},
    {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 1.0},
    {"vllm_xargs": None},
    {"vllm_xargs": {}},
]


@pytest.mark.parametrize(("name", "body"), CONSTRAINED)
def test_a_field_that_constrains_decoding_is_named(
    name: str, body: dict[str, Any]
) -> None:
    assert find_constraint({"messages": [], **body}) == name


@pytest.mark.parametrize("body", FREE)
def test_what_leaves_every_token_open_is_no_constraint(body: dict[str, Any]) -> None:
    assert find_constraint({"messages": [], **body}) is None


class Params:
    """As much of vLLM's `SamplingParams` as is given."""

    def __init__(self, **given: object) -> None:
        vars(self).update(given)


@pytest.mark.parametrize(
    "given",
    [
        {"structured_outputs": object()},
        {"logit_bias": {5: 100.0}},
        {"allowed_token_ids": [5]},
        {"bad_words": ["no"]},
        {"thinking_token_budget": 0},
        {"trace_decode_token_ids": [5]},
        {"extra_args": {"guard_ticket": "x", "whitelist_token_ids": [5]}},
    ],
)
def test_a_param_that_constrains_decoding_is_named(given: dict[str, Any]) -> None:
    assert find_param_constraint(Params(**given)) == next(iter(given))


@pytest.mark.parametrize(
    "params",
    [
        None,
        Params(),
        Params(structured_outputs=None, logit_bias=None, bad_words=[]),
        Params(extra_args={"guard_ticket": "x", "kv_transfer_params": {}}),
        # The model's own ends of an answer are among them.
        Params(min_tokens=3, stop_token_ids=[2], stop=["a"], temperature=0.5),
    ],
)
def test_params_that_leave_every_token_open_are_free(params: object) -> None:
    assert find_param_constraint(params) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logit_bias", "a request without it"),
        ("tool_choice", "'auto' or 'none'"),
        ("response_format", "the type 'text'"),
        ("stop_token_ids", "none beside 'min_tokens'"),
    ],
)
def test_what_is_refused_is_one_line_with_what_would_be_right(
    name: str, expected: str
) -> None:
    error = constraint_error(name)
    assert (error.status, error.param) == (400, name)
    assert error.message == (
        f"'{name}' constrains which tokens may be decoded, which the policy of this "
        f"request refuses; expected {expected}."
    )
