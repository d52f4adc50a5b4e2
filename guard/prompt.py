"""Files of prompts: one JSON object a line, with what is known about each."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guard.errors import PromptError
from guard.file import read_file

__all__ = [
    "Prompt",
    "digest_prompts",
    "read_prompts",
    "split_prompts",
    "write_prompts",
]

_MAX_BYTES = 1 << 30


class Prompt(BaseModel):
    """One line of a prompt file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str | None = None
    """What a user says."""
    messages: tuple[dict[str, str], ...] = ()
    """A whole conversation instead, as chat completions take it."""
    text: str | None = None
    """Raw text instead, without a chat template."""
    response: str | None = None
    """What the model is taken to have answered; left out, it answers itself."""
    label: int | None = Field(default=None, ge=0, le=1)
    """For probes: 1 where this is the behaviour that a probe shall see."""
    group: str | None = None
    """What it is about. A group is never split between fitting and judging."""
    max_tokens: int = Field(default=128, ge=1, le=1_000_000)
    """Longest answer asked for."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        given = [self.prompt is not None, bool(self.messages), self.text is not None]
        if sum(given) != 1:
            raise ValueError("expected one of 'prompt', 'messages' and 'text'")
        return self

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages of a chat; none where the prompt is raw text."""
        if self.prompt is not None:
            return [{"role": "user", "content": self.prompt}]
        return list(self.messages)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file.

    Raises:
        PromptError: It cannot be read, is empty, or a line is not a prompt; the line is
            named.
    """
    prompts = []
    try:
        # Not `splitlines`: JSON text may hold other characters that end a line.
        lines = _read(path).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path}: cannot be read ({error}); expected JSON lines in UTF-8."
        raise PromptError(message) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(Prompt.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            message = (
                f"{path}:{number}: {where + ': ' if where else ''}{first['msg']}; "
                'expected e.g. {"prompt": "...", "max_tokens": 64}.'
            )
            raise PromptError(message) from error
    if not prompts:
        message = f"{path}: holds no prompt; expected one JSON object a line."
        raise PromptError(message)
    return prompts


def _read(path: Path) -> bytes:
    # A shell's <(command) is a pipe, and somebody writes to it.
    return path.read_bytes() if path.is_fifo() else read_file(path, limit=_MAX_BYTES)


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write a prompt file that `read_prompts` reads."""
    lines = [prompt.model_dump_json(exclude_defaults=True) for prompt in prompts]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def split_prompts(
    prompts: Sequence[Prompt], share: float, *, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Deal prompts into two parts, whole groups together.

    Args:
        prompts: In any order; those without a group are groups of their own.
        share: Of the prompts, about how many go to the first part.
        seed: Of the shuffle.
    """
    groups: dict[str, list[Prompt]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.group or f"\0{number}", []).append(prompt)
    dealt = list(groups.values())
    random.Random(seed).shuffle(dealt)
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for group in dealt:
        parts[len(parts[0]) >= share * len(prompts)].extend(group)
    for part in parts:
        random.Random(seed).shuffle(part)
    return parts


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """Hash prompts in their order."""
    text = json.dumps([prompt.model_dump(mode="json") for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()
