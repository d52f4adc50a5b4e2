"""Every token that the engine scheduled has passed the hooks, and was counted."""

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import httpx
from e2e.serving import Server
from e2e.tripwires import LONG_PROMPT
from e2e.wire import ask, read_events, request_body

from benchmarks.steps import StepRecord

POLICIES = [
    "default",
    "held",
    "open",
    "middle-output",
    "middle-output-hold-4",
    "cached",
    "cached-observed",
    "open-hold-40",
    None,
]
WANTED_TOKENS = 10_000


def count_guarded(server: Server) -> float:
    return sum(
        value
        for name, value in server.metrics().items()
        if name.startswith("guard_tokens_total{")
    )


def draw_request(draw: random.Random) -> dict[str, Any]:
    """Return a random request; some begin like others, so that the cache is hit."""
    words = LONG_PROMPT.split()[: draw.choice([0, 0, 33, 70, 130])]
    words += [f"w{draw.randrange(110)}" for _ in range(draw.randint(1, 150))]
    sampled = draw.random() < 0.3
    return request_body(
        " ".join(words),
        draw.choice(POLICIES),
        route=draw.choice(["completions", "chat/completions"]),
        max_tokens=draw.randint(1, 80),
        n=draw.randint(1, 3) if sampled else 1,
        temperature=1.0 if sampled else 0.0,
        stream=draw.random() < 0.5,
        ignore_eos=draw.random() < 0.5,
    )


def send(server: Server, body: dict[str, Any], *, events: int | None) -> None:
    """Send a request, and hang up after some events of its stream."""
    route = "completions" if "prompt" in body else "chat/completions"
    url = f"{server.url}/v1/{route}"
    with httpx.stream("POST", url, json=body, timeout=120) as stream:
        assert stream.status_code == 200
        for _ in islice(read_events(stream), events):
            pass


def test_every_scheduled_token_is_counted(
    toy_server: Server, steps: StepRecord
) -> None:
    draw = random.Random(5)
    before = steps.count_tokens()
    with ThreadPoolExecutor(12) as pool:
        while steps.count_tokens() - before < WANTED_TOKENS:
            bodies = [draw_request(draw) for _ in range(24)]
            hang_ups = [draw.choice([None, None, None, 2, 5]) for _ in bodies]
            list(
                pool.map(
                    lambda body, events: send(toy_server, body, events=events),
                    bodies,
                    hang_ups,
                )
            )
    # What an aborted last step computed is told with the next output.
    ask(toy_server, "w1 w2", "open")
    assert steps.count_tokens() - before >= WANTED_TOKENS
    assert count_guarded(toy_server) == steps.count_tokens()
    assert toy_server.metrics()['guard_unscored_tokens_total{reason="no_reading"}'] == 0


def test_a_cached_prefix_is_not_counted_again(
    toy_server: Server, steps: StepRecord
) -> None:
    prompt = "w99 " + LONG_PROMPT
    ask(toy_server, prompt, "open", max_tokens=1)
    counted, scheduled = count_guarded(toy_server), steps.count_tokens()
    ask(toy_server, prompt, "open", max_tokens=1)
    assert steps.count_tokens() - scheduled == 132 - 128
    assert count_guarded(toy_server) - counted == 132 - 128


def test_chunks_of_a_prompt_count_though_their_steps_answer_nobody(
    drafting_server: Server,
) -> None:
    before = count_guarded(drafting_server)
    answer = ask(drafting_server, "w97 " + LONG_PROMPT, "open", max_tokens=1)
    assert answer.usage["prompt_tokens"] == 132
    assert count_guarded(drafting_server) - before == 132


def test_prompt_and_output_are_counted_apart(toy_server: Server) -> None:
    before = toy_server.metrics()
    ask(toy_server, "w98 w97 w96", "open", max_tokens=6, ignore_eos=True)
    after = toy_server.metrics()
    added = {
        phase: after[name] - before[name]
        for phase in ("prefill", "decode")
        for name in [f'guard_tokens_total{{phase="{phase}"}}']
    }
    # The sixth token is sampled and never computed.
    assert added == {"prefill": 4, "decode": 5}
