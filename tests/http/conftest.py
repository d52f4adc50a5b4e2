"""A small OpenAI-compatible application with an engine behind it, all fake."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from guard.http import GuardMiddleware, PolicyDesk
from guard.policy import Drill, Policy, PolicyFile, SaeSource
from guard.request import TICKET_KEY, read_ticket
from guard.verdict import Verdict

SECRET = b"a secret of the test, 32 bytes.."
AT = "layers.1.resid_post"
FINGERPRINTS = {"default": "f-default", "open": "f-open", "private": "f-private"}


@dataclass
class FakeServer:
    """Answers as vLLM does, and records verdicts as the plugin does."""

    desk: PolicyDesk
    texts: list[str] = field(default_factory=lambda: ["hello dear world"])
    """What each choice says, a token per word."""
    verdicts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the verdict of a choice is, beyond "allow"."""
    unjudged: set[int] = field(default_factory=set)
    """Choices without a verdict."""
    tool_calls: list[dict[str, Any]] | None = None
    usage: bool = False
    error_after: int | None = None
    """Number of chunks after which the stream breaks."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    raw_bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    reply: Response | None = None
    """An answer given instead of the scripted one."""

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
        ]
        others = ("/health", "/v1/responses", "/tokenize", "/v1/models")
        routes += [Route(path, _other, methods=["GET", "POST"]) for path in others]
        return Starlette(routes=routes)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat")

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, "completion")

    async def _answer(self, request: Request, kind: str) -> Response:
        raw = await request.body()
        self.raw_bodies.append(raw)
        self.headers.append(dict(request.headers))
        try:
            body = json.loads(raw)
        except json.JSONDecodeError:
            return JSONResponse({"error": {"message": "vLLM: bad JSON"}}, 400)
        if not isinstance(body, dict):
            return JSONResponse({"error": {"message": "vLLM: no object"}}, 400)
        self.bodies.append(body)
        self._judge(body)
        if self.reply is not None:
            return self.reply
        if body.get("stream"):
            return StreamingResponse(self._stream(kind), media_type="text/event-stream")
        head = {"id": "x", "object": kind, "created": 1, "model": "m"}
        choices = [self._choice(i, kind) for i in range(len(self.texts))]
        return JSONResponse({**head, "choices": choices, "usage": {}})

    def _judge(self, body: dict[str, Any]) -> None:
        """Do what the engine core and the plugin do with the ticket."""
        text = body["vllm_xargs"][TICKET_KEY]
        ticket = read_ticket(text, SECRET, now=time.time())
        assert ticket is not None
        for index in range(len(self.texts)):
            if index in self.unjudged:
                continue
            values: dict[str, Any] = {
                "id": ticket.guard_id,
                "policy": ticket.policy,
                "fingerprint": FINGERPRINTS[ticket.policy],
                "mode": "enforce",
                "action": "allow",
                "tokens_seen": 3,
            }
            values |= self.verdicts.get(index, {})
            self.desk.record(ticket.guard_id, index, Verdict(**values))

    def _choice(self, index: int, kind: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": None}
        choice |= {"finish_reason": "stop", "stop_reason": None}
        text = self.texts[index]
        if kind == "completion":
            return choice | {"text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.tool_calls is not None:
            message["tool_calls"] = self.tool_calls
            choice["finish_reason"] = "tool_calls"
        return choice | {"message": message}

    def _chunks(self, kind: str) -> list[dict[str, Any]]:
        """Give one chunk per token, choices in turn, as vLLM does."""
        chunks = []
        if kind == "chat":
            chunks = [
                {"index": i, "delta": {"role": "assistant", "content": ""}}
                | {"finish_reason": None}
                for i in range(len(self.texts))
            ]
        words = [text.split() for text in self.texts]
        for step in range(max(map(len, words), default=0)):
            for index, tokens in enumerate(words):
                if step >= len(tokens):
                    continue
                last = step == len(tokens) - 1
                chunk: dict[str, Any] = {"index": index, "logprobs": None}
                text = tokens[step] + " "
                chunk |= {"delta": {"content": text}} if kind == "chat" else {}
                chunk |= {"text": text} if kind == "completion" else {}
                if self.tool_calls is not None and last:
                    chunk["delta"]["tool_calls"] = self.tool_calls
                chunk["finish_reason"] = "stop" if last else None
                chunks.append(chunk)
        return chunks

    async def _stream(self, kind: str) -> AsyncIterator[str]:
        name = "chat.completion.chunk" if kind == "chat" else "text_completion"
        head = {"id": "x", "object": name, "created": 1, "model": "m"}
        for number, choice in enumerate(self._chunks(kind)):
            if number == self.error_after:
                yield f"data: {json.dumps({'error': {'message': 'broken'}})}\n\n"
                yield "data: [DONE]\n\n"
                return
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        if self.usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': {}})}\n\n"
        yield "data: [DONE]\n\n"


async def _other(request: Request) -> Response:
    return JSONResponse(
        {"path": request.url.path, "body": (await request.body()).decode()}
    )


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def policy_file() -> PolicyFile:
    return PolicyFile(
        version=1,
        policies={name: Policy() for name in FINGERPRINTS},
        public_policies=("default", "open"),
        default_policy="default",
        saes={"s": SaeSource(path="s", format="guard", hook_point=AT, sha256="a" * 64)},
        drills=(Drill(name="fire", sae="s", delta="fire"),),
    )


@pytest.fixture
def desk(policy_file: PolicyFile) -> PolicyDesk:
    return PolicyDesk(policy_file, FINGERPRINTS, secret=SECRET)


@pytest.fixture
def server(desk: PolicyDesk) -> FakeServer:
    return FakeServer(desk)


@pytest.fixture
def guarded(server: FakeServer, desk: PolicyDesk) -> GuardMiddleware:
    return GuardMiddleware(server.app(), desk=desk)


@pytest.fixture
def client(guarded: GuardMiddleware) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(guarded, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://guard")
