"""A certified policy on the real server: its certificate shows, and prompts are judged
there as they were on transformers."""

import json
import shutil
from pathlib import Path

import pytest

from guard.certificate import certificate_id
from guard.client import Client
from guard.demo.measure import ORGANISM
from guard.demo.traffic import certified_prompts
from guard.fingerprint import fingerprint
from guard.policy import load_policy
from guard.prompt import write_prompts
from guard.redteam.benign import measure_benign
from guard.redteam.certificate import Search
from guard.redteam.prompt import (
    SAMPLED,
    encode_prompts,
    run_prompts,
    serve_prompts,
)
from guard.redteam.reply import deliver
from guard.redteam.subject import Subject, load_subject
from guard.redteam.target import answer

from .serving import Server, ServerFactory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The organism, its default policy under a certificate."""
    folder = tmp_path_factory.mktemp("certified") / "organism"
    shutil.copytree(ORGANISM, folder)
    policy = folder / "policy.yaml"
    found = fingerprint(load_policy(policy), "default")
    content = {"issued": "2026-01-02", "subject": {"policy_fingerprint": found}}
    content["id"] = certificate_id(content)
    (folder / "certificate.json").write_text(json.dumps(content))
    text = policy.read_text().replace(
        "  default:\n", "  default:\n    certificate: certificate.json\n", 1
    )
    policy.write_text(text)
    lines = certified_prompts()
    write_prompts(folder / "few.jsonl", [*lines[:8], *lines[-20:]])
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, start_server: ServerFactory) -> Server:
    return start_server(
        folder / "model",
        folder / "policy.yaml",
        *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager"),
    )


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return load_subject(
        folder / "model",
        folder / "policy.yaml",
        "default",
        folder / "few.jsonl",
        samples=8,
        benign=20,
    )


def test_its_certificate_shows_in_status_and_metrics(
    folder: Path, server: Server
) -> None:
    wanted = json.loads((folder / "certificate.json").read_text())
    policies = json.loads(server.get("/guard/status"))["policies"]
    assert policies["default"]["certificate"] == {
        "id": wanted["id"],
        "issued": "2026-01-02",
    }
    assert policies["open"]["certificate"] is None
    line = (
        f'guard_certificate_info{{certificate="{wanted["id"]}",policy="default"}} 1.0'
    )
    assert line in server.get("/metrics")


@pytest.mark.parametrize("search", ["suffix", "prefilled"])
def test_attacked_prompts_get_from_the_server_what_was_worked_out_beforehand(
    subject: Subject, server: Server, search: Search
) -> None:
    row = run_prompts(subject, search, "unaware", queries=100, seed=0)
    assert row.recovered.hits
    asked = encode_prompts(subject, row)
    given = answer(subject.target, asked, clamp=subject.target.clamp)
    expected = subject.receive(subject.policy, given, subject.record(given))
    exchanges = deliver(
        Client(server.url),
        asked if search == "prefilled" else row.prompts,
        max_tokens=subject.target.max_tokens,
        policy="default",
    )
    for outcome, exchange in zip(expected, exchanges, strict=True):
        reply = exchange.greedy
        text = subject.tokenizer.decode(outcome.received.tokens)
        assert reply.text.split() == text.split()
        is_blocked = outcome.received.blocked_at is not None
        assert (reply.action == "block") == is_blocked
    assert any(one.greedy.action == "block" for one in exchanges)


def test_what_is_sent_is_counted_and_judged_by_the_same_predicate(
    subject: Subject, server: Server
) -> None:
    plain, begun = (
        serve_prompts(
            subject,
            Client(server.url),
            run_prompts(subject, search, "unaware", queries=1, seed=0),
            seed=0,
        )
        for search in ("none", "prefilled")
    )
    count = len(subject.samples) * (1 + SAMPLED)
    assert plain.attempts == begun.attempts == count
    # Greedy replies are refusals; of the sampled ones a few may not be.
    assert plain.recovered <= len(subject.samples) * SAMPLED / 4
    assert begun.blocked > plain.blocked


def test_what_benign_users_pay_is_timed_through_the_server(
    subject: Subject, server: Server
) -> None:
    found = measure_benign(subject, Client(server.url))
    assert found.seconds_guarded is not None
    assert found.seconds_open is not None
    assert 0 < found.seconds_open < 10
    assert 0 < found.seconds_guarded < 10
