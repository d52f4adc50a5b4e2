"""Servers shared by the end-to-end tests of a session."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from e2e.serving import (
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    launch,
    make_toy,
    stop,
    wait_until_ready,
)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFactory]:
    """Start servers on free ports; all are stopped when the session ends."""
    with contextlib.ExitStack() as stack:

        def start(
            model: Path,
            policy: Path,
            *flags: str,
            environment: Mapping[str, str] | None = None,
        ) -> Server:
            folder = tmp_path_factory.mktemp("server")
            server = launch(model, policy, flags, folder, environment or {})
            stack.callback(stop, server.process)
            wait_until_ready(server)
            return server

        yield start


@pytest.fixture(scope="session")
def toy_server(toy: Toy, start_server: ServerFactory) -> Server:
    """Serve the toy model under `TOY_POLICIES`, compiled, small KV blocks."""
    policy = toy.write_policy("shared", TOY_POLICIES)
    return start_server(toy.model, policy, "--block-size", "32")
