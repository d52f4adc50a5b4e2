"""A YAML file as plain values that still know their lines.

What a person reads in the file is what is meant: a subset of YAML without anchors,
aliases, tags or repeated keys. Everything wrong is one line with file and line.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import yaml
from pydantic_core import ErrorDetails

from guard.errors import PolicyError

__all__ = ["Document", "Location", "shorten"]

Location = tuple[str | int, ...]
"""Keys and indices from the top of a file down to a value."""


class Document:
    """A YAML text as plain values, with the line of every key."""

    def __init__(self, source: str, content: bytes) -> None:
        """Read a file's content.

        Args:
            source: Its name, for messages.
            content: UTF-8 YAML, a mapping at the top.

        Raises:
            PolicyError: It is not that, or not the subset that is read.
        """
        self.source = source
        self._lines: dict[Location, int] = {(): 1}
        try:
            node = _Composer(content.decode("utf-8-sig")).get_single_node()
        except UnicodeDecodeError as error:
            raise PolicyError(f"{source}: is not UTF-8; expected YAML text") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            problem = " ".join(str(error.problem).split())
            raise PolicyError(
                f"{source}:{line}: is not the YAML a policy is written in: {problem}"
            ) from error
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # The scanner itself lets go of an escape or a version beyond any bound.
            message = shorten(" ".join(str(error).split()))
            raise PolicyError(f"{source}: is not YAML: {message}") from error
        if not isinstance(node, yaml.MappingNode):
            raise PolicyError(
                f"{source}: holds no keys; expected 'version: 1' and so on"
            )
        self.value = self._read(node, ())

    def fault(
        self, errors: list[ErrorDetails], *, explain: Callable[[ErrorDetails], str]
    ) -> PolicyError:
        """Turn what pydantic found into one line about the first of it.

        Args:
            errors: Of a pydantic `ValidationError`.
            explain: Says what is wrong and what would be right.
        """
        found = []
        for error in errors:
            if error["type"] == "default_factory_not_called":
                continue  # only says that another key is wrong
            context = error.get("ctx", {})
            location = (*error["loc"], *context.get("at", ()))
            location = tuple(part for part in location if part != "[key]")
            line = self._line(location)
            text = f"{_show(location)}: " if location else ""
            message = " ".join(f"{text}{explain(error)}".split())
            # What a later version builds comes first: the rest may be about it.
            # The inner of two faults on a line is the cause of the outer one.
            order = (error["type"] != "later", line, -len(location))
            found.append((order, line, message))
        _, line, message = min(found)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return PolicyError(f"{self.source}:{line}: {message}{more}")

    def _line(self, location: Location) -> int:
        while location not in self._lines:
            location = location[:-1]
        return self._lines[location]

    def _stop(self, node: yaml.Node, at: Location, message: str) -> NoReturn:
        where = f"{_show(at)}: " if at else ""
        line = node.start_mark.line + 1
        raise PolicyError(f"{self.source}:{line}: {where}{message}")

    def _read(self, node: yaml.Node, at: Location) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return self._read_mapping(node, at)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            values = []
            for index, item in enumerate(node.value):
                self._lines[*at, index] = item.start_mark.line + 1
                values.append(self._read(item, (*at, index)))
            return values
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            self._stop(
                node, at, f"{node.tag.split(':')[-1]!r} is no plain value; quote it"
            )
        if node.style is None and _EXPONENT.fullmatch(node.value):
            return float(node.value)  # YAML 1.1 would read 1e-3 as text
        try:
            return _SCALARS[node.tag](node)
        except ValueError as error:
            raise PolicyError(
                f"{self.source}:{node.start_mark.line + 1}: {_show(at)}: "
                f"{shorten(node.value)} is no decimal number; quote it if it is text"
            ) from error

    def _read_mapping(self, node: yaml.MappingNode, at: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT:
                shown = (
                    shorten(key.value) if isinstance(key, yaml.ScalarNode) else "this"
                )
                self._stop(key, at, f"key {shown} is not text; quote it")
            if key.value in values:
                line = self._lines[*at, key.value]
                self._stop(key, at, f"key {key.value!r} is already on line {line}")
            self._lines[*at, key.value] = key.start_mark.line + 1
            values[key.value] = self._read(value, (*at, key.value))
        return values


class _Composer(yaml.SafeLoader):
    """A YAML composer that refuses what makes a small file a large value."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are refused; write the value out",
                problem_mark=event.start_mark,
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="tags are refused; write a plain value, quoted if it is text",
                problem_mark=event.start_mark,
            )
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem="it is nested too deeply", problem_mark=event.start_mark
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_MAX_DEPTH = 16
_TAG = "tag:yaml.org,2002:"
_MAPPING, _SEQUENCE, _TEXT = f"{_TAG}map", f"{_TAG}seq", f"{_TAG}str"
_PLAIN = yaml.constructor.SafeConstructor()
_SCALARS: Mapping[str, Any] = {
    _TEXT: lambda node: node.value,
    f"{_TAG}bool": _PLAIN.construct_yaml_bool,
    f"{_TAG}int": lambda node: _read_int(node.value),
    f"{_TAG}float": lambda node: _read_float(node),
    f"{_TAG}null": _PLAIN.construct_yaml_null,
}


def _read_int(text: str) -> int:
    # YAML 1.1 reads 010 as eight and 1:30 as ninety.
    if re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", text) is None:
        raise ValueError(text)
    return int(text)


def _read_float(node: yaml.ScalarNode) -> float:
    # YAML 1.1 reads 1:30.5 as ninety and a half.
    if ":" in node.value:
        raise ValueError(node.value)
    return float(_PLAIN.construct_yaml_float(node))


def _show(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def shorten(value: object) -> str:
    """Return a value as it is quoted in a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
