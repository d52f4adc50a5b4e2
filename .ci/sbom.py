"""What an installation is made of, with licences: `make sbom`.

Writes CycloneDX 1.6 as JSON: this package and everything its requirements lead to in
this environment. Says which licences ask for more than a notice.
"""

import argparse
import json
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT_PACKAGE = "vllm-guard"
EXTRAS = ("cpu", "gpu")
"""Of them those that are installed; `dev` is nobody's but ours."""
PERMISSIVE = re.compile(
    r"\b(MIT|Apache|BSD|ISC|PSF|Python Software Foundation|Python-2\.0|Zlib|0BSD"
    r"|Unlicense|CC0|HPND|BSL-1\.0|CNRI-Python|MIT-0|MIT-CMU|Public Domain)\b",
    re.I,
)
OTHER = re.compile(r"GPL|MPL|Mozilla|EPL|CDDL|Propriet|NVIDIA|Commercial|SSPL", re.I)
_LONGEST_NAME = 80
"""Of a licence; some packages put the whole text where its name belongs."""


def walk(root: str, extras: Sequence[str]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that a requirement leads to, by name."""
    found: dict[str, metadata.Distribution] = {}
    todo: list[tuple[str, frozenset[str]]] = [(root, frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that was not chosen, or another platform's
        found[name] = distribution
        todo += [
            (canonicalize_name(one.name), frozenset(one.extras))
            for one in requirements(distribution, wanted)
        ]
    return found


def requirements(
    distribution: metadata.Distribution, extras: frozenset[str]
) -> Iterator[Requirement]:
    """Yield what a distribution requires here, with some of its extras."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        chosen = ({"extra": extra} for extra in ("", *extras))
        if requirement.marker is None or any(map(requirement.marker.evaluate, chosen)):
            yield requirement


def licence_of(distribution: metadata.Distribution) -> str:
    """Return a licence as its package names it; empty where it does not."""
    about = distribution.metadata
    text = str(about.get("License-Expression") or "").strip()
    if text:
        return text
    classified = [
        line.rpartition("::")[2].strip()
        for line in about.get_all("Classifier") or ()
        if line.startswith("License ::") and not line.endswith("OSI Approved")
    ]
    if classified:
        return " AND ".join(sorted(set(classified)))
    text = str(about.get("License") or "").strip()
    first = text.splitlines()[0].strip() if text else ""
    return "" if first.upper() == "UNKNOWN" else first[:_LONGEST_NAME]


def is_permissive(licence: str) -> bool:
    """Tell whether a licence asks for a notice and no more; where unsure, it does not.

    Of several joined by OR one may be chosen.
    """
    return any(
        PERMISSIVE.search(choice) is not None and OTHER.search(choice) is None
        for choice in re.split(r"\bOR\b", licence)
    )


def describe(distribution: metadata.Distribution) -> dict[str, Any]:
    """Return a component of CycloneDX."""
    name, version = canonicalize_name(distribution.name), distribution.version
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}",
    }
    if licence := licence_of(distribution):
        component["licenses"] = [{"license": {"name": licence}}]
    return component


def make_bom(found: Mapping[str, metadata.Distribution], root: str) -> dict[str, Any]:
    """Return the bill of materials; the same environment gives the same one."""
    parts = {name: describe(one) for name, one in sorted(found.items())}
    main = {**parts.pop(root), "type": "application"}
    depends = []
    for name, distribution in sorted(found.items()):
        extras = frozenset(EXTRAS) if name == root else frozenset[str]()
        needs = {
            canonicalize_name(one.name) for one in requirements(distribution, extras)
        }
        refs = sorted(parts[need]["bom-ref"] for need in needs if need in parts)
        ref = main["bom-ref"] if name == root else parts[name]["bom-ref"]
        depends.append({"ref": ref, "dependsOn": refs})
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": main},
        "components": list(parts.values()),
        "dependencies": depends,
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {**content, "serialNumber": number.urn}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the bill and say what is not permissive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args(arguments).output
    found = walk(ROOT_PACKAGE, EXTRAS)
    if ROOT_PACKAGE not in found:
        sys.stderr.write(f"{ROOT_PACKAGE} is not installed; expected it here.\n")
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    bom = make_bom(found, ROOT_PACKAGE)
    output.write_text(json.dumps(bom, indent=1) + "\n", encoding="utf-8")
    licences = {name: licence_of(one) for name, one in sorted(found.items())}
    strict = {name: text for name, text in licences.items() if not is_permissive(text)}
    lines = [f"{output}: {len(found)} packages, {len(strict)} not surely permissive"]
    lines += [f"  {name}: {text or 'not stated'}" for name, text in strict.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
