"""Whatever is sent to the guard's own routes: answered, and reloads only as allowed."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote_from_bytes

import pytest
from fastapi import FastAPI
from fuzz.limits import attempt, fuzz
from fuzz.mutation import NUMBERS, TEXTS, damaged
from hypothesis import given
from hypothesis import strategies as st
from vllm_guard import context, server
from vllm_guard.rollout import Outcome

from guard.http.keys import AdminToken

TOKEN = "of-an-administrator-and-long"
ROUTES = ["/guard/drills", "/guard/ready", "/guard/status", "/guard/reload%2f"]
TIMES = [b"30", b"0", b"3600", b"3600.1", b"1_0", b" 5 ", "\u0663".encode()]
ODD = [text.encode("utf-8", "surrogatepass") for text in [*map(str, NUMBERS), *TEXTS]]
waits = (
    st.sampled_from(TIMES)
    | st.sampled_from(ODD)
    | st.floats().map(lambda number: str(number).encode())
    | st.binary(max_size=8)
)
whole = waits.map(lambda wait: b"wait=" + quote_from_bytes(wait).encode())
queries = whole | whole.flatmap(lambda one: damaged(one, snippets=[b"&wait=1", b"%"]))
ADMIN = (b"x-guard-admin-token", TOKEN.encode())
names = st.sampled_from([ADMIN[0], b"authorization", b"host"])
heads = st.just([ADMIN]) | st.lists(st.tuples(names, st.binary(max_size=8)))
orders = st.just(("POST", "/guard/reload")) | st.tuples(
    st.sampled_from(["GET", "POST", "PUT", "X"]), st.sampled_from(ROUTES)
)
requests = st.tuples(orders, queries, heads, st.binary(max_size=200))


@pytest.fixture
def waited(
    drilled: context.Context, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FastAPI, list[float]]]:
    """The guard's routes, and how long each reload was told to wait."""
    desk = SimpleNamespace(
        admin=AdminToken(TOKEN), offer=lambda _key: ["open"], oldest_generation=1
    )
    monkeypatch.setattr(drilled, "board", SimpleNamespace(desk=desk))
    waited: list[float] = []

    async def reload(*, wait: float) -> Outcome:
        waited.append(wait)
        return Outcome("success", 1, "", None, 0.0)

    async def say_nothing(*_call: Any) -> list[Any]:
        return []

    core = SimpleNamespace(
        call_utility_all_async=say_nothing, call_utility_async=say_nothing
    )
    endpoint, app = server.GuardEndpoint(), FastAPI()
    endpoint._client = SimpleNamespace(engine_core=core)
    endpoint._rollout = SimpleNamespace(reload=reload, follow=say_nothing, last=None)
    endpoint.attach_router(app)
    return app, waited


async def send(app: FastAPI, request: Any) -> list[Any]:
    (method, path), query, head, body = request
    sent: list[Any] = []
    body = [{"type": "http.request", "body": body}]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "http_version": "1.1",
        "scheme": "http",
        "headers": head,
    }

    async def receive() -> Any:
        return body.pop() if body else {"type": "http.disconnect"}

    async def take(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, take)
    return sent


def test_any_request_for_the_guards_own_routes_is_answered(waited: Any) -> None:
    app, waits = waited
    statuses = set()

    @fuzz
    @given(requests)
    def try_one(request: Any) -> None:
        waits.clear()
        sent: list[Any] = []
        assert attempt(lambda: sent.extend(asyncio.run(send(app, request)))) is None
        (status,) = [one["status"] for one in sent if "status" in one]
        statuses.add(status)
        assert status in (200, 400, 403, 404, 405, 503)
        assert len(waits) <= (ADMIN in request[2])
        assert all(0 <= wait <= 3600 for wait in waits)
        told = b"".join(one.get("body", b"") for one in sent)
        assert TOKEN.encode() not in told
        assert len(told) < 4000

    try_one()
    assert {200, 400, 403} <= statuses
