"""What a client receives, byte by byte: every field, streamed or not, in one shape."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from e2e.serving import Server

Route = Literal["completions", "chat/completions"]


@dataclass
class Choice:
    """Everything a client learnt about one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens delivered, where they were asked for."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    refusal: str | None = None


@dataclass
class Answer:
    """A whole answer."""

    status: int
    body: dict[str, Any]
    """Of an answer in one piece: as it came."""
    choices: dict[int, Choice] = field(default_factory=dict)
    guards: list[dict[str, Any]] = field(default_factory=list)
    """Every `guard` object there was; expected one."""
    usage: dict[str, Any] = field(default_factory=dict)
    is_done: bool = False
    """Whether it ended as it should: a stream with [DONE]."""

    @property
    def guard(self) -> dict[str, Any]:
        return self.guards[0]

    def verdict(self, index: int) -> dict[str, Any]:
        """Return the verdict of a choice."""
        choices: list[dict[str, Any]] = self.guard.get("choices", [self.guard])
        return choices[index]

    def take(self, chunk: dict[str, Any]) -> None:
        """Take in a chunk of a stream, or the body of an answer in one piece."""
        if "guard" in chunk:
            self.guards.append(chunk["guard"])
        self.usage = chunk.get("usage") or self.usage
        for part in chunk.get("choices", ()):
            choice = self.choices.setdefault(part["index"], Choice())
            said = part.get("delta") or part.get("message") or {}
            choice.text += part.get("text") or said.get("content") or ""
            choice.refusal = said.get("refusal") or choice.refusal
            choice.token_ids += part.get("token_ids") or []
            choice.logprobs += _read_logprobs(part.get("logprobs") or {})
            choice.finish_reason = part.get("finish_reason") or choice.finish_reason
            choice.stop_reason = part.get("stop_reason") or choice.stop_reason


def _read_logprobs(logprobs: dict[str, Any]) -> list[float]:
    if "content" in logprobs:
        return [entry["logprob"] for entry in logprobs["content"] or ()]
    return list(logprobs.get("token_logprobs") or ())


def ask(
    server: Server,
    prompt: str | list[str],
    policy: str | None = None,
    *,
    route: Route = "completions",
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> Answer:
    """Ask for a completion, or for a chat's answer with the same prompt tokens."""
    body = request_body(prompt, policy, route=route, **fields)
    url = f"{server.url}/v1/{route}"
    if not body.get("stream"):
        whole = httpx.post(url, json=body, headers=headers, timeout=120)
        answer = Answer(whole.status_code, whole.json(), is_done=True)
        answer.take(answer.body)
        return answer
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as stream:
        answer = Answer(stream.status_code, {})
        for data in read_events(stream):
            if data == "[DONE]":
                answer.is_done = True
            else:
                answer.take(json.loads(data))
    return answer


def request_body(
    prompt: str | list[str],
    policy: str | None = None,
    *,
    route: Route = "completions",
    **fields: Any,
) -> dict[str, Any]:
    """Return a request's body, greedy unless told otherwise."""
    body: dict[str, Any] = {
        "model": "model",
        "max_tokens": 24,
        "temperature": 0,
        "return_token_ids": True,
        **fields,
    }
    if policy is not None:
        body["guard"] = {"policy": policy}
    if route == "completions":
        return body | {"prompt": prompt}
    message = {"role": "user", "content": prompt}
    return {"add_special_tokens": True} | body | {"messages": [message]}


def read_events(stream: httpx.Response) -> Iterator[str]:
    """Yield the data of each event of a stream."""
    for line in stream.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
