"""The server opens once every rank of every engine has answered for the guard."""

import asyncio
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from vllm_guard import context, server
from vllm_guard.question import ANSWER_VARIABLE
from vllm_guard.rollout import Outcome, Rollout

from guard.errors import EngineError
from guard.http.keys import AdminToken

TOKEN = "a token of 24 letters..".replace(" ", "-")


def make_client(engines: list[list[Any]]) -> Any:
    """Return a client of so many engines, as data parallelism has it."""

    async def answer_all(*_call: Any) -> list[list[Any]]:
        return engines

    async def answer_first(*call: Any) -> list[Any]:
        return (await answer_all(*call))[0]

    core = SimpleNamespace(
        call_utility_all_async=answer_all, call_utility_async=answer_first
    )
    return SimpleNamespace(engine_core=core)


def make_engine(
    state: context.Context, *ranks: int, world_size: int = 2, **of_last: Any
) -> list[dict[str, Any]]:
    """Return what an engine says: its workers, the last of them odd, and its core."""
    about = {"fingerprint": state.current.fingerprint}
    workers = [about | {"role": "worker", "rank": n, "ready": True} for n in ranks]
    workers[-1] |= of_last
    return [*workers, about | {"role": "engine_core", "world_size": world_size}]


def check(*engines: list[dict[str, Any]]) -> None:
    asyncio.run(server.check_engines(make_client(list(engines))))


def test_a_server_whose_ranks_all_answer_is_ready(state: context.Context) -> None:
    check(make_engine(state, 0, 1), make_engine(state, 1, 0))
    check(make_engine(state, 0, world_size=1))


def test_a_rank_that_does_not_answer_is_missed(state: context.Context) -> None:
    with pytest.raises(
        EngineError, match=r"Engine 0 .* ranks \[1\]; expected \[0, 1\]"
    ):
        check(make_engine(state, 1))
    with pytest.raises(EngineError, match=r"ranks \[0, 0\]; expected \[0, 1\]"):
        check(make_engine(state, 0, 0))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"fingerprint": "other"}, "another policy file"),
        ({"ready": False}, "not ready"),
    ],
)
def test_the_last_rank_of_the_last_engine_counts_too(
    odd: dict[str, Any], said: str, state: context.Context
) -> None:
    with pytest.raises(EngineError, match=f"ngine 1 .*{said}"):
        check(make_engine(state, 0, 1), make_engine(state, 0, 1, **odd))


def test_an_engine_without_the_guard_is_missed(state: context.Context) -> None:
    with pytest.raises(EngineError, match="Engine 1 answers for nothing"):
        check(make_engine(state, 0, 1), [None, None])


