"""The API server's part: the guard's routes, its readiness, its place before vLLM's.

Runs in each API server.
"""

import contextlib
import logging
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard import __version__
from guard.audit import AuditLog
from guard.certificate import Attestation
from guard.errors import EngineError
from guard.http.desk import DRILLS_OFF, NO_ADMIN, NO_RELOAD, RELOAD_OFF
from guard.http.keys import ADMIN_HEADER, ADMIN_VARIABLE, AdminToken
from guard.http.middleware import GuardMiddleware, send_error
from guard.http.openai import error_body
from guard.metrics import Metrics, ReloadResult
from vllm_guard import context, ending
from vllm_guard.pulse import Pulse
from vllm_guard.question import answer_seconds, ask, await_answer, share
from vllm_guard.rollout import WAIT_SECONDS, Rollout, read_keys

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import Headers
    from starlette.types import Receive, Scope, Send

__all__ = ["GuardEndpoint", "ServingMiddleware", "read_admin", "read_keys"]

logger = logging.getLogger(__name__)

_RELOAD_CODES: Mapping[ReloadResult, int] = {
    "success": 200,
    "refused": 422,
    "busy": 409,
    "unanswered": 503,
}
"""HTTP status of what became of a reload."""
_MOST_WAIT_SECONDS = 3600.0
_WAIT_EXPECTED = (
    "'wait' is no time; expected how many seconds to wait for requests that began "
    f"before the last reload, at most {_MOST_WAIT_SECONDS:g}."
)


class _SilenceError(EngineError):
    """An engine does not answer."""


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
        self._rollout: Rollout | None = None
        self._pulse: Pulse | None = None

    def attach_router(self, app: "FastAPI") -> None:
        """Add `/guard/ready`, `/guard/status`, `/guard/drills`, `/guard/reload`."""
        from fastapi.responses import JSONResponse, Response
        from starlette.requests import Request

        @app.get("/guard/ready")
        async def ready() -> JSONResponse:
            try:
                await self._check()
            except EngineError as error:
                return JSONResponse({"ready": False, "reason": str(error)}, 503)
            return JSONResponse({"ready": True})

        @app.get("/guard/status")
        async def status(request: Request) -> JSONResponse:
            authorization = request.headers.get("authorization")
            desk = context.get_board().desk
            said = await describe(self._client, desk.offer(authorization))
            if said["engines"] is not None:
                await self._follow()
            # What is wrong with a file may name what is nobody else's business.
            is_admin = desk.admin.admits(request.headers.get(ADMIN_HEADER))
            has_tenants = bool(context.get().current.policy_file.tenants)
            is_open = not desk.admin.is_set and not has_tenants
            said["last_reload"] = self._tell_last(with_reason=is_open or is_admin)
            return JSONResponse(said)

        @app.get("/guard/drills")
        async def drills(request: Request) -> Response:
            if refusal := refuse(request.headers, off=DRILLS_OFF, stranger=NO_ADMIN):
                return refusal
            return JSONResponse({"drills": list_drills()})

        @app.post("/guard/reload")
        async def reload(request: Request) -> Response:
            if refusal := refuse(request.headers, off=RELOAD_OFF, stranger=NO_RELOAD):
                return refusal
            assert self._rollout is not None, "a route was called before the start"
            try:
                wait = float(request.query_params.get("wait", WAIT_SECONDS))
            except ValueError:
                wait = -1.0
            if not 0 <= wait <= _MOST_WAIT_SECONDS:
                body = error_body(_WAIT_EXPECTED, status=400, param="wait")
                return Response(body, 400, media_type="application/json")
            outcome = await self._rollout.reload(wait=wait)
            code = _RELOAD_CODES[outcome.result]
            if outcome.reason is None:
                return JSONResponse(asdict(outcome), code)
            body = error_body(f"The policies stay: {outcome.reason}", status=code)
            return Response(body, code, media_type="application/json")

        def refuse(headers: "Headers", *, off: str, stranger: str) -> Response | None:
            """Return what whoever is no administrator is told."""
            admin = context.get_board().desk.admin
            if admin.admits(headers.get(ADMIN_HEADER)):
                return None
            said, code = (stranger, 403) if admin.is_set else (off, 404)
            body = error_body(said, status=code)
            return Response(body, code, media_type="application/json")

    async def _check(self) -> None:
        """Check the engines; in the midst of a reload, once more after it."""
        try:
            await check_engines(self._client)
        except _SilenceError:
            raise
        except EngineError:
            await self._follow()
            await check_engines(self._client)

    async def _follow(self) -> None:
        """Catch up with the engines; what is wrong with them, others say."""
        if self._rollout is not None:
            with contextlib.suppress(Exception):
                await self._rollout.follow(seconds=answer_seconds())

    def _tell_last(self, *, with_reason: bool) -> dict[str, Any] | None:
        """Return the outcome of the last reload, if there was one."""
        if self._rollout is None:
            return None
        told = self._rollout.last
        if told is None or with_reason:
            return told
        return {key: value for key, value in told.items() if key != "reason"}

    async def init_state(
        self, engine_client: Any, _state: Any, args: Namespace
    ) -> None:
        """Ask every engine whether it is guarded; the server opens only then.

        Raises:
            EngineError: One of them is not, or is guarded by another policy file; or
                the administrator's token is none; or the audit log cannot be written.
            PolicyError: The key of a tenant is not among the server's.
        """
        from vllm import envs

        self._client = engine_client
        ending.attend(engine_client)
        board = context.get_board()
        with context.reporting():
            board.desk.keys = read_keys(args, context.get().start.policy_file)
            board.desk.admin = read_admin()
            board.audit = open_audit(engine_client, board.metrics)
        await check_engines(engine_client)
        if context.get().start.policy_file.on_error == "open":
            logger.warning(
                "on_error is open: requests go on where nobody vouches for them."
            )
        self._rollout = Rollout(engine_client, args)
        self._rollout.start()
        board.ready = True
        self._pulse = Pulse(
            engine_client,
            check_engines,
            metrics=board.metrics,
            # What vLLM allows a worker, it shall allow an engine core as well.
            patience=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            give_up=ending.give_up,
        )
        self._pulse.start()


