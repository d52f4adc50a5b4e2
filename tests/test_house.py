"""The house itself: what the README says of the tree, and what it may not say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from guard.policy import load_policy

ROOT = Path(__file__).parents[1]
UNLISTED = {
    *(".dockerignore", ".gitignore"),
    *("__init__.py", "__main__.py", "py.typed"),
}
"""Names that say nothing a reader of the tree would look for."""

PAGES = ["README.md", "CONTRIBUTING.md", "docs/threat-model.md", "docs/deploy.md"]
LISTED_WHOLE = (".", ".ci", "guard", "plugins", "plugins/vllm_guard")
"""Folders of which the README names every entry."""

MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:work/|home/|Users/|root/(?!v1/))")
CONTROL_PLANE = "errors request policy certificate metrics verdict audit http".split()


def tracked_files(root: Path) -> list[str]:
    """Return what git tracks or would track, relative to `root`."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sorted(
        name for name in set(listing.split("\0")) if name and (root / name).is_file()
    )


def entries_on_disk(files: list[str], folder: str) -> set[str]:
    """Return the names directly in `folder`, folders with a closing slash."""
    prefix = "" if folder == "." else f"{folder}/"
    names = set()
    for file in files:
        if file.startswith(prefix):
            first, slash, _ = file.removeprefix(prefix).partition("/")
            names.add(first + slash)
    return names - UNLISTED


def entries_in_tree(tree: str) -> dict[str, set[str]]:
    """Parse an indented tree, one entry a line, into folder -> names."""
    entries: dict[str, set[str]] = {}
    path: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        path = [(depth, above) for depth, above in path if depth < indent]
        folder = "/".join(above for _, above in path) or "."
        entries.setdefault(folder, set()).add(name)
        if name.endswith("/"):
            path.append((indent, name.rstrip("/")))
    return entries


def find_machine_paths(root: Path, files: list[str]) -> list[str]:
    """Return the files that name a path of somebody's machine."""
    return [name for name in files if MACHINE_PATH.search((root / name).read_bytes())]


def block(page: str, language: str) -> str:
    """Return the first fenced block of `page` in `language`."""
    return page.split(f"```{language}\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def files() -> list[str]:
    return tracked_files(ROOT)


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def tree(readme: str) -> dict[str, set[str]]:
    return entries_in_tree(block(readme, "text"))


@pytest.mark.parametrize("folder", LISTED_WHOLE)
def test_the_tree_in_the_readme_is_the_tree_on_disk(
    folder: str, files: list[str], tree: dict[str, set[str]]
) -> None:
    assert tree[folder] == entries_on_disk(files, folder)


def test_a_file_that_the_tree_leaves_out_is_noticed(tmp_path: Path) -> None:
    tree = entries_in_tree("a.md      one\nguard/    two\n  clamp.py  three\n")
    files = ["a.md", "guard/__init__.py", "guard/clamp.py", "guard/monitor.py"]
    assert tree["."] == entries_on_disk(files, ".")
    assert entries_on_disk(files, "guard") - tree["guard"] == {"monitor.py"}


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_a_page_names_exists(page: str) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z]\w*)", (ROOT / page).read_text(), re.M))
    assert named
    assert named <= targets


@pytest.mark.parametrize(
    "name", ["CONTRIBUTING.md", "docs/threat-model.md", "docs/limits.md"]
)
def test_every_test_that_a_page_names_exists(name: str) -> None:
    page = (ROOT / name).read_text()
    named = re.findall(r"(test_\w+\.py)(?:::(\w+))?", page)
    assert len(named) > 20
    sources: dict[str, str] = {}
    for path in ROOT.glob("tests/**/test_*.py"):
        # Some names stand in two folders.
        sources[path.name] = sources.get(path.name, "") + path.read_text()
    missing = [
        f"{file}::{name}"
        for file, name in named
        if f"def {name}" not in sources.get(file, "")
    ]
    assert missing == []


@pytest.mark.parametrize(
    "name", ["README.md", "docs/threat-model.md", "docs/deploy.md"]
)
def test_every_link_into_the_repository_leads_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_policy_in_the_readme_is_a_valid_one(readme: str, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(block(readme, "yaml"))
    policy_file = load_policy(tmp_path / "policy.yaml")
    assert set(policy_file.public_policies) == {"default", "open"}


def test_the_client_in_the_readme_is_python(readme: str) -> None:
    compile(block(readme, "python"), "README.md", "exec")


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    headings = re.findall(
        r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert headings[0] == ("Unreleased", "")
    for version, date in headings[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)


def test_no_file_names_a_path_of_the_machine_it_was_written_on(
    files: list[str],
) -> None:
    assert find_machine_paths(ROOT, files) == []


def test_a_path_of_a_machine_is_found_where_there_is_one(tmp_path: Path) -> None:
    home = "/".join(["", "home", "somebody", "model"])
    (tmp_path / "named.md").write_text(f"cd {home}")
    (tmp_path / "clean.md").write_text("https://example.org" + home)
    assert find_machine_paths(tmp_path, ["named.md", "clean.md"]) == ["named.md"]


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ([f"guard.{name}" for name in CONTROL_PLANE], "torch"),
        (["guard", "guard.pipeline", "guard.cli", "vllm_guard"], "vllm"),
    ],
    ids=["the control plane needs no torch", "importing loads no engine"],
)
def test_an_import_stays_within_its_contract(
    modules: list[str], forbidden: str
) -> None:
    """What import-linter reads in the source, seen at run time."""
    code = f"import sys, {', '.join(modules)}; assert {forbidden!r} not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
