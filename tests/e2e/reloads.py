"""A server whose policy file changes under it."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import yaml
from e2e.drills import ADMIN_TOKEN
from e2e.serving import Server, Toy
from e2e.wire import Answer, read_events, request_body

from guard.calibration import load_calibration, save_calibration

KEYS = {"one": "sk-of-one", "two": "sk-of-two"}

HOLD = {"name": "hold", "sae": "s", "latents": [1, 2], "law": "ablate"}
PUSH = {"name": "push", "sae": "s", "latents": [5, 9], "law": "set", "value": 25.0}
"""Clamps under which the toy says something else."""


def watch(calibration: str, on_alarm: str = "flag") -> dict[str, Any]:
    return {
        "name": "recovery",
        "sae": "s",
        "score": "density",
        "calibration": calibration,
        "target_fpr": 0.01,
        "on_alarm": on_alarm,
    }


def write_calibrations(toy: Toy) -> None:
    """Write calibrations whose scores are twice as large, and whose bar is low."""
    plain = load_calibration(toy.folder / "density.safetensors")
    (name, entry), *_ = plain.entries.items()
    scale = entry.statistics["inverse_scale"]
    twice = replace(entry, statistics={**entry.statistics, "inverse_scale": 2 * scale})
    save_calibration(
        replace(plain, entries={name: twice}), toy.folder / "twice.safetensors"
    )
    low = tuple(0.001 * maxima for maxima in plain.maxima)
    save_calibration(replace(plain, maxima=low), toy.folder / "low.safetensors")


def dump(body: dict[str, Any]) -> str:
    """Write YAML without anchors, however often a part comes in it."""
    return yaml.safe_dump(json.loads(json.dumps(body)), sort_keys=False)


class PolicyFolder:
    """The policy file of one server, to be written again and again."""

    def __init__(self, toy: Toy, name: str) -> None:
        self._toy = toy
        self._name = name
        self.path = toy.folder / f"{name}.yaml"

    def write(self, policies: dict[str, Any], **others: Any) -> Path:
        """Write a file with these policies; `default` and all are public."""
        body = {
            "policies": policies,
            "default_policy": "default",
            "public_policies": list(policies),
            **others,
        }
        return self._toy.write_policy(self._name, dump(body))


def headers_of(key: str | None = "one", token: str | None = None) -> dict[str, str]:
    headers = {} if key is None else {"authorization": f"Bearer {KEYS[key]}"}
    if token is not None:
        headers["x-guard-admin-token"] = token
    return headers


def post_reload(server: Server, *, wait: float = 30.0) -> httpx.Response:
    return httpx.post(
        f"{server.url}/guard/reload",
        params={"wait": wait},
        headers=headers_of(token=ADMIN_TOKEN),
        timeout=120,
    )


def reload(server: Server) -> dict[str, Any]:
    """Reload, successfully."""
    answer = post_reload(server)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def read_status(server: Server) -> dict[str, Any]:
    url = f"{server.url}/guard/status"
    headers = headers_of(token=ADMIN_TOKEN)
    return dict(httpx.get(url, headers=headers, timeout=60).json())


def ask(
    server: Server, prompt: str, policy: str | None = None, **fields: Any
) -> Answer:
    """Ask with the first key, or with `key`."""
    key = fields.pop("key", "one")
    body = request_body(prompt, policy, **fields)
    if policy is not None or "trace" in fields:
        body["guard"] = {"trace": body.pop("trace", "none")}
        body["guard"] |= {} if policy is None else {"policy": policy}
    url = f"{server.url}/v1/completions"
    answer = httpx.post(url, json=body, headers=headers_of(key), timeout=120)
    found = Answer(answer.status_code, answer.json(), is_done=True)
    found.take(found.body)
    return found


@contextmanager
def in_flight(server: Server, prompt: str, **fields: Any) -> Iterator[Future[Answer]]:
    """Have a stream under way, some of whose tokens have come; it ends in the end."""
    body = request_body(prompt, stream=True, ignore_eos=True, **fields)
    url = f"{server.url}/v1/completions"
    begun: Future[None] = Future()

    def read() -> Answer:
        answer = Answer(0, {})
        with httpx.stream(
            "POST", url, json=body, headers=headers_of(), timeout=300
        ) as stream:
            answer.status = stream.status_code
            for number, data in enumerate(read_events(stream)):
                if number == 2:
                    begun.set_result(None)
                if data != "[DONE]":
                    answer.take(json.loads(data))
        return answer

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(read)
        begun.result(timeout=60)
        yield found
        found.result(timeout=300)


def wait_for_generation(server: Server, number: int, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while read_status(server)["generation"] < number:
        assert time.monotonic() < deadline, f"generation {number} did not come"
        time.sleep(0.1)
