"""What every test may use: the async backend, a real Prometheus, the order."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from tools import find_tool

E2E = Path(__file__).parent / "e2e"
SHARED = ("toy_server", "drafting_server")
"""Servers of a session."""

# Small tensors: a second thread only gets in the way of the servers under test.
torch.set_num_threads(1)

# Time per example measures the machine's neighbours, not the code.
settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


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
    for item in items:
        if E2E in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (not is_e2e(item), not shares_servers(item.path)))
    else:
        items.sort(key=is_e2e)


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
