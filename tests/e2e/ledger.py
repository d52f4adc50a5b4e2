"""The page on which every fault stands: what a client saw, and what the operator.

Each test of a fault writes down what it saw and holds that against `docs/faults.md`.
With GUARD_WRITE_FAULTS=1 in the environment it writes the page instead.
"""

import os
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"

FAULTS = (
    "a hook stops running",
    "a step's readings are lost",
    "a step's readings come with the next step",
    "every step and its readings are late",
    "verdicts are lost on their way to the API server",
    "each verdict comes with the tokens of the next step",
    "tokens and their verdicts are late on their way to the API server",
    "`on_error: open`, a hook stops running",
    "`on_error: open`, a step's readings are lost",
    "`on_error: open`, verdicts are lost on their way to the API server",
    "the model computes NaN, a monitor blocks",
    "the model computes NaN, a monitor flags",
    "the model computes NaN, no monitor",
    "`on_error: open`, the model computes NaN, no monitor",
    "a request is given the KV blocks of one that computed NaN",
    "the engine core hangs",
    "a worker hangs",
    "the engine core hangs for good",
    "the disk is full",
    "no process has a file descriptor left",
    "a storm of harmless signals, stops and continues",
    "an API server of two is stopped",
    "SIGTERM during the start",
    "SIGTERM",
    "a storm of SIGTERM and SIGINT to every process",
    "a worker is killed",
    "one of two tensor-parallel ranks is killed",
    "the engine core is killed",
    "an API server of two is killed",
)
"""In the order of the page."""

_HEAD = """\
# Faults

What happens when something breaks under load: what the client of a running stream
saw, and what the operator did. Every row is written by the test that it names, on a
real server, and that test fails where it sees something else
(`GUARD_WRITE_FAULTS=1 make test ARGS=tests/e2e/test_outage.py`). "Closed"
is the default, `on_error: closed`.

What a model computes is looked at where its stream ends, of every token: a request
under an enforcing policy ends where that is not finite, with or without monitors, and
one under a policy that observes is flagged. Attention kernels multiply what lies behind
the end of a sequence by 0, and 0 * NaN is NaN: so a KV block that such a request had is
zeroed before another one is given it.

Told to end, vLLM kills its engines and then waits without end for the connections of
those who hope for more of an answer; the guard ends each with an `error` event. Told so
while its engines start, vLLM drops the order and waits for them; the guard holds it to
it.

For a worker that hangs vLLM waits as long as the row says, then the server ends; for an
engine core it would wait without end, and so would clients: the guard gives one up that
has not answered for as long and 15 seconds more, and the server ends as if it had died.
Until then `/guard/ready` tells and `/health` does not: readiness by the former keeps
clients away.

"The disk is full" is tried with one API server and `RLIMIT_FSIZE` at 0: writing fails
with EFBIG, where a full disk says ENOSPC. The audit log has met the latter as well
(`tests/test_audit.py`).

What is not here vLLM does alone. Seconds from a killed process to not ready are in
[faults.json](../benchmarks/results/faults.json).

| fault | what the client saw | what the operator saw | test |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Ledger:
    """Where one test writes down what it saw."""

    test: str
    """File and name of the test."""

    def enter(self, fault: str, *, client: str, operator: str) -> None:
        """Hold what was seen against the page, or write it there."""
        assert fault in FAULTS
        row = f"| {fault} | {client} | {operator} | `{self.test}` |"
        rows = read_page()
        if os.environ.get("GUARD_WRITE_FAULTS"):
            rows[fault] = row
            lines = [rows[known] for known in FAULTS if known in rows]
            PAGE.write_text(_HEAD + "\n".join(lines) + "\n", encoding="utf-8")
        else:
            assert rows.get(fault) == row, "docs/faults.md says otherwise"


def read_page() -> dict[str, str]:
    """Return the rows of the page, by fault."""
    if not PAGE.exists():
        return {}
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows[1:]}