def read_admin() -> AdminToken:
    """Return the administrator's token, as the environment has it.

    Raises:
        EngineError: It is too short.
    """
    return AdminToken(os.environ.get(ADMIN_VARIABLE))


def open_audit(client: Any, metrics: Metrics) -> AuditLog | None:
    """Open this API server's audit log, where the operator wants one.

    Raises:
        EngineError: It cannot be written.
    """
    path = os.environ.get(context.AUDIT_VARIABLE)
    if not path:
        return None
    rank = client.vllm_config.parallel_config._api_process_rank
    return AuditLog(Path(path), metrics, rank=max(rank, 0))


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
        for name, edit in context.get().current.edits.items()
    ]


async def ask_engines(client: Any) -> list[list[dict[str, Any]]]:
    """Return what each engine's core and workers say, one list per engine.

    One question at a time, which all who ask meanwhile share: an engine that hangs is
    not left with a queue of them.

    Raises:
        TimeoutError: They did not answer in time, or are dead.
    """
    known = getattr(client, "guard_question", None)
    question = client.guard_question = share(known, lambda: _hear_engines(client))
    return await await_answer(client, question, seconds=answer_seconds())


async def _hear_engines(client: Any) -> list[list[dict[str, Any]]]:
    """Return what they say, and note when, also where nobody waits for it any more."""
    answers = await ask(client, "collective_rpc", "guard_status", None, (), None)
    client.guard_answered = time.monotonic()
    return answers


async def check_engines(client: Any) -> None:
    """Check that every rank of every engine is guarded by this policy file.

    Raises:
        EngineError: Says which part is not.
    """
    expected = context.get().current.fingerprint
    try:
        engines = await ask_engines(client)
    except TimeoutError as error:
        message = "An engine does not answer for the guard: it hangs, or is dead."
        raise _SilenceError(message) from error
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
    current = context.get().current
    try:
        engines: Any = await ask_engines(client)
    except Exception as error:
        logger.warning("An engine did not answer for its status: %s", error)
        engines = None
    return {
        "version": __version__,
        "generation": current.number,
        "fingerprint": current.fingerprint,
        "on_error": current.policy_file.on_error,
        "default_policy": offer[0],
        "policies": {
            name: {
                "fingerprint": current.fingerprints[name],
                "mode": current.policy_file.policies[name].mode,
                "certificate": _describe_certificate(current.certificates.get(name)),
            }
            for name in offer
        },
        "engines": engines,
    }


def _describe_certificate(found: Attestation | None) -> dict[str, str] | None:
    return None if found is None else {"id": found.id, "issued": found.issued}
