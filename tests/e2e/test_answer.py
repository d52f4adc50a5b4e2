"""An unmodified OpenAI client reads the guard's answer."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import openai
import pytest
from e2e.serving import Server

from benchmarks.steps import StepRecord
from guard.http.route import decide_route

PROMPTS = [
    "w1 w2 w3",
    "w9 w8",
    "w17",
    "w40 w41 w42 w43",
    "w5 w5 w5",
    "w100 w3 w77 w12",
    "w64 w65",
    "w30 w20 w10",
]


def complete(server: Server, prompt: str | list[str], **options: Any) -> Any:
    defaults = {"model": "model", "max_tokens": 8, "temperature": 0}
    return server.client.completions.create(prompt=prompt, **(defaults | options))


def chat(server: Server, text: str, **options: Any) -> Any:
    defaults = {"model": "model", "max_tokens": 8, "temperature": 0}
    messages: Any = [{"role": "user", "content": text}]
    return server.client.chat.completions.create(
        messages=messages, **(defaults | options)
    )


def under(policy: object) -> dict[str, Any]:
    return {"guard": {"policy": policy}}


def same(verdict: dict[str, Any]) -> dict[str, Any]:
    """Return a verdict without what differs from one request to the next."""
    return {key: verdict[key] for key in verdict if key not in ("id", "choices")}


def verdicts_in(chunks: Iterable[Any]) -> list[dict[str, Any]]:
    return [chunk.guard for chunk in chunks if "guard" in (chunk.model_extra or {})]


def text_in(chunks: Iterable[Any]) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(
        choice.text if hasattr(choice, "text") else choice.delta.content or ""
        for choice in choices
    )


def test_a_chat_answer_carries_its_verdict(toy_server: Server) -> None:
    answer = chat(toy_server, "w1 w2 w3")
    verdict = answer.guard
    assert verdict["schema"] == 1
    assert verdict["policy"] == "default"
    assert verdict["mode"] == "enforce"
    assert verdict["action"] in ("allow", "flag")
    assert verdict["clamped_tokens"]["hold"] > 0
    # The last token was sampled, and never went through the model itself.
    assert verdict["tokens_seen"] == answer.usage.total_tokens - 1
    assert answer.choices[0].finish_reason == "length"


def test_a_text_completion_carries_its_verdict(toy_server: Server) -> None:
    answer = complete(toy_server, "w1 w2 w3")
    assert answer.guard["policy"] == "default"
    assert answer.guard["clamped_tokens"]["hold"] > 0
    assert answer.guard["tokens_seen"] == answer.usage.total_tokens - 1
    assert answer.kv_transfer_params is None


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_stream_says_the_same_and_its_verdict_once_with_the_finish(
    ask: Any, toy_server: Server
) -> None:
    whole = ask(toy_server, "w1 w2 w3")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = ask(toy_server, "w1 w2 w3", **options)
    choice = whole.choices[0]
    text = choice.text if hasattr(choice, "text") else choice.message.content
    assert text_in(chunks) == text
    assert [same(verdict) for verdict in verdicts_in(chunks)] == [same(whole.guard)]
    assert chunks[-1].guard["policy"] == "default"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert usage.usage.total_tokens == whole.usage.total_tokens
    assert usage.choices == []


def test_the_policy_is_chosen_by_the_request(toy_server: Server) -> None:
    answers = [
        [chat(toy_server, prompt, extra_body=under(name)) for prompt in PROMPTS]
        for name in ("default", "open")
    ]
    for name, group in zip(("default", "open"), answers, strict=True):
        assert {answer.guard["policy"] for answer in group} == {name}
    default, free = (
        [answer.choices[0].message.content for answer in group] for group in answers
    )
    assert default != free
    assert answers[1][0].guard["clamped_tokens"] == {}
    assert answers[0][0].guard["fingerprint"] != answers[1][0].guard["fingerprint"]


def test_every_choice_has_its_own_verdict(toy_server: Server) -> None:
    prompts = ["w1 w2 w3 w4", "w9"]
    answer = complete(toy_server, prompts, n=2, temperature=1, seed=3)
    verdicts = answer.guard["choices"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    # BOS and words of the prompt, then what was sampled but the last.
    assert [v["tokens_seen"] for v in verdicts] == [5 + 7, 5 + 7, 2 + 7, 2 + 7]
    assert answer.guard["action"] == verdicts[0]["action"] == "allow"
    assert {v["id"] for v in verdicts} == {answer.guard["id"]}


def test_every_choice_of_a_stream_has_its_own_verdict(toy_server: Server) -> None:
    options = {"n": 2, "temperature": 1, "seed": 3, "stream": True}
    chunks = list(chat(toy_server, "w1 w2 w3", **options))
    (verdict,) = verdicts_in(chunks)
    assert [choice["tokens_seen"] for choice in verdict["choices"]] == [10, 10]
    finishes = [
        choice.index
        for chunk in chunks
        for choice in chunk.choices
        if choice.finish_reason
    ]
    assert sorted(finishes) == [0, 1]
    assert chunks[-1].guard == verdict


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_the_verdict_alike(
    stream: bool, toy_server: Server
) -> None:
    words = complete(toy_server, "w1 w2 w3", max_tokens=24).choices[0].text.split()
    delivered = next(i for i in range(4, 24) if words[i] not in words[:i])
    options = {"max_tokens": 24, "stop": [words[delivered]], "stream": stream}
    answer = complete(toy_server, "w1 w2 w3", **options)
    if stream:
        chunks = list(answer)
        text, (verdict,) = text_in(chunks), verdicts_in(chunks)
    else:
        text, verdict = answer.choices[0].text, answer.guard
    assert text.split() == words[:delivered]
    assert verdict["tokens_seen"] == 4 + delivered
    # The step that sampled the stop string read the last token before it.
    cut = complete(toy_server, "w1 w2 w3", max_tokens=delivered + 1)
    assert same(verdict) == same(cut.guard)


def test_headers_name_the_request_its_policy_and_what_was_decided(
    toy_server: Server,
) -> None:
    client = toy_server.client
    raw = client.completions.with_raw_response.create(
        model="model", prompt="w1", max_tokens=2, extra_body=under("open")
    )
    guard = raw.parse().guard  # type: ignore[attr-defined]
    assert raw.headers["x-guard-id"] == guard["id"]
    assert raw.headers["x-guard-policy"] == "open"
    assert raw.headers["x-guard-action"] == "allow"
    with client.completions.with_streaming_response.create(
        model="model", prompt="w1", max_tokens=2, stream=True
    ) as streamed:
        assert streamed.headers["x-guard-policy"] == "default"
        assert "x-guard-action" not in streamed.headers
        assert streamed.headers["x-guard-id"] in "".join(streamed.iter_lines())


@pytest.mark.parametrize(
    ("guard", "status", "param"),
    [
        ({"policy": "nowhere"}, 400, "guard.policy"),
        ({"policy": "staff"}, 403, "guard.policy"),
        ({"policy": 5}, 400, "guard.policy"),
        ({"polcy": "open"}, 400, "guard.polcy"),
        ("open", 400, "guard"),
        ([], 400, "guard"),
        ({"drill": "last"}, 403, "guard.drill"),
        ({"drill": ""}, 400, "guard.drill"),
        ({"path": "saes/mine.safetensors"}, 400, "guard.path"),
    ],
)
@pytest.mark.parametrize("ask", [chat, complete])
def test_a_guard_field_that_cannot_be_honoured_is_refused_by_name(
    guard: object, status: int, param: str, ask: Any, toy_server: Server
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        ask(toy_server, "w1", extra_body={"guard": guard})
    assert refused.value.status_code == status
    assert refused.value.param == param
    kind = "permission_error" if status == 403 else "invalid_request_error"
    assert refused.value.type == kind


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"vllm_xargs": {"guard_ticket": "g1.forged.ticket"}}, "vllm_xargs"),
        ({"vllm_xargs": {"guard_slot": 2}}, "vllm_xargs"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_what_would_slip_past_the_guard_is_refused(
    extra: dict[str, Any], param: str, toy_server: Server
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(toy_server, "w1", extra_body=extra)
    assert refused.value.param == param


JSON_OBJECT: dict[str, Any] = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        (JSON_OBJECT, "response_format"),
        ({"structured_outputs": {"regex": "(w1)+"}}, "structured_outputs"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"bad_words": ["w1"]}, "bad_words"),
        ({"stop_token_ids": [5, 6], "min_tokens": 4}, "stop_token_ids"),
    ],
)
@pytest.mark.parametrize("ask", [chat, complete])
def test_who_constrains_decoding_is_refused_and_his_neighbour_answered(
    extra: dict[str, Any], param: str, ask: Any, toy_server: Server, steps: StepRecord
) -> None:
    ran = steps.count_tokens()
    with pytest.raises(openai.BadRequestError) as refused:
        ask(toy_server, "w1 w2 w3", extra_body=under("free") | extra)
    assert refused.value.param == param
    assert "constrains which tokens may be decoded" in refused.value.message
    assert steps.count_tokens() == ran
    for body in (under("free"), under("open") | extra):
        assert ask(toy_server, "w1 w2 w3", extra_body=body).guard["action"] == "allow"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/completions/render",
        "/v1/chat/completions/batch",
        "/invocations",
        "/inference/v1/generate",
        "/score",
        "/pooling",
    ],
)
def test_a_route_that_is_not_done_yet_is_refused_clearly(
    path: str, toy_server: Server
) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported by guard yet"):
        toy_server.client.post(
            f"{toy_server.url}{path}",
            body={"model": "model", "input": "w1", "prompt": "w1"},
            cast_to=object,
        )


def test_every_route_of_this_vllm_is_guarded_refused_or_known_to_be_harmless(
    toy_server: Server,
) -> None:
    paths = json.loads(toy_server.get("/openapi.json"))["paths"]
    passed = {
        path
        for path, methods in paths.items()
        if "post" in methods and decide_route(path, "POST") == "pass"
    }
    assert passed == {"/tokenize", "/detokenize", "/ping", "/is_scaling_elastic_ep"}


def test_policies_that_share_a_batch_do_not_touch_each_other(
    toy_server: Server,
) -> None:
    asked = [(prompt, name) for prompt in PROMPTS for name in ("default", "open")]

    def ask(entry: tuple[str, str]) -> tuple[str, dict[str, Any]]:
        prompt, name = entry
        answer = complete(toy_server, prompt, max_tokens=48, extra_body=under(name))
        return answer.choices[0].text, same(answer.guard)

    alone = [ask(entry) for entry in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(ask, asked))
    assert together == alone
    texts = dict(zip(asked, (text for text, _ in alone), strict=True))
    assert any(texts[p, "default"] != texts[p, "open"] for p in PROMPTS)


def test_two_streams_at_once_keep_their_own_verdicts(toy_server: Server) -> None:
    options = {"max_tokens": 32, "stream": True}
    streams = [
        iter(complete(toy_server, PROMPTS[0], extra_body=under(name), **options))
        for name in ("default", "open")
    ]
    taken: list[list[Any]] = [[], []]
    # In turns, so that both are open for as long as possible.
    for pair in zip_longest(*streams):
        for chunks, chunk in zip(taken, pair, strict=True):
            chunks += [] if chunk is None else [chunk]
    for name, chunks in zip(("default", "open"), taken, strict=True):
        (verdict,) = verdicts_in(chunks)
        assert verdict["policy"] == name
        assert verdict["tokens_seen"] > 4
        whole = complete(toy_server, PROMPTS[0], max_tokens=32, extra_body=under(name))
        assert text_in(chunks) == whole.choices[0].text
        assert same(verdict) == same(whole.guard)
