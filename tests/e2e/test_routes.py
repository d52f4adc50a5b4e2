"""What becomes of every route of vLLM's server, and the table that says so."""

import json
import os
import re
from pathlib import Path

import httpx
import pytest
from e2e.serving import Server

from benchmarks.steps import StepRecord
from guard.http.route import REFUSED, decide_route

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- routes -->\n", "<!-- /routes -->\n"
OUTCOMES = {
    "guarded": "guarded, with a verdict in the answer",
    "refused": "refused, 400: text, scores or vectors of the model in another shape, "
    "or a change of the model",
    "private": "passed on, to whoever has a key of the server if it checks keys; "
    "drills and reloads to the administrator alone",
    "passed": "passed on: the model does not run for it",
}
ANY_BODY = {
    "model": "model",
    "prompt": "w1 w2",
    "messages": [{"role": "user", "content": "w1 w2"}],
    "input": "w1 w2",
    "text_1": "w1",
    "text_2": "w2",
    "tokens": [4, 5],
    "token_ids": [4, 5],
    "sampling_params": {"max_tokens": 2},
    "max_tokens": 2,
}
DISRUPTIVE = re.compile("abort|pause|profile|shutdown")
"""Parts of routes that would disturb the tests beside this one."""


@pytest.fixture(scope="module")
def routes(toy_server: Server) -> list[tuple[str, str]]:
    """Return every method and path that the server itself declares."""
    paths = json.loads(toy_server.get("/openapi.json"))["paths"]
    return sorted(
        (path, method.upper())
        for path, methods in paths.items()
        for method in methods
        if not DISRUPTIVE.search(path)
    )


@pytest.fixture(scope="module")
def outcomes(
    routes: list[tuple[str, str]], toy_server: Server, steps: StepRecord
) -> dict[tuple[str, str], str]:
    """Return what happened to a request that means something to each of them."""
    return {
        (path, method): _try(toy_server, steps, path, method) for path, method in routes
    }


def _try(server: Server, steps: StepRecord, path: str, method: str) -> str:
    before = steps.count_tokens()
    url = server.url + re.sub(r"\{.*?\}", "x", path)
    body = ANY_BODY if method in ("POST", "PUT", "PATCH") else None
    answer = httpx.request(method, url, json=body, timeout=60)
    ran = steps.count_tokens() > before
    if "is not supported by guard" in answer.text:
        assert (answer.status_code, ran) == (400, False)
        return "refused"
    if ran:
        assert answer.json()["guard"]["action"] == "allow", path
        return "guarded"
    # A server without keys, as this one, passes both on.
    return "private" if decide_route(path, method) == "private" else "passed"


def test_the_model_runs_for_guarded_routes_only(
    outcomes: dict[tuple[str, str], str],
) -> None:
    assert len(outcomes) > 20
    named = {
        "chat": "guarded",
        "completion": "guarded",
        "refuse": "refused",
        "private": "private",
    }
    for (path, method), outcome in outcomes.items():
        filled = re.sub(r"\{.*?\}", "x", path)
        decision = decide_route(filled, method)
        assert outcome == named.get(decision, "passed"), (path, method)


def test_the_table_of_routes_is_what_happens(
    outcomes: dict[tuple[str, str], str],
) -> None:
    rows = {outcome: set[str]() for outcome in OUTCOMES}
    for (path, _), outcome in outcomes.items():
        rows[outcome].add(f"`{path}`")
    # Other kinds of models declare more; below a refused route all is refused.
    declared = {path for path, _ in outcomes}
    rows["refused"] |= {f"`{path}`" for path in REFUSED if path not in declared}
    # A route that answers GET without the model may be guarded for POST.
    rows["passed"] -= rows["guarded"]
    table = "| route | what happens |\n|---|---|\n" + "".join(
        f"| {', '.join(sorted(rows[outcome]))} | {text} |\n"
        for outcome, text in OUTCOMES.items()
    )
    head, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, tail = rest.partition(END)
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(head + BEGIN + table + END + tail)
    else:
        assert written == table, "run this test with WRITE_DOCS=1 and look at the diff"
