"""The kinds of panel that the dashboard has, as Grafana's JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
NOTHING = {"null": ("no data", "#6e6e6e")}
"""What is not known is no zero."""

Query = tuple[str, str]
"""An expression, and the legend of its series."""


def stat(
    title: str,
    about: str,
    expression: str,
    *,
    steps: Mapping[float, str],
    unit: str = "short",
    words: Mapping[str, tuple[str, str]] | None = None,
    decimals: int | None = None,
) -> dict[str, Any]:
    """Return one number, coloured by where it stands.

    Args:
        title: Of the panel.
        about: What it shows, with the name of its metric.
        expression: Of the number.
        steps: Lower bound to colour; the first holds for anything below, too.
        unit: As Grafana calls it.
        words: Said instead of a number, with a colour; "null" where there is no series.
        decimals: How many are shown.
    """
    mappings: list[dict[str, Any]] = []
    for value, (text, color) in (NOTHING | dict(words or {})).items():
        result = {"text": text, "color": color}
        if value == "null":
            options: dict[str, Any] = {"match": "null", "result": result}
            mappings.append({"type": "special", "options": options})
        else:
            mappings.append({"type": "value", "options": {value: result}})
    defaults = {
        "unit": unit,
        "color": {"mode": "thresholds"},
        "thresholds": _thresholds(steps),
        "mappings": mappings,
    }
    if decimals is not None:
        defaults["decimals"] = decimals
    options = {
        "colorMode": "background",
        "graphMode": "none",
        "textMode": "value",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return _panel("stat", title, about, [(expression, "")], defaults, options)


def series(
    title: str,
    about: str,
    queries: Sequence[Query],
    *,
    unit: str = "short",
    stacked: bool = False,
    colors: Mapping[str, str] | None = None,
    line: float | None = None,
    least: float | None = 0,
) -> dict[str, Any]:
    """Return curves over time.

    Args:
        title: Of the panel.
        about: What it shows, with the name of its metric.
        queries: Of the curves.
        unit: As Grafana calls it.
        stacked: Whether they add up.
        colors: Of curves, by legend.
        line: Where a threshold is drawn.
        least: Where the axis begins; None for curves that go below 0.
    """
    custom: dict[str, Any] = {
        "lineWidth": 1,
        "fillOpacity": 40 if stacked else 0,
        "showPoints": "never",
        "axisSoftMax": 1 if unit == "short" else None,  # nothing is no mountain
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    defaults: dict[str, Any] = {
        "unit": unit,
        **({} if least is None else {"min": least}),
        "color": {"mode": "palette-classic"},
        "custom": custom,
    }
    if line is not None:
        custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults["thresholds"] = _thresholds({0: "transparent", line: RED})
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    panel = _panel("timeseries", title, about, queries, defaults, options)
    panel["fieldConfig"]["overrides"] = [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [
                {"id": "color", "value": {"mode": "fixed", "fixedColor": color}}
            ],
        }
        for name, color in (colors or {}).items()
    ]
    return panel


def table(
    title: str, about: str, expression: str, columns: Sequence[str], *, value: str
) -> dict[str, Any]:
    """Return a table of labels and a value, one row a series.

    Args:
        title: Of the panel.
        about: What it shows, with the name of its metric.
        expression: Whose series are the rows.
        columns: Labels, in order.
        value: What the value is called.
    """
    panel = _panel("table", title, about, [(expression, "")], {}, {"showHeader": True})
    panel["targets"][0] |= {"format": "table", "instant": True, "range": False}
    names = [*columns, "Value"]
    keep = {"include": {"names": names}}
    order = {
        "indexByName": {name: n for n, name in enumerate(names)},
        "renameByName": {"Value": value},
    }
    panel["transformations"] = [
        {"id": "filterFieldsByName", "options": keep},
        {"id": "organize", "options": order},
    ]
    return panel


def _thresholds(steps: Mapping[float, str]) -> dict[str, Any]:
    (_, first), *others = steps.items()
    rest = [{"color": color, "value": value} for value, color in others]
    return {"mode": "absolute", "steps": [{"color": first, "value": None}, *rest]}


def _panel(
    kind: str,
    title: str,
    about: str,
    queries: Sequence[Query],
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "targets": [
            {
                "datasource": DATASOURCE,
                "refId": chr(ord("A") + number),
                "expr": expression,
                "legendFormat": legend or "__auto",
                "range": True,
            }
            for number, (expression, legend) in enumerate(queries)
        ],
        "fieldConfig": {"defaults": dict(defaults), "overrides": []},
        "options": dict(options),
    }
