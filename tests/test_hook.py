"""Names of places in the model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import PolicyError
from guard.hook import HookPoint


@given(st.integers(0, 10_000))
def test_a_hook_point_is_read_as_it_is_written(layer: int) -> None:
    at = HookPoint.parse(f"layers.{layer}.resid_post")
    assert at == HookPoint(layer)
    assert HookPoint.parse(str(at)) == at


@given(st.integers(1, 10_000))
def test_what_enters_a_layer_is_what_left_the_one_before(layer: int) -> None:
    assert HookPoint.parse(f"layers.{layer}.resid_pre") == HookPoint(layer - 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "layers.01.resid_post",
        "layers.-1.resid_post",
        "layers.1.mlp_out",
        "blocks.1.hook_resid_post",
        " layers.1.resid_post",
        "layers.1.resid_post\n",
        "layers.1.resid_postscript",
        "layers.٣.resid_post",
    ],
)
def test_another_name_is_refused_with_the_one_that_is_expected(text: str) -> None:
    with pytest.raises(PolicyError, match=r"expected 'layers\.<n>\.resid_post'"):
        HookPoint.parse(text)


def test_what_enters_the_first_layer_has_a_name_of_its_own() -> None:
    at = HookPoint.parse("layers.0.resid_pre")
    assert at < HookPoint(0)
    assert str(at) == "layers.0.resid_pre"


def test_hook_points_are_ordered_by_layer_and_not_by_name() -> None:
    assert HookPoint(2) < HookPoint(10)
