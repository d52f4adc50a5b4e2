import itertools
import json

import pytest
from fuzz.limits import fuzz
from hypothesis import given
from hypothesis import strategies as st

from guard.http.openai import REFUSAL
from guard.http.sse import EventReader
from guard.http.stream import NO_VERDICT, GuardedStream
from guard.verdict import Verdict

DONE = b"data: [DONE]\n\n"


def make_verdict(action="allow"):
    return Verdict("id", "default", "f", "enforce", action)


def make_stream(verdicts, kind="chat", choices=1):
    return GuardedStream(
        lambda: verdicts, kind=kind, choices=choices, guard_id="g", model="asked"
    )


def event(**body):
    head = {"id": "x", "object": "o", "created": 7, "model": "m"}
    return f"data: {json.dumps(head | body)}\n\n".encode()


def chat(index, content, finish=None, **delta):
    choice = {"index": index, "delta": {"content": content, **delta}}
    return event(choices=[choice | {"finish_reason": finish}])


def text(index, content, finish=None):
    choice = {"index": index, "text": content, "finish_reason": finish}
    return event(choices=[choice])


USAGE = event(choices=[], usage={"total_tokens": 3})


def parse(data):
    return [
        json.loads(item.data)
        for item in EventReader().feed(data)
        if item.data not in (None, "[DONE]")
    ]


def test_events_before_the_finish_leave_byte_for_byte():
    stream = make_stream({0: make_verdict()})
    first = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}],   "x":1}\r\n\r\n'
    assert stream.feed(first) == first
    assert stream.feed(b": keep-alive\n\n") == b": keep-alive\n\n"


def test_the_finishing_chunk_gets_the_guard_object():
    stream = make_stream({0: make_verdict()})
    (chunk,) = parse(stream.feed(chat(0, "a", "stop")))
    assert chunk["guard"]["action"] == "allow"
    assert chunk["choices"][0] == {
        "index": 0,
        "delta": {"content": "a"},
        "finish_reason": "stop",
    }
    assert stream.feed(USAGE + DONE) == USAGE + DONE


def test_only_the_last_open_choice_carries_the_guard_object():
    verdicts = {0: make_verdict(), 1: make_verdict("flag")}
    stream = make_stream(verdicts, choices=2)
    (first,) = parse(stream.feed(chat(1, "a", "stop")))
    (last,) = parse(stream.feed(chat(0, "b", "length")))
    assert "guard" not in first
    assert last["guard"]["action"] == "flag"
    assert [one["action"] for one in last["guard"]["choices"]] == ["allow", "flag"]


