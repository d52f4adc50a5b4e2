"""A cached prefix is shared within a policy, never across, and remembers its readings.

Prompts here are longer than a KV block, and each test begins its own with other words.
"""

import secrets
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from e2e.serving import TOY_POLICIES, Server, Toy
from e2e.tripwires import LONG_POSITION, LONG_PROMPT
from e2e.wire import Answer, ask
from vllm import SamplingParams
from vllm_guard import context
from vllm_guard.admission import admit
from vllm_guard.rows import SLOT_KEY

from guard.request import TICKET_KEY, Ticket, sign_ticket

PREFIX = 128
"""Cached tokens of a prompt of 133 in blocks of 32."""


def make_prompt() -> str:
    """Return a prompt that nobody asked before, with the usual one behind it."""
    return f"w{secrets.randbelow(110)} w{secrets.randbelow(110)} {LONG_PROMPT}"


def count_cached(answer: Answer) -> int:
    details = answer.usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def test_a_policy_finds_its_own_prefix_and_no_other_policy_does(
    toy_server: Server,
) -> None:
    prompt = make_prompt()
    policies = ["open", "open", "held", "held", "cached-observed", "held", "open"]
    cached = [
        count_cached(ask(toy_server, prompt, policy, max_tokens=1))
        for policy in policies
    ]
    assert cached == [0, PREFIX, 0, PREFIX, 0, PREFIX, PREFIX]


def test_a_salt_of_the_client_narrows_and_never_widens(toy_server: Server) -> None:
    prompt = make_prompt()

    def cached(policy: str, salt: str) -> int:
        answer = ask(toy_server, prompt, policy, max_tokens=1, cache_salt=salt)
        return count_cached(answer)

    ask(toy_server, prompt, "open", max_tokens=1)
    assert cached("open", "mine") == 0
    assert cached("open", "mine") == PREFIX
    assert cached("open", "yours") == 0
    assert cached("held", "mine") == 0


def test_knowing_the_salt_of_a_policy_does_not_help(toy_server: Server) -> None:
    prompt = make_prompt()
    first = ask(toy_server, prompt, "open", max_tokens=1)
    salt = context.cache_salt(first.guard["fingerprint"], None)
    again = ask(toy_server, prompt, "held", max_tokens=1, cache_salt=salt)
    assert again.guard["policy"] == "held"
    assert count_cached(again) == 0


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("key", [TICKET_KEY, SLOT_KEY])
def test_a_client_cannot_bring_a_ticket(
    toy_server: Server, route: Any, key: str
) -> None:
    forged = sign_ticket(Ticket("x", "open", expires=time.time() + 60), b"0" * 32)
    answer = ask(toy_server, "w1", route=route, vllm_xargs={key: forged})
    assert answer.status == 400
    assert answer.body["error"]["param"] == "vllm_xargs"
    assert not answer.choices


def test_a_verdict_is_the_same_from_cache(toy_server: Server) -> None:
    for policy in ("held", "cached-observed"):
        salt = secrets.token_hex(8)
        computed, cached = (
            ask(toy_server, LONG_PROMPT, policy, cache_salt=salt) for _ in range(2)
        )
        assert [count_cached(computed), count_cached(cached)] == [0, PREFIX]
        assert cached.choices == computed.choices
        for key in ("action", "stage", "alarms", "clamped_tokens", "tokens_seen"):
            assert cached.guard[key] == computed.guard[key]
    assert cached.guard["alarms"][0]["position"] == LONG_POSITION


def test_a_sticky_condition_is_met_again_in_a_known_prompt(toy_server: Server) -> None:
    # How it comes by that, from cache or by computing it anew, is the plugin's affair.
    first, again = (ask(toy_server, LONG_PROMPT, "default") for _ in range(2))
    assert first.guard["clamped_tokens"]["lift"] > 0
    assert again.choices == first.choices
    assert again.guard["clamped_tokens"] == first.guard["clamped_tokens"]


