import json
import math

import pytest
from fuzz.limits import fuzz
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import RequestError
from guard.http.openai import (
    MAX_DEPTH,
    REFUSAL,
    carries_text,
    check_sendable,
    count_choices,
    error_body,
    guard_object,
    parse_body,
    refuse_unsupported,
    seal_body,
    withhold,
)
from guard.verdict import Verdict


def make_verdict(action="allow", tokens_seen=3):
    return Verdict("id", "default", "f", "enforce", action, tokens_seen=tokens_seen)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda child: st.lists(child) | st.dictionaries(st.text(), child),
    max_leaves=10,
)


@fuzz
@given(st.dictionaries(st.text(), json_values))
def test_a_body_is_the_same_after_sealing_but_for_guard_and_ticket(body):
    body.pop("vllm_xargs", None)
    raw = json.dumps(body).encode()
    parsed = parse_body(raw)
    assert parsed is not None
    sealed = json.loads(seal_body(parsed, "t"))
    assert sealed.pop("vllm_xargs") == {"guard_ticket": "t"}
    body.pop("guard", None)
    assert sealed == body


def test_a_key_that_stands_twice_means_what_was_validated():
    body = parse_body(
        b'{"n": 9, "vllm_xargs": {"guard_ticket": "x"}, "n": 1, "vllm_xargs": {}}'
    )
    refuse_unsupported(body)
    sealed = seal_body(body, "t")
    assert sealed.count(b"vllm_xargs") == sealed.count(b'"n"') == 1
    assert json.loads(sealed) == {"n": 1, "vllm_xargs": {"guard_ticket": "t"}}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "\ud800"},
        {"a": [{"b": "w\udfff"}]},
        {"a": {"\udead": 1}},
        {"seed": 2**64},
        {"a": [[-(2**63) - 1]]},
    ],
)
def test_what_the_engine_core_cannot_be_sent_is_refused(body):
    with pytest.raises(RequestError, match="expected") as caught:
        check_sendable(parse_body(json.dumps(body).encode()))
    assert caught.value.status == 400


@fuzz
@given(st.dictionaries(st.text(), json_values))
def test_whatever_messagepack_can_carry_is_let_through(body):
    msgspec = pytest.importorskip("msgspec")
    try:
        msgspec.msgpack.encode(body)
    except OverflowError:
        with pytest.raises(RequestError):
            check_sendable(body)
    else:
        check_sendable(body)


def test_xargs_of_the_client_are_kept():
    sealed = json.loads(seal_body({"vllm_xargs": {"a": 1}}, "t"))
    assert sealed["vllm_xargs"] == {"a": 1, "guard_ticket": "t"}


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"x"', b"null", b"3", b"{'a': 1}"])
def test_what_is_no_object_is_left_to_the_server(raw):
    assert parse_body(raw) is None


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
        b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"a": "\xff"}',
    ],
    ids=["open", "lists", "objects", "one too deep", "long number", "no utf-8"],
)
def test_a_bomb_is_refused(raw):
    with pytest.raises(RequestError) as caught:
        parse_body(raw)
    assert caught.value.status == 400


def test_the_deepest_body_allowed_is_read():
    depth = MAX_DEPTH - 1
    assert parse_body(b'{"a": ' + b"[" * depth + b"]" * depth + b"}") is not None


def test_a_flat_body_of_many_brackets_is_read():
    assert parse_body(json.dumps({"a": [[1]] * 500}).encode()) is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": "x"}, "structured_outputs"),
        ({"vllm_xargs": {"guard_ticket": "x"}}, "vllm_xargs"),
        ({"vllm_xargs": {"guard_": 1, "a": 2}}, "vllm_xargs"),
        ({"vllm_xargs": {"guard_slot": 0}}, "vllm_xargs"),
        ({"vllm_xargs": [["guard_ticket", "x"]]}, "vllm_xargs"),
        ({"vllm_xargs": "guard_ticket"}, "vllm_xargs"),
        ({"vllm_xargs": False}, "vllm_xargs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_beam_search": "yes"}, "use_beam_search"),
    ],
)
def test_what_would_pass_the_guard_by_is_refused(body, param):
    with pytest.raises(RequestError) as caught:
        refuse_unsupported(body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [{}, {"vllm_xargs": None}, {"vllm_xargs": {"a": 1}}, {"use_beam_search": False}],
)
def test_ordinary_bodies_are_not_refused(body):
    refuse_unsupported(body)


@pytest.mark.parametrize(
    ("body", "choices"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2, 3], "n": 2}, 2),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": "a", "n": None}, 1),
        ({"prompt_embeds": ["a", "b"]}, 2),
        ({"prompt_embeds": "a", "prompt": ["b"]}, 2),
        ({}, 1),
    ],
)
def test_choices_are_counted_as_the_server_does(body, choices):
    assert count_choices(body, "completion") == choices


@pytest.mark.parametrize("n", ["2", "2.0", 2.0, "x", math.inf, math.nan, [], {}])
def test_a_number_of_choices_that_two_parsers_may_read_differently_is_refused(n):
    with pytest.raises(RequestError) as refused:
        refuse_unsupported({"prompt": "a", "n": n})
    assert refused.value.param == "n"


def test_a_chat_has_one_prompt():
    assert count_choices({"n": 2, "prompt": ["a", "b"]}, "chat") == 2


def test_a_blocked_message_keeps_its_text_and_loses_its_tool_calls():
    message = {"role": "assistant", "content": "so far", "tool_calls": [{"id": "x"}]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    withhold(choice, "chat")
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"] == {
        "role": "assistant",
        "content": "so far",
        "refusal": REFUSAL,
    }


def test_a_blocked_completion_has_no_message():
    choice = {"index": 0, "text": "so far", "finish_reason": "stop"}
    withhold(choice, "completion")
    assert choice == {"index": 0, "text": "so far", "finish_reason": "content_filter"}


def test_the_guard_object_is_the_worst_verdict_with_each_choice_in_order():
    verdicts = {1: make_verdict("block", 7), 0: make_verdict("flag", 5)}
    body = guard_object(verdicts)
    assert (body["action"], body["tokens_seen"]) == ("block", 7)
    assert [choice["tokens_seen"] for choice in body["choices"]] == [5, 7]


def test_a_single_choice_stands_alone():
    assert guard_object({0: make_verdict()}) == make_verdict().to_json()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"content": "x"}}, True),
        ({"delta": {"tool_calls": [{}]}}, True),
        ({"delta": {"reasoning": "x"}}, True),
        ({"delta": {}, "token_ids": [1]}, True),
        ({"text": ""}, False),
        ({"text": "x"}, True),
        ({"text": "", "logprobs": {"tokens": ["x"]}}, True),
    ],
)
def test_any_trace_of_a_token_counts_as_text(choice, expected):
    assert carries_text(choice) is expected


def test_an_error_has_openais_shape():
    body = json.loads(error_body("No.", status=400, param="guard.policy"))
    assert body == {
        "error": {
            "message": "No.",
            "type": "invalid_request_error",
            "param": "guard.policy",
            "code": 400,
        }
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, "permission_error"),
        (413, "invalid_request_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_errors_type_follows_its_status(status, kind):
    body = json.loads(error_body("No.", status=status))
    assert body["error"]["type"] == kind
