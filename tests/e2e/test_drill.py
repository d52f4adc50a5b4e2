"""Fire drills on a real server: they work, for an administrator, on one request."""

import random
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e.drills import ADMIN_TOKEN, POSITIONS, PROMPT, Drills
from e2e.serving import (
    TOY_POLICIES,
    Server,
    Toy,
    guard_command,
    guard_environment,
)
from e2e.stepped import Ask, step_engine
from e2e.test_salt import PREFIX, count_cached, make_prompt
from e2e.traffic import draw_prompt
from e2e.wire import Answer, ask

ADMIN = {"x-guard-admin-token": ADMIN_TOKEN}


def drill(
    server: Server, prompt: str, name: str, policy: str = "open", **fields: Any
) -> Answer:
    """Ask as an administrator for an answer with a drill."""
    guard = {"policy": policy, "drill": name}
    return ask(server, prompt, guard=guard, headers=ADMIN, **fields)


def said(answer: Answer) -> tuple[object, ...]:
    """Return all that a client reads of an answer, but its own id."""
    assert len(answer.guards) == 1
    guard = {k: v for k, v in answer.guard.items() if k not in ("id", "choices")}
    return answer.choices, guard


def first(answer: Answer) -> tuple[int, float]:
    """Return the first token of an answer and its logprob."""
    choice = answer.choices[0]
    return choice.token_ids[0], choice.logprobs[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("prompt", [PROMPT, "w40", "w1 w2 w3 w4 w5 w6 w7 w8"])
def test_a_drill_answers_as_transformers_does_with_the_same_edit(
    toy_server: Server, drills: Drills, prompt: str, name: str, *, stream: bool
) -> None:
    clean = ask(toy_server, prompt, "open", logprobs=1, stream=stream)
    drilled = drill(toy_server, prompt, name, logprobs=1, stream=stream)
    expected = drills.continue_drilled(drills.encode(prompt), name, count=24)
    assert drilled.choices[0].token_ids == expected
    assert drilled.guard["drill"] == name
    assert first(drilled)[0] != first(clean)[0]
    again = ask(toy_server, prompt, "open", logprobs=1, stream=stream)
    assert said(again) == said(clean)
    assert "drill" not in again.guard


def test_a_drill_is_behind_the_clamp_and_before_the_monitors(
    toy_server: Server,
) -> None:
    clean = ask(toy_server, PROMPT, guard={"trace": "summary"})
    guard = {"trace": "summary", "drill": "last"}
    drilled = ask(toy_server, PROMPT, guard=guard, headers=ADMIN)
    assert clean.guard["action"] == "allow"
    assert drilled.guard["action"] == "flag"
    (alarm,) = drilled.guard["alarms"]
    assert (alarm["position"], drilled.guard["stage"]) == (4, "prompt")
    assert drilled.guard["readings"][0]["ratio"] > clean.guard["readings"][0]["ratio"]
    assert drilled.guard["clamped_tokens"]["hold"] > 0


@pytest.mark.parametrize("policy", ["open", "held", "cached-observed"])
def test_what_a_drill_computes_is_found_by_nobody(
    toy_server: Server, policy: str
) -> None:
    prompt = make_prompt()
    drilled = [drill(toy_server, prompt, "last", policy, logprobs=1) for _ in range(2)]
    clean = [ask(toy_server, prompt, policy, logprobs=1) for _ in range(2)]
    again = drill(toy_server, prompt, "last", policy, logprobs=1)
    cached = [count_cached(answer) for answer in (*drilled, *clean, again)]
    assert cached == [0, 0, 0, PREFIX, 0]
    assert said(drilled[0]) == said(drilled[1]) == said(again)
    assert clean[0].choices[0].token_ids == clean[1].choices[0].token_ids
    assert first(clean[0])[1] == pytest.approx(first(clean[1])[1], abs=0.001)
    assert first(again)[0] != first(clean[0])[0]


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_of_a_drill_is_one(toy_server: Server, *, stream: bool) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "stream": stream}
    prompt = make_prompt()
    together = drill(toy_server, prompt, "last", n=3, seed=1, **sampled)
    assert len(together.choices) == 3
    for index, choice in together.choices.items():
        alone = drill(toy_server, prompt, "last", seed=1 + index, **sampled)
        assert choice.token_ids == alone.choices[0].token_ids
        assert together.verdict(index)["drill"] == "last"


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("guard", "headers", "status"),
    [
        ({"drill": "last"}, {}, 403),
        ({"drill": "last"}, {"x-guard-admin-token": ""}, 403),
        ({"drill": "last"}, {"x-guard-admin-token": ADMIN_TOKEN[:-1]}, 403),
        ({"drill": "last"}, {"authorization": f"Bearer {ADMIN_TOKEN}"}, 403),
        ({"drill": "gone"}, {}, 403),
        ({"drill": "gone"}, ADMIN, 400),
        ({"drill": "Last"}, ADMIN, 400),
        ({"drill": 1}, ADMIN, 400),
        ({"drill": ["last"]}, ADMIN, 400),
        ({"drill": "drills/last.safetensors"}, ADMIN, 400),
    ],
)
def test_a_drill_that_is_not_granted_is_refused(
    toy_server: Server,
    route: Any,
    guard: dict[str, Any],
    headers: dict[str, str],
    status: int,
) -> None:
    answer = ask(toy_server, "w1", route=route, guard=guard, headers=headers)
    assert answer.status == status
    error = answer.body["error"]
    assert error["param"].startswith("guard.drill")
    assert not any(name in error["message"] for name in POSITIONS if status == 403)


