"""What is kept of whole requests, however their rows come."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm_guard.recorder import Recorder
from vllm_guard.rows import StepRequest

PLACES = ("layers.1.resid_post", "layers.3.resid_post")


def draw(request: str, at: str, length: int) -> Tensor:
    """Return the whole stream of a request at a place."""
    generator = torch.Generator().manual_seed(hash((request, at)) % 1000)
    return torch.randn(length, 4, generator=generator)


def step(recorder: Recorder, *shares: tuple[str, int, int], bos: str = "") -> None:
    """Let a recorder see one step: requests with their first and last position."""
    for at in PLACES:
        rows = [draw(request, at, 20)[first:last] for request, first, last in shares]
        padding = torch.full((3, 4), torch.nan)
        guard: Any = SimpleNamespace(hook_point=at)
        recorder.see(guard, torch.cat([*rows, padding]))
    recorder.close_step(
        [
            StepRequest(
                id=request,
                slot=1,
                first=first,
                num_rows=last - first,
                starts_with_bos=request == bos,
                admitted=first == 0,
                num_prompt_tokens=20,
            )
            for request, first, last in shares
        ]
    )


def write(recorder: Recorder, folder: Path) -> dict[str, Tensor]:
    recorder.write(folder / "out")
    return load_file(folder / "out")


def check(found: dict[str, Tensor], request: str, first: int, last: int) -> None:
    for at in PLACES:
        expected = draw(request, at, 20)[first:last]
        assert torch.equal(found[f"{request}/{at}"], expected)


def test_rows_are_sorted_by_request_and_put_together_by_position(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    step(recorder, ("a", 0, 5), ("b", 0, 2), bos="a")
    step(recorder, ("b", 2, 7), ("a", 5, 6), ("c", 0, 1), bos="a")
    step(recorder, ("a", 6, 7), bos="a")
    found = write(recorder, tmp_path)
    assert len(found) == 3 * len(PLACES)
    # A true BOS is not kept.
    check(found, "a", 1, 7)
    check(found, "b", 0, 7)
    check(found, "c", 0, 1)


@pytest.mark.parametrize("first_chunk", [1, 2, 5])
def test_a_bos_may_come_alone(tmp_path: Path, first_chunk: int) -> None:
    recorder = Recorder()
    step(recorder, ("a", 0, first_chunk), bos="a")
    step(recorder, ("a", first_chunk, 6), bos="a")
    check(write(recorder, tmp_path), "a", 1, 6)


def test_what_is_computed_again_after_preemption_is_there_once(tmp_path: Path) -> None:
    recorder = Recorder()
    step(recorder, ("a", 0, 6), bos="a")
    step(recorder, ("a", 6, 7), bos="a")
    step(recorder, ("a", 0, 3), bos="a")
    step(recorder, ("a", 3, 9), bos="a")
    check(write(recorder, tmp_path), "a", 1, 9)


def test_a_dummy_pass_is_nobodys(tmp_path: Path) -> None:
    recorder = Recorder()
    guard: Any = SimpleNamespace(hook_point=PLACES[0])
    recorder.see(guard, torch.ones(8, 4))
    recorder.close_step([])
    step(recorder, ("a", 0, 2))
    found = write(recorder, tmp_path)
    assert len(found) == len(PLACES)
    check(found, "a", 0, 2)


def test_what_was_written_is_forgotten(tmp_path: Path) -> None:
    recorder = Recorder()
    step(recorder, ("a", 0, 2))
    write(recorder, tmp_path)
    step(recorder, ("b", 0, 3))
    found = write(recorder, tmp_path)
    assert {name.split("/")[0] for name in found} == {"b"}


def test_rows_are_copied_before_the_next_layer_changes_them(tmp_path: Path) -> None:
    recorder = Recorder()
    rows = torch.ones(2, 4)
    guard: Any = SimpleNamespace(hook_point=PLACES[0])
    recorder.see(guard, rows)
    rows.zero_()
    recorder.close_step([StepRequest("a", 1, 0, 2, False, True, num_prompt_tokens=2)])
    assert (write(recorder, tmp_path)[f"a/{PLACES[0]}"] == 1).all()
