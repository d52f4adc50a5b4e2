"""One model over two ranks: the same tokens, readings and counts as on one."""

import json
from typing import Any

import httpx
import pytest
import yaml
from e2e.drills import ADMIN_TOKEN
from e2e.faults import Faults
from e2e.reloads import dump, post_reload
from e2e.serving import (
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    launch,
    stop,
)
from e2e.tripwires import LONG_PROMPT, PROMPT, Tripwires
from e2e.wire import Answer, ask

from benchmarks.steps import StepRecord

TENSOR_PARALLEL = ("--tensor-parallel-size", "2")
BOUND_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

NUM_TERMS = 2 * (64 + 64 + 132 + 64 + 64 + 128) + 512 + 64
"""Terms summed, one after the other, from the embedding to a score: in each of two
layers the widths of norm, projection, attention, norm and the two halves of the MLP,
then decoder and encoder of the SAE."""
TOLERANCE = 2 * NUM_TERMS * 2.0**-24
"""How far two fp32 engines may differ that sum in another order: each of them is off
by at most n u of the sum of magnitudes (u is half an ulp at 1; Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1). Ranks split sums, so they reorder them.
Scores here are sums without much cancellation."""

REQUESTS: dict[str, tuple[str, str]] = {
    "clamps that remember": (PROMPT, "default"),
    "one clamp": ("w3 w14 w15", "held"),
    "nothing": (PROMPT, "open"),
    "block at the prompt": (PROMPT, "last-prompt"),
    "block amid the answer": (PROMPT, "middle-output"),
    "what would have been a block": (PROMPT, "middle-output-observed"),
    "not a number": (PROMPT, "not-finite"),
    "many blocks": (LONG_PROMPT, "cached"),
    "many blocks, clamped": ("w50 " + LONG_PROMPT, "default"),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("rank-faults"))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> StepRecord:
    """Every step of `two_ranks`."""
    return StepRecord(tmp_path_factory.mktemp("rank-steps"))


