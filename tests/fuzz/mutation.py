"""Valid content, changed where a parser looks: by structure first, then by the byte."""

import copy
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st


class Raw(str):
    """Text that stands in a document as it is."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object in which a key may stand twice."""


Path = tuple[str | int, ...]

DEEP = 30_000
PATHS = [
    "../../../../etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "\0",
    "",
    ".",
    "/",
    "a" * 5000,
    "~/x",
    "file:///etc/passwd",
]
TEXTS = [
    *PATHS,
    "\ud800",
    "\U0010ffff",
    "\u202epolicy",
    "e\u0301",
    "line\r\nline",
    "\x1b[31m",
    "{{7*7}}",
    "%s%n",
    "$(id)",
    "\u0661\u0662",
    "nan",
    "layers.1.resid_post\n",
    "0" * 64,
]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    2,
    2**31,
    2**63,
    2**64,
    10**400,
    -(10**30),
    -0.0,
    0.5,
    1e308,
    -1e308,
    1e-320,
    math.inf,
    -math.inf,
    math.nan,
    Raw("9" * 5000),
    Raw("1e999999999"),
    Raw("-" + "1" * 400 + ".5"),
]
CONTAINERS: list[Any] = [
    [],
    {},
    [[]],
    {"": 0},
    [None] * 300,
    {str(i): i for i in range(300)},
    Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "0" + "}" * DEEP),
    Raw("[" * DEEP),
]
odd_values = st.sampled_from(
    [None, True, False, *NUMBERS, *TEXTS, *CONTAINERS]
) | st.text(st.characters(exclude_categories=()), max_size=8)


# Trees of JSON


def write_json(value: Any) -> str:
    """Write JSON, with whatever `Raw` and `Pairs` smuggle in."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        items = value.items() if isinstance(value, dict) else value
        return (
            "{" + ", ".join(f"{json.dumps(k)}: {write_json(v)}" for k, v in items) + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(write_json, value)) + "]"
    return json.dumps(value)


def list_paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """Yield where every value of a tree lies, the tree itself first."""
    yield at
    if isinstance(value, dict):
        for key, child in value.items():
            yield from list_paths(child, (*at, key))
    elif isinstance(value, list) and not isinstance(value, Pairs):
        for index, child in enumerate(value):
            yield from list_paths(child, (*at, index))


def look_up(value: Any, path: Path) -> Any:
    for part in path:
        value = value[part]
    return value


def put(value: Any, path: Path, child: Any) -> Any:
    """Return the tree with another value at a place."""
    child = copy.deepcopy(child)
    if not path:
        return child
    look_up(value, path[:-1])[path[-1]] = child
    return value


@st.composite
def changed(draw: st.DrawFn, tree: Any, *, most: int = 3) -> Any:
    """A tree in which a few values are odd, gone, doubled, moved or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(list_paths(tree))))
        tree = draw(_changed_at(tree, path))
    return tree


@st.composite
def _changed_at(draw: st.DrawFn, tree: Any, path: Path) -> Any:
    there = look_up(tree, path)
    kind = draw(
        st.sampled_from("odd odd moved wrapped gone renamed doubled grown".split())
    )
    if kind == "moved":
        source = draw(st.sampled_from(list(list_paths(tree))))
        return put(tree, path, copy.deepcopy(look_up(tree, source)))
    if kind == "wrapped":
        return put(
            tree, path, draw(st.sampled_from([[there], {"a": there}, str(there)]))
        )
    if kind == "grown" and isinstance(there, list) and there:
        return put(tree, path, there * draw(st.sampled_from([2, 50])))
    if path and isinstance(parent := look_up(tree, path[:-1]), dict):
        if kind == "gone":
            del parent[path[-1]]
            return tree
        if kind == "renamed":
            name = draw(st.sampled_from(TEXTS) | st.text(max_size=5))
            parent[name] = parent.pop(path[-1])
            return tree
        if kind == "doubled":
            twice = Pairs([*parent.items(), (str(path[-1]), draw(odd_values))])
            return put(tree, path[:-1], twice)
    return put(tree, path, draw(odd_values))


# Bytes


