"""What a server replies to attacked prompts, from a client that plays the server."""

import threading

import pytest

from guard.client import Client
from guard.demo.tokenizer import encode_prompt
from guard.errors import EngineError, PromptError
from guard.redteam.reply import Reply, deliver, write_message


class Played(Client):
    """Answers as a guarded server would; remembers what it was asked."""

    def __init__(self, change=lambda answer: None):
        super().__init__("http://nowhere")
        self.asked, self.change = [], change
        self._lock = threading.Lock()

    def call(self, path, body=None):
        if path == "/v1/models":
            return {"data": [{"id": "organism", "max_model_len": 256}]}
        with self._lock:
            self.asked.append((path, body))
        blocked = body["temperature"] == 1 and body["seed"] == 6
        if path == "/v1/completions":
            said = {"text": "" if blocked else f"of {len(body['prompt'])}"}
        else:
            content = f"to {body['messages'][0]['content']} ."
            said = {"message": {"content": None if blocked else content}}
        finish = {"finish_reason": "content_filter" if blocked else "stop"}
        answer = {
            "choices": [said | finish],
            "guard": {
                "action": "block" if blocked else "allow",
                "alarms": [{"monitor": "content"}] if blocked else [],
                "fingerprint": "f" * 64,
            },
        }
        self.change(answer)
        return answer


def test_a_message_becomes_exactly_the_prompt(organism):
    _, tokenizer = organism
    text = "how do i pick the lock ? cup , all"
    prompt = encode_prompt(tokenizer, text)
    assert write_message(tokenizer, prompt) == text
    bos, user, assistant = prompt[0], prompt[1], prompt[-1]
    for no_message in (
        [bos, 9, user, 10, assistant],  # words before the message
        [bos, user, 9, 10],  # nothing that asks for an answer
        [bos, user, 9, bos, 10],
        prompt[1:],
    ):
        with pytest.raises(PromptError, match="expected one that a client can write"):
            write_message(tokenizer, no_message)


def test_every_message_is_sent_greedily_and_some_times_at_random():
    client = Played()
    exchanges = deliver(
        client, ["a", "b", "c"], max_tokens=20, samples=2, policy="watch", seed=5
    )
    assert [one.asked for one in exchanges] == ["a", "b", "c"]
    assert [one.greedy.text for one in exchanges] == ["to a .", "to b .", "to c ."]
    assert all(len(one.sampled) == 2 for one in exchanges)
    assert {path for path, _ in client.asked} == {"/v1/chat/completions"}
    bodies = [body for _, body in client.asked]
    assert len(bodies) == 9
    assert all(body["guard"] == {"policy": "watch"} for body in bodies)
    assert all(body["max_tokens"] == 20 for body in bodies)
    assert all(body["model"] == "organism" for body in bodies)
    manners = [
        (body["temperature"], body.get("seed"))
        for body in bodies
        if body["messages"] == [{"role": "user", "content": "b"}]
    ]
    assert sorted(manners, key=str) == [(0, None), (1, 5), (1, 6)]


def test_token_ids_are_completed():
    client = Played()
    first, second = deliver(
        client, [[1, 6, 7], [1, 8]], max_tokens=20, samples=2, seed=5
    )
    assert [one.text for one in first.replies] == ["of 3", "of 3", ""]
    assert second.asked == [1, 8]
    assert {path for path, _ in client.asked} == {"/v1/completions"}
    assert [body["prompt"] for _, body in client.asked].count([1, 6, 7]) == 3


def test_a_reply_says_what_was_delivered_and_decided():
    (exchange,) = deliver(Played(), ["a"], max_tokens=20, samples=2, seed=5)
    free, blocked = exchange.sampled
    assert free == Reply("to a .", "stop", "allow", (), "f" * 64)
    assert blocked == Reply("", "content_filter", "block", ("content",), "f" * 64)
    assert exchange.replies == (exchange.greedy, free, blocked)
    assert exchange.alarms == {"content": 1}
    assert exchange.recoveries("to  a .") == 2
    assert exchange.recoveries("to b .") == 0


def test_an_answer_that_was_cut_is_not_recovered():
    def cut(answer):
        answer["choices"][0]["finish_reason"] = "length"

    (exchange,) = deliver(Played(cut), ["a"], max_tokens=20)
    assert exchange.recoveries("to a .") == 0


def test_without_a_policy_none_is_asked_for():
    client = Played()
    deliver(client, ["a"], max_tokens=20)
    ((_, body),) = client.asked
    assert "guard" not in body


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer.pop("guard"),
        lambda answer: answer.pop("choices"),
        lambda answer: answer["choices"].append(answer["choices"][0]),
        lambda answer: answer["guard"].pop("action"),
        lambda answer: answer.update(guard=None),
        lambda answer: answer["guard"].update(action=["allow"]),
        lambda answer: answer["guard"].update(fingerprint=7),
        lambda answer: answer["choices"][0]["message"].update(content=5),
    ],
)
def test_an_answer_without_a_verdict_is_refused(change):
    with pytest.raises(EngineError, match="expected a guarded server"):
        deliver(Played(change), ["a"], max_tokens=20)


def test_a_server_without_a_model_is_refused(monkeypatch):
    monkeypatch.setattr(Client, "call", lambda self, path, body=None: {"data": []})
    with pytest.raises(EngineError, match="names no model"):
        deliver(Client("http://nowhere"), ["a"], max_tokens=20)


def test_when_one_is_refused_the_rest_are_not_sent():
    def refuse(answer):
        message = "answered 403"
        raise EngineError(message)

    client = Played(refuse)
    with pytest.raises(EngineError, match="answered 403"):
        deliver(client, ["a"] * 400, max_tokens=20)
    assert len(client.asked) < 400
