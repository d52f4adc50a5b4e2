"""Requests that are wrong, as the bytes a client sends: drawn, counted, repeatable.

Some must be refused before the engine hears of them. On the others the engine's own
server has the first word, and it may well serve them.
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD: dict[str, dict[str, Any]] = {
    path: {"model": "model", "max_tokens": 2, "temperature": 0} | prompt
    for path, prompt in {
        COMPLETIONS: {"prompt": "w1 w2"},
        CHAT: {"messages": [{"role": "user", "content": "w1 w2"}]},
    }.items()
}
PUBLIC = ("default", "held", "open")
"""Policies that malformed requests may name and be right."""


@dataclass(frozen=True)
class Malformed:
    """One request, byte for byte."""

    family: str
    raw: bytes
    """Head and body, as they go over the wire."""
    path: str = COMPLETIONS
    body: bytes = b""
    """The body within `raw`."""
    hangs_up: bool = False
    """Whether its client says nothing more and does not wait for an answer."""


Fields = st.SearchStrategy[dict[str, Any]]
"""What is wrong in a body that is good otherwise; it is sent to both routes."""
Bodies = st.SearchStrategy[tuple[str, bytes]]
"""Path and body of a request."""


def draw(strategy: st.SearchStrategy[Any], count: int, *, number: int = 1) -> list[Any]:
    """Draw examples, the same ones every time; a small space is gone through again."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return list(islice(cycle(found), count))


def write_json(value: object) -> bytes:
    return json.dumps(value).encode()


def write_head(path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: guard"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def write_request(
    path: str, body: bytes, headers: Mapping[str, str] | None = None
) -> bytes:
    """Return a request whose head says of its body what is true."""
    honest = {"content-type": "application/json", "content-length": str(len(body))}
    return write_head(path, honest | dict(headers or {})) + body


# Values

any_text = st.text(st.characters(exclude_categories=()), max_size=8)
"""Text with everything in it, halves of surrogate pairs too."""
numbers = (
    st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400])
    | st.floats()
)
scalars = st.none() | st.booleans() | numbers | any_text | st.just("w" * 3000)
junk = st.recursive(
    scalars,
    lambda some: (
        st.lists(some, max_size=3) | st.dictionaries(any_text, some, max_size=3)
    ),
    max_leaves=5,
)


def nest(depth: int) -> object:
    nested: object = 0
    for level in range(depth):
        nested = [nested] if level % 2 else {"a": nested}
    return nested


deep = st.integers(201, 900).map(nest)
paths = st.sampled_from([COMPLETIONS, CHAT])


def only(name: str, values: st.SearchStrategy[Any]) -> Fields:
    return values.map(lambda value: {name: value})


# What the guard refuses


def is_in_order(field: object) -> bool:
    """Tell whether this `guard` field is one that a client may send."""
    if not isinstance(field, dict):
        return field is None
    names = {"policy": (None, *PUBLIC), "trace": ("none", "summary"), "drill": (None,)}
    return all(
        key in names and value in names[key] and not isinstance(value, list | dict)
        for key, value in field.items()
    )


def guard_fields() -> Fields:
    policies = st.one_of(
        junk,
        st.sampled_from(["staff", "", "Default", "default ", "p" * 5000, "../open"]),
    )
    objects = st.fixed_dictionaries(
        {},
        optional={
            "policy": policies | st.sampled_from(PUBLIC),
            "trace": junk | st.sampled_from(["none", "tokens", "Summary"]),
            "drill": junk | st.sampled_from(["fire", "", "d" * 5000]),
            "enabled": junk,
            "n" * 5000: junk,
        },
    )
    wrong = objects | junk | st.dictionaries(any_text, junk, max_size=4)
    return only("guard", wrong.filter(lambda field: not is_in_order(field)))


