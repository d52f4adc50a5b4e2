"""Secrets in the source: how they are compared, and what could run what it reads."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("guard/**/*.py"), *ROOT.glob("plugins/**/*.py")]
SECRET = re.compile(
    r"secret|signature|authorization|admin|_token$|api_?keys?$|password"
    r"|_sign$",
    re.I,
)
"""Names of what only some may know, or of what is worked out from it."""
KEPT = ("guard/http/keys.py", "guard/request.py")
"""Where secrets are compared; here a digest, a key or its hash is one as well."""
HASHED = re.compile(r"digest|_hash$|_read$|known|accepted|shown|key", re.I)
EXECUTES = re.compile(
    r"^(pickle|_pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)(\.|$)"
    r"|^torch\.(load|jit\.load)$|^(numpy|np)\.load$|^yaml\.(full_|unsafe_)?load(_all)?$"
    r"|^(eval|exec|__import__)$|^os\.(system|popen)$"
)


def names_in(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


def is_constant(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant)


def find_plain_compares(source: str, pattern: re.Pattern[str]) -> list[str]:
    """Return every comparison of a secret that stops at the first byte that differs.

    Whether one is there at all may be asked: `is None`, or a comparison to a constant.
    """
    ordinary = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        if any(map(is_constant, sides)):
            continue
        if any(isinstance(operator, ordinary) for operator in node.ops) and any(
            pattern.search(name) for side in sides for name in names_in(side)
        ):
            found.append(ast.unparse(node))
    return found


def find_execution(source: str) -> list[str]:
    """Return imports and calls that can run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)]
            told = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if told.get("shell") == "True" or told.get("trust_remote_code") == "True":
                found.append(ast.unparse(node))
        found += [name for name in names if EXECUTES.search(name)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_secret_is_compared_in_constant_time_and_nothing_read_is_run(
    path: Path,
) -> None:
    source = path.read_text()
    assert find_plain_compares(source, SECRET) == []
    if str(path.relative_to(ROOT)) in KEPT:
        assert find_plain_compares(source, HASHED) == []
    assert find_execution(source) == []


@pytest.mark.parametrize("file", KEPT)
def test_a_plain_comparison_would_be_found(file: str) -> None:
    source = (ROOT / file).read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "hmac.compare_digest"
    ]
    assert calls
    for call in calls:
        exact = ast.get_source_segment(source, call)
        assert exact is not None
        for operator in ("==", "in"):
            plain = f" {operator} ".join(f"({ast.unparse(a)})" for a in call.args)
            broken = source.replace(exact, f"({plain})")
            assert find_plain_compares(broken, HASHED) + find_plain_compares(
                broken, SECRET
            )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "torch.load(path)",
        "np.load(path)",
        "yaml.load(text, yaml.Loader)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_what_runs_what_it_reads_would_be_found(source: str) -> None:
    assert find_execution(source)