@pytest.fixture
def hung(state: context.Context, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a client whose engine answers no call before `release` is set."""
    monkeypatch.setenv(ANSWER_VARIABLE, "0.3")
    client = make_client([])
    client.calls, client.release = 0, asyncio.Event()

    async def answer(*_call: Any) -> list[Any]:
        client.calls += 1
        await client.release.wait()
        return [make_engine(state, 0, world_size=1)]

    client.engine_core.call_utility_all_async = answer
    return client


async def ask_all(client: Any, times: int) -> list[Any]:
    asked = [server.check_engines(client) for _ in range(times)]
    return await asyncio.gather(*asked, return_exceptions=True)


def test_an_engine_that_hangs_is_asked_once_however_many_ask(hung: Any) -> None:
    async def probe() -> None:
        said = await ask_all(hung, 20) + await ask_all(hung, 1)
        assert all("does not answer" in str(error) for error in said)
        assert hung.calls == 1
        hung.release.set()
        assert await ask_all(hung, 2) == [None, None]
        before = hung.calls
        assert await ask_all(hung, 1) == [None]
        assert hung.calls == before + 1

    asyncio.run(probe())


def test_a_dead_engine_is_not_waited_for(
    hung: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ANSWER_VARIABLE, "60")

    async def probe() -> None:
        waiting = asyncio.ensure_future(ask_all(hung, 1))
        await asyncio.sleep(0.05)
        hung.errored = True
        (error,) = await asyncio.wait_for(waiting, 5)
        assert "does not answer" in str(error)

    asyncio.run(probe())


def follow(client: Any) -> Rollout:
    """Return the reloads of a server whose engines are a client's."""
    parallel = SimpleNamespace(_api_process_rank=-1)
    client.vllm_config = SimpleNamespace(parallel_config=parallel)
    return Rollout(client, Namespace(api_key=None))


def serve(endpoint: server.GuardEndpoint) -> httpx.AsyncClient:
    """Return a client of a server that has the guard's own routes alone."""
    from fastapi import FastAPI

    app = FastAPI()
    endpoint.attach_router(app)
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://guard")


def put_desk(
    state: context.Context, monkeypatch: pytest.MonkeyPatch, *, token: str | None
) -> None:
    """Let the process have a desk at which everybody is offered `open`."""
    desk = SimpleNamespace(
        admin=AdminToken(token), offer=lambda _key: ["open"], oldest_generation=1
    )
    monkeypatch.setattr(state, "board", SimpleNamespace(desk=desk))


@pytest.mark.parametrize(
    ("route", "status", "said"),
    [("ready", 503, {"ready": False}), ("status", 200, {"engines": None})],
)
def test_who_asks_about_an_engine_that_hangs_is_answered(
    route: str,
    status: int,
    said: dict[str, Any],
    hung: Any,
    state: context.Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_desk(state, monkeypatch, token=None)
    endpoint = server.GuardEndpoint()

    async def ask() -> httpx.Response:
        endpoint._client, endpoint._rollout = hung, follow(hung)
        async with serve(endpoint) as client:
            return await asyncio.wait_for(client.get(f"/guard/{route}"), 5)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert said.items() <= answer.json().items()


def test_a_reload_does_not_wait_for_an_engine_that_died(
    hung: Any, state: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_desk(state, monkeypatch, token=None)

    async def wait() -> None:
        waiting = asyncio.ensure_future(follow(hung).follow())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        hung.errored = True
        with pytest.raises(TimeoutError, match="hangs, or is dead"):
            await asyncio.wait_for(asyncio.shield(waiting), 5)

    asyncio.run(wait())


def test_status_says_which_certificate_a_policy_has_or_none(
    certified: context.Context,
) -> None:
    found = certified.current.certificates["research"]
    client = make_client([make_engine(certified, 0, world_size=1)])
    said = asyncio.run(server.describe(client, ["research", "open"]))["policies"]
    assert said["research"]["certificate"] == {"id": found.id, "issued": "2026-07-25"}
    assert said["open"]["certificate"] is None


REASON = "p.yaml:3: policies.secret: no"


@pytest.mark.parametrize(
    ("token", "shown", "is_read"),
    [
        (None, None, True),
        (TOKEN, TOKEN, True),
        (TOKEN, None, False),
        (TOKEN, TOKEN[:-1], False),
    ],
)
def test_why_a_reload_was_refused_is_the_administrators_where_there_is_one(
    token: str | None,
    shown: str | None,
    is_read: bool,
    state: context.Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_desk(state, monkeypatch, token=token)
    endpoint = server.GuardEndpoint()
    headers = {} if shown is None else {"x-guard-admin-token": shown}

    async def ask() -> dict[str, Any]:
        client = make_client([make_engine(state, 0, world_size=1)])
        endpoint._client, endpoint._rollout = client, follow(client)
        endpoint._rollout.last = asdict(Outcome("refused", 1, "f", REASON))
        async with serve(endpoint) as asker:
            answer = await asker.get("/guard/status", headers=headers)
        return dict(answer.json()["last_reload"])

    told = asyncio.run(ask())
    assert told["result"] == "refused"
    assert told.get("reason") == (REASON if is_read else None)


def test_a_reload_at_an_engine_that_hangs_is_answered(
    hung: Any, state: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = context.get_board(CollectorRegistry())
    board.desk.admin = AdminToken(TOKEN)
    endpoint = server.GuardEndpoint()

    async def ask() -> httpx.Response:
        endpoint._client, endpoint._rollout = hung, follow(hung)
        async with serve(endpoint) as client:
            headers = {"x-guard-admin-token": TOKEN}
            reload = client.post("/guard/reload?wait=5", headers=headers)
            return await asyncio.wait_for(reload, 5)

    answer = asyncio.run(ask())
    assert answer.status_code == 503
    said = answer.json()["error"]["message"]
    assert said.startswith("The policies stay: an engine hangs, or is dead")


@pytest.fixture
def ask_as_admin(
    drilled: context.Context, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., httpx.Response]:
    """Ask a server with or without an administrator for what is his."""
    from fastapi import FastAPI

    board = SimpleNamespace(desk=SimpleNamespace(admin=AdminToken(TOKEN)))
    monkeypatch.setattr(drilled, "board", board)
    app = FastAPI()
    server.GuardEndpoint().attach_router(app)

    def ask(
        shown: str | None, *, token: str | None = TOKEN, route: str = "GET drills"
    ) -> httpx.Response:
        board.desk.admin = AdminToken(token)
        headers = {} if shown is None else {"x-guard-admin-token": shown}
        method, _, name = route.partition(" ")

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://guard"
            ) as client:
                return await client.request(method, f"/guard/{name}", headers=headers)

        return asyncio.run(send())

    return ask


def test_an_administrator_reads_what_each_drill_should_bring_back(
    ask_as_admin: Callable[..., httpx.Response],
) -> None:
    answer = ask_as_admin(TOKEN)
    assert answer.json() == {
        "drills": [
            {
                "name": name,
                "prompt": f"w1 {position}",
                "gold": "w2",
                "budget": 0.5,
                "position": position,
            }
            for name, position in (("last", "last_prompt"), ("whole", "all_prompt"))
        ]
    }


@pytest.mark.parametrize("route", ["GET drills", "POST reload"])
@pytest.mark.parametrize(
    ("shown", "token", "status", "words"),
    [
        (None, TOKEN, 403, "expected the token in 'x-guard-admin-token'"),
        (TOKEN[:-1], TOKEN, 403, "expected the token in 'x-guard-admin-token'"),
        (TOKEN, None, 404, "off on this server"),
        ("", None, 404, "off on this server"),
    ],
)
def test_nobody_else_reads_anything_of_a_drill_or_reloads(
    ask_as_admin: Callable[..., httpx.Response],
    route: str,
    shown: str | None,
    token: str | None,
    status: int,
    words: str,
) -> None:
    answer = ask_as_admin(shown, token=token, route=route)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert not any(word in answer.text for word in ("last", "whole", "w1"))


OPEN = {"/guard/ready", "/guard/status"}
"""Routes of the guard that are no administrator's."""


def test_every_route_of_an_administrator_is_shut_by_default_and_to_all_others(
    drilled: context.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi import FastAPI

    monkeypatch.delenv("GUARD_ADMIN_TOKEN", raising=False)
    desk = SimpleNamespace(admin=server.read_admin())
    monkeypatch.setattr(drilled, "board", SimpleNamespace(desk=desk))
    app = FastAPI(openapi_url=None)
    server.GuardEndpoint().attach_router(app)
    shut = [
        (method, route.path)
        for route in app.routes
        for method in getattr(route, "methods", ())
        if getattr(route, "path", None) not in OPEN
    ]
    assert ("GET", "/guard/drills") in shut

    async def ask(method: str, path: str, token: str | None) -> int:
        transport = httpx.ASGITransport(app)
        headers = {"x-guard-admin-token": token} if token is not None else {}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://guard"
        ) as client:
            return (await client.request(method, path, headers=headers)).status_code

    for method, path in shut:
        for token in (None, "", "None", TOKEN):
            assert asyncio.run(ask(method, path, token)) in (403, 404)
    desk.admin = AdminToken(TOKEN)
    for method, path in shut:
        for token in (None, "", TOKEN[:-1], f"{TOKEN}x"):
            assert asyncio.run(ask(method, path, token)) == 403
    assert asyncio.run(ask("GET", "/guard/drills", TOKEN)) == 200