def guard_fields_twice() -> Bodies:
    """Return raw JSON with the key twice: first in order, then not."""
    wrong = st.sampled_from([{"policy": "staff"}, {"policy": "nowhere"}, 7, [], "open"])

    def write(path: str, first: str, last: object) -> tuple[str, bytes]:
        head = json.dumps(GOOD[path])[:-1]
        in_order = json.dumps({"policy": first})
        return (
            path,
            f'{head}, "guard": {in_order}, "guard": {json.dumps(last)}}}'.encode(),
        )

    return st.builds(write, paths, st.sampled_from(PUBLIC), wrong)


def reserved_keys() -> Fields:
    own = st.sampled_from(["guard_ticket", "guard_slot", "guard_"])
    keys = own | any_text.map(lambda text: f"guard_{text}")
    values = junk | st.just("g1.WyJ4Il0=.c2lnbmVk") | st.integers(0, 20)
    reserved = st.dictionaries(keys, values, min_size=1, max_size=3)
    others = st.dictionaries(any_text, scalars, max_size=2)
    flat = st.builds(lambda own, more: {**more, **own}, reserved, others)
    return only("vllm_xargs", flat | junk.filter(_is_no_object))


def _is_no_object(value: object) -> bool:
    return value is not None and not isinstance(value, dict)


# What is no JSON object in the first place


def broken_bodies() -> Bodies:
    whole = st.builds(
        lambda path, field: (path, json.dumps(GOOD[path] | {"guard": field}).encode()),
        paths,
        st.sampled_from([{"policy": name} for name in PUBLIC]),
    )
    cut = st.builds(
        lambda some, at: (some[0], some[1][: 1 + at % (len(some[1]) - 1)]),
        whole,
        st.integers(0, 10_000),
    )
    no_text = st.builds(
        lambda some, byte: (some[0], some[1][:-3] + byte + some[1][-3:]),
        whole,
        st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80\xff", b"\x00", b"\xf8\x88"]),
    )
    no_object = st.tuples(paths, junk.filter(lambda x: not isinstance(x, dict)))
    noise = st.tuples(paths, st.binary(max_size=40).filter(lambda x: x[:1] != b"{"))
    return (
        cut
        | no_text
        | noise
        | no_object.map(lambda some: (some[0], write_json(some[1])))
    )


def bombs() -> Bodies:
    """Return bodies that nest too deep, anywhere, or hold a number without end."""
    fields = st.sampled_from(["guard", "vllm_xargs", "logit_bias", "x", "messages"])
    nested = st.builds(lambda name, value: {name: value}, fields, deep)
    digits = st.builds(
        lambda path, name: (
            path,
            json.dumps(GOOD[path])[:-1].encode()
            + f', "{name}": {"9" * 5000}}}'.encode(),
        ),
        paths,
        fields,
    )
    open_ended = st.tuples(paths, st.integers(1, 40).map(lambda n: b'{"a":[' * n * 500))
    whole = st.builds(
        lambda path, more: (path, write_json(GOOD[path] | more)), paths, nested
    )
    return whole | digits | open_ended


def unsendable() -> Fields:
    """Return bodies with what no process can send on: half a character, 80 bits."""
    names = st.sampled_from(
        "stop cache_salt user request_id vllm_xargs logit_bias seed x bad_words".split()
    )
    values = st.sampled_from(
        ["\ud800", "w\udfff", ["\udead"], {"\ud834": 1}, 2**64, {"a": -(2**63) - 1}]
    )
    return st.builds(lambda name, value: {name: value}, names, values)


def shapeless() -> Fields:
    """Return bodies with no object where only an object can be."""
    return only("structured_outputs", junk.filter(_is_no_object))


# Heads


def junk_headers() -> st.SearchStrategy[dict[str, str]]:
    values = st.text(
        st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"),
        max_size=30,
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "authorization": values | values.map(lambda text: f"Bearer {text}"),
            "x-request-id": values | st.just("r" * 4000),
            "content-type": values | st.sampled_from(["text/plain", "multipart/x"]),
            "content-encoding": st.sampled_from(["gzip", "br", "deflate, gzip", ""]),
            "accept-encoding": values,
            "accept": values,
            "x-guard-admin-token": values,
            "x-guard-policy": st.just("staff"),
            "traceparent": values,
            "expect": st.just("100-continue"),
            "cookie": values,
        },
    )