def test_without_the_token_a_drill_that_exists_is_as_unknown_as_any(
    toy_server: Server,
) -> None:
    answers = [ask(toy_server, "w1", guard={"drill": name}) for name in ("last", "x")]
    assert answers[0].body == answers[1].body


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"drill": "last"},
        {"guard_drill": 1},
        {"vllm_xargs": {"drill": 1}},
        {"extra_args": {"guard_drill": 1}},
        {"guard": {"drill": None}},
    ],
)
def test_nothing_but_the_field_asks_for_a_drill(
    toy_server: Server, fields: dict[str, Any]
) -> None:
    clean = ask(toy_server, PROMPT, logprobs=1)
    answer = ask(toy_server, PROMPT, headers=ADMIN, logprobs=1, **fields)
    assert answer.status == 200
    assert said(answer) == said(clean)


def test_the_engines_own_key_is_refused(toy_server: Server) -> None:
    answer = ask(toy_server, "w1", headers=ADMIN, vllm_xargs={"guard_drill": 1})
    assert (answer.status, answer.body["error"]["param"]) == (400, "vllm_xargs")


def test_without_an_administrator_drills_are_off(drafting_server: Server) -> None:
    for headers in ({}, ADMIN, {"x-guard-admin-token": ""}):
        answer = ask(drafting_server, "w1", guard={"drill": "last"}, headers=headers)
        assert answer.status == 403
        assert "Drills are off" in answer.body["error"]["message"]
        listed = httpx.get(f"{drafting_server.url}/guard/drills", headers=headers)
        assert listed.status_code == 404


def test_only_an_administrator_reads_the_drills(toy_server: Server) -> None:
    url = f"{toy_server.url}/guard/drills"
    for headers in ({}, {"x-guard-admin-token": ADMIN_TOKEN + "x"}):
        refused = httpx.get(url, headers=headers)
        assert refused.status_code == 403
        assert PROMPT not in refused.text
    listed = httpx.get(url, headers=ADMIN).json()["drills"]
    assert {entry["name"]: entry["position"] for entry in listed} == POSITIONS
    assert {entry["prompt"] for entry in listed} == {PROMPT}


# In the middle of other traffic


@dataclass(frozen=True)
class Order:
    """One request of the storm."""

    prompt: str
    policy: str
    max_tokens: int
    drill: str | None
    stream: bool


def make_orders(prompts: int, *, each: int) -> list[Order]:
    """Return so many requests for each prompt, one of them drilled."""
    draw = random.Random(3)
    orders = []
    for number in range(prompts):
        length = draw.choice([1, 3, 10, 40, 90, 150])
        words = [f"w{draw.randrange(110)}" for _ in range(length)]
        policy = draw.choice(["open", "held", "default"])
        max_tokens = draw.randrange(4, 32)
        for copy in range(each):
            name = draw.choice(list(POSITIONS)) if copy == 0 else None
            orders.append(
                Order(" ".join(words), policy, max_tokens, name, bool(copy % 2))
            )
        assert len(orders) == each * (number + 1)
    draw.shuffle(orders)
    return orders


def place(server: Server, order: Order, *, salt: str | None = None) -> Answer:
    guard = {"policy": order.policy}
    fields: dict[str, Any] = {"max_tokens": order.max_tokens, "stream": order.stream}
    if salt is not None:
        fields["cache_salt"] = salt
    if order.drill is not None:
        guard["drill"] = order.drill
    return ask(server, order.prompt, guard=guard, headers=ADMIN, **fields)


def test_a_drill_in_the_middle_of_traffic_changes_no_other_answer(
    toy_server: Server,
) -> None:
    orders = make_orders(40, each=5)

    def key(order: Order) -> tuple[str, str, str | None]:
        return order.prompt, order.policy, order.drill

    # Under salts of their own, so that nothing of them is found in the cache.
    alone = {
        which: place(toy_server, order, salt=f"alone-{number}")
        for number, (which, order) in enumerate({key(o): o for o in orders}.items())
    }
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda order: place(toy_server, order), orders))
    for order, answer in zip(orders, together, strict=True):
        expected = alone[key(order)]
        assert answer.choices[0].token_ids == expected.choices[0].token_ids, order
        assert answer.guard.get("drill") == order.drill
        for name in ("action", "clamped_tokens", "tokens_seen"):
            assert answer.guard[name] == expected.guard[name]
    changed = [
        alone[o.prompt, o.policy, None].choices != alone[key(o)].choices
        for o in orders
        if o.drill is not None
    ]
    assert len(changed) == 40
    assert all(changed)


