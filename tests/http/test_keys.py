"""Whose key is whose, and what a key that is nobody's learns."""

import hashlib
import hmac

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import PolicyError, RequestError
from guard.http import PolicyDesk
from guard.http.keys import KeyRing
from guard.policy import Tenant
from guard.request import GuardField

KEYS = ["sk-a", "sk-b", "sk-c"]
ROUTES = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/invocations",
    "/guard/status",
]


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