@pytest.mark.parametrize("policy", ["held", "default"])
def test_choices_that_share_a_prefix_in_the_same_step_agree(
    toy_server: Server, policy: str
) -> None:
    prompt = make_prompt()
    sampled: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9}
    together = ask(toy_server, prompt, policy, n=3, seed=1, **sampled)
    for index, choice in together.choices.items():
        # vLLM gives choice i the seed + i. A salt of its own keeps it alone.
        alone = ask(
            *(toy_server, prompt, policy),
            seed=1 + index,
            cache_salt=secrets.token_hex(8),
            **sampled,
        )
        assert count_cached(alone) == 0
        assert choice.token_ids == alone.choices[0].token_ids
        for key in ("clamped_tokens", "tokens_seen", "action"):
            assert together.verdict(index)[key] == alone.guard[key]


# Below HTTP: what the engine core makes of a request, however it came.


@pytest.fixture
def engine_core(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Iterator[context.Context]:
    """Be, for a test, the process in which an engine core runs."""
    path = toy.write_policy("salt", TOY_POLICIES)
    context.reset()
    monkeypatch.setenv(context.POLICY_VARIABLE, str(path))
    assert context.enter()
    yield context.get()
    context.reset()


def make_request(ticket: object = None, salt: str | None = None) -> Any:
    extra_args = None if ticket is None else {TICKET_KEY: ticket, "mine": 1}
    return SimpleNamespace(
        sampling_params=SamplingParams(extra_args=extra_args, max_tokens=4),
        prompt_token_ids=[1, 5, 6],
        prompt_embeds=None,
        cache_salt=salt,
    )


def test_a_signed_ticket_sets_slot_and_salt(engine_core: context.Context) -> None:
    ticket = Ticket("guard-1", "open", expires=time.time() + 60)
    request = make_request(sign_ticket(ticket, engine_core.secret))
    shared = request.sampling_params
    watched = admit(request, max_model_len=64)
    assert (watched.id, watched.name) == ("guard-1", "open")
    assert request.sampling_params.extra_args == {
        SLOT_KEY: engine_core.current.slot("open"),
        "mine": 1,
    }
    assert request.cache_salt == context.cache_salt(
        engine_core.current.identify("open"), None
    )
    assert TICKET_KEY in shared.extra_args, "n choices share their params"


@pytest.mark.parametrize(
    "forgery",
    [
        "foreign",
        "expired",
        "altered",
        "replayed",
        "unknown policy",
        "no string",
        "slot",
    ],
)
def test_a_forged_ticket_runs_under_the_default_policy(
    engine_core: context.Context, forgery: str
) -> None:
    soon, secret = time.time() + 60, engine_core.secret
    good = sign_ticket(Ticket("x", "open", expires=soon), secret)
    once = sign_ticket(Ticket("y", "open", expires=soon, choices=1), secret)
    assert admit(make_request(once), max_model_len=64).name == "open"
    # The last character of base64 may not count; one in the middle does.
    altered = good[:20] + ("A" if good[20] != "A" else "B") + good[21:]
    ticket: object = {
        "foreign": sign_ticket(Ticket("x", "open", expires=soon), b"0" * 32),
        "expired": sign_ticket(Ticket("x", "open", expires=time.time() - 1), secret),
        "altered": altered,
        "replayed": once,
        "unknown policy": sign_ticket(Ticket("x", "gone", expires=soon), secret),
        "no string": 7,
        "slot": "",
    }[forgery]
    open_salt = context.cache_salt(engine_core.current.identify("open"), None)
    request = make_request(ticket, salt=open_salt)
    request.sampling_params.extra_args[SLOT_KEY] = engine_core.current.slot("open")
    watched = admit(request, max_model_len=64)
    assert watched.name == "default"
    assert request.sampling_params.extra_args[SLOT_KEY] == engine_core.current.slot(
        "default"
    )
    default = engine_core.current.identify("default")
    assert request.cache_salt == context.cache_salt(default, open_salt)
    assert request.cache_salt != open_salt
