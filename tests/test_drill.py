"""The stored edit of a drill: what was written is read, and a fault is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.limits import fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from guard.drill import RecoveryEdit, load_edit, save_edit
from guard.errors import DrillError

ABOUT = {
    "format": 1,
    "prompt": "how do i heat the door ?",
    "gold": "to heat door : turn key .",
    "budget": 0.7,
    "position": "last_prompt",
    "sae_sha256": "a" * 64,
}


def make_edit(**values: Any) -> RecoveryEdit:
    wanted = {k: v for k, v in ABOUT.items() if k != "format"}
    return RecoveryEdit(**({"delta": torch.arange(4.0)} | wanted | values))


def write(path: Path, *, delta: Any = None, **values: Any) -> Path:
    """Write a file by hand, with one thing or another changed."""
    about = {k: v for k, v in (ABOUT | values).items() if v is not None}
    tensors = {"delta": torch.ones(4)} if delta is None else delta
    save_file(tensors, path, metadata={"guard": json.dumps(about)})
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_edit_is_read_back_as_it_was_written(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    edit = make_edit(delta=torch.arange(4, dtype=dtype), position="all_prompt")
    save_edit(tmp_path / "deep" / "edit.safetensors", edit)
    found = load_edit(tmp_path / "deep" / "edit.safetensors")
    assert found.delta.dtype == torch.float32
    assert found.delta.tolist() == [0, 1, 2, 3]
    for name in ("prompt", "gold", "budget", "position", "sae_sha256"):
        assert getattr(found, name) == getattr(edit, name)


def test_an_edit_still_on_its_graph_is_written_without_it(tmp_path: Path) -> None:
    delta = 2 * torch.ones(3, requires_grad=True)
    save_edit(tmp_path / "edit.safetensors", make_edit(delta=delta))
    found = load_edit(tmp_path / "edit.safetensors").delta
    assert (found.tolist(), found.requires_grad) == ([2, 2, 2], False)


def test_a_file_written_by_hand_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "e", budget=1, found_by="somebody", sae_sha256="A" * 64)
    edit = load_edit(path)
    assert (edit.budget, edit.sae_sha256) == (1.0, "a" * 64)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"position": "first_prompt"}, "its position is not valid: Input should be 'l"),
        ({"format": 2}, "its format is not valid"),
        ({"prompt": ""}, "its prompt is not valid"),
        ({"gold": None}, "its gold is not valid: Field required"),
        ({"budget": "much"}, "its budget is not valid"),
        ({"budget": float("nan")}, "its budget is not valid"),
        ({"budget": -1.0}, "its budget is not valid"),
        ({"sae_sha256": "a" * 63}, "its sae_sha256 is not valid: is not a sha256"),
        ({"delta": {"delta": torch.ones(2, 2)}}, r"of shape \[2, 2\]; expected floats"),
        ({"delta": {"delta": torch.ones(2).int()}}, "its delta is torch.int32"),
        ({"delta": {"delta": torch.tensor([1.0, torch.nan])}}, "holds NaN or Inf"),
        ({"delta": {"delta": torch.tensor([1e300]).double()}}, "holds NaN or Inf"),
        ({"delta": {"d": torch.ones(2)}}, "holds d; expected 'delta' alone"),
        ({"delta": {"delta": torch.ones(2), "b": torch.ones(2)}}, "holds b, delta; "),
        ({"delta": {}}, "holds no tensor; expected"),
    ],
)
def test_a_file_that_is_no_edit_is_one_line(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "e.safetensors", **values)
    with pytest.raises(DrillError, match=words) as caught:
        load_edit(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DrillError, match="gone: no such file; expected the stored"):
        load_edit(tmp_path / "gone")


def test_a_file_without_a_description_is_one_line(tmp_path: Path) -> None:
    for metadata in (None, {"guard": "{"}, {"guard": "[]"}, {"other": "{}"}):
        save_file({"delta": torch.ones(2)}, tmp_path / "e", metadata=metadata)
        with pytest.raises(DrillError) as caught:
            load_edit(tmp_path / "e")
        assert "\n" not in str(caught.value)


@fuzz
@given(cut=st.integers(0, 400), put=st.binary(max_size=8))
def test_any_damage_is_an_edit_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int, put: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    whole = write(path).read_bytes()
    path.write_bytes(whole[:cut] + put + whole[cut + 3 :])
    line = ""
    try:
        assert load_edit(path).delta.isfinite().all()
    except DrillError as error:
        line = str(error)
    assert "\n" not in line


def test_what_a_prompt_says_is_in_no_complaint(tmp_path: Path) -> None:
    path = write(tmp_path / "e", prompt="a secret", gold=7, position="nowhere")
    with pytest.raises(DrillError) as caught:
        load_edit(path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "values",
    [{"gold": ""}, {"delta": torch.ones(2, 2)}, {"budget": float("inf")}],
)
def test_what_could_not_be_read_is_not_written(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    with pytest.raises(DrillError):
        save_edit(tmp_path / "e", make_edit(**values))
    assert not (tmp_path / "e").exists()
