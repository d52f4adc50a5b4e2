"""The fenced blocks of README and docs, and what is to be done with each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = "against a server"
NOT_RUN = "not run:"
"""A comment above a block begins with one of these; without one it is simply run."""

_BLOCK = re.compile(r"(?:^<!-- (.+?) -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    comment: str
    """Of the HTML comment right above it."""
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether it is run, where it needs nothing but the organism's files."""
        return not self.comment

    @property
    def needs_server(self) -> bool:
        return self.comment == SERVER

    @property
    def reason(self) -> str:
        """Why it is not run."""
        return self.comment.removeprefix(NOT_RUN).strip()


def read_blocks(text: str, page: str) -> Iterator[Block]:
    """Yield the blocks of a page, those inside a list too."""
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(2)) + 1
        yield Block(page, line, found[2], found[1] or "", found[3])


def list_blocks(*languages: str) -> list[Block]:
    """Return the blocks of every page that are written in one of these languages."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    return [
        block
        for path in sorted(pages)
        for block in read_blocks(path.read_text(), str(path.relative_to(ROOT)))
        if block.language in languages
    ]


def list_commands(text: str) -> list[str]:
    """Return the commands of a shell block, one a line, without comments."""
    joined = text.replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]