def lies() -> Iterator[bytes]:
    """Yield requests whose head is not true of their body."""
    chunked = {"content-type": "application/json", "transfer-encoding": "chunked"}
    for path, good in GOOD.items():
        body = write_json(good)
        for length in ("-1", "x", "", "1, 2", "0x10", str(2**70), "9" * 300):
            yield write_request(path, body, {"content-length": length})
        yield write_request(path, b"", {"content-length": str(65 << 20)})
        for chunks in (
            b"zz\r\n{}\r\n",
            b"-5\r\n",
            b"5\r\n{}\r\n0\r\n\r\n",
            b"\xff\r\n",
        ):
            yield write_head(path, chunked) + chunks
        both = chunked | {"content-length": str(len(body))}
        yield write_head(path, both) + b"zz\r\n" + body
        yield b"POST " + path.encode() + b" HTTP/9.9\r\n\r\n"
        yield write_head(path, {"a b": "c"}) + body


def cut_requests() -> Iterator[bytes]:
    """Yield requests whose client is gone in the middle of head or body."""
    for path, good in GOOD.items():
        whole = write_request(path, write_json(good))
        yield from (whole[:at] for at in range(1, len(whole), 7))
        yield write_request(path, write_json(good), {"content-length": "5000"})


def too_much() -> Iterator[bytes]:
    """Yield a body in chunks of a megabyte that says nothing of how many there are."""
    chunked = {"content-type": "application/json", "transfer-encoding": "chunked"}
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    yield write_head(COMPLETIONS, chunked) + chunk * 66


# What the engine's own server has the first word on

