"""Servers shared by the end-to-end tests of a session."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from e2e.drills import ADMIN_TOKEN, Drills
from e2e.ledger import Ledger
from e2e.serving import (
    THREADS,
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    launch,
    make_toy,
    stop,
    wait_until_ready,
)
from e2e.tripwires import Tripwires

from benchmarks.steps import StepRecord

os.environ |= THREADS


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def tripwires(toy: Toy) -> Tripwires:
    return Tripwires(toy)


@pytest.fixture(scope="session")
def drills(toy: Toy) -> Drills:
    return Drills(toy)


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> StepRecord:
    """Every step of `toy_server`."""
    return StepRecord(tmp_path_factory.mktemp("steps"))


@contextlib.contextmanager
def starting(factory: pytest.TempPathFactory) -> Iterator[ServerFactory]:
    """Start servers on free ports; all are stopped with the context."""
    with contextlib.ExitStack() as stack:

        def start(
            model: Path,
            policy: Path,
            *flags: str,
            environment: Mapping[str, str] | None = None,
        ) -> Server:
            folder = factory.mktemp("server")
            server = launch(model, policy, flags, folder, environment or {})
            stack.callback(stop, server.process)
            wait_until_ready(server)
            return server

        yield start


@pytest.fixture(scope="session")
def start_shared_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerFactory]:
    """Start servers that tests of several modules use."""
    with starting(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFactory]:
    """Start servers of one module of tests, which end with it."""
    with starting(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def toy_server(
    toy: Toy,
    tripwires: Tripwires,
    drills: Drills,
    steps: StepRecord,
    start_shared_server: ServerFactory,
) -> Server:
    """Serve the toy under `TOY_POLICIES`, tripwires and drills, compiled."""
    policies = tripwires.add_to(TOY_POLICIES)
    return start_shared_server(
        toy.model,
        toy.write_policy("shared", drills.add_to(policies)),
        *("--block-size", "32", "--enable-prompt-tokens-details"),
        environment=steps.begin() | {"GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
    )


@pytest.fixture(scope="session")
def drafting_server(
    toy: Toy, tripwires: Tripwires, start_shared_server: ServerFactory
) -> Server:
    """Serve the toy with n-gram speculation, and long prompts in chunks."""
    drafts = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    return start_shared_server(
        toy.model,
        toy.write_policy("drafting", tripwires.add_to(TOY_POLICIES)),
        *("--block-size", "32", "--max-num-batched-tokens", "64"),
        *("--speculative-config", json.dumps(drafts)),
    )


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """Where a test of a fault writes down what it saw."""
    return Ledger(f"{request.path.name}::{request.node.originalname}")
