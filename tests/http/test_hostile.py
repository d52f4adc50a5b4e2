"""Whatever a client sends: answered once and soon, and let in with a ticket or not."""

import json
import time
from typing import Any

import anyio
from fuzz.limits import attempt, fuzz
from fuzz.mutation import TEXTS, changed, damaged, odd_values, write_json
from hypothesis import example, given
from hypothesis import strategies as st

from guard.http.keys import AdminToken, KeyRing
from guard.request import TICKET_KEY, Ticket, read_field, read_ticket, sign_ticket

TOKEN, KEY = "of-an-administrator", "sk-of-a-client"
SECRET = b"a secret of the test, 32 bytes.."
PATHS = ["/v1/chat/completions", "/v1/completions"]
GOOD: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": ["a", "b"],
    "n": 1,
    "stream": False,
    "vllm_xargs": {"a": 1},
    "structured_outputs": {"regex": "a"},
    "guard": {"policy": "open", "trace": "summary", "drill": "fire"},
}
PLAIN = {key: value for key, value in GOOD.items() if key != "guard"}
trees = changed(GOOD) | changed(PLAIN, most=1) | st.just(PLAIN) | st.just(PLAIN)
bodies = trees.map(write_json).map(str.encode)
values = st.sampled_from(
    [
        *(f"Bearer {KEY}", "Bearer", "bearer  ", KEY, TOKEN, "9" * 400, "-1", "gzip"),
        *("0x10", "identity", "text/event-stream", "\xb2", "\xff" * 3, "a" * 9000),
    ]
) | st.text(st.characters(max_codepoint=255), max_size=12)
names = st.sampled_from(
    "authorization x-guard-admin-token content-length content-type content-encoding "
    "transfer-encoding x-guard-policy x-guard-id accept-encoding host".split()
) | st.text("abc-_:\xff", max_size=8)
headers = st.lists(st.tuples(names, values), max_size=6)


@st.composite
def pieces(draw: st.DrawFn, body: bytes) -> list[dict[str, Any]]:
    """A body as it comes, in a few messages; its client waits, or is gone before."""
    messages = []
    while len(messages) < 4 and body:
        at = draw(st.integers(0, len(body)))
        messages.append({"type": "http.request", "body": body[:at], "more_body": True})
        body = body[at:]
    if draw(st.integers(0, 9)) == 0:
        return [*messages, {"type": "http.disconnect"}]
    return [*messages, {"type": "http.request", "body": body}]


others = ["/v1/chat/completions/", "/guard/status", "/v1/responses"]
others += [f"/v1/completions/{text}" for text in TEXTS]
requests = st.tuples(
    # Mostly where a body is read.
    st.sampled_from(PATHS) | st.sampled_from(PATHS) | st.sampled_from(others),
    headers,
    (bodies | bodies | bodies.flatmap(damaged)).flatmap(pieces),
)


def test_any_request_is_answered_once_and_let_in_only_with_a_ticket(
    guarded: Any, server: Any, desk: Any
) -> None:
    server.texts = ["one", "two"]
    desk.admin = AdminToken(TOKEN)
    statuses = set()

    async def send(path: str, head: list[Any], body: list[Any]) -> list[Any]:
        sent: list[Any] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode("utf-8", "replace"),
            "root_path": "",
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "headers": [(n.encode("latin-1"), v.encode("latin-1")) for n, v in head],
        }

        async def receive() -> Any:
            if not body:
                await anyio.sleep_forever()
            is_gone = body[0]["type"] == "http.disconnect"
            return body[0] if is_gone else body.pop(0)

        async def take(message: Any) -> None:
            sent.append(message)

        await guarded(scope, receive, take)
        return sent

    @fuzz
    @example(("/v1/completions/", [("host", KEY)], [{"type": "http.request"}]), False)
    @given(requests, st.booleans())
    def try_one(request: Any, checks_keys: bool) -> None:
        path, head, body = request
        desk.keys = KeyRing((), accepted=[KEY] if checks_keys else [])
        gone = all(one.get("more_body", False) for one in body if "body" in one)
        server.bodies.clear()
        sent: list[Any] = []
        refused = attempt(lambda: sent.extend(anyio.run(send, path, head, list(body))))
        assert refused is None
        starts = [one for one in sent if one["type"] == "http.response.start"]
        assert len(starts) == 1 or (gone and not sent)
        if not starts:
            return
        statuses.add(starts[0]["status"])
        told = b"".join(one.get("body", b"") for one in sent)
        shown = told + repr(starts[0]["headers"]).encode()
        for hidden in (TOKEN, KEY, SECRET.decode(), TICKET_KEY + '":'):
            # Starlette redirects to the host that the client himself named.
            assert hidden.encode() not in shown or hidden in str((head, body))
        if starts[0]["status"] >= 400 and path in PATHS:
            assert len(told) < 1000
            assert json.loads(told)["error"]["message"]
        for reached in server.bodies:
            assert "guard" not in reached
            ticket = reached["vllm_xargs"][TICKET_KEY]
            assert read_ticket(ticket, SECRET, now=time.time())

    try_one()
    assert {200, 400, 401} <= statuses
    assert not desk._visits, "a request that is over is remembered"


@fuzz
@given(odd_values | changed(GOOD["guard"]))
def test_any_guard_field_is_read_or_refused(value: object) -> None:
    attempt(lambda: read_field(value))


TICKET = sign_ticket(Ticket("g", "default", expires=2e9, choices=1), SECRET)


@fuzz
@given(damaged(TICKET.encode(), snippets=[b".", b"=", b"g1.", b"W10="]))
def test_a_changed_ticket_is_none(text: bytes) -> None:
    said = text.decode("latin-1")
    found = []
    attempt(lambda: found.append(read_ticket(said, SECRET, now=0.0)))
    assert (found == [None]) or said == TICKET
