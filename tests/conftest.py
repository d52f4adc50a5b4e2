"""What every test may use: the async backend, a real Prometheus, the order.

And which tests run: those of `SLOW` with `--slow`, or where they are named.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from tools import find_tool

TESTS = Path(__file__).parent
E2E = TESTS / "e2e"
SHARED = ("toy_server", "drafting_server")
"""Servers of a session."""
SLOW = (
    "deploy/test_docker.py",
    "e2e/test_audit.py",
    "e2e/test_dashboard.py",
    "e2e/test_deploy.py",
    "e2e/test_docs.py",
    "e2e/test_game_day.py",
    "e2e/test_load.py",
    "e2e/test_outage.py",
    "e2e/test_parallel.py",
    "e2e/test_replicas.py",
    "e2e/test_soak.py",
)
"""What takes servers of its own for long, breaks one at each test, or builds images."""

# Small tensors: a second thread only gets in the way of the servers under test.
torch.set_num_threads(1)

# Time per example measures the machine's neighbours, not the code.
settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer `--slow`, as CI asks."""
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def promtool() -> str:
    """The path of what checks rules and metrics for Prometheus."""
    return find_tool("promtool")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Mark what lies in tests/e2e, and order tests so that nobody waits for them.

    One process runs them after everything quicker. Several begin with them: the first
    with the files that share servers, the others with those that start their own.
    """
    left_out = {item for item in items if is_left_out(item.path, config)}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    for item in items:
        if E2E in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (not is_e2e(item), not shares_servers(item.path)))
    else:
        items.sort(key=is_e2e)


def is_left_out(path: Path, config: pytest.Config) -> bool:
    """Whether a file is slow, and nobody asked for it."""
    named = {config.rootpath / arg.partition("::")[0] for arg in config.args}
    is_asked_for = config.getoption("--slow") or path in named
    return not is_asked_for and path in {TESTS / name for name in SLOW}


def is_e2e(item: pytest.Item) -> bool:
    return item.get_closest_marker("e2e") is not None


@functools.cache
def shares_servers(path: Path) -> bool:
    """Whether tests of this file use a server that those of other files use as well."""
    return E2E in path.parents and any(name in path.read_text() for name in SHARED)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give the tests of a file to one process, and all that share servers to one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "shared" if shares_servers(config.rootpath / file) else file

    return Scheduling(config, log)