def test_a_drill_is_the_same_in_chunks_and_after_preemption(
    toy: Toy, drills: Drills, tmp_path: Path
) -> None:
    draw = random.Random(6)
    policy_file = toy.write_policy("stepped", drills.add_to(TOY_POLICIES))
    subjects = [
        Ask(draw_prompt(draw, length), "open", 80, drill=name)
        for length, name in ((90, "last"), (70, "whole"), (1, "last"), (64, None))
    ]
    crowd = [Ask(draw_prompt(draw, 40), "open", 150) for _ in range(15)]
    with step_engine(
        toy.model, policy_file, tmp_path, num_gpu_blocks_override=64
    ) as engine:
        alone = engine.run([*subjects, *crowd[:4]])
        chunks = engine.run([*subjects, *crowd[:4]], chunk=16)
        # Who comes last is preempted first.
        pressed = engine.run([*crowd, *subjects], chunk=64)
    ours = pressed[len(crowd) :]
    assert any(answer.preemptions for answer in ours[:2])
    for index, subject in enumerate(subjects):
        several = (alone[index], chunks[index], ours[index])
        for answer in several:
            assert answer.guard is not None
            assert answer.guard.get("drill") == subject.drill
        tokens = [answer.tokens for answer in several]
        # A BOS alone is a prompt without a token that may be edited.
        if subject.drill is not None and len(subject.prompt) > 1:
            expected = drills.continue_drilled(subject.prompt, subject.drill, count=80)
            assert tokens[0][: len(expected)] == expected  # it stops at the EOS
        assert tokens[0] == tokens[1] == tokens[2]
    for index in range(4):
        assert pressed[index].tokens == alone[len(subjects) + index].tokens


# The command


def run_command(*arguments: str, **environment: str) -> Any:
    return subprocess.run(
        guard_command("drill", *arguments),
        capture_output=True,
        text=True,
        env=guard_environment(environment | {"COLUMNS": "140"}),
        check=False,
    )


def read_table(shown: str) -> list[list[str]]:
    """Return the first line of each row of the table, cell by cell."""
    rows, is_first = [], False
    for line in shown.splitlines():
        if line[:1] in "┡├":
            is_first = True
        elif line.startswith("│") and is_first:
            rows.append([cell.strip() for cell in line.split("│")[1:-1]])
            is_first = False
    return rows


def test_the_command_shows_what_each_drill_did_under_each_policy(
    toy_server: Server,
) -> None:
    policies = ["--policy", "open", "--policy", "default"]
    ran = run_command("--url", toy_server.url, *policies, GUARD_ADMIN_TOKEN=ADMIN_TOKEN)
    assert ran.returncode == 0, ran.stderr
    rows = read_table(ran.stdout)
    assert [row[:2] for row in rows] == [
        [name, policy] for policy in ("open", "default") for name in POSITIONS
    ]
    by_policy: dict[str, Sequence[list[str]]] = {"open": rows[:2], "default": rows[2:]}
    for row in by_policy["open"]:
        assert row[2:] == ["yes", "", "allow", "no", "yes"]
    for row in by_policy["default"]:
        assert row[3].startswith("recovery ")
        assert row[4:] == ["flag", "yes", "yes"]
    assert ran.stdout.count("ALARM") == len(POSITIONS)


def test_the_command_says_withheld_of_what_was_blocked(toy_server: Server) -> None:
    ran = run_command(
        *("--url", toy_server.url, "--admin-token", ADMIN_TOKEN),
        *("--policy", "not-finite"),
    )
    assert ran.returncode == 0, ran.stderr
    for row in read_table(ran.stdout):
        assert row[2] == "withheld"
        assert row[4] == "block"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "answered 403: Drills are an administrator's"),
        (["--admin-token", "wrong"], "answered 403: Drills are an administrator's"),
        (["--admin-token", ADMIN_TOKEN, "--policy", "gone"], "does not exist"),
        (["--admin-token", ADMIN_TOKEN, "--url", "http://127.0.0.1:9"], "not answer"),
        (["--admin-token", "a\nb"], "token and a key that fit a header"),
    ],
)
def test_a_command_that_cannot_work_is_one_line(
    toy_server: Server, arguments: list[str], words: str
) -> None:
    ran = run_command("--url", toy_server.url, *arguments)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1), ran.stderr
    assert words in ran.stderr
    assert ran.stdout == ""


def test_drills_off_is_said_by_the_command(drafting_server: Server) -> None:
    ran = run_command("--url", drafting_server.url, "--admin-token", ADMIN_TOKEN)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "answered 404: Drills are off" in ran.stderr
