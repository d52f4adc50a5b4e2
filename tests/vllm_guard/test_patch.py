"""Wrapping a method of the engine: once, or loudly not at all."""

from typing import Any

import pytest
from vllm_guard.patch import wrap

from guard.errors import EngineError


class Engine:
    def step(self, number: int, *, double: bool = False) -> int:
        """Do a step."""
        return number * (2 if double else 1)


class ChildEngine(Engine):
    pass


def add_one(original: Any, engine: Engine, *args: Any, **kwargs: Any) -> Any:
    return original(engine, *args, **kwargs) + 1


@pytest.fixture
def engine_class() -> type[Engine]:
    """A fresh class, so that no test sees the wrap of another."""
    return type("Engine", (), dict(vars(Engine)))


def test_the_wrap_is_called_with_the_original(engine_class: type[Engine]) -> None:
    engine = engine_class()
    wrap(engine_class, "step", add_one)
    assert engine.step(3) == 4
    assert engine.step(3, double=True) == 7
    assert engine_class.step.__doc__ == "Do a step."


def test_wrapping_twice_is_wrapping_once(engine_class: type[Engine]) -> None:
    wrap(engine_class, "step", add_one)
    wrap(engine_class, "step", add_one)
    assert engine_class().step(3) == 4


def test_a_seam_that_moved_is_named(engine_class: type[Engine]) -> None:
    with pytest.raises(EngineError, match=r"no .*\.Engine\.stride; expected"):
        wrap(engine_class, "stride", add_one)


def test_a_method_that_is_only_inherited_is_not_taken_for_an_own_one() -> None:
    with pytest.raises(EngineError, match=r"ChildEngine\.step"):
        wrap(ChildEngine, "step", add_one)
