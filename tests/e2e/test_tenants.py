"""API keys on a real server: whose request runs under what, and who learns what."""

import hashlib
import json
import subprocess

import httpx
import openai
import pytest
from e2e.serving import (
    TOY_POLICIES,
    Server,
    ServerFactory,
    Toy,
    guard_command,
    guard_environment,
)
from e2e.tripwires import LONG_PROMPT

from guard.verdict import Verdict

KEYS = {"research": "sk-research", "open": "sk-open", "nobody's": "sk-known"}
UNASKED = {"research": "staff", "open": "open", "nobody's": "default"}
"""What a request of each key runs under that names no policy."""


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def keyed_server(toy: Toy, start_server: ServerFactory) -> Server:
    tenants = (
        "tenants:\n"
        f"  - {{api_key_sha256: {digest_of(KEYS['research'])}, "
        "policies: [staff, held]}\n"
        f"  - {{api_key_sha256: {digest_of(KEYS['open'])}, policies: [open]}}\n"
    )
    return start_server(
        toy.model,
        toy.write_policy("tenants", TOY_POLICIES + tenants),
        *("--block-size", "32", "--enforce-eager", "--enable-prompt-tokens-details"),
        *("--api-key", *KEYS.values()),
    )


def complete(
    server: Server, key: str, policy: str | None = None, prompt: str = "w1 w2"
) -> openai.types.Completion:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
    guard = {} if policy is None else {"guard": {"policy": policy}}
    return client.completions.create(
        model="model", prompt=prompt, max_tokens=2, extra_body=guard
    )


@pytest.mark.parametrize("tenant", KEYS)
def test_a_key_decides_what_runs_unasked(keyed_server: Server, tenant: str) -> None:
    answer = complete(keyed_server, KEYS[tenant])
    assert answer.guard["policy"] == UNASKED[tenant]
    assert Verdict.from_json(answer.guard).action == "allow"


def test_a_tenant_may_name_its_own_policies_and_no_other(keyed_server: Server) -> None:
    held = complete(keyed_server, KEYS["research"], "held")
    assert held.guard["policy"] == "held"
    for tenant, policy in [("research", "open"), ("open", "held"), ("open", "default")]:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            complete(keyed_server, KEYS[tenant], policy)
        assert caught.value.param == "guard.policy"
    with pytest.raises(openai.BadRequestError) as refused:
        complete(keyed_server, KEYS["open"], "nowhere")
    assert refused.value.param == "guard.policy"


def test_tenants_share_a_cached_prefix_within_a_policy_only(
    keyed_server: Server,
) -> None:
    def cached(key: str, policy: str) -> int:
        usage = complete(keyed_server, key, policy, LONG_PROMPT).usage
        assert usage is not None
        details = usage.prompt_tokens_details
        return (details and details.cached_tokens) or 0

    assert cached(KEYS["research"], "held") == 0
    assert cached(KEYS["open"], "open") == 0
    assert cached(KEYS["nobody's"], "held") == 128
    assert cached(KEYS["nobody's"], "open") == 128


@pytest.mark.parametrize("header", [None, "Bearer sk-wrong", "Bearer", "sk-open"])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/responses", "/invocations", "/guard/status"]
)
def test_an_unknown_key_is_401_and_learns_nothing(
    keyed_server: Server, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    method = "GET" if path == "/guard/status" else "POST"
    asked = {"model": "model", "prompt": "w1", "guard": {"policy": "staff"}}
    url = keyed_server.url + path
    answer = httpx.request(method, url, headers=headers, json=asked)
    assert answer.status_code == 401
    assert not any(name.startswith("x-guard") for name in answer.headers)
    for policy in ("staff", "held", "default"):
        assert policy not in answer.text


def test_status_names_what_the_key_may_use(keyed_server: Server) -> None:
    for tenant, policies in [("research", ["staff", "held"]), ("open", ["open"])]:
        headers = {"authorization": f"Bearer {KEYS[tenant]}"}
        answer = httpx.get(f"{keyed_server.url}/guard/status", headers=headers)
        assert list(answer.json()["policies"]) == policies
        assert answer.json()["default_policy"] == policies[0]


def test_the_command_line_asks_for_status_with_a_key(
    keyed_server: Server,
) -> None:
    command = guard_command("status", "--json", "--url", keyed_server.url)
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=guard_environment({"VLLM_API_KEY": KEYS["open"]}),
        check=True,
    )
    assert list(json.loads(ran.stdout)["policies"]) == ["open"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=guard_environment(), check=False
    )
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "401" in ran.stderr


def test_readiness_needs_no_key(keyed_server: Server) -> None:
    assert json.loads(keyed_server.get("/guard/ready"))["ready"]