ODDITIES: dict[str, Sequence[object]] = {
    "n": [-1, 0, 2, 10**9, "2", None, 1.5],
    "logit_bias": [
        *({"-1": 1}, {"99999": 100}, {"1": math.nan}, {"x": 1}, {"3": 1e308}, {"": 0}),
        *([], {"1": None}, {"1.5": 1}, {str(i): 1 for i in range(2000)}),
    ],
    "stop": ["", [""], [None], "w" * 5000, ["w1"] * 1000, [0], {}, "\0", ["\0", "w"]],
    "stop_token_ids": [[-1], [2**40], ["x"], [None], 3, list(range(2000))],
    "bad_words": [[""], ["w1"] * 500, [None], "w1", [" "], ["nothing of the kind"]],
    "min_tokens": [5, -1, 10**9, "x"],
    "max_tokens": [0, -1, 1.5, "2", [], 10**9],
    "temperature": [-1, math.nan, math.inf, 1e308, 1e-300, "hot"],
    "top_p": [0, 2, -1, math.nan],
    "top_k": [-2, 10**9, 0.5, 2**40],
    "min_p": [-1, 2, math.nan],
    "repetition_penalty": [0, -1, 1e308, math.inf],
    "presence_penalty": [-3, 3, math.nan],
    "logprobs": [-2, -1, 0, 21, 10**9, True, "x"],
    "top_logprobs": [-1, 0, 21, 10**9],
    "prompt_logprobs": [-2, 0, 21, 10**9],
    "logprob_token_ids": [[-1], [10**6], [1] * 500, []],
    "allowed_token_ids": [[], [-1], [10**6], list(range(4, 9))],
    "seed": [-1, 2**63 - 1, -(2**63), 1.5, "x"],
    "truncate_prompt_tokens": [-2, -1, 0, 1, 10**9],
    "response_format": [
        *({"type": "x"}, {"type": "json_schema"}, {}, [], "json", {"type": []}),
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": 7}},
        {"type": "structural_tag", "structures": [], "triggers": []},
        {"type": "json_object", "extra": 1},
    ],
    "structured_outputs": [
        *({}, {"regex": "("}, {"regex": ""}, {"grammar": "x"}, {"choice": []}),
        *({"choice": [1]}, {"json": 7}, {"json": "{"}, {"json": {"type": "y"}}),
        *({"json": {"$ref": "#"}}, {"structural_tag": "{"}, {"json_object": False}),
        *({"regex": "a", "choice": ["b"]}, {"choice": ["w1", "w2"]}, {"x": 1}),
        *(
            {"regex": "\0"},
            {"grammar": ""},
            {"json": {"type": "object"}, "_backend": "x"},
        ),
    ],
    "stream": [True, "x"],
    "stream_options": [{"include_usage": True}, {}, 7, {"include_usage": "x"}],
    "prompt_embeds": ["AAAA", "", "%", [""], ["AAAA", "AAAA"], 7, {}],
    "cache_salt": ["", "s" * 2000, "\0", "\0" * 1024, 7, [], {}, " ", "\ud55c"],
    "request_id": ["", "r" * 5000, "a-b-7", "\0\r\n", 7, "cmpl-x-5"],
    "kv_transfer_params": [{"guard": {"verdict": {}}}, {"do_remote_decode": True}, 7],
    "vllm_xargs": [{"x": {"y": 1}}, {"x": None}, {"x": [[1]]}, {"x": "w" * 5000}, {}],
    "priority": [1, -1, 2**40],
    "stream_interval": [0, -1, 2**40],
    "suffix": ["", "w1"],
    "echo": [True, "x"],
    "best_of": [0, 5],
    "use_beam_search": [True, 1, "x"],
    "repetition_detection": [{}, {"max_pattern_size": -1}, 7],
    "thinking_token_budget": [-2, 5, "x"],
    "tools": [[], [7], [{"type": "function"}], [{"type": "x", "function": {}}]],
    "tool_choice": ["required", "auto", {"type": "function"}, 7],
    "chat_template": ["{{", "{% for x in y %}", "{{ raise }}", "", "{{ 1/0 }}"],
    "chat_template_kwargs": [{"x": 1}, 7, {"messages": []}, {"chat_template": "x"}],
    "continue_final_message": [True],
    "documents": [[], [7], [{"title": "x"}]],
    "model": ["", "other", 7, None, "model ", "m" * 5000],
    "ignore_eos": ["x", True],
    "return_token_ids": ["x", True],
    "reasoning_effort": ["x", "high"],
}
PROMPTS: Sequence[object] = [
    *(None, [], [[]], "", [""], [[], [1]], [1.5], [None], ["w1", 2], ["w1", [1]], {}),
    *([127], [128], [10**6], [2**40], [-1], [[1, 2], [10**6]], [True], "\0", "\ud55c"),
    *(
        ["w1", "w2"],
        [[1, 5], [1, 6]],
        "w1 " * 3000,
        [1] * 2049,
        [1] * 2048,
        ["w1", None],
    ),
]
CONTENTS: Sequence[object] = [
    *(None, [], [7], {}, [{"type": "text"}], [{"type": "x"}], "", 7, "w1 " * 3000),
    [{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}],
    [{"type": "image_url", "image_url": {"url": "data:,"}}],
    [{"type": "text", "text": 7}],
    [{"type": "input_audio", "input_audio": {}}],
]
ROLES: Sequence[object] = [
    "",
    "root",
    None,
    7,
    "tool",
    "assistant",
    "system",
    "x" * 3000,
]


def oddities() -> Fields:
    """Return bodies whose fields are of no use to the engine, one or two at a time."""
    one = st.sampled_from(sorted(ODDITIES)).flatmap(
        lambda name: st.sampled_from(ODDITIES[name]).map(lambda value: {name: value})
    )
    return one | st.builds(lambda a, b: a | b, one, one)


def odd_prompts() -> Fields:
    prompts = st.sampled_from(PROMPTS).map(lambda prompt: {"prompt": prompt})
    message = st.builds(
        lambda role, content, more: {"role": role, "content": content} | more,
        st.sampled_from(ROLES) | st.just("user"),
        st.sampled_from(CONTENTS) | st.just("w1"),
        st.sampled_from([{}, {"tool_calls": [7]}, {"tool_calls": []}, {"name": 7}]),
    )
    messages = st.lists(message | st.sampled_from([7, {}, None]), max_size=3)
    return prompts | only("messages", messages)


# All of them


