"""Tokens that are kept back: dropped by a block, and otherwise nobody sees it."""

from dataclasses import asdict
from typing import Any

import httpx
import pytest
from e2e.serving import Server
from e2e.test_block import (
    CASES,
    DRAFTED_KINDS,
    KINDS,
    count_unfinished,
    expect_beginning,
)
from e2e.tripwires import HOLDS, MAX_TOKENS, PROMPT, Tripwires
from e2e.wire import Answer, Route, ask, read_events, request_body

BENIGN = "w7 w8 w9"


def expect_held(
    tripwires: Tripwires, name: str, hold: int, blocked: Answer, whole: Answer
) -> None:
    """Check that of the tokens before the alarm the last `hold` are missing."""
    assert blocked.status == 200, blocked.body
    assert blocked.is_done
    prompt = tripwires.encode(tripwires.by_name[name].prompt)
    for index, choice in blocked.choices.items():
        tokens = whole.choices[index].token_ids
        # The last token is never fed back.
        position = tripwires.alarm_position(name, prompt + tokens[:-1])
        assert position is not None
        allowed = max(position + 1 - len(prompt) - hold, 0)
        assert choice.token_ids == tokens[:allowed]
        assert choice.text.split() == tripwires.decode(tokens[:allowed]).split()
        assert choice.finish_reason == "content_filter"
        verdict = blocked.verdict(index)
        assert verdict["action"] == "block"
        assert verdict["alarms"][0]["position"] == position
        assert verdict["tokens_seen"] == position + 1
    delivered = sum(len(choice.token_ids) for choice in blocked.choices.values())
    assert blocked.usage.get("completion_tokens", 0) == delivered
    expect_beginning(blocked, whole)


def expect_same(held: Answer, free: Answer) -> None:
    """Check that a client reads what it reads without a hold."""
    assert (held.status, held.is_done) == (200, True)
    assert held.choices.keys() == free.choices.keys()
    for index, choice in held.choices.items():
        ours, theirs = asdict(choice), asdict(free.choices[index])
        assert ours.pop("logprobs") == pytest.approx(theirs.pop("logprobs"), abs=1e-3)
        assert ours == theirs
    for count in ("prompt_tokens", "completion_tokens"):
        assert held.usage.get(count) == free.usage.get(count)
    assert [strip(guard) for guard in held.guards] == [
        strip(guard) for guard in free.guards
    ]


def strip(guard: dict[str, Any]) -> dict[str, Any]:
    """Return a `guard` object without what differs from policy to policy."""
    names = ("id", "policy", "fingerprint")
    rest = {key: value for key, value in guard.items() if key not in names}
    return rest | {"choices": [strip(one) for one in rest.get("choices", ())]}


def with_usage(fields: dict[str, Any]) -> dict[str, Any]:
    usage = {"stream_options": {"include_usage": True}}
    return fields | (usage if fields.get("stream") else {})


@pytest.mark.parametrize("hold", HOLDS[1:])
@pytest.mark.parametrize(("route", "kind"), CASES)
def test_what_a_block_finds_held_is_not_delivered(
    toy_server: Server, tripwires: Tripwires, route: Route, kind: str, hold: int
) -> None:
    name, fields = "middle-output", with_usage(KINDS[route][kind])
    prompt = tripwires.by_name[name].prompt
    blocked = ask(toy_server, prompt, f"{name}-hold-{hold}", route=route, **fields)
    whole = ask(toy_server, prompt, f"{name}-observed", route=route, **fields)
    expect_held(tripwires, name, hold, blocked, whole)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("name", ["last-prompt", "first-output", "middle-output"])
def test_the_token_of_an_alarm_counts_as_held(
    toy_server: Server, tripwires: Tripwires, name: str, hold: int
) -> None:
    delivered = {
        f"{name}{suffix}": ask(toy_server, PROMPT, f"{name}{suffix}").choices[0]
        for suffix in ("", f"-hold-{hold}")
    }
    free, held = (len(choice.token_ids) for choice in delivered.values())
    assert free == {"last-prompt": 0, "first-output": 1, "middle-output": 6}[name]
    assert held == max(free - hold, 0)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("kind", [k for k in DRAFTED_KINDS if "choices" not in k])
