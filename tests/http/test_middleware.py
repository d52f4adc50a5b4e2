import asyncio
import json

import httpx
import openai
import pytest
from malformed import draw_odd, draw_refused
from prometheus_client import CollectorRegistry
from starlette.responses import JSONResponse, Response, StreamingResponse

from guard.http import GuardMiddleware
from guard.http.openai import REFUSAL
from guard.http.stream import NO_VERDICT
from guard.metrics import Metrics
from guard.policy import Policy

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


async def ask(client, path=CHAT, **body):
    return await client.post(path, json={"model": "m", "messages": MESSAGES} | body)


def read_events(response):
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def read_error(response, status):
    assert response.status_code == status
    return response.json()["error"]


# Requests


async def test_the_application_gets_a_ticket_in_place_of_the_guard_field(
    client, server
):
    response = await ask(client, guard={"policy": "open"}, vllm_xargs={"a": 1})
    assert response.status_code == 200
    (body,) = server.bodies
    assert "guard" not in body
    assert set(body["vllm_xargs"]) == {"a", "guard_ticket"}
    assert body["messages"] == MESSAGES


async def test_the_content_length_is_that_of_the_sealed_body(client, server):
    await ask(client)
    assert int(server.headers[0]["content-length"]) == len(server.raw_bodies[0])


async def test_the_application_is_not_asked_to_compress(client, server):
    await client.post(CHAT, json={}, headers={"accept-encoding": "gzip"})
    assert "accept-encoding" not in server.headers[0]


async def test_other_routes_are_left_alone(client):
    response = await client.post("/tokenize", content=b'{"guard": 1}')
    assert response.json() == {"path": "/tokenize", "body": '{"guard": 1}'}
    assert "x-guard-id" not in response.headers


async def test_a_refused_route_never_reaches_the_application(client):
    error = read_error(await client.post("/v1/responses", json={}), 400)
    assert error["type"] == "invalid_request_error"
    assert "not supported by guard yet" in error["message"]


@pytest.mark.parametrize("raw", [b"{", b"[]", b'"x"', b""])
async def test_what_is_no_object_gets_the_servers_own_answer(client, server, raw):
    response = await client.post(CHAT, content=raw)
    assert read_error(response, 400)["message"].startswith("vLLM")
    assert server.raw_bodies == [raw]


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"guard": {"policy": "nowhere"}}, "guard.policy", 400),
        ({"guard": {"policy": "private"}}, "guard.policy", 403),
        ({"guard": {"enabled": False}}, "guard.enabled", 400),
        ({"guard": {"drill": "fire"}}, "guard.drill", 403),
        ({"guard": {"drill": ""}}, "guard.drill", 400),
        ({"guard": 0}, "guard", 400),
        ({"vllm_xargs": {"guard_ticket": "x"}}, "vllm_xargs", 400),
        ({"use_beam_search": True}, "use_beam_search", 400),
    ],
)
async def test_a_refused_request_never_reaches_the_application(
    client, server, desk, body, param, status
):
    error = read_error(await ask(client, **body), status)
    assert error["param"] == param
    assert server.bodies == []
    assert desk._visits == {}


CONSTRAINED = [
    (CHAT, "response_format", {"response_format": {"type": "json_object"}}),
    (CHAT, "tool_choice", {"tool_choice": "required", "tools": []}),
    (CHAT, "logit_bias", {"logit_bias": {"5": 100}}),
    (COMPLETION, "structured_outputs", {"structured_outputs": {"regex": "a"}}),
    (COMPLETION, "stop_token_ids", {"stop_token_ids": [5], "min_tokens": 1}),
]


