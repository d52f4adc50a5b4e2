"""The client of a running server, against a small server that answers what it must."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from played import Answer, Played, play_server

from guard.client import Client
from guard.errors import EngineError
from guard.prompt import Prompt
from guard.traffic import Told


@pytest.fixture
def server() -> Iterator[Played]:
    with play_server() as played:
        yield played


MODELS = {"data": [{"id": "small", "max_model_len": 100}]}


def guarded(path: str, body: Any) -> Answer:
    """Answer as a guarded server; a prompt names its score."""
    if path == "/v1/models":
        return 200, MODELS
    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    score = float(text)
    alarm = {"monitor": "far", "score": score, "position": 3}
    return 200, {
        "usage": {"prompt_tokens": 40},
        "guard": {
            "fingerprint": "f1",
            "alarms": [alarm] if score > 5 else [],
            "readings": [
                {"monitor": "far", "score": score, "position": 3},
                {"monitor": "late", "score": None, "position": None},
                {"monitor": "odd", "score": None, "position": 7},
            ],
        },
    }


def test_what_is_told_keeps_the_order_of_the_prompts(server: Played) -> None:
    def answer(path: str, body: Any) -> Answer:
        if path != "/v1/models":
            time.sleep(0.05 if body["messages"][-1]["content"] == "0" else 0)
        return guarded(path, body)

    server.answer = answer
    prompts = [Prompt(prompt=f"{i}", max_tokens=10 * (i + 1)) for i in range(8)]
    told = list(Client(server.url).ask(prompts))
    assert [one.scores["far"] for one in told] == [float(i) for i in range(8)]
    assert [one.alarms for one in told] == [frozenset()] * 6 + [frozenset({"far"})] * 2
    # Never more than the model can hold.
    assert [one.total_length for one in told] == [50, 60, 70, 80, 90, 100, 100, 100]


def test_a_score_that_json_has_no_word_for_comes_back_as_it_was(
    server: Played,
) -> None:
    server.answer = guarded
    (told,) = Client(server.url).ask([Prompt(prompt="1")])
    assert told == Told(
        scores={"far": 1.0, "late": float("-inf"), "odd": float("inf")},
        alarms=frozenset(),
        total_length=100,
    )


def test_prompts_go_out_greedy_and_traced_under_the_policy_and_the_key(
    server: Played,
) -> None:
    server.answer = guarded
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "2"}]
    prompts = [
        Prompt(prompt="1", max_tokens=5),
        Prompt.model_validate({"messages": messages}, strict=False),
        Prompt(text="3"),
    ]
    client = Client(server.url + "/", api_key="sk-1", policy="strict")
    assert len(list(client.ask(prompts))) == 3
    (_, first, _), *rest = server.asked
    assert first["authorization"] == "Bearer sk-1"
    assert all(headers["authorization"] == "Bearer sk-1" for _, headers, _ in rest)
    bodies = {
        json.dumps(body.get("messages", body.get("prompt"))): (path, body)
        for path, _, body in rest
    }
    for asked, (path, body) in bodies.items():
        assert body["model"] == "small"
        assert body["temperature"] == 0
        assert body["guard"] == {"policy": "strict", "trace": "summary"}
        assert path == ("/v1/completions" if asked == '"3"' else "/v1/chat/completions")
    assert bodies[json.dumps(messages)][1]["max_tokens"] == 128
    said = json.dumps([{"role": "user", "content": "1"}])
    assert bodies[said][1]["max_tokens"] == 5


def test_without_a_key_or_a_policy_none_is_sent(server: Played) -> None:
    server.answer = guarded
    list(Client(server.url).ask([Prompt(prompt="1")]))
    assert all("authorization" not in headers for _, headers, _ in server.asked)
    assert server.asked[-1][2]["guard"] == {"trace": "summary"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            (401, {"error": {"message": "No such\nkey."}}),
            "/v1/models answered 401: No such key.",
        ),
        ((500, b"<html>\n oops </html>"), "answered 500: <html> oops </html>"),
        ((200, b"<html>"), "does not answer as a guarded server: "),
        ((200, {}), "names no model; expected an OpenAI-compatible one."),
        ((200, []), "names no model"),
        ((200, {"data": []}), "names no model"),
        ((200, {"data": [{"id": "a"}]}), "does not say max_model_len; expected vLLM."),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_line(
    server: Played, answer: Answer, words: str
) -> None:
    server.answer = lambda path, body: answer
    with pytest.raises(EngineError) as caught:
        list(Client(server.url).ask([Prompt(prompt="1")]))
    assert words in str(caught.value)
    assert str(caught.value).startswith(server.url)
    assert "\n" not in str(caught.value)


def test_an_answer_without_an_end_is_not_read(
    server: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard.client._MAX_BYTES", 1 << 20)
    server.answer = lambda path, body: (200, b" " * (1 << 20) + b"{}"[:size])
    size = 0
    with pytest.raises(EngineError, match="does not answer as a guarded server"):
        Client(server.url).call("/guard/status")
    size = 2
    with pytest.raises(EngineError, match="/guard/status answers without an end; exp"):
        Client(server.url).call("/guard/status")


def test_an_answer_that_is_cut_off_is_not_taken_for_a_short_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nshort"
                )

        answering = threading.Thread(target=answer)
        answering.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(EngineError, match=r"IncompleteRead\(5 bytes read, 15 more"):
            Client(url).fetch("/metrics")
        answering.join()


def test_a_refused_prompt_keeps_the_words_of_the_server(server: Played) -> None:
    def answer(path: str, body: Any) -> Answer:
        if path == "/v1/models":
            return 200, MODELS
        return 403, {"error": {"message": "Policy 'strict' is not yours."}}

    server.answer = answer
    with pytest.raises(EngineError, match="answered 403: Policy 'strict' is not yours"):
        list(Client(server.url, policy="strict").ask([Prompt(prompt="1")] * 40))
    # The others are not asked any more.
    assert len(server.asked) < 40


def test_a_server_without_a_guard_is_refused(server: Played) -> None:
    def answer(path: str, body: Any) -> Answer:
        return 200, MODELS if path == "/v1/models" else {"usage": {}}

    server.answer = answer
    with pytest.raises(
        EngineError, match="answers without a verdict; expected a guard"
    ):
        list(Client(server.url).ask([Prompt(prompt="1")]))


def test_replicas_under_different_files_are_not_taken_for_one(server: Played) -> None:
    def answer(path: str, body: Any) -> Answer:
        status, told = guarded(path, body)
        if path != "/v1/models" and body["messages"][-1]["content"] == "3":
            told["guard"]["fingerprint"] = "f2"
        return status, told

    server.answer = answer
    prompts = [Prompt(prompt=f"{number % 4}") for number in range(40)]
    with pytest.raises(EngineError, match="several versions of the policy, f1 and f2"):
        list(Client(server.url).ask(prompts))
    assert len(list(Client(server.url).ask(prompts[:3]))) == 3


def test_a_prompt_that_brings_its_answer_is_refused_before_anything_is_asked(
    server: Played,
) -> None:
    prompts = [Prompt(prompt="1"), Prompt(prompt="2", response="")]
    with pytest.raises(
        EngineError, match="a server answers by itself; expected prompt"
    ):
        list(Client(server.url).ask(prompts))
    assert server.asked == []


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "nonsense", "ftp://x", "http://[", ""]
)
def test_a_url_behind_which_nobody_is_is_one_line(url: str) -> None:
    with pytest.raises(EngineError, match="does not answer as a guarded server"):
        Client(url).call("/guard/status")


def test_a_call_without_a_body_is_a_get_and_shows_what_was_said(
    server: Played,
) -> None:
    server.answer = lambda path, body: (200, {"path": path, "body": body})
    client = Client(server.url, api_key="k", admin_token="t")
    assert client.call("/guard/status") == {"path": "/guard/status", "body": None}
    said = client.call("/x", {"a": 1})
    assert said == {"path": "/x", "body": {"a": 1}}
    assert server.asked[-1][1]["x-guard-admin-token"] == "t"
