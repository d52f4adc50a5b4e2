"""The policy file as a JSON schema, for editors and for the page of its keys.

What an editor can check it says: keys, choices, bounds. What one key says about another
only `guard check` knows. Descriptions are the docstrings of the models.
"""

from typing import Any

from guard.policy import PolicyFile

__all__ = ["policy_schema"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_KEYWORDS = {"gt": "exclusiveMinimum", "ge": "minimum", "le": "maximum"}
"""What pydantic 2.14 leaves untranslated where a bound follows a check of our own."""


def policy_schema() -> dict[str, Any]:
    """Return the JSON schema of a policy file, once it was read as YAML."""
    schema = _tidy(PolicyFile.model_json_schema())
    return {"$schema": _DIALECT, "title": "vllm-guard policy", **schema}


def _tidy(node: Any) -> Any:
    """Return a schema in the words of its dialect, without titles nobody wrote."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    tidied: dict[str, Any] = {}
    for key, value in node.items():
        if key in {"properties", "$defs"}:
            tidied[key] = {name: _tidy(child) for name, child in value.items()}
        elif key == "description":
            tidied[key] = " ".join(value.split())
        elif key != "title":
            tidied[str(_KEYWORDS.get(key, key))] = _tidy(value)
    if "patternProperties" in tidied:
        tidied["additionalProperties"] = False
    return tidied
