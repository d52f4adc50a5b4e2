"""Whose key is whose, and what a key that is nobody's learns."""

import hashlib
import hmac
import time
from typing import Any

import httpx
import pytest
from fuzz.limits import fuzz
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import EngineError, PolicyError, RequestError
from guard.http import PolicyDesk
from guard.http.keys import AdminToken, KeyRing
from guard.policy import Tenant
from guard.request import GuardField, read_ticket

KEYS = ["sk-a", "sk-b", "sk-c"]
ROUTES = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/invocations",
    "/guard/status",
    "/guard/drills",
]
TOKEN = "sixteen-letters!"


SECRET = b"a secret of the test, 32 bytes.."


def make_tenant(key: str, *policies: str) -> Tenant:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return Tenant(api_key_sha256=digest, policies=policies)


@pytest.fixture
def keyed(desk: PolicyDesk) -> PolicyDesk:
    tenants = [make_tenant("sk-a", "private", "open"), make_tenant("sk-b", "open")]
    desk.keys = KeyRing(tenants, accepted=KEYS)
    return desk


def admit(desk: PolicyDesk, key: str, policy: str | None = None) -> str:
    field = GuardField(policy=policy)
    return desk.admit(field, authorization=f"Bearer {key}", choices=1).policy


def test_a_tenant_runs_under_the_first_of_its_policies_unasked(
    keyed: PolicyDesk,
) -> None:
    assert [admit(keyed, key) for key in KEYS] == ["private", "open", "default"]


def test_a_tenant_may_name_its_own_policies_and_no_other(keyed: PolicyDesk) -> None:
    assert admit(keyed, "sk-a", "open") == "open"
    assert admit(keyed, "sk-a", "private") == "private"
    assert admit(keyed, "sk-c", "open") == "open"
    for key, policy in [("sk-a", "default"), ("sk-b", "private"), ("sk-c", "private")]:
        with pytest.raises(RequestError) as caught:
            admit(keyed, key, policy)
        assert (caught.value.status, caught.value.param) == (403, "guard.policy")
    with pytest.raises(RequestError) as caught:
        admit(keyed, "sk-a", "nowhere")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "header", [None, "", "sk-a", "Bearer", "Bearer ", "Bearer sk-A", "Basic sk-a"]
)
def test_a_header_without_an_accepted_key_lets_nobody_in(
    keyed: PolicyDesk, header: str | None
) -> None:
    assert not keyed.lets_in(header)
    assert keyed.keys.tenant(header) is None


@fuzz
@given(header=st.text())
def test_any_header_is_somebodys_or_nobodys(header: str) -> None:
    ring = KeyRing([make_tenant("sk-a", "open")], accepted=KEYS)
    scheme, _, key = header.partition(" ")
    assert ring.lets_in(header) == (scheme.lower() == "bearer" and key in KEYS)


def test_every_digest_is_compared_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring = KeyRing([make_tenant(key, "open") for key in KEYS], accepted=KEYS)
    compared: list[object] = []
    plain = hmac.compare_digest
    monkeypatch.setattr(
        hmac, "compare_digest", lambda a, b: compared.append(b) or plain(a, b)
    )
    for key in [*KEYS, "sk-nobody"]:
        compared.clear()
        ring.lets_in(f"Bearer {key}")
        ring.tenant(f"Bearer {key}")
        assert len(compared) == 2 * len(KEYS)


def test_without_keys_everybody_is_let_in(desk: PolicyDesk) -> None:
    assert desk.lets_in(None)
    assert desk.lets_in("Bearer anything")


def test_a_tenant_whose_key_the_server_does_not_accept_is_a_mistake() -> None:
    tenant = make_tenant("sk-typo", "open")
    with pytest.raises(PolicyError, match="checks no API keys; expected --api-key"):
        KeyRing([tenant], accepted=[])
    with pytest.raises(PolicyError, match=r"tenants\[0\].*the server accepts no such"):
        KeyRing([tenant], accepted=KEYS)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ROUTES)
async def test_an_unknown_key_is_401_before_anything_of_the_guard_speaks(
    keyed: PolicyDesk, client: httpx.AsyncClient, path: str
) -> None:
    bad = {"guard": {"policy": "nowhere"}, "vllm_xargs": {"guard_ticket": "x"}}
    for headers in ({}, {"authorization": "Bearer sk-nobody"}):
        for content in (b"{", None):
            answer = await client.post(
                path,
                headers=headers,
                **({"content": content} if content else {"json": bad}),
            )
            assert answer.status_code == 401
            assert answer.json()["error"]["message"] == "Unauthorized"
            assert not any(name.startswith("x-guard") for name in answer.headers)


@pytest.mark.anyio
@pytest.mark.parametrize("route", ["GET status", "GET drills", "POST reload"])
@pytest.mark.parametrize(
    ("shown", "status"), [(TOKEN, 404), (TOKEN[:-1], 401), ("", 401), (None, 401)]
)
async def test_the_token_alone_opens_the_guards_own_routes(
    keyed: PolicyDesk,
    client: httpx.AsyncClient,
    route: str,
    shown: str | None,
    status: int,
) -> None:
    """404: whatever is behind the guard here has no such route."""
    keyed.admin = AdminToken(TOKEN)
    headers = {} if shown is None else {"x-guard-admin-token": shown}
    method, _, name = route.partition(" ")
    answer = await client.request(method, f"/guard/{name}", headers=headers)
    assert answer.status_code == status