@pytest.fixture(scope="module")
def two_ranks(
    toy: Toy,
    tripwires: Tripwires,
    faults: Faults,
    record: StepRecord,
    start_server: ServerFactory,
) -> Server:
    """Serve as `toy_server` does, compiled, on two tensor-parallel ranks."""
    path = f"{record.begin()['PYTHONPATH']}:{faults.folder}"
    return start_server(
        toy.model,
        toy.write_policy("two-ranks", tripwires.add_to(TOY_POLICIES)),
        *("--block-size", "32", *TENSOR_PARALLEL),
        environment=faults.environment
        | BOUND_CORES
        | {"PYTHONPATH": path, "GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
    )


def ask_with_readings(server: Server, name: str) -> Answer:
    prompt, policy = REQUESTS[name]
    guard = {"policy": policy, "trace": "summary"}
    return ask(server, prompt, guard=guard, logprobs=1)


def split_scores(verdict: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return what of a verdict must be equal, and the scores that may round."""
    exact = {k: v for k, v in verdict.items() if k not in ("id", "fingerprint")}
    scores = []
    for field in ("alarms", "readings"):
        entries = [dict(entry) for entry in exact.get(field, ())]
        for entry in entries:
            # What is no finite number is told as null, and is no matter of rounding.
            scores += [entry.pop(n) for n in ("score", "ratio") if entry[n] is not None]
        exact[field] = entries
    return exact, scores


@pytest.mark.parametrize("name", REQUESTS)
def test_two_ranks_answer_and_read_as_one(
    name: str, two_ranks: Server, toy_server: Server
) -> None:
    found, expected = (ask_with_readings(s, name) for s in (two_ranks, toy_server))
    for mine, theirs in zip(
        found.choices.values(), expected.choices.values(), strict=True
    ):
        assert mine.token_ids == theirs.token_ids
        assert (mine.text, mine.finish_reason) == (theirs.text, theirs.finish_reason)
    exact, scores = split_scores(found.guard)
    exact_expected, scores_expected = split_scores(expected.guard)
    assert exact == exact_expected
    assert scores == pytest.approx(scores_expected, rel=TOLERANCE)


def test_both_ranks_answer_for_the_guard(two_ranks: Server) -> None:
    assert json.loads(two_ranks.get("/guard/ready")) == {"ready": True}
    (engine,) = json.loads(two_ranks.get("/guard/status"))["engines"]
    workers = [answer for answer in engine if answer["role"] == "worker"]
    assert [worker["rank"] for worker in workers] == [0, 1]
    assert all(worker["hooks"] == ["layers.1.resid_post"] for worker in workers)
    assert len({answer["fingerprint"] for answer in engine}) == 1


def count(server: Server, name: str) -> float:
    return sum(v for k, v in server.metrics().items() if k.startswith(name + "{"))


def test_a_token_of_two_ranks_counts_once(
    two_ranks: Server, record: StepRecord
) -> None:
    before = two_ranks.metrics()
    answer = ask(two_ranks, "w77 " + PROMPT, "default", ignore_eos=True)
    after = two_ranks.metrics()
    assert count(two_ranks, "guard_tokens_total") == record.count_tokens() > 0
    grown = {name: after[name] - before[name] for name in after}
    # Eleven tokens of prompt with BOS; the last of 24 is sampled, never computed.
    assert grown['guard_tokens_total{phase="prefill"}'] == 11
    assert grown['guard_tokens_total{phase="decode"}'] == 23
    requests = 'guard_requests_total{action="%s",mode="enforce",policy="default"}'
    assert grown[requests % answer.guard["action"]] == 1
    clamped = 'guard_clamped_tokens_total{clamp="hold",policy="default"}'
    assert grown[clamped] == answer.guard["clamped_tokens"]["hold"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_one_rank_did_not_guard_never_leaves(
    stream: bool, two_ranks: Server, faults: Faults
) -> None:
    prompt = f"w71 w{int(stream)} w2"
    before = two_ranks.metrics()
    with faults.on("op-stops-on-rank-1"):
        answer = ask(two_ranks, prompt, "held", stream=stream, logprobs=1)
    after = two_ranks.metrics()
    choice = answer.choices[0]
    assert choice.finish_reason == "content_filter"
    assert (choice.text, choice.token_ids, choice.logprobs) == ("", [], [])
    assert (answer.guard["action"], answer.guard["reason"]) == ("block", "unguarded")
    unscored = 'guard_unscored_tokens_total{reason="no_reading"}'
    assert after[unscored] - before[unscored] == 4
    assert ask(two_ranks, prompt, "held").guard["action"] == "allow"


def test_a_rank_that_cannot_stage_stops_the_other(
    two_ranks: Server, toy: Toy, tripwires: Tripwires, faults: Faults
) -> None:
    body = yaml.safe_load(tripwires.add_to(TOY_POLICIES))
    held = body["policies"]["held"]["clamps"][0]
    held |= {"law": "set", "value": 25.0}
    before = ask(two_ranks, PROMPT, "held")
    status = json.loads(two_ranks.get("/guard/status"))
    toy.write_policy("two-ranks", dump(body))
    with faults.on("stage-fails-on-rank-1"):
        refused = post_reload(two_ranks)
    assert refused.status_code == 422
    assert "rank 1: OSError: the disk is on fire" in refused.text
    after = json.loads(two_ranks.get("/guard/status"))
    assert after["engines"] == status["engines"]
    same = ask(two_ranks, PROMPT, "held")
    assert same.choices[0].token_ids == before.choices[0].token_ids
    assert post_reload(two_ranks).json()["generation"] == 2
    (engine,) = json.loads(two_ranks.get("/guard/status"))["engines"]
    assert [answer["generation"] for answer in engine] == [2, 2, 2]
    changed = ask(two_ranks, PROMPT, "held")
    assert changed.choices[0].token_ids != before.choices[0].token_ids
    assert changed.guard["fingerprint"] != before.guard["fingerprint"]
    with faults.on("op-stops-on-rank-1"):
        blocked = ask(two_ranks, "w72 w1 w2", "held")
    assert blocked.guard["reason"] == "unguarded"


def test_a_rank_without_its_hook_does_not_start(
    toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hookless-rank")
    faults = Faults(folder)
    faults.switch_on("no-hooks-on-rank-1")
    server = launch(
        toy.model,
        toy.write_policy("hookless-rank", TOY_POLICIES),
        ["--enforce-eager", *TENSOR_PARALLEL],
        folder,
        faults.environment | BOUND_CORES,
    )
    try:
        assert server.process.wait(timeout=300) == 1
    finally:
        stop(server.process)
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("guard: ")
    assert "A pass through the model ran 0 of 1 hooks" in last
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
