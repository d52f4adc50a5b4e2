"""The wire shapes of OpenAI's API: request bodies, choices, error bodies.

Only dicts come in and go out here; nothing in this module does I/O.
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from guard.errors import RequestError
from guard.http.route import Kind
from guard.request import TICKET_KEY
from guard.verdict import Verdict, worst

__all__ = [
    "REFUSAL",
    "carries_text",
    "check_sendable",
    "count_choices",
    "dump_json",
    "error_body",
    "guard_object",
    "parse_body",
    "refuse_unsupported",
    "seal_body",
    "withhold",
]

REFUSAL = "This response was stopped by the operator's safety policy."
"""What a client reads in place of blocked text."""

MAX_DEPTH = 200
"""How deeply a request body may nest. JSON schemas need some tens of levels."""

_RESERVED = "guard_"
_OBJECTS = ("vllm_xargs", "structured_outputs")
"""Fields that are objects. vLLM 0.32 answers 500 where the second is anything else:
a validator calls its `get`."""
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    500: "server_error",
    503: "server_error",
}


def error_body(message: str, *, status: int, param: str | None = None) -> bytes:
    """Return OpenAI's error object as JSON.

    Args:
        message: What is wrong; what would be right.
        status: HTTP status, repeated as the engine does in `code`.
        param: The request field at fault.
    """
    error = {
        "message": message,
        "type": _ERROR_TYPES.get(status, "invalid_request_error"),
        "param": param,
        "code": status,
    }
    return dump_json({"error": error})


def dump_json(body: object) -> bytes:
    """Write JSON in ASCII, so that any string that was read can be written."""
    return json.dumps(body, separators=(",", ":")).encode("ascii")


def parse_body(raw: bytes) -> dict[str, Any] | None:
    """Read a request body with the parser that the engine's server uses.

    Returns:
        The body, or None where it is no JSON object: the server refuses that
        with its own words, and nothing in it can carry a ticket.

    Raises:
        RequestError: The body is a bomb: too deep, or a number too long.
    """
    try:
        body = json.loads(raw)
    except json.JSONDecodeError:
        return None
    except (RecursionError, ValueError) as error:
        raise RequestError(
            "The body cannot be read; expected JSON in UTF-8 with at most "
            f"{MAX_DEPTH} levels and numbers of ordinary length."
        ) from error
    if not isinstance(body, dict):
        return None
    # Counting brackets is cheap and settles it for nearly every request.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(body)
    return body


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Refuse what would keep the guard from covering the request.

    Raises:
        RequestError: 400 with the offending field as `param`.
    """
    # Beam search runs as many small requests, none of which is an answer.
    if body.get("use_beam_search") not in (None, False):
        raise RequestError(
            "'use_beam_search' is not supported by guard yet; expected false.",
            param="use_beam_search",
        )
    if not isinstance(body.get("n"), int | None):
        # The engine's server reads "2.0" as 2 as well; one of us would count wrongly.
        raise RequestError("'n' is not an integer; expected one.", param="n")
    for name in _OBJECTS:
        if not isinstance(body.get(name), dict | None):
            raise RequestError(
                f"'{name}' is not an object; expected names with values.", param=name
            )
    if any(key.startswith(_RESERVED) for key in body.get("vllm_xargs") or {}):
        raise RequestError(
            f"Keys of 'vllm_xargs' that begin with '{_RESERVED}' are the server's; "
            "expected none, and 'guard.policy' to choose a policy.",
            param="vllm_xargs",
        )


def check_sendable(body: Mapping[str, Any]) -> None:
    """Refuse what JSON can say and the engine core cannot be sent.

    MessagePack has neither half a surrogate pair nor an integer beyond 64 bits. vLLM
    finds out when the request is on its way, and answers 500.

    Raises:
        RequestError: The body holds one of them.
    """
    try:
        for value in _scalars(body):
            if isinstance(value, str) and not value.isascii():
                value.encode()
            elif isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise RequestError(
                    "An integer of the body has more than 64 bits; expected a smaller "
                    "one."
                )
    except UnicodeEncodeError as error:
        raise RequestError(
            "A string of the body holds half of a surrogate pair; expected whole "
            "characters."
        ) from error


def seal_body(body: Mapping[str, Any], ticket: str) -> bytes:
    """Return the body that goes on: without `guard`, with the ticket.

    It is written from what was validated, so a key that stood twice, or bytes
    that two parsers read differently, cannot mean something else further on.
    """
    sealed = {key: value for key, value in body.items() if key != "guard"}
    sealed["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), TICKET_KEY: ticket}
    return dump_json(sealed)


def count_choices(body: Mapping[str, Any], kind: Kind) -> int:
    """Return how many choices the answer should have."""
    choices = int(body.get("n") or 1)
    return choices * _count_prompts(body) if kind == "completion" else choices


def carries_text(choice: Mapping[str, Any]) -> bool:
    """Tell whether a choice of a stream holds anything the model said."""
    delta = choice.get("delta") or {}
    return any(value for key, value in delta.items() if key != "role") or any(
        choice.get(key) for key in ("text", "token_ids", "logprobs")
    )


def withhold(choice: MutableMapping[str, Any], kind: Kind) -> None:
    """Mark a choice as blocked; what was delivered before the alarm stays.

    A tool call that was cut would look complete, so none is left.

    Args:
        choice: Of a whole answer or the last one of a stream; changed in place.
        kind: Which of the two shapes it has.
    """
    choice["finish_reason"] = "content_filter"
    if kind == "completion":
        return
    message = choice["message" if "message" in choice else "delta"]
    message.pop("tool_calls", None)
    message.pop("function_call", None)
    message["refusal"] = REFUSAL


def guard_object(verdicts: Mapping[int, Verdict]) -> dict[str, Any]:
    """Return the `guard` object for these choices: the worst one, and each.

    Raises:
        ValueError: There is no verdict.
    """
    body = worst(verdicts[index] for index in sorted(verdicts)).to_json()
    if len(verdicts) > 1:
        body["choices"] = [verdicts[index].to_json() for index in sorted(verdicts)]
    return body


def _count_prompts(body: Mapping[str, Any]) -> int:
    """Count as the server does: embeddings and texts, a list of ids as one text."""
    count = 0
    for key in ("prompt_embeds", "prompt"):
        prompt = body.get(key)
        if isinstance(prompt, list):
            single = bool(prompt) and isinstance(prompt[0], int)
            count += 1 if single else len(prompt)
        elif isinstance(prompt, str):
            count += 1
    return count or 1


def _scalars(body: object) -> Iterator[object]:
    """Yield every key, and every value that is no container."""
    found = [body]
    while found:
        value = found.pop()
        if isinstance(value, dict):
            found += value
            found += value.values()
        elif isinstance(value, list):
            found += value
        else:
            yield value


def _check_depth(body: object) -> None:
    """Raise RequestError when containers nest deeper than allowed."""
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise RequestError(
        f"The body nests more than {MAX_DEPTH} levels deep; expected fewer."
    )