def test_of_accepted_drafts_as_many_are_dropped_as_of_single_tokens(
    drafting_server: Server, tripwires: Tripwires, kind: str, hold: int
) -> None:
    name, fields = "drafted", with_usage(KINDS["completions"][kind])
    prompt = tripwires.by_name[name].prompt
    blocked = ask(drafting_server, prompt, f"{name}-hold-{hold}", **fields)
    whole = ask(drafting_server, prompt, f"{name}-observed", **fields)
    expect_held(tripwires, name, hold, blocked, whole)


@pytest.mark.parametrize("hold", HOLDS[1:])
@pytest.mark.parametrize(("route", "kind"), CASES)
def test_a_request_that_is_not_blocked_is_answered_as_without_a_hold(
    toy_server: Server, route: Route, kind: str, hold: int
) -> None:
    fields = with_usage(KINDS[route][kind])
    held, free = (
        ask(toy_server, BENIGN, policy, route=route, **fields)
        for policy in (f"open-hold-{hold}", "open")
    )
    expect_same(held, free)
    assert all(choice.token_ids for choice in held.choices.values())


@pytest.mark.parametrize("which", ["toy_server", "drafting_server"])
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_text_and_verdict_where_it_stands(
    request: pytest.FixtureRequest, which: str, hold: int, stream: bool
) -> None:
    server: Server = request.getfixturevalue(which)
    third = ask(server, BENIGN, "open").choices[0].text.split()[2]
    fields = with_usage({"stream": stream, "stop": [third], "logprobs": 1})
    held, free = (
        ask(server, BENIGN, policy, **fields)
        for policy in (f"open-hold-{hold}", "open")
    )
    assert free.choices[0].finish_reason == "stop"
    assert len(free.choices[0].token_ids) < MAX_TOKENS
    expect_same(held, free)


def test_an_alarm_on_what_holds_a_stop_string_back_blocks(
    toy_server: Server, tripwires: Tripwires
) -> None:
    name = "middle-output"
    third = ask(toy_server, PROMPT, "open").choices[0].text.split()[2]
    one, four = (
        ask(toy_server, PROMPT, f"{name}-hold-{hold}", stop=[third]) for hold in (1, 4)
    )
    assert one.choices[0].finish_reason == "stop"
    assert one.guard["action"] == "allow"
    assert four.choices[0].finish_reason == "content_filter"
    assert len(four.choices[0].token_ids) == 2


def count_pieces(server: Server, policy: str) -> list[int]:
    """Return how many tokens each chunk of a stream brings."""
    body = request_body(BENIGN, policy, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
        events = [httpx.Response(200, text=e) for e in read_events(stream)][:-1]
    found = [e.json()["choices"] for e in events]
    counts = [len(c[0].get("token_ids") or ()) for c in found if c]
    return [count for count in counts if count]


def test_a_stream_waits_for_what_is_held(toy_server: Server) -> None:
    assert len(count_pieces(toy_server, "open")) > 2
    # Longer than the answer: all of it leaves at once.
    assert count_pieces(toy_server, "open-hold-40") == [MAX_TOKENS]


def test_nothing_is_left_of_streams_that_nobody_reads(toy_server: Server) -> None:
    body = request_body(BENIGN, "open-hold-4", stream=True, max_tokens=400)
    body["ignore_eos"] = True
    for _ in range(3):
        url = f"{toy_server.url}/v1/completions"
        with httpx.stream("POST", url, json=body) as stream:
            next(read_events(stream))
    answer = ask(toy_server, BENIGN, "open-hold-4")
    assert len(answer.choices[0].token_ids) == MAX_TOKENS
    assert count_unfinished(toy_server) == 0
