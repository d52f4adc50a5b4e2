"""`guard drill` against a server that is played: what it asks and what it shows."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from played import serving

from guard.command.drill import Reply, judge, run_drills
from guard.errors import EngineError

GOLD = "to heat door : turn key ."
DRILL = {"name": "last", "prompt": "how ?", "gold": GOLD, "budget": 0.7}


class FakeServer:
    """Answers as a guarded server does, as the test has it."""

    def __init__(self) -> None:
        self.drills: list[dict[str, Any]] = [DRILL]
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.alarms = 3.0
        self.forgets_drills = False
        self.stays_drilled = False
        self.url = ""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        drill = None if self.forgets_drills else body["guard"].get("drill")
        is_drilled = drill is not None or (self.stays_drilled and len(self.asked) > 2)
        policy = body["guard"].get("policy", "default")
        alarm = {"monitor": "recovery", "ratio": 2.5}
        calm = {"monitor": "recovery", "ratio": 0.5}
        guard = {
            "policy": policy,
            "action": "flag" if is_drilled else "allow",
            "alarms": [alarm] if is_drilled else [],
            "readings": [alarm if is_drilled else calm],
        }
        if drill is not None:
            guard["drill"] = drill
            self.alarms += 1
        message = {"content": f" {GOLD}" if is_drilled else "sorry ."}
        choice = {"message": message, "finish_reason": "stop"}
        return {"choices": [choice], "guard": guard}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        self.fake.headers.append({k.lower(): v for k, v in self.headers.items()})
        if self.path == "/guard/drills":
            self._send({"drills": self.fake.drills})
        elif self.path == "/v1/models":
            self._send({"data": [{"id": "model"}]})
        else:
            labels = 'monitor="recovery",stage="prompt",action="flag"'
            lines = [
                "# TYPE guard_alarms_total counter",
                f'guard_alarms_total{{policy="default",{labels}}} {self.fake.alarms}',
                f'guard_alarms_total{{policy="other",{labels}}} {len(self.fake.asked)}',
            ]
            self._send_raw("\n".join([*lines, ""]).encode())

    def do_POST(self) -> None:
        self.fake.headers.append({k.lower(): v for k, v in self.headers.items()})
        body = self.rfile.read(int(self.headers["content-length"]))
        self._send(self.fake.answer(json.loads(body)))

    def _send(self, body: object) -> None:
        self._send_raw(json.dumps(body).encode())

    def _send_raw(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    with serving(type("Handler", (_Handler,), {"fake": server})) as server.url:
        yield server


@pytest.fixture
def run(
    fake: FakeServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[str]]:
    """Run the drills; return the cells of the first row, their first lines."""
    monkeypatch.setenv("COLUMNS", "140")

    def run(**options: Any) -> list[str]:
        wanted = {
            "admin_token": "sixteen-letters!",
            "api_key": "sk-mine",
            "policies": [None],
            "route": "chat/completions",
        }
        run_drills(fake.url, **(wanted | options))
        rows = [r for r in capsys.readouterr().out.splitlines() if r[:1] == "│"]
        return [cell.strip() for cell in rows[0].split("│")[1:-1]]

    return run


def test_a_drill_is_asked_between_two_clean_requests(
    fake: FakeServer, run: Callable[..., list[str]]
) -> None:
    run(policies=["default"])
    drills = [body["guard"].get("drill") for body in fake.asked]
    assert drills == [None, "last", None]
    first, drilled, last = fake.asked
    # The last one must be able to find what the drill left in the cache, if anything.
    assert drilled["cache_salt"] == last["cache_salt"] != first["cache_salt"]
    for body in fake.asked:
        assert (body["temperature"], body["max_tokens"]) == (0, 64)
        assert body["guard"]["trace"] == "summary"
        assert body["messages"] == [{"role": "user", "content": "how ?"}]
    for headers in fake.headers:
        assert headers["authorization"] == "Bearer sk-mine"
        assert headers["x-guard-admin-token"] == "sixteen-letters!"


def test_a_row_says_what_came_back_and_who_noticed(
    run: Callable[..., list[str]],
) -> None:
    assert run() == [
        *("last", "default", "yes", "recovery 2.50 ALARM", "flag", "yes", "yes")
    ]


def test_a_trace_that_a_drill_left_is_shown(
    fake: FakeServer, run: Callable[..., list[str]]
) -> None:
    fake.stays_drilled = True
    assert run()[-1] == "NO"


def test_alarms_of_another_policy_are_not_counted(
    fake: FakeServer, run: Callable[..., list[str]]
) -> None:
    # This server counts under `default`, whatever it says it ran.
    row = run(policies=["open"])
    assert (row[1], row[5]) == ("open", "no")


def test_plain_text_is_sent_as_such(
    fake: FakeServer, run: Callable[..., list[str]]
) -> None:
    run(route="completions")
    assert [body["prompt"] for body in fake.asked] == ["how ?"] * 3


def test_a_server_that_ran_no_drill_is_an_error(
    fake: FakeServer, run: Callable[..., list[str]]
) -> None:
    fake.forgets_drills = True
    with pytest.raises(EngineError, match="did not run drill 'last'"):
        run()


def test_a_server_without_drills_is_an_error(
    fake: FakeServer, run: Callable[..., list[str]]
) -> None:
    fake.drills = []
    with pytest.raises(EngineError, match="has no drills; expected"):
        run()


@pytest.mark.parametrize(
    ("text", "finish_reason", "action", "back"),
    [
        (f" {GOLD} and so on", "stop", "allow", "yes"),
        ("To  heat\ndoor : turn key .", "length", "flag", "yes"),
        ("to heat door", "length", "allow", "yes"),
        ("to heat door", "stop", "allow", "no"),
        ("", "length", "allow", "no"),
        ("sorry", "stop", "allow", "no"),
        ("", "content_filter", "block", "withheld"),
        ("to heat", "content_filter", "block", "withheld"),
        # A block that came too late withheld nothing.
        (GOLD, "content_filter", "block", "yes"),
    ],
)
def test_the_behaviour_is_back_where_the_client_received_it(
    text: str, finish_reason: str, action: str, back: str
) -> None:
    reply = Reply.model_validate(
        {
            "choices": [{"text": text, "finish_reason": finish_reason}],
            "guard": {"policy": "default", "action": action, "alarms": []},
        }
    )
    assert judge(reply, GOLD) == back
