"""`guard status` as a person types it, against a real server."""

import json
import re
import signal
import subprocess

from e2e.serving import Server, guard_command, guard_environment

WIDE = {"COLUMNS": "200"}


def status(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        guard_command("status", *arguments),
        env=guard_environment(WIDE),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def count_requests(shown: str, policy: str) -> int:
    row = next(line for line in shown.splitlines() if re.search(f" {policy} ", line))
    return int(re.split("[│┃]", row)[5])


def test_a_request_is_seen_in_the_row_of_its_policy(toy_server: Server) -> None:
    before = status("--url", toy_server.url)
    assert before.returncode == 0, before.stderr
    said = json.loads(toy_server.get("/guard/status"))
    assert said["policies"]["held"]["fingerprint"][:12] in before.stdout
    assert f"generation {said['generation']}," in before.stdout
    toy_server.client.completions.create(
        model="model",
        prompt="w1 w2",
        max_tokens=2,
        extra_body={"guard": {"policy": "held"}},
    )
    after = status("--url", toy_server.url)
    counted = [count_requests(done.stdout, "held") for done in (before, after)]
    assert counted[1] == counted[0] + 1


def test_json_is_what_the_server_says(toy_server: Server) -> None:
    shown = json.loads(status("--url", toy_server.url, "--json").stdout)
    assert shown == json.loads(toy_server.get("/guard/status"))


def test_a_watch_goes_on_until_it_is_interrupted(toy_server: Server) -> None:
    command = guard_command(
        "status", "--url", toy_server.url, "--watch", "--every", "1"
    )
    process = subprocess.Popen(
        command, env=guard_environment(WIDE), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    looks = 0
    with process:
        while looks < 2 and (line := process.stdout.readline()):
            looks += toy_server.url in line
        process.send_signal(signal.SIGINT)
        # Read to the end: leaving closes the pipe, and a last look may break on it.
        process.communicate(timeout=60)
    assert looks == 2
    assert process.returncode == 130
