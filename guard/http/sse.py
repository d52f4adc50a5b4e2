"""Server-sent events, read from and written to bytes that are cut anywhere.

Follows the HTML standard's event stream: three line endings, comments, several
`data` lines. Each event keeps its own bytes, so that what nobody changes is
passed on as it came.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["DONE", "Event", "EventReader", "write_event"]

DONE = "[DONE]"
"""Data of the event that ends an OpenAI stream."""

# Atomic groups: "\r\n" is one line ending and must never be read as two.
_LINE_END = re.compile(rb"(?>\r\n|\n|\r)")
_EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")


@dataclass(frozen=True, slots=True)
class Event:
    """One event, or a block without data such as a keep-alive comment."""

    raw: bytes
    """The bytes as they came, with the blank line at the end."""
    data: str | None
    """The `data` lines, joined; None when there was none."""


class EventReader:
    """Cuts a byte stream into events, however the bytes are split."""

    def __init__(self) -> None:
        self._buffer = b""
        self._searched = 0

    @property
    def pending(self) -> int:
        """Bytes of an event that is not complete yet."""
        return len(self._buffer)

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Take in bytes and yield the events they complete."""
        self._buffer += chunk
        while match := _EVENT_END.search(self._buffer, self._searched):
            end = match.end()
            if end == len(self._buffer) and self._buffer.endswith(b"\r"):
                # The next byte may be the "\n" of this very line ending.
                return
            raw, self._buffer = self._buffer[:end], self._buffer[end:]
            self._searched = 0
            yield _parse(raw)
        # Everything but a possible beginning of the ending has been looked at.
        self._searched = max(0, len(self._buffer) - 3)

    def close(self) -> Iterator[Event]:
        """Yield what is left when the stream is over, complete or not."""
        if self._buffer:
            raw, self._buffer = self._buffer, b""
            yield _parse(raw)


def write_event(data: str) -> bytes:
    """Return an event with this data, a single line."""
    return b"data: " + data.encode() + b"\n\n"


def _parse(raw: bytes) -> Event:
    lines = []
    for line in _LINE_END.split(raw):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    data = b"\n".join(lines).decode("utf-8", "replace") if lines else None
    return Event(raw, data)
