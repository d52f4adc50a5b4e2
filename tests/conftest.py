"""What every test may use: the async backend, a real Prometheus, the order."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

E2E = Path(__file__).parent / "e2e"

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


@pytest.fixture
def prometheus_binary() -> str:
    """The path of a Prometheus server; only CI may not do without one."""
    beside_python = str(Path(sys.executable).parent / "prometheus")
    binary = shutil.which("prometheus") or shutil.which(beside_python)
    if binary is None:
        reason = "no Prometheus on the PATH; `make test` unpacks one where apt has it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return binary


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/e2e, and run it after everything quicker."""
    for item in items:
        if E2E in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)