@st.composite
def damaged(
    draw: st.DrawFn, content: bytes, *, snippets: Sequence[bytes] = ()
) -> bytes:
    """Bytes of which some are flipped, cut, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from("flipped cut doubled put put".split()))
        if kind == "flipped" and at < len(content):
            bit = 1 << draw(st.integers(0, 7))
            content = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "doubled":
            content = content[:at] + content[max(0, at - 200) : at] + content[at:]
        else:
            known = st.sampled_from([*snippets, b"\0", b"\xff\xfe", b"\xef\xbb\xbf"])
            content = content[:at] + draw(known | st.binary(max_size=6)) + content[at:]
    return content


# Safetensors

WIDTHS = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}
"""Bytes of a number of each type that a file can name."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_safetensors(content: bytes) -> tuple[list[Stored], dict[str, str]]:
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    data = content[8 + size :]
    tensors = [
        Stored(
            name,
            about["dtype"],
            tuple(about["shape"]),
            data[slice(*about["data_offsets"])],
        )
        for name, about in header.items()
    ]
    return tensors, metadata


def describe(tensors: Sequence[Stored], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the header of a file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + len(tensor.data)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return header


def write_safetensors(
    header: Any, tensors: Sequence[Stored], size: int | None = None
) -> bytes:
    text = write_json(header).encode()
    text += b" " * (-len(text) % 8)
    size = len(text) if size is None else size
    return struct.pack("<Q", size % 2**64) + text + b"".join(t.data for t in tensors)


@st.composite
def changed_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with other tensors, another note, or none that is one."""
    tensors, metadata = read_safetensors(content)
    kind = draw(st.sampled_from("tensors tensors note note header size bytes".split()))
    if kind == "tensors":
        for _ in range(draw(st.integers(1, 2))):
            tensors = draw(_changed_tensors(tensors))
    if kind == "note" and "guard" in metadata:
        note = draw(changed(json.loads(metadata["guard"])))
        metadata = {**metadata, "guard": write_json(note)}
    header = describe(tensors, metadata)
    if kind == "header":
        header = draw(changed(header))
    sizes = [0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001]
    size = draw(st.sampled_from(sizes)) if kind == "size" else None
    whole = write_safetensors(header, tensors, size)
    return draw(damaged(whole)) if kind == "bytes" else whole


@st.composite
def _changed_tensors(draw: st.DrawFn, tensors: list[Stored]) -> list[Stored]:
    if not tensors:
        return tensors
    at = draw(st.integers(0, len(tensors) - 1))
    old = tensors[at]
    kind = draw(
        st.sampled_from("retyped reshaped refilled renamed gone added emptied".split())
    )
    if kind == "gone":
        return tensors[:at] + tensors[at + 1 :]
    if kind == "added":
        name = draw(
            st.sampled_from(
                ["x", "", "guard", "scaling_factor", "latent_max", *TEXTS[:6]]
            )
        )
        return (
            [*tensors, replace(old, name=name)]
            if name not in {t.name for t in tensors}
            else tensors
        )
    new = {
        "retyped": lambda: _retype(old, draw(st.sampled_from(sorted(WIDTHS)))),
        "reshaped": lambda: _reshape(
            old, draw(st.sampled_from(["flat", "turned", "column", "scalar"]))
        ),
        "refilled": lambda: _refill(
            old, draw(st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e38]))
        ),
        "renamed": lambda: replace(
            old, name=draw(st.sampled_from(TEXTS[:6]) | st.text(max_size=4))
        ),
        "emptied": lambda: replace(
            old,
            shape=draw(
                st.sampled_from([(0,), (0, 2**40), (2**62, 0), (0, *old.shape)])
            ),
            data=b"",
        ),
    }[kind]()
    return [*tensors[:at], new, *tensors[at + 1 :]]


def _retype(old: Stored, dtype: str) -> Stored:
    """Return the same bytes, taken for numbers of another type."""
    ratio = WIDTHS[old.dtype] / WIDTHS[dtype]
    if old.shape and (old.shape[-1] * ratio).is_integer():
        return replace(
            old, dtype=dtype, shape=(*old.shape[:-1], int(old.shape[-1] * ratio))
        )
    count = math.prod(old.shape)
    return replace(old, dtype=dtype, data=bytes(count * WIDTHS[dtype]))


def _reshape(old: Stored, kind: str) -> Stored:
    count = math.prod(old.shape)
    shapes = {"flat": (count,), "turned": old.shape[::-1], "column": (count, 1)}
    if kind == "scalar":
        return replace(old, shape=(), data=old.data[: WIDTHS[old.dtype]])
    return replace(old, shape=shapes[kind])


def _refill(old: Stored, value: float) -> Stored:
    if old.dtype != "F32":
        return old
    count = math.prod(old.shape)
    return replace(old, data=struct.pack("<f", value) * count)