@pytest.mark.anyio
@pytest.mark.parametrize("path", ROUTES[:4])
async def test_the_token_opens_nothing_of_the_model(
    keyed: PolicyDesk, client: httpx.AsyncClient, path: str
) -> None:
    keyed.admin = AdminToken(TOKEN)
    answer = await client.post(path, headers={"x-guard-admin-token": TOKEN}, json={})
    assert answer.status_code == 401


@pytest.mark.anyio
async def test_a_tenants_request_says_under_which_policy_it_ran(
    keyed: PolicyDesk, client: httpx.AsyncClient
) -> None:
    for key, policy in [("sk-a", "private"), ("sk-b", "open"), ("sk-c", "default")]:
        answer = await client.post(
            "/v1/chat/completions",
            headers={"authorization": f"bearer {key}"},
            json={"messages": []},
        )
        assert answer.status_code == 200
        assert answer.headers["x-guard-policy"] == policy
        assert answer.json()["guard"]["policy"] == policy


# Drills


def ask_for_drill(
    desk: PolicyDesk, shown: str | None, drill: str = "fire"
) -> str | None:
    """Return the drill in the ticket of a request that asked for one."""
    admission = desk.admit(
        GuardField(drill=drill), authorization=None, choices=1, admin_token=shown
    )
    ticket = read_ticket(admission.ticket, SECRET, now=time.time())
    assert ticket is not None
    return ticket.drill


def test_an_administrator_gets_a_drill_and_a_client_never_has_one(
    desk: PolicyDesk,
) -> None:
    desk.admin = AdminToken(TOKEN)
    assert ask_for_drill(desk, TOKEN) == "fire"
    admission = desk.admit(
        GuardField(), authorization=None, choices=1, admin_token=TOKEN
    )
    ticket = read_ticket(admission.ticket, SECRET, now=time.time())
    assert ticket is not None
    assert ticket.drill is None


@pytest.mark.parametrize(
    "shown", [None, "", TOKEN[:-1], TOKEN.upper(), f"{TOKEN} ", f"Bearer {TOKEN}"]
)
def test_whoever_has_no_token_learns_nothing_of_a_drill(
    desk: PolicyDesk, shown: str | None
) -> None:
    desk.admin = AdminToken(TOKEN)
    refusals = []
    for drill in ("fire", "gone"):
        with pytest.raises(RequestError) as caught:
            ask_for_drill(desk, shown, drill)
        refusals.append((caught.value.status, caught.value.param, caught.value.message))
    assert refusals[0] == refusals[1]
    assert refusals[0][:2] == (403, "guard.drill")
    assert desk._visits == {}


@pytest.mark.parametrize("unset", [None, ""])
@pytest.mark.parametrize("shown", [None, "", TOKEN])
def test_without_a_token_drills_are_off(
    desk: PolicyDesk, unset: str | None, shown: str | None
) -> None:
    desk.admin = AdminToken(unset)
    with pytest.raises(RequestError, match="Drills are off on this server") as caught:
        ask_for_drill(desk, shown)
    assert (caught.value.status, caught.value.param) == (403, "guard.drill")


def test_an_unknown_drill_is_a_bad_request(desk: PolicyDesk) -> None:
    desk.admin = AdminToken(TOKEN)
    with pytest.raises(RequestError, match="does not exist") as caught:
        ask_for_drill(desk, TOKEN, "gone")
    assert (caught.value.status, caught.value.param) == (400, "guard.drill")


@pytest.mark.parametrize(
    "token", ["x" * 15, "sixteen letters!", "sixteen-lettérs!", "\n"]
)
def test_a_token_that_keeps_nobody_out_is_refused_and_never_shown(token: str) -> None:
    with pytest.raises(EngineError, match="at least 16") as caught:
        AdminToken(token)
    assert token not in str(caught.value)


def test_the_token_is_compared_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admin = AdminToken(TOKEN)
    compared: list[tuple[object, object]] = []
    plain = hmac.compare_digest
    monkeypatch.setattr(
        hmac, "compare_digest", lambda a, b: compared.append((a, b)) or plain(a, b)
    )
    digests = [hashlib.sha256(shown.encode()).digest() for shown in (TOKEN, "x")]
    assert admin.admits(TOKEN)
    assert not admin.admits("x")
    assert compared == [(digests[0], digests[0]), (digests[1], digests[0])]


@pytest.mark.anyio
async def test_the_token_is_not_handed_on(
    desk: PolicyDesk, server: Any, client: httpx.AsyncClient
) -> None:
    desk.admin = AdminToken(TOKEN)
    answer = await client.post(
        "/v1/chat/completions",
        headers={"x-guard-admin-token": TOKEN},
        json={"messages": [], "guard": {"drill": "fire"}},
    )
    assert answer.status_code == 200
    assert "x-guard-admin-token" not in server.headers[0]
