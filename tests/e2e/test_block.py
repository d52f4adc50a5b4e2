"""A block means no token: nothing sampled at or after an alarm reaches the client.

Each alarm is a real score above its threshold, at a position that transformers knows.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from e2e.serving import Server
from e2e.tripwires import DRAFTED_OUTPUT, LONG_PROMPT, MAX_TOKENS, Tripwires
from e2e.wire import Answer, Route, ask
from prometheus_client.parser import text_string_to_metric_families

POSITIONS = ["first-prompt", "last-prompt", "first-output", "middle-output"]
# So long that all delivered text is held back until the end comes.
NEVER = " ".join(["w1"] * 60)
COMMON_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "streamed": {"stream": True},
    # vLLM refuses several choices at temperature 0.
    "two choices": {"n": 2, "temperature": 0.01, "seed": 2},
    "two sampled choices": {"n": 2, "temperature": 1.0, "seed": 3},
    "two sampled streams": {"n": 2, "temperature": 1.0, "seed": 4, "stream": True},
    "prompt logprobs": {"prompt_logprobs": 2},
    "min tokens": {"min_tokens": MAX_TOKENS},
    "ignored end": {"ignore_eos": True},
    "stop string": {"stop": [NEVER]},
    "streamed stop string": {"stop": [NEVER], "stream": True},
    "regex": {"structured_outputs": {"regex": "(w[0-9]*[02468])+"}},
    "JSON": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "ones",
                "schema": {
                    "type": "array",
                    "items": {"type": "integer"},
                    "minItems": MAX_TOKENS,
                },
            },
        }
    },
}
KINDS: dict[Route, dict[str, dict[str, Any]]] = {
    "completions": COMMON_KINDS
    | {
        "logprobs": {"logprobs": 2},
        "streamed logprobs": {"logprobs": 2, "stream": True},
        "echo": {"echo": True, "logprobs": 2},
        "streamed echo": {"echo": True, "logprobs": 2, "stream": True},
    },
    "chat/completions": COMMON_KINDS
    | {
        "logprobs": {"logprobs": True, "top_logprobs": 2},
        "streamed logprobs": {"logprobs": True, "top_logprobs": 2, "stream": True},
    },
}
DRAFTED_KINDS = [
    *("plain", "streamed", "two choices", "two sampled choices", "logprobs"),
    *("streamed logprobs", "min tokens", "ignored end", "stop string", "regex", "JSON"),
]
CASES = [
    pytest.param(route, kind, id=f"{route}-{kind}")
    for route, kinds in KINDS.items()
    for kind in kinds
]


def expect_block(tripwires: Tripwires, name: str, answer: Answer) -> None:
    """Check that each choice ends with the token on which transformers alarms."""
    assert answer.status == 200, answer.body
    assert answer.is_done
    assert len(answer.guards) == 1
    prompt = tripwires.encode(tripwires.by_name[name].prompt)
    for index, choice in answer.choices.items():
        position = tripwires.alarm_position(name, prompt + choice.token_ids)
        assert position is not None
        assert len(choice.token_ids) == max(position + 1 - len(prompt), 0)
        text = tripwires.decode(choice.token_ids)
        assert choice.text.split() == text.split()
        assert choice.finish_reason == "content_filter"
        verdict = answer.verdict(index)
        assert verdict["action"] == "block"
        assert verdict["stage"] == ("prompt" if position < len(prompt) else "output")
        assert verdict["alarms"][0]["position"] == position
        assert verdict["tokens_seen"] == position + 1
    delivered = sum(len(choice.token_ids) for choice in answer.choices.values())
    assert answer.usage.get("completion_tokens", 0) == delivered


def expect_beginning(blocked: Answer, unblocked: Answer) -> None:
    """Check that a blocked answer is the beginning of the unblocked one."""
    assert blocked.choices.keys() == unblocked.choices.keys()
    for index, choice in blocked.choices.items():
        whole = unblocked.choices[index]
        delivered = len(choice.token_ids)
        assert delivered < len(whole.token_ids)
        assert choice.token_ids == whole.token_ids[:delivered]
        # Under `echo` the prompt's come first, with the first token.
        echoed = max(len(whole.logprobs) - len(whole.token_ids), 0)
        expected = whole.logprobs[:echoed] if delivered else [None] * echoed
        expected += whole.logprobs[echoed : echoed + delivered]
        # A stream says nothing at all about a choice without tokens.
        if choice.logprobs or delivered:
            assert choice.logprobs == pytest.approx(expected, abs=1e-3)


def ask_both(
    server: Server,
    tripwires: Tripwires,
    name: str,
    *,
    route: Route = "completions",
    fields: Mapping[str, Any],
) -> tuple[Answer, Answer]:
    """Ask under a policy that blocks, and under the one that only observes."""
    prompt = tripwires.by_name[name].prompt
    if fields.get("stream"):
        fields = {**fields, "stream_options": {"include_usage": True}}
    blocked = ask(server, prompt, name, route=route, **fields)
    unblocked = ask(server, prompt, f"{name}-observed", route=route, **fields)
    return blocked, unblocked


def count_unfinished(server: Server) -> float:
    """Return how many requests and KV blocks the scheduler still holds."""
    names = {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    }
    samples = [
        sample.value
        for family in text_string_to_metric_families(server.get("/metrics"))
        for sample in family.samples
        if sample.name in names
    ]
    assert len(samples) == len(names)
    return sum(samples)


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize(("route", "kind"), CASES)
def test_nothing_at_or_after_an_alarm_is_delivered(
    toy_server: Server, tripwires: Tripwires, route: Route, kind: str, name: str
) -> None:
    fields = KINDS[route][kind]
    blocked, unblocked = ask_both(
        toy_server, tripwires, name, route=route, fields=fields
    )
    assert unblocked.guard["action"] == "flag"
    expect_block(tripwires, name, blocked)
    expect_beginning(blocked, unblocked)
    if route == "chat/completions":
        assert all(choice.refusal for choice in blocked.choices.values())
    if blocked.guard["stage"] == "prompt":
        for choice in blocked.body.get("choices", ()):
            assert not any(choice.get("prompt_logprobs") or ())


@pytest.mark.parametrize("name", [name for name in POSITIONS if name != "first-output"])
def test_the_alarm_lies_where_transformers_puts_it(
    toy_server: Server, tripwires: Tripwires, name: str
) -> None:
    tripwire = tripwires.by_name[name]
    answer = ask(toy_server, tripwire.prompt, name)
    assert answer.guard["alarms"][0]["position"] == tripwire.position
    assert answer.guard["alarms"][0]["score"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_first_token_that_is_no_bos_can_alarm(
    toy_server: Server, tripwires: Tripwires, route: Route
) -> None:
    prompt = tripwires.by_name["position-zero"].prompt
    answer = ask(
        toy_server, prompt, "position-zero", route=route, add_special_tokens=False
    )
    assert answer.guard["action"] == "block"
    assert answer.guard["alarms"][0]["position"] == 0
    assert answer.choices[0].token_ids == []
    assert answer.choices[0].text == ""


def test_a_score_that_is_not_a_number_blocks(
    toy_server: Server, tripwires: Tripwires
) -> None:
    blocked, unblocked = ask_both(toy_server, tripwires, "not-finite", fields={})
    expect_block(tripwires, "not-finite", blocked)
    expect_beginning(blocked, unblocked)
    assert blocked.guard["alarms"][0]["score"] is None


@pytest.mark.parametrize(
    ("which", "name"),
    [("toy_server", "middle-output"), ("drafting_server", "drafted")],
)
def test_a_request_that_ends_before_its_alarm_is_not_blocked(
    request: pytest.FixtureRequest, tripwires: Tripwires, which: str, name: str
) -> None:
    server: Server = request.getfixturevalue(which)
    tripwire = tripwires.by_name[name]
    # The last token is never fed back, so no score of it counts, not even where
    # a longer draft had it computed.
    allowed = tripwire.position + 1 - len(tripwires.encode(tripwire.prompt))
    for max_tokens in range(1, allowed + 1):
        answer = ask(server, tripwire.prompt, name, max_tokens=max_tokens)
        assert answer.guard["action"] == "allow"
        assert answer.choices[0].finish_reason == "length"
        assert len(answer.choices[0].token_ids) == max_tokens
        prompt_tokens = answer.usage["prompt_tokens"]
        assert answer.guard["tokens_seen"] == prompt_tokens + max_tokens - 1


def test_a_stop_string_before_the_alarm_ends_the_request_first(
    toy_server: Server, tripwires: Tripwires
) -> None:
    tripwire = tripwires.by_name["middle-output"]
    whole = ask(toy_server, tripwire.prompt, "open")
    third = whole.choices[0].text.split()[2]
    answer = ask(toy_server, tripwire.prompt, "middle-output", stop=[third])
    assert answer.guard["action"] == "allow"
    assert answer.choices[0].finish_reason == "stop"


def test_a_blocked_prompt_is_blocked_again_from_cache(
    toy_server: Server, tripwires: Tripwires
) -> None:
    answers = [ask(toy_server, LONG_PROMPT, "cached") for _ in range(3)]
    for answer in answers:
        assert answer.guard["action"] == "block"
        assert answer.guard["alarms"] == answers[0].guard["alarms"]
        assert answer.guard["alarms"][0]["position"] == (
            tripwires.by_name["cached"].position
        )
        assert answer.choices[0].token_ids == []
    # That the observing twin does hit the cache is shown in test_salt.


def test_a_neighbour_of_a_blocked_prompt_is_served(
    toy_server: Server, tripwires: Tripwires
) -> None:
    bad, good = tripwires.by_name["last-prompt"].prompt, "w7 w8 w9"
    alone = ask(toy_server, good, "last-prompt-observed").choices[0].token_ids
    prompt = tripwires.encode(good)
    position = tripwires.alarm_position("last-prompt", prompt + alone)
    allowed = None if position is None else position + 1 - len(prompt)
    answer = ask(toy_server, [bad, good], "last-prompt")
    assert answer.choices[0].token_ids == []
    assert answer.choices[1].token_ids == alone[:allowed] != []


@pytest.mark.parametrize("name", [*POSITIONS, "drafted", "not-finite"])
@pytest.mark.parametrize("kind", DRAFTED_KINDS)
def test_drafts_carry_no_token_past_an_alarm(
    drafting_server: Server, tripwires: Tripwires, kind: str, name: str
) -> None:
    blocked, unblocked = ask_both(
        drafting_server, tripwires, name, fields=KINDS["completions"][kind]
    )
    expect_block(tripwires, name, blocked)
    # On CPUs, vLLM's draft sampling does not repeat itself for a given seed.
    if "n" not in KINDS["completions"][kind]:
        expect_beginning(blocked, unblocked)


def test_the_drafted_alarm_lies_among_accepted_drafts(
    drafting_server: Server, tripwires: Tripwires
) -> None:
    before = count_accepted(drafting_server)
    prompt = tripwires.by_name["drafted"].prompt
    answer = ask(
        drafting_server, prompt, "drafted-observed", max_tokens=DRAFTED_OUTPUT + 2
    )
    assert len(answer.choices[0].token_ids) == DRAFTED_OUTPUT + 2
    assert count_accepted(drafting_server) - before >= 3


def count_accepted(server: Server) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(server.get("/metrics"))
        for sample in family.samples
        if sample.name == "vllm:spec_decode_num_accepted_tokens_total"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_an_alarm_in_the_first_chunk_of_a_prompt_ends_it_cleanly(
    drafting_server: Server, stream: bool
) -> None:
    answer = ask(drafting_server, LONG_PROMPT, "cached", stream=stream)
    assert answer.is_done
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.choices[0].token_ids == []
    assert answer.guard["alarms"][0]["position"] == 50
    assert answer.guard["tokens_seen"] == 51


@pytest.mark.parametrize("which", ["toy_server", "drafting_server"])
def test_blocks_leave_nothing_behind(
    request: pytest.FixtureRequest, tripwires: Tripwires, which: str
) -> None:
    server: Server = request.getfixturevalue(which)
    for name in (*POSITIONS, "drafted", "cached"):
        prompt = tripwires.by_name[name].prompt
        ask(server, prompt, name, stream=True, n=3)
    answer = ask(server, "w7 w8 w9", "open")
    assert answer.guard["action"] == "allow"
    assert len(answer.choices[0].token_ids) == MAX_TOKENS
    assert count_unfinished(server) == 0
