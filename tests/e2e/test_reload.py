"""Another policy file for a server that runs: all of it or nothing, and nobody lost."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from e2e import reloads
from e2e.drills import ADMIN_TOKEN
from e2e.faults import Faults
from e2e.reloads import (
    HOLD,
    KEYS,
    PUSH,
    PolicyFolder,
    ask,
    dump,
    in_flight,
    post_reload,
    read_status,
    reload,
    wait_for_generation,
    watch,
)
from e2e.serving import Server, ServerFactory, Toy
from e2e.test_tenants import digest_of
from e2e.tripwires import LONG_PROMPT, PROMPT

REMEMBER = {
    "name": "lift",
    "sae": "s",
    "latents": [5],
    "law": "set",
    "value": 4.0,
    "when": {"latents": [7, 8], "above": 0.5, "scope": "request"},
}
PLAIN = {
    "default": {"clamps": [HOLD], "monitors": [watch("density.safetensors")]},
    "pushed": {"clamps": [PUSH]},
    "open": {},
    "sticky": {"clamps": [REMEMBER]},
}
CHANGED = PLAIN | {
    "default": {"clamps": [PUSH], "monitors": [watch("twice.safetensors")]}
}


@pytest.fixture(scope="module")
def folder(toy: Toy) -> PolicyFolder:
    reloads.write_calibrations(toy)
    return PolicyFolder(toy, "reloaded")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("reload-faults"))


@pytest.fixture(scope="module")
def running(
    toy: Toy, folder: PolicyFolder, faults: Faults, start_server: ServerFactory
) -> Server:
    """Serve the toy, compiled, to two keys."""
    return start_server(
        toy.model,
        folder.write(PLAIN),
        *("--block-size", "32", "--enable-prompt-tokens-details"),
        *("--api-key", *KEYS.values()),
        environment=faults.environment | {"GUARD_ADMIN_TOKEN": ADMIN_TOKEN},
    )


@pytest.fixture
def server(running: Server, folder: PolicyFolder) -> Iterator[Server]:
    """Have the plain policies at the beginning."""
    folder.write(PLAIN)
    reload(running)
    yield running
    assert running.process.poll() is None


def largest(answer: Any) -> float:
    """Return the score of the one monitor of an answer."""
    (reading,) = answer.guard["readings"]
    return float(reading["score"])


def test_a_reload_changes_what_new_requests_run_under_and_none_in_flight(
    server: Server, folder: PolicyFolder, faults: Faults
) -> None:
    fields = {"max_tokens": 80, "ignore_eos": True}
    before = ask(server, PROMPT, trace="summary", **fields)
    pushed = ask(server, PROMPT, "pushed", **fields)
    long = {"max_tokens": 200, "guard": {"trace": "summary"}}
    with in_flight(server, PROMPT, **long) as undisturbed:
        pass
    assert before.choices[0].token_ids[20:] != pushed.choices[0].token_ids[20:]
    with faults.on("slow-steps"), in_flight(server, PROMPT, **long) as begun:
        folder.write(CHANGED)
        told = reload(server)
        after = ask(server, PROMPT, trace="summary", **fields)
        assert not begun.done()
    assert after.choices[0].token_ids == pushed.choices[0].token_ids
    assert after.guard["fingerprint"] != before.guard["fingerprint"]
    assert after.guard["clamped_tokens"].keys() == {"push"}
    ended, expected = begun.result(), undisturbed.result()
    assert ended.choices[0].token_ids == expected.choices[0].token_ids
    assert ended.guard["fingerprint"] == before.guard["fingerprint"]
    assert ended.guard["clamped_tokens"] == expected.guard["clamped_tokens"]
    assert largest(ended) == pytest.approx(largest(expected), rel=1e-4)
    status = read_status(server)
    assert status["generation"] == told["generation"]
    assert status["policies"]["default"]["fingerprint"] == after.guard["fingerprint"]
    metrics = server.metrics()
    assert metrics["guard_policy_generation"] == told["generation"]
    info = 'guard_policy_info{fingerprint="%s",policy="default"}'
    assert metrics[info % after.guard["fingerprint"]] == 1
    assert info % before.guard["fingerprint"] not in metrics


def test_other_statistics_score_new_requests_and_none_in_flight(
    server: Server, folder: PolicyFolder, faults: Faults
) -> None:
    fields: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "trace": "summary"}
    plain = largest(ask(server, PROMPT, **fields))
    long = {"max_tokens": 200, "guard": {"trace": "summary"}}
    with faults.on("slow-steps"), in_flight(server, PROMPT, **long) as begun:
        twice = watch("twice.safetensors")
        folder.write(PLAIN | {"default": {"clamps": [HOLD], "monitors": [twice]}})
        reload(server)
        after = largest(ask(server, PROMPT, **fields | {"max_tokens": 10}))
        assert not begun.done()
    assert largest(begun.result()) == pytest.approx(plain, rel=1e-4)
    again = largest(ask(server, PROMPT, **fields))
    assert again == pytest.approx(2 * plain, rel=1e-4)
    assert after == pytest.approx(again, rel=0.5)


def test_thresholds_and_actions_change_for_new_requests_only(
    server: Server, folder: PolicyFolder, faults: Faults
) -> None:
    assert ask(server, PROMPT).guard["action"] == "allow"
    with faults.on("slow-steps"), in_flight(server, PROMPT, max_tokens=100) as begun:
        for action, said in (("flag", "flag"), ("block", "block")):
            if action == "block":
                begun.result(timeout=120)
            monitors = [watch("low.safetensors", action)]
            folder.write(PLAIN | {"default": {"clamps": [HOLD], "monitors": monitors}})
            reload(server)
            assert ask(server, PROMPT).guard["action"] == said
    assert begun.result().guard["action"] == "allow"
    assert len(begun.result().choices[0].token_ids) == 100


def test_default_policy_and_tenants_change(
    server: Server, folder: PolicyFolder
) -> None:
    assert ask(server, "w1", key="two").guard["policy"] == "default"
    tenants = [{"api_key_sha256": digest_of(KEYS["two"]), "policies": ["pushed"]}]
    folder.write(PLAIN, tenants=tenants, default_policy="open")
    reload(server)
    assert ask(server, "w1").guard["policy"] == "open"
    assert ask(server, "w1", key="two").guard["policy"] == "pushed"
    assert ask(server, "w1", "default", key="two").status == 403


def test_policies_come_and_go(server: Server, folder: PolicyFolder) -> None:
    clamp = HOLD | {"name": "fresh", "latents": [20, 21, 22, 23]}
    folder.write(PLAIN | {"new": {"clamps": [clamp, PUSH]}})
    reload(server)
    answer = ask(server, PROMPT, "new", ignore_eos=True)
    assert answer.guard["clamped_tokens"].keys() == {"fresh", "push"}
    folder.write({"default": PLAIN["default"]})
    reload(server)
    assert ask(server, PROMPT, "new").status == 400
    assert ask(server, PROMPT, "pushed").status == 400


def test_a_cached_prefix_belongs_to_its_policy(
    server: Server, folder: PolicyFolder
) -> None:
    prompt = f"w77 {LONG_PROMPT}"

    def cached() -> int:
        answer = ask(server, prompt, max_tokens=1, trace="summary")
        details = answer.usage["prompt_tokens_details"] or {}
        return int(details.get("cached_tokens") or 0)

    assert (cached(), cached()) == (0, 128)
    folder.write(CHANGED)
    reload(server)
    assert (cached(), cached()) == (0, 128)
    folder.write(PLAIN)
    reload(server)
    assert cached() == 128


def test_the_same_file_is_no_new_generation(server: Server) -> None:
    number = read_status(server)["generation"]
    assert reload(server)["generation"] == number


def wrong_sae(body: dict[str, Any], **changed: str) -> str:
    return dump(body | {"saes": {"s": body["saes"]["s"] | changed}})


def with_default(body: dict[str, Any], **changed: Any) -> str:
    policies = {**body["policies"], "default": body["policies"]["default"] | changed}
    return dump(body | {"policies": policies})


def many(body: dict[str, Any]) -> str:
    policies = body["policies"] | {f"p{i}": {} for i in range(13)}
    return dump(body | {"policies": policies, "max_policies": 99})


BAD: dict[str, tuple[Any, str]] = {
    "syntax": (lambda _: "policies: [", "reloaded.yaml:"),
    "unknown key": (
        lambda body: dump(body | {"polices": 1}),
        "did you mean 'policies'?",
    ),
    "another SAE": (
        lambda body: wrong_sae(body, sha256="0" * 64),
        "SAE 's' has another sha256; that needs a restart",
    ),
    "another place": (
        lambda body: wrong_sae(body, hook_point="layers.0.resid_post"),
        "SAE 's' has another hook_point; that needs a restart",
    ),
    "a calibration for other clamps": (
        lambda body: with_default(body, clamps=[PUSH]),
        "was made under other clamps",
    ),
    "a further score": (
        lambda body: with_default(
            body,
            monitors=[
                body["policies"]["default"]["monitors"][0]
                | {"score": "error_norm", "name": "n"}
            ],
        ),
        "a further score 'error_norm'",
    ),
    "too many policies": (many, "17 policies are more than there are slots for, 16"),
    "too many latents": (
        lambda body: dump(
            body
            | {
                "policies": {
                    "default": {"clamps": [HOLD | {"latents": list(range(10, 60))}]}
                },
                "public_policies": ["default"],
            }
        ),
        "no room for",
    ),
    "a latent beyond the last": (
        lambda body: dump(
            body
            | {
                "policies": {"default": {"clamps": [HOLD | {"latents": [9999]}]}},
                "public_policies": ["default"],
            }
        ),
        "names latent 9999",
    ),
    "an unknown tenant": (
        lambda body: dump(
            body
            | {
                "tenants": [
                    {"api_key_sha256": digest_of("sk-new"), "policies": ["open"]}
                ]
            }
        ),
        "the server accepts no such key",
    ),
    "gone": (None, "cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_leaves_everything_as_it_was_and_says_why(
    name: str, server: Server, folder: PolicyFolder
) -> None:
    make, words = BAD[name]
    before, counted = read_status(server), server.metrics()
    body = yaml.safe_load(folder.path.read_text())
    if make is None:
        folder.path.unlink()
    else:
        folder.path.write_text(make(body))
    answer = post_reload(server)
    assert answer.status_code == 422
    said = answer.json()["error"]["message"]
    assert words in said
    assert "\n" not in said
    after, metrics = read_status(server), server.metrics()
    last = after.pop("last_reload")
    before.pop("last_reload")
    assert after == before
    assert last["result"] == "refused"
    assert words in last["reason"]
    refused = 'guard_policy_reloads_total{result="refused"}'
    assert metrics[refused] == counted[refused] + 1
    assert metrics["guard_policy_last_reload_successful"] == 0
    assert metrics["guard_policy_generation"] == before["generation"]
    told = ask(server, PROMPT).guard
    assert told["fingerprint"] == before["policies"]["default"]["fingerprint"]


def test_a_rank_that_cannot_stage_stops_all_of_it(
    server: Server, folder: PolicyFolder, faults: Faults
) -> None:
    before = read_status(server)
    held = ask(server, PROMPT, ignore_eos=True)
    folder.write(CHANGED)
    with faults.on("stage-fails"):
        answer = post_reload(server)
    assert answer.status_code == 422
    assert "rank 0: OSError: the disk is on fire" in answer.json()["error"]["message"]
    after = read_status(server)
    assert after["engines"] == before["engines"]
    assert after["fingerprint"] == before["fingerprint"]
    same = ask(server, PROMPT, ignore_eos=True)
    assert same.choices[0].token_ids == held.choices[0].token_ids
    assert reload(server)["generation"] == before["generation"] + 1


def test_a_third_generation_waits_for_the_first_to_end(
    server: Server, folder: PolicyFolder, faults: Faults
) -> None:
    with faults.on("slow-steps"), in_flight(server, PROMPT, max_tokens=300) as begun:
        folder.write(CHANGED)
        number = reload(server)["generation"]
        folder.write(PLAIN)
        answer = post_reload(server, wait=0.3)
        assert answer.status_code == 409
        assert "requests are still in flight" in answer.json()["error"]["message"]
        assert not begun.done()
        assert read_status(server)["generation"] == number
        assert post_reload(server, wait=60).json()["generation"] == number + 1
        begun.result(timeout=5)
    assert begun.result().choices[0].finish_reason == "length"


def test_reloads_under_load_lose_nothing(server: Server, folder: PolicyFolder) -> None:
    expected = {}
    for policies in (PLAIN, CHANGED):
        folder.write(policies)
        reload(server)
        answer = ask(server, PROMPT, ignore_eos=True)
        expected[answer.guard["fingerprint"]] = answer.choices[0].token_ids
    assert len(expected) == 2
    stop = time.monotonic() + 15

    def load(worker: int) -> list[Any]:
        found = []
        while time.monotonic() < stop:
            found.append(ask(server, PROMPT, ignore_eos=True))
        return found

    with ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(load, i) for i in range(6)]
        reloaded = 0
        while time.monotonic() < stop - 1:
            folder.write((PLAIN, CHANGED)[reloaded % 2])
            reload(server)
            reloaded += 1
        answers = [answer for worker in workers for answer in worker.result()]
    assert reloaded > 5
    seen = {answer.guard["fingerprint"] for answer in answers}
    assert seen == set(expected)
    for answer in answers:
        assert answer.status == 200
        assert answer.choices[0].token_ids == expected[answer.guard["fingerprint"]]


@pytest.mark.parametrize("token", [None, ADMIN_TOKEN[:-1], ""])
def test_nobody_but_an_administrator_reloads(server: Server, token: str | None) -> None:
    number = read_status(server)["generation"]
    url = f"{server.url}/guard/reload"
    answer = httpx.post(url, headers=reloads.headers_of(token=token))
    assert answer.status_code == 403
    assert httpx.post(url, headers=reloads.headers_of(None, token)).status_code == 401
    assert read_status(server)["generation"] == number


def test_an_administrator_needs_no_key_besides(server: Server) -> None:
    number = read_status(server)["generation"]
    headers = reloads.headers_of(None, ADMIN_TOKEN)
    answer = httpx.post(f"{server.url}/guard/reload", headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["generation"]) == (200, number)
    assert answer.json()["followed"]


@pytest.mark.parametrize("wait", ["x", "-1", "nan", "1e9"])
def test_a_wait_that_is_no_time_is_refused(server: Server, wait: str) -> None:
    answer = httpx.post(
        f"{server.url}/guard/reload?wait={wait}",
        headers=reloads.headers_of(token=ADMIN_TOKEN),
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "wait"


def test_a_hangup_signal_reloads(server: Server, folder: PolicyFolder) -> None:
    number = read_status(server)["generation"]
    folder.write(CHANGED)
    os.kill(server.process.pid, signal.SIGHUP)
    wait_for_generation(server, number + 1)
    assert ask(server, PROMPT).guard["clamped_tokens"].keys() == {"push"}


def test_watched_files_are_reloaded_when_they_or_what_a_link_leads_to_is_swapped(
    toy: Toy,
    tmp_path_factory: pytest.TempPathFactory,
    start_server: ServerFactory,
) -> None:
    """As Kubernetes updates the files of a ConfigMap: one of two links renamed."""
    reloads.write_calibrations(toy)
    mount = tmp_path_factory.mktemp("mount")
    for name, policies in (("one", PLAIN), ("two", CHANGED)):
        (mount / f"..{name}").mkdir()
        source = PolicyFolder(toy, f"watched-{name}").write(policies)
        body = yaml.safe_load(source.read_text())
        body["saes"]["s"]["path"] = str(toy.folder / "sae")
        for policy in body["policies"].values():
            for monitor in policy.get("monitors", ()):
                monitor["calibration"] = str(toy.folder / monitor["calibration"])
        (mount / f"..{name}" / "policy.yaml").write_text(dump(body))
    (mount / "..data").symlink_to("..one")
    path = mount / "policy.yaml"
    path.symlink_to("..data/policy.yaml")
    watched = start_server(toy.model, path, "--watch", "--enforce-eager")
    first = ask(watched, PROMPT).guard
    assert first["clamped_tokens"].keys() == {"hold"}
    swap(mount, "..two")
    wait_for_generation(watched, 2)
    assert ask(watched, PROMPT).guard["clamped_tokens"].keys() == {"push"}
    (mount / "..three").mkdir()
    swap(mount, "..three")
    deadline = time.monotonic() + 20
    while (read_status(watched)["last_reload"] or {}).get("result") != "refused":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "No such file" in read_status(watched)["last_reload"]["reason"]
    assert ask(watched, PROMPT).guard["clamped_tokens"].keys() == {"push"}
    swap(mount, "..one")
    wait_for_generation(watched, 3)
    again = ask(watched, PROMPT, trace="summary")
    assert again.guard["fingerprint"] == first["fingerprint"]
    # A file that the policy file names, and not that one itself.
    other = PLAIN["default"] | {"monitors": [watch("twice.safetensors")]}
    PolicyFolder(toy, "watched-twice").write({"default": other})
    calibrations = toy.folder / "calibrations"
    (calibrations / "watched-twice/default/twice.safetensors").rename(
        calibrations / "watched-one/default/density.safetensors"
    )
    wait_for_generation(watched, 4)
    doubled = ask(watched, PROMPT, trace="summary")
    assert largest(doubled) == pytest.approx(2 * largest(again), rel=1e-4)
    answer = httpx.post(f"{watched.url}/guard/reload", headers={"x": "y"})
    assert answer.status_code == 404


def swap(mount: Path, target: str) -> None:
    """Let `..data` lead elsewhere, in one step."""
    (mount / "..new").symlink_to(target)
    (mount / "..new").rename(mount / "..data")