def draw_refused(count: int) -> list[Malformed]:
    """Draw requests that must be refused before the engine hears of them."""
    refused = [Malformed("lies", raw) for raw in lies()]
    refused += [Malformed("too_much", raw) for raw in too_much()]
    refused += [Malformed("cut", raw, hangs_up=True) for raw in cut_requests()]
    for bodies, share in (
        (guard_fields_twice, 0.01),
        (broken_bodies, 0.2),
        (bombs, 0.05),
    ):
        refused += send(bodies.__name__, draw(bodies(), round(share * count)))
    for fields, share in ((reserved_keys, 0.2), (unsendable, 0.03), (shapeless, 0.02)):
        refused += send_to_both(
            fields.__name__, draw(fields(), round(share * count / 2))
        )
    wrong = send_to_both("guard_fields", draw(guard_fields(), count // 5))
    refused += wrong
    # The same faults again, behind heads that have nothing to do with them.
    heads = cycle(draw(junk_headers(), count // 20))
    for fault in islice(cycle(wrong), count - len(refused)):
        raw = write_request(fault.path, fault.body, next(heads))
        refused.append(replace(fault, family="headers", raw=raw))
    random.Random(1).shuffle(refused)
    return refused


def draw_odd(count: int) -> list[Malformed]:
    """Draw requests that may well be served, odd as they are."""
    odd = send_to_both("oddities", draw(oddities(), round(0.3 * count)))
    odd += send_to_both("odd_prompts", draw(odd_prompts(), round(0.15 * count)))
    good = cycle((path, write_json(body)) for path, body in GOOD.items())
    heads = draw(junk_headers(), count - len(odd), number=2)
    for (path, body), headers in zip(good, heads, strict=False):
        raw = write_request(path, body, headers)
        odd.append(Malformed("odd_heads", raw, path, body))
    random.Random(1).shuffle(odd)
    return odd


_COSTLY = {"messages", "tools", "max_tokens", "max_completion_tokens", "n"}
"""Fields whose schema takes seconds to draw from, or makes the engine work for long."""


def draw_schema(document: Mapping[str, Any], count: int) -> list[Malformed]:
    """Draw values of each field of our routes, in and against the server's own schema.

    Args:
        document: Its `/openapi.json`.
        count: Values of each kind for each field.
    """
    import schemathesis
    from schemathesis import GenerationMode

    schemas = document["components"]["schemas"]
    fields: dict[str, Any] = {}
    for model in ("ChatCompletionRequest", "CompletionRequest"):
        fields |= schemas[model]["properties"]
    for name in _COSTLY:
        del fields[name]
    paths = {f"/{name}": {"post": _describe(name, fields[name])} for name in fields}
    own = {"openapi": "3.1.0", "paths": paths}
    schema = schemathesis.openapi.from_dict(dict(document) | own)
    drawn = []
    for name in fields:
        operation = schema[f"/{name}"]["POST"]
        for mode in (GenerationMode.NEGATIVE, GenerationMode.POSITIVE):
            bodies = operation.as_strategy(generation_mode=mode).map(lambda c: c.body)
            for body in draw(bodies, count):
                if isinstance(body, dict):
                    drawn += send_to_both(name, [body])
                else:
                    raw = body if isinstance(body, bytes) else write_json(body)
                    drawn += send(name, [(path, raw) for path in GOOD])
    return drawn


def _describe(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return an operation whose body is an object of one field."""
    one = {"type": "object", "properties": {name: schema}, "required": [name]}
    content = {"application/json": {"schema": one}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "answered"}},
    }


def send(family: str, bodies: Sequence[tuple[str, bytes]]) -> list[Malformed]:
    """Return requests with these bodies, and heads that are in order."""
    return [
        Malformed(family, write_request(path, body), path, body)
        for path, body in bodies
    ]


def send_to_both(family: str, fields: Sequence[dict[str, Any]]) -> list[Malformed]:
    """Return a request to each route for each of these faults in a good body."""
    return send(
        family,
        [(path, write_json(GOOD[path] | more)) for more in fields for path in GOOD],
    )
