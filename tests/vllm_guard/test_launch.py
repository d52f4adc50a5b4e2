"""What is refused before anything is loaded."""

from pathlib import Path

import pytest
from vllm_guard import launch

from guard.errors import EngineError, PolicyError


def test_a_file_of_options_that_vllm_would_overlook_is_refused(tmp_path: Path) -> None:
    """Or a server whose keys stand in it would let everybody in."""
    with pytest.raises(EngineError, match="expected two words, --config FILE"):
        launch.serve("model", tmp_path / "policy.yaml", ["--config=keys.yaml"])
    with pytest.raises(PolicyError, match="cannot be read"):
        launch.serve("model", tmp_path / "policy.yaml", ["--config", "keys.yaml"])
