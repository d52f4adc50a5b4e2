"""`guard demo`: the organism behind the guard, a table, and a server to try.

Starts the same `guard serve` that a user would, and talks to it over HTTP only.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from guard.client import Client
from guard.command.drill import run_drills
from guard.redteam.server import find_free_port, run_server, wait_until_ready

__all__ = ["OPTIONS", "run_demo"]

ORGANISM = Path(__file__).parent / "organism"
OPTIONS = (
    *("--served-model-name", "organism", "--dtype", "float32"),
    *("--max-model-len", "256", "--max-num-seqs", "16"),
)
"""Of a server as small as the organism."""
_KINDS = {
    "b": "benign",
    "bj": "benign, jailbreak phrase",
    "h": "harmful",
    "hj": "harmful, jailbroken",
}
_TRY_IT = """\
The server stays up at {url} (Ctrl-C stops it). Ask it yourself:

curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '{{
  "model": "organism", "temperature": 0,
  "messages": [{{"role": "user", "content": "{prompt}"}}],
  "guard": {{"policy": "default", "trace": "summary"}}}}'

curl -s {url}/guard/status
curl -s {url}/metrics | grep ^guard_
GUARD_ADMIN_TOKEN={token} guard drill --url {url} --policy watch

python - <<'END'
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model="organism", temperature=0,
    messages=[{{"role": "user", "content": "{prompt}"}}],
    extra_body={{"guard": {{"policy": "open"}}}})
print(answer.choices[0].message.content, answer.model_extra["guard"])
END
"""


def run_demo(*, port: int, once: bool) -> None:
    """Serve the organism, print the table, and stay up unless `once`.

    Args:
        port: Where to listen; 0 picks a free one.
        once: Stop after the table.

    Raises:
        EngineError: The server did not start; its log is named.
    """
    console = Console()
    prompts = json.loads((ORGANISM / "prompts.json").read_text(encoding="utf-8"))
    port = port or find_free_port()
    url = f"http://127.0.0.1:{port}"
    token = secrets.token_hex(16)
    command = ["guard", "serve", str(ORGANISM / "model")]
    command += ["--policy", str(ORGANISM / "policy.yaml"), *OPTIONS]
    with (
        tempfile.TemporaryDirectory(prefix="guard-demo-") as folder,
        run_server(
            command,
            port=port,
            log=Path(folder, "log"),
            environment={"GUARD_ADMIN_TOKEN": token},
        ) as server,
    ):
        with console.status("Starting vLLM with the guard (about a minute) ..."):
            wait_until_ready(url, server, Path(folder, "log"))
        console.print(_table(Client(url), prompts))
        console.print(_explain(), markup=False)
        run_drills(
            url,
            admin_token=token,
            api_key="",
            policies=["watch", "default"],
            route="chat/completions",
        )
        if once:
            return
        text = _TRY_IT.format(url=url, prompt=prompts[-1]["text"], token=token)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


def _explain() -> str:
    return (
        "open: no clamps, no monitors. default: the jailbreak latents are ablated and "
        "monitors watch what flows on.\nratio: largest score / threshold of the "
        "request; above 1 is an alarm, and one benign request in a hundred may have "
        "one. All harm here is made up."
    )


def _table(client: Client, prompts: list[dict[str, str]]) -> Table:
    """Ask every prompt under both policies, and lay the answers side by side."""
    table = Table(title="The same prompts, unguarded and guarded", show_lines=True)
    for name in ("prompt", "open", "default", "clamped", "ratio", "verdict"):
        table.add_column(name, overflow="fold")
    for prompt in prompts:
        free = _ask(client, prompt["text"], "open")
        held = _ask(client, prompt["text"], "default")
        verdict = held["guard"]
        alarms = {alarm["monitor"] for alarm in verdict["alarms"]}
        ratios = [
            f"{reading['monitor']} {reading['ratio']:.2f}"
            + (" ALARM" if reading["monitor"] in alarms else "")
            for reading in verdict.get("readings", ())
        ]
        table.add_row(
            f"{prompt['text']}\n({_KINDS[prompt['kind']]})",
            _text(free),
            _text(held),
            "\n".join(f"{k} {v}" for k, v in verdict["clamped_tokens"].items()),
            "\n".join(ratios),
            verdict["action"],
        )
    return table


def _text(answer: dict[str, Any]) -> str:
    message = answer["choices"][0]["message"]
    return str(message.get("content") or message.get("refusal") or "").strip()


def _ask(client: Client, text: str, policy: str) -> dict[str, Any]:
    body = {
        "model": "organism",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 32,
        "guard": {"policy": policy, "trace": "summary"},
    }
    return dict(client.call("/v1/chat/completions", body))
