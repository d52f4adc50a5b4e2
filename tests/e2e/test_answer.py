"""An unmodified OpenAI client reads the guard's answer."""

from e2e.serving import Server


def test_a_chat_answer_carries_its_verdict(toy_server: Server) -> None:
    answer = toy_server.client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "w1 w2 w3"}],
        max_tokens=8,
        temperature=0,
    )
    assert answer.model_extra is not None
    verdict = answer.model_extra["guard"]
    assert verdict["policy"] == "default"
    assert verdict["clamped_tokens"]["hold"] > 0