@pytest.mark.parametrize(("path", "param", "body"), CONSTRAINED)
async def test_a_constraint_is_refused_where_the_policy_says_so(
    client, server, desk, policy_file, path, param, body
):
    strict = Policy(constrained_decoding="refuse")
    prints = {"default": "f-default", "open": "f-open"}
    changed = policy_file.model_copy(
        update={"policies": {"default": strict, "open": Policy()}}
    )
    desk.offer_terms(changed, prints, keys=desk.keys)
    error = read_error(await client.post(path, json=body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(f"'{param}' constrains which tokens may be ")
    assert server.bodies == []
    assert desk._visits == {}
    # Neither whoever constrains nothing there, nor another policy.
    for neighbour in ({}, {**body, "guard": {"policy": "open"}}):
        answer = await client.post(path, json=neighbour)
        assert answer.status_code == 200


async def test_malformed_requests_leave_nothing_behind_and_learn_no_policys_name(
    client, desk
):
    requests = [some for some in draw_refused(1200) + draw_odd(200) if some.body]
    answers = [
        await client.post(some.path, content=some.body.replace(b"staff", b"private"))
        for some in requests
    ]
    assert {answer.status_code for answer in answers} == {200, 400, 403}
    assert not any("private" in answer.text for answer in answers)
    assert desk._visits == {}


async def test_a_bomb_is_a_bad_request(client, server):
    response = await client.post(CHAT, content=b'{"a": ' + b"[" * 100_000)
    assert read_error(response, 400)["type"] == "invalid_request_error"
    assert server.raw_bodies == []


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_above_the_limit_is_refused(server, desk, declared):
    guarded = GuardMiddleware(server.app(), desk=desk, max_body_bytes=100)

    async def pieces():
        for _ in range(11):
            yield b"x" * 10

    content = b"x" * 110 if declared else pieces()
    transport = httpx.ASGITransport(guarded)
    async with httpx.AsyncClient(transport=transport, base_url="http://g") as client:
        read_error(await client.post(CHAT, content=content), 413)
        short = await client.post(CHAT, content=b"{" + b" " * 99)
    assert short.status_code == 400
    assert len(server.raw_bodies) == 1


async def test_a_body_that_comes_in_pieces_is_read_whole(client, server):
    raw = json.dumps({"messages": MESSAGES, "guard": {"policy": "open"}}).encode()

    async def pieces():
        for byte in raw:
            yield bytes([byte])

    response = await client.post(CHAT, content=pieces())
    assert response.json()["guard"]["policy"] == "open"
    assert server.bodies[0]["messages"] == MESSAGES


# Whole answers


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_an_allowed_answer_carries_its_verdict(client, path):
    response = await ask(client, path, guard={"policy": "open"})
    guard = response.json()["guard"]
    assert (guard["action"], guard["policy"]) == ("allow", "open")
    assert response.headers["x-guard-action"] == "allow"
    assert response.headers["x-guard-policy"] == "open"
    assert response.headers["x-guard-id"] == guard["id"]
    assert int(response.headers["content-length"]) == len(response.content)


async def test_a_flagged_answer_keeps_its_text(client, server):
    server.verdicts = {0: {"action": "flag"}}
    response = await ask(client)
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"] == "hello dear world"
    assert choice["finish_reason"] == "stop"
    assert response.headers["x-guard-action"] == "flag"


async def test_a_blocked_answer_is_filtered(client, server):
    server.verdicts = {0: {"action": "block", "stage": "output"}}
    server.texts = ["hello"]
    server.tool_calls = [{"id": "cut", "function": {"name": "f", "arguments": "{"}}]
    response = await ask(client)
    (choice,) = response.json()["choices"]
    assert response.status_code == 200
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"] == {
        "role": "assistant",
        "content": "hello",
        "refusal": REFUSAL,
    }
    assert response.headers["x-guard-action"] == "block"


async def test_several_choices_have_a_verdict_each_and_the_worst_on_top(client, server):
    server.texts = ["a", "b", "c"]
    server.verdicts = {1: {"action": "block"}, 2: {"action": "flag"}}
    body = (await ask(client, COMPLETION, n=3)).json()
    assert body["guard"]["action"] == "block"
    actions = [choice["action"] for choice in body["guard"]["choices"]]
    assert actions == ["allow", "block", "flag"]
    reasons = [choice["finish_reason"] for choice in body["choices"]]
    assert reasons == ["stop", "content_filter", "stop"]


@pytest.mark.parametrize("unjudged", [{0}, {1}, {0, 1}])
async def test_an_answer_without_a_verdict_is_not_given(client, server, unjudged):
    server.texts = ["secret", "secret"]
    server.unjudged = unjudged
    response = await ask(client, n=2)
    assert read_error(response, 500)["message"] == NO_VERDICT
    assert "secret" not in response.text
    assert "x-guard-action" not in response.headers


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("unjudged", [set(), {0}])
async def test_answers_that_failed_closed_are_counted(
    server, desk, policy_file, stream, unjudged
):
    registry = CollectorRegistry()
    prints = dict.fromkeys(policy_file.policies, "f")
    metrics = Metrics(
        policy_file, fingerprints=prints, digests={"s": "f"}, registry=registry
    )
    guarded = GuardMiddleware(server.app(), desk=desk, metrics=metrics)
    transport = httpx.ASGITransport(guarded)
    server.unjudged = unjudged
    async with httpx.AsyncClient(transport=transport, base_url="http://g") as client:
        await ask(client, stream=stream)
    value = registry.get_sample_value("guard_errors_total", {"component": "http"})
    assert value == len(unjudged)


@pytest.mark.parametrize("leaves", [True, False])
async def test_who_has_left_is_not_counted_among_the_answers_that_failed(
    desk, policy_file, leaves
):
    """The engine's own server says `null` where nobody waits for an answer."""
    registry = CollectorRegistry()
    prints = dict.fromkeys(policy_file.policies, "f")
    metrics = Metrics(
        policy_file, fingerprints=prints, digests={"s": "f"}, registry=registry
    )

    async def cancelled(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        assert registry.get_sample_value("guard_open_requests") == 1
        if leaves:
            assert (await receive())["type"] == "http.disconnect"
        await JSONResponse(None)(scope, receive, send)

    heard = iter(
        [
            {"type": "http.request", "body": json.dumps({"messages": []}).encode()},
            {"type": "http.disconnect"},
        ]
    )
    sent = []

    async def receive():
        return next(heard)

    async def send(message):
        sent.append(message)

    guarded = GuardMiddleware(cancelled, desk=desk, metrics=metrics)
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await guarded(scope, receive, send)
    value = registry.get_sample_value("guard_errors_total", {"component": "http"})
    assert value == int(not leaves)
    assert [m.get("status") for m in sent] == ([] if leaves else [500, None])
    assert registry.get_sample_value("guard_open_requests") == 0


async def test_an_answer_judged_under_another_policy_is_not_given(client, server):
    server.verdicts = {0: {"policy": "open", "fingerprint": "f-open"}}
    response = await ask(client)
    assert read_error(response, 500)["message"] == NO_VERDICT


@pytest.mark.parametrize(
    "reply",
    [
        Response(b"secret", media_type="application/json"),
        Response(b"secret", media_type="text/plain"),
        Response(b"\x1f\x8bsecret", headers={"content-encoding": "gzip"}),
        JSONResponse({"text": "secret"}),
        JSONResponse(["secret"]),
        JSONResponse({"choices": [], "text": "secret"}),
        JSONResponse({"choices": ["secret"]}),
        JSONResponse({"choices": [{"index": 4, "text": "secret"}]}),
        Response(b"secret", status_code=201),
        Response(
            b"data: secret\n\n",
            media_type="text/event-stream",
            headers={"content-encoding": "br"},
        ),
    ],
)
async def test_an_answer_in_an_unknown_shape_is_not_given(client, server, reply):
    server.reply = reply
    response = await ask(client)
    assert read_error(response, 500)["message"] == NO_VERDICT
    assert "secret" not in response.text


async def test_an_answer_above_the_limit_is_not_given(client, server, monkeypatch):
    whole = len((await ask(client)).content)
    sent = []

    async def pieces():
        body = json.dumps({"choices": [], "secret": "s" * whole}).encode()
        for start in range(0, len(body), 10):
            sent.append(body[start : start + 10])
            yield sent[-1]

    monkeypatch.setattr("guard.http.responder.MAX_ANSWER_BYTES", whole)
    server.reply = StreamingResponse(pieces(), media_type="application/json")
    response = await ask(client)
    assert read_error(response, 500)["message"] == NO_VERDICT
    # What the application goes on to say is not put together any more.
    assert sum(map(len, sent)) <= whole + 20


async def test_an_error_of_the_server_is_passed_on_with_the_guards_headers(
    client, server
):
    server.reply = JSONResponse({"error": {"message": "no such model"}}, 404)
    response = await ask(client)
    assert read_error(response, 404) == {"message": "no such model"}
    assert response.headers["x-guard-policy"] == "default"


async def test_headers_of_the_application_cannot_speak_for_the_guard(client, server):
    headers = {"x-guard-id": "forged", "x-guard-policy": "forged"}
    server.reply = JSONResponse({"error": {}}, 404, headers=headers)
    response = await ask(client)
    assert response.headers.get_list("x-guard-policy") == ["default"]


# Streams


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("usage", [True, False])
async def test_a_stream_carries_its_verdict_on_the_last_content_chunk(
    client, server, path, usage
):
    server.usage = usage
    response = await ask(client, path, stream=True)
    events = read_events(response)
    carriers = [event for event in events if "guard" in event]
    assert len(carriers) == 1
    assert carriers[0] is events[-2 if usage else -1]
    assert carriers[0]["choices"][0]["finish_reason"] == "stop"
    assert response.headers["x-guard-id"] == carriers[0]["guard"]["id"]
    assert "x-guard-action" not in response.headers


async def test_a_blocked_stream_ends_as_filtered(client, server):
    server.verdicts = {0: {"action": "block", "stage": "output"}}
    events = read_events(await ask(client, stream=True))
    (choice,) = events[-1]["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["delta"]["refusal"] == REFUSAL
    assert events[-1]["guard"]["stage"] == "output"


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_a_stream_blocked_in_the_prompt_still_has_an_end(client, server, path):
    server.texts = [""]
    server.verdicts = {0: {"action": "block", "stage": "prompt"}}
    events = read_events(await ask(client, path, stream=True))
    (choice,) = events[-1]["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert events[-1]["guard"]["stage"] == "prompt"


async def test_a_stream_of_a_list_of_prompts_waits_for_the_last_choice(client, server):
    server.texts = ["a b c", "d", "e f", "g"]
    server.verdicts = {1: {"action": "block"}}
    response = await ask(client, COMPLETION, stream=True, prompt=["p", "q"], n=2)
    events = read_events(response)
    assert ["guard" in event for event in events].index(True) == len(events) - 1
    assert len(events[-1]["guard"]["choices"]) == 4


async def test_a_stream_without_a_verdict_says_nothing_of_the_model(client, server):
    server.unjudged = {0}
    response = await ask(client, stream=True)
    assert "hello" not in response.text
    assert read_events(response)[-1]["error"]["message"] == NO_VERDICT


async def test_a_broken_stream_is_passed_on_as_the_server_broke_it(client, server):
    server.error_after = 2
    events = read_events(await ask(client, stream=True))
    assert events[-1] == {"error": {"message": "broken"}}


# Below HTTP


class Wire:
    """An ASGI server's two ends, to see what is sent and when."""

    def __init__(self, body=b"{}"):
        self.sent = []
        self.inbox = [{"type": "http.request", "body": body, "more_body": False}]
        self.gone = asyncio.Event()

    async def receive(self):
        if self.inbox:
            return self.inbox.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    @property
    def text(self):
        return b"".join(message.get("body", b"") for message in self.sent)


def make_scope(kind="http", path=CHAT):
    return {"type": kind, "method": "POST", "path": path, "headers": []}


async def test_each_event_is_passed_on_at_once(server, desk):
    wire = Wire()
    proceed = asyncio.Event()

    async def words():
        yield b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\n\n'
        await proceed.wait()
        yield b"data: [DONE]\n\n"

    server.reply = StreamingResponse(words(), media_type="text/event-stream")
    guarded = GuardMiddleware(server.app(), desk=desk)
    task = asyncio.create_task(guarded(make_scope(), wire.receive, wire.send))
    async with asyncio.timeout(5):
        while b"one" not in wire.text:
            await asyncio.sleep(0.001)
    assert not task.done()
    proceed.set()
    await task
    assert wire.text.endswith(b"data: [DONE]\n\n")


async def test_a_request_is_closed_when_its_answer_is_over(client, server, desk):
    await ask(client)
    await ask(client, stream=True)
    server.reply = JSONResponse({}, 404)
    await ask(client)
    assert desk._visits == {}


async def test_a_request_is_closed_when_the_application_breaks(desk):
    async def broken(scope, receive, send):
        assert len(desk._visits) == 1
        raise ValueError("broken")

    wire = Wire()
    guarded = GuardMiddleware(broken, desk=desk)
    with pytest.raises(ValueError, match="broken"):
        await guarded(make_scope(), wire.receive, wire.send)
    assert desk._visits == {}


async def test_a_request_is_closed_when_its_task_is_cancelled(desk):
    started = asyncio.Event()

    async def slow(scope, receive, send):
        started.set()
        await asyncio.Event().wait()

    wire = Wire()
    guarded = GuardMiddleware(slow, desk=desk)
    task = asyncio.create_task(guarded(make_scope(), wire.receive, wire.send))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert desk._visits == {}


async def test_the_application_learns_that_the_client_is_gone(desk):
    wire = Wire()
    heard = []

    async def listening(scope, receive, send):
        heard.append(await receive())
        wire.gone.set()
        heard.append(await receive())

    await GuardMiddleware(listening, desk=desk)(make_scope(), wire.receive, wire.send)
    assert [message["type"] for message in heard] == [
        "http.request",
        "http.disconnect",
    ]


@pytest.mark.parametrize("gone", [True, False])
async def test_only_an_answer_that_somebody_waits_for_can_fail(desk, policy_file, gone):
    """VLLM answers `null` where the client has hung up."""
    wire, registry = Wire(), CollectorRegistry()
    prints = dict.fromkeys(policy_file.policies, "f")
    metrics = Metrics(
        policy_file, fingerprints=prints, digests={"s": "f"}, registry=registry
    )

    async def answer(scope, receive, send):
        await receive()
        if gone:
            wire.gone.set()
            await receive()
        await JSONResponse(None)(scope, receive, send)

    guarded = GuardMiddleware(answer, desk=desk, metrics=metrics)
    await guarded(make_scope(), wire.receive, wire.send)
    value = registry.get_sample_value("guard_errors_total", {"component": "http"})
    assert (value, wire.text == b"") == ((0, True) if gone else (1, False))


async def test_a_client_gone_before_its_body_reaches_nobody(server, desk):
    wire = Wire()
    wire.inbox = [{"type": "http.request", "body": b"{", "more_body": True}]
    wire.gone.set()
    guarded = GuardMiddleware(server.app(), desk=desk)
    await guarded(make_scope(), wire.receive, wire.send)
    assert wire.sent == []
    assert server.raw_bodies == []


async def test_an_ended_stream_stops_the_application(desk):
    spoken = []

    async def talkative(scope, receive, send):
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for word in ("one", "two", "three"):
            spoken.append(word)
            chunk = {"choices": [{"index": 0, "delta": {"content": word}}]}
            body = f"data: {json.dumps(chunk)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

    wire = Wire()
    guarded = GuardMiddleware(talkative, desk=desk)
    await guarded(make_scope(), wire.receive, wire.send)
    assert spoken == ["one", "two"]
    assert b"one" not in wire.text
    assert wire.sent[-1]["more_body"] is False


async def test_a_message_that_could_carry_a_file_is_dropped(desk):
    async def sneaky(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": "/etc/hostname"})

    wire = Wire()
    guarded = GuardMiddleware(sneaky, desk=desk)
    await guarded(make_scope(), wire.receive, wire.send)
    assert wire.sent == []


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_lifespan_and_websockets_are_passed_through(desk, kind):
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    wire = Wire()
    scope = {"type": kind, "path": "/ws"}
    await GuardMiddleware(app, desk=desk)(scope, wire.receive, wire.send)
    assert seen == [(scope, wire.receive, wire.send)]


async def test_a_websocket_that_would_speak_for_the_model_is_closed(server, desk):
    wire = Wire()
    guarded = GuardMiddleware(server.app(), desk=desk)
    await guarded(make_scope("websocket", "/v1/realtime"), wire.receive, wire.send)
    assert [message["type"] for message in wire.sent] == ["websocket.close"]


# The client everybody has


@pytest.fixture
def openai_client(client):
    return openai.AsyncOpenAI(
        api_key="x", base_url="http://guard/v1", http_client=client, max_retries=0
    )


async def test_an_unmodified_client_reads_the_verdict(openai_client, server):
    server.verdicts = {0: {"action": "block", "clamped_tokens": {"jailbreak": 3}}}
    answer = await openai_client.chat.completions.create(
        model="m", messages=MESSAGES, extra_body={"guard": {"policy": "open"}}
    )
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.choices[0].message.refusal == REFUSAL
    assert answer.model_extra["guard"]["clamped_tokens"] == {"jailbreak": 3}


async def test_an_unmodified_client_reads_the_verdict_of_a_stream(
    openai_client, server
):
    server.usage = True
    server.verdicts = {0: {"action": "flag"}}
    chunks = [
        chunk
        async for chunk in await openai_client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True
        )
    ]
    found = [chunk.model_extra["guard"] for chunk in chunks if chunk.model_extra]
    assert [guard["action"] for guard in found] == ["flag"]


async def test_an_unmodified_client_reads_why_it_was_refused(openai_client):
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await openai_client.chat.completions.create(
            model="m", messages=MESSAGES, extra_body={"guard": {"policy": "private"}}
        )
    assert caught.value.param == "guard.policy"