def test_a_blocked_choice_ends_as_filtered_with_a_refusal():
    stream = make_stream({0: make_verdict("block")})
    (chunk,) = parse(stream.feed(chat(0, "a", "stop", tool_calls=[{"index": 0}])))
    (choice,) = chunk["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["delta"] == {"content": "a", "refusal": REFUSAL}


def test_one_blocked_choice_leaves_its_neighbour_alone():
    stream = make_stream({0: make_verdict("block"), 1: make_verdict()}, "completion", 2)
    (first,) = parse(stream.feed(text(0, "a", "stop")))
    (last,) = parse(stream.feed(text(1, "b", "stop")))
    assert first["choices"][0]["finish_reason"] == "content_filter"
    assert last["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("ending", [DONE, USAGE + DONE])
def test_a_choice_blocked_before_its_first_token_is_finished_here(kind, ending):
    """The engine's server sends no chunk for a choice without tokens."""
    stream = make_stream({0: make_verdict("block")}, kind)
    out = stream.feed(ending)
    assert out.endswith(ending)
    chunk = parse(out)[0]
    (choice,) = chunk["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert chunk["guard"]["action"] == "block"
    assert chunk["model"] == "asked"
    if kind == "chat":
        assert choice["delta"] == {"refusal": REFUSAL}
    else:
        assert choice["text"] == ""


def test_a_choice_blocked_in_the_prompt_beside_one_that_runs():
    verdicts = {0: make_verdict("block"), 1: make_verdict()}
    stream = make_stream(verdicts, choices=2)
    (ran,) = parse(stream.feed(chat(1, "a", "stop")))
    (added, usage) = parse(stream.feed(USAGE + DONE))
    assert "guard" not in ran
    assert added["choices"][0]["index"] == 0
    assert (added["id"], added["model"]) == ("x", "m")
    assert len(added["guard"]["choices"]) == 2
    assert usage["choices"] == []


def test_fewer_choices_than_expected_still_get_a_guard_object():
    stream = make_stream({0: make_verdict()}, choices=2)
    stream.feed(chat(0, "a", "stop"))
    out = stream.feed(DONE)
    (chunk,) = parse(out)
    assert chunk["choices"] == []
    assert chunk["guard"]["action"] == "allow"
    assert out.endswith(DONE)


def is_failure(out):
    (body,) = parse(out)
    return body["error"]["message"] == NO_VERDICT and out.endswith(DONE)


def test_no_word_leaves_without_a_verdict():
    stream = make_stream({})
    role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    assert stream.feed(role) == role
    assert is_failure(stream.feed(chat(0, "secret")))
    assert stream.failed
    assert stream.feed(chat(0, "more") + DONE) + stream.close() == b""


def test_the_verdict_of_one_choice_does_not_vouch_for_another():
    stream = make_stream({0: make_verdict()})
    assert stream.feed(chat(0, "a")) == chat(0, "a")
    assert is_failure(stream.feed(chat(1, "secret")))


def test_a_finished_choice_without_a_verdict_ends_the_stream():
    stream = make_stream({1: make_verdict()}, choices=2)
    assert is_failure(stream.feed(chat(0, "secret", "stop")))


def test_a_seen_choice_without_a_verdict_ends_the_stream():
    stream = make_stream({1: make_verdict()}, choices=2)
    stream.feed(chat(0, "") + chat(1, "a", "stop"))
    assert is_failure(stream.feed(DONE))


def test_an_answer_of_which_nothing_is_known_ends_in_an_error():
    assert is_failure(make_stream({}).feed(DONE))


@pytest.mark.parametrize(
    "data", [b"data: secret\n\n", b"data: [1]\n\n", b"data: [[\n\n"]
)
def test_what_cannot_be_read_is_not_sent_on(data):
    stream = make_stream({0: make_verdict()})
    assert is_failure(stream.feed(data))


def test_an_event_above_the_limit_ends_the_stream(monkeypatch):
    monkeypatch.setattr("guard.http.stream.MAX_EVENT_BYTES", 100)
    stream = make_stream({0: make_verdict()})
    assert stream.feed(b"data: " + b"x" * 94) == b""
    assert is_failure(stream.feed(b"x"))
    assert stream.failed


def test_an_error_of_the_server_is_passed_on_alone():
    stream = make_stream({0: make_verdict()})
    error = b'data: {"error": {"message": "broken"}}\n\n'
    assert stream.feed(error + DONE) == error + DONE
    assert not stream.failed


def test_an_unfinished_last_event_is_judged_too():
    stream = make_stream({})
    out = stream.feed(chat(0, "secret").rstrip(b"\n")) + stream.close()
    assert is_failure(out)


@fuzz
@given(st.data())
def test_the_answer_does_not_depend_on_how_its_bytes_are_cut(data):
    verdicts = {0: make_verdict(), 1: make_verdict("block")}
    whole = chat(0, "é\n") + chat(1, "b", "stop") + chat(0, "", "stop") + USAGE + DONE
    cut = data.draw(st.lists(st.integers(0, len(whole)), max_size=8).map(sorted))
    stream = make_stream(verdicts, choices=2)
    ends = [0, *cut, len(whole)]
    parts = [whole[a:b] for a, b in itertools.pairwise(ends)]
    out = b"".join([stream.feed(part) for part in parts]) + stream.close()
    assert out == make_stream(verdicts, choices=2).feed(whole)


def test_a_blocked_choice_is_finished_once():
    stream = make_stream({0: make_verdict("block")}, choices=2)
    stream.feed(chat(0, "a", "stop"))
    (chunk,) = parse(stream.feed(DONE))
    assert chunk["choices"] == []
    assert chunk["guard"]["action"] == "block"
