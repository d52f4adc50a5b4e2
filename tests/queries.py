"""What queries of dashboards and rules ask for, and what the guard declares."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import promql_parser
from prometheus_client import CollectorRegistry

from guard.metrics import Metrics
from guard.policy import Policy, PolicyFile


def declared_names() -> set[str]:
    """Return the names of all series that the guard's collectors expose."""
    registry = CollectorRegistry()
    policy_file = PolicyFile(
        version=1, policies={"default": Policy()}, default_policy="default"
    )
    Metrics(policy_file, fingerprints={}, digests={}, registry=registry)
    suffixes = {
        "counter": ("_total",),
        "gauge": ("",),
        "histogram": ("_bucket", "_count", "_sum"),
    }
    return {
        family.name + suffix
        for family in registry.collect()
        for suffix in suffixes[family.type]
    }


def selected_names(query: str) -> set[str]:
    """Return the names of all series that a query selects.

    Raises:
        ValueError: It is no PromQL.
    """
    names: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)
        for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, name, None)
            if isinstance(child, promql_parser.Expr):
                visit(child)
        for argument in getattr(node, "args", None) or ():
            visit(argument)

    visit(promql_parser.parse(query))
    return names


def list_targets(dashboard: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the title of each panel with each of its expressions."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def fill_in(expression: str, *, window: str) -> str:
    """Return an expression as Grafana sends it, all servers chosen."""
    for name in ("__rate_interval", "__range"):
        expression = expression.replace(f"${name}", window)
    return re.sub(r"\$\w+", ".*", expression)
