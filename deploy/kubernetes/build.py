"""Write deploy/prometheus/rules.yml as the PrometheusRule of the operator.

`python deploy/kubernetes/build.py` writes it, `--check` says whether it is up to date.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "prometheus" / "rules.yml"
TARGET = HERE / "monitoring" / "rules.yaml"

HEAD = """\
# Made of deploy/prometheus/rules.yml by deploy/kubernetes/build.py: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: guard
  labels:
    app.kubernetes.io/name: vllm-guard
spec:
"""


def build_rule(source: str) -> str:
    """Return the manifest of a rule file; comments stay."""
    lines = [f"  {line}" if line else "" for line in source.rstrip().splitlines()]
    return HEAD + "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the manifest, or only compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    wanted = build_rule(options.source.read_text(encoding="utf-8"))
    if not options.check:
        options.target.write_text(wanted, encoding="utf-8")
        return 0
    if not options.target.is_file() or options.target.read_text() != wanted:
        sys.stderr.write(
            f"{options.target} is not what {options.source} makes of it; "
            "run deploy/kubernetes/build.py.\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
