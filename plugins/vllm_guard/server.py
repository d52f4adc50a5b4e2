"""The API server's part: the guard's routes, its readiness, its place before vLLM's.

Runs in each API server.
"""

import asyncio
import logging
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from guard import __version__
from guard.certificate import Attestation
from guard.errors import EngineError
from guard.http.desk import DRILLS_OFF, NO_ADMIN
from guard.http.keys import ADMIN_HEADER, ADMIN_VARIABLE, AdminToken, KeyRing
from guard.http.middleware import GuardMiddleware, send_error
from guard.http.openai import error_body
from guard.policy import PolicyFile
from vllm_guard import context

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

__all__ = ["GuardEndpoint", "ServingMiddleware", "read_admin", "read_keys"]

logger = logging.getLogger(__name__)


ANSWER_VARIABLE = "GUARD_ANSWER_SECONDS"
"""How long engines may take to answer for the guard, where 10 seconds are not right: a
step that is under way comes first."""
_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 0.1


class ServingMiddleware(GuardMiddleware):
    """`GuardMiddleware` as `--middleware` builds it, closed until the guard is up."""

    def __init__(self, app: Any) -> None:
        """Stand in front of vLLM's application, outermost."""
        self._board = context.get_board()
        super().__init__(app, desk=self._board.desk, metrics=self._board.metrics)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer 503 to everything until every engine has said that it is guarded."""
        if scope["type"] != "http" or self._board.ready:
            await super().__call__(scope, receive, send)
            return
        text = "The guard is not ready; expected GET /guard/ready first."
        await send_error(send, text, status=503)


class GuardEndpoint:
    """vLLM's endpoint plugin: the guard's own routes, and the gate before serving."""

    name = "guard"
    required_tasks = None

    def __init__(self) -> None:
        """Know no engine yet; `init_state` brings it."""
        self._client: Any = None

    def attach_router(self, app: "FastAPI") -> None:
        """Add `/guard/ready`, `/guard/status` and `/guard/drills`."""
        from fastapi.responses import JSONResponse, Response
        from starlette.requests import Request

        @app.get("/guard/ready")
        async def ready() -> JSONResponse:
            try:
                await check_engines(self._client)
            except EngineError as error:
                return JSONResponse({"ready": False, "reason": str(error)}, 503)
            return JSONResponse({"ready": True})

        @app.get("/guard/status")
        async def status(request: Request) -> JSONResponse:
            authorization = request.headers.get("authorization")
            offer = context.get_board().desk.offer(authorization)
            return JSONResponse(await describe(self._client, offer))

        @app.get("/guard/drills")
        async def drills(request: Request) -> Response:
            admin = context.get_board().desk.admin
            if admin.admits(request.headers.get(ADMIN_HEADER)):
                return JSONResponse({"drills": list_drills()})
            said, code = (NO_ADMIN, 403) if admin.is_set else (DRILLS_OFF, 404)
            body = error_body(said, status=code)
            return Response(body, code, media_type="application/json")

    async def init_state(
        self, engine_client: Any, _state: Any, args: Namespace
    ) -> None:
        """Ask every engine whether it is guarded; the server opens only then.

        Raises:
            EngineError: One of them is not, or is guarded by another policy file; or
                the administrator's token is none.
            PolicyError: The key of a tenant is not among the server's.
        """
        self._client = engine_client
        board = context.get_board()
        with context.reporting():
            board.desk.keys = read_keys(args, context.get().policy_file)
            board.desk.admin = read_admin()
        await check_engines(engine_client)
        if context.get().policy_file.on_error == "open":
            logger.warning(
                "on_error is open: requests go on where nobody vouches for them."
            )
        board.ready = True


def read_keys(args: Namespace, policy_file: PolicyFile) -> KeyRing:
    """Return the keys that vLLM's own check accepts, and whose they are.

    Raises:
        PolicyError: The key of a tenant is not among them.
    """
    given = args.api_key or [os.environ.get("VLLM_API_KEY")]
    return KeyRing(policy_file.tenants, accepted=[key for key in given if key])


def read_admin() -> AdminToken:
    """Return the administrator's token, as the environment has it.

    Raises:
        EngineError: It is too short.
    """
    return AdminToken(os.environ.get(ADMIN_VARIABLE))


def list_drills() -> list[dict[str, Any]]:
    """Return what an administrator reads of each drill in `/guard/drills`."""
    return [
        {
            "name": name,
            "prompt": edit.prompt,
            "gold": edit.gold,
            "budget": edit.budget,
            "position": edit.position,
        }
        for name, edit in context.get().edits.items()
    ]


async def ask_engines(client: Any) -> list[list[dict[str, Any]]]:
    """Return what each engine's core and workers say, one list per engine.

    One question at a time, which all who ask meanwhile share: an engine that hangs is
    not left with a queue of them. vLLM never answers for one that died.

    Raises:
        TimeoutError: They did not answer in time, or are dead.
    """
    question = getattr(client, "guard_question", None)
    if question is None or question.done():
        question = client.guard_question = asyncio.ensure_future(_ask(client))
    seconds = float(os.environ.get(ANSWER_VARIABLE) or _ANSWER_SECONDS)
    deadline = time.monotonic() + seconds
    while not question.done():
        if getattr(client, "errored", False) or time.monotonic() > deadline:
            message = "The engines are dead, or did not answer in time."
            raise TimeoutError(message)
        await asyncio.wait({question}, timeout=_PAUSE_SECONDS)
    answers: list[list[dict[str, Any]]] = question.result()
    return answers


async def _ask(client: Any) -> list[list[dict[str, Any]]]:
    core = client.engine_core
    call = ("collective_rpc", "guard_status", None, (), None)
    if hasattr(core, "call_utility_all_async"):
        answers: list[list[dict[str, Any]]] = await core.call_utility_all_async(*call)
        return answers
    return [await core.call_utility_async(*call)]


async def check_engines(client: Any) -> None:
    """Check that every rank of every engine is guarded by this policy file.

    Raises:
        EngineError: Says which part is not.
    """
    expected = context.get().fingerprint
    try:
        engines = await ask_engines(client)
    except TimeoutError as error:
        message = "An engine does not answer for the guard: it hangs, or is dead."
        raise EngineError(message) from error
    except Exception as error:  # vLLM raises bare Exceptions for a failed call
        message = (
            "A worker does not answer for the guard; expected the plugin loaded in "
            "every process (is VLLM_PLUGINS without 'guard', or its import broken?)."
        )
        raise EngineError(message) from error
    for number, answers in enumerate(engines):
        roles = {answer["role"] for answer in answers if isinstance(answer, dict)}
        if roles != {"engine_core", "worker"}:
            message = (
                f"Engine {number} answers for {sorted(roles) or 'nothing'}; expected "
                "its engine core and its workers to be guarded."
            )
            raise EngineError(message)
        ranks = sorted(a["rank"] for a in answers if a["role"] == "worker")
        wanted = list(range(answers[-1]["world_size"]))
        if ranks != wanted:
            message = f"Engine {number} answers for ranks {ranks}; expected {wanted}."
            raise EngineError(message)
        if any(answer["fingerprint"] != expected for answer in answers):
            message = f"Engine {number} runs another policy file; expected {expected}."
            raise EngineError(message)
        if not all(answer.get("ready", True) for answer in answers):
            message = f"A worker of engine {number} is not ready; expected its model."
            raise EngineError(message)


async def describe(client: Any, offer: Sequence[str]) -> dict[str, Any]:
    """Return the JSON of `/guard/status` for a client to whom policies are offered."""
    state = context.get()
    try:
        engines: Any = await ask_engines(client)
    except Exception as error:
        logger.warning("An engine did not answer for its status: %s", error)
        engines = None
    return {
        "version": __version__,
        "fingerprint": state.fingerprint,
        "on_error": state.policy_file.on_error,
        "default_policy": offer[0],
        "policies": {
            name: {
                "fingerprint": state.fingerprints[name],
                "mode": state.policy_file.policies[name].mode,
                "certificate": _describe_certificate(state.certificates.get(name)),
            }
            for name in offer
        },
        "engines": engines,
    }


def _describe_certificate(found: Attestation | None) -> dict[str, str] | None:
    return None if found is None else {"id": found.id, "issued": found.issued}
