"""The API server's part: verdicts taken from outputs, the guard's routes, readiness.

Runs wherever outputs are processed: in each API server, or in the process of an
offline `LLM`.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from guard import __version__
from guard.errors import EngineError
from guard.http.desk import PolicyDesk
from guard.http.keys import KeyRing
from guard.http.middleware import GuardMiddleware, send_error
from guard.metrics import Metrics
from guard.policy import PolicyFile
from guard.verdict import Verdict
from vllm_guard import context
from vllm_guard.engine import BLOCK_REASON
from vllm_guard.patch import wrap
from vllm_guard.readings import CARRIER_KEY, Progress

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

__all__ = ["Board", "GuardEndpoint", "ServingMiddleware", "install"]

logger = logging.getLogger(__name__)


def install() -> None:
    """Wrap the processing of outputs, the last stop before text exists.

    `stat_logger` plugins get no data of a plugin's own, and the serving classes only
    see merged outputs. Remove when vLLM hands engine outputs to plugins.
    """
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    wrap(OutputProcessor, "process_outputs", _process_outputs)
    wrap(OutputProcessor, "abort_requests", _abort_requests)
    wrap(RequestState, "_new_completion_output", _new_completion_output)


class Board:
    """Where this process keeps verdicts and counts: one desk, one set of metrics."""

    def __init__(self, state: context.Context) -> None:
        """Open the desk and declare the metrics of a policy file."""
        sources = state.policy_file.saes
        self.desk = PolicyDesk(
            state.policy_file, state.fingerprints, secret=state.secret
        )
        self.metrics = Metrics(
            state.policy_file,
            fingerprints=state.fingerprints,
            digests={name: source.sha256 for name, source in sources.items()},
        )
        self.ready = False

    def take(self, request: Any, progress: Progress) -> None:
        """Keep a request's progress: vLLM's `RequestState` carries its verdict."""
        verdict = Verdict.from_json(progress.verdict)
        before = getattr(request, "guard_progress", None)
        self.metrics.observe_progress(before and before[0], verdict)
        request.guard_progress = verdict, progress
        self.desk.record(verdict.id, _choice_of(request), verdict)

    def count(self, counted: dict[str, int]) -> None:
        """Count tokens and faults that the engine had not told before."""
        for phase in ("prefill", "decode"):
            if counted.get(phase):
                self.metrics.count_tokens(phase, counted[phase])
        if counted.get("unguarded"):
            self.metrics.count_unscored("no_reading", counted["unguarded"])
            self.metrics.count_error("worker")
        if counted.get("unscored"):
            self.metrics.count_unscored("no_score", counted["unscored"])

    def finish(self, request: Any) -> None:
        """Count a request that is over, if the engine ever spoke of it."""
        known = getattr(request, "guard_progress", None)
        if known is None:
            return
        verdict, progress = known
        self.metrics.finish(verdict, progress.ratios)
        for name, value in progress.observed.items():
            if name.startswith("error_ratio:"):
                self.metrics.observe_error_norm(value)
            elif name.startswith("clamp_residual:"):
                self.metrics.observe_clamp_residual(value)


def _board() -> Board:
    state = context.get()
    if state.board is None:
        state.board = Board(state)
    return state.board


def _choice_of(request: Any) -> int:
    """Return the index of a request's choice in the HTTP answer.

    Prompt i of a list of prompts runs as request `cmpl-...-i`.
    """
    parent = request.parent_req
    external = request.external_req_id if parent is None else parent.external_req_id
    prompt = int(external.rsplit("-", 1)[1]) if external.startswith("cmpl-") else 0
    return prompt * (1 if parent is None else parent.n) + int(request.request_index)


def _process_outputs(
    original: Callable[..., Any],
    processor: Any,
    outputs: list[Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    board = _board()
    present = {}
    refused: list[str] = []
    for output in outputs:
        progress = _detach(output)
        request = processor.request_states.get(output.request_id)
        if progress is not None:
            board.count(progress.counted)
            for seconds in progress.hook_seconds:
                board.metrics.observe_hook(seconds)
        if request is None:
            continue
        present[output.request_id] = request
        if progress is not None:
            board.take(request, progress)
        elif output.new_token_ids or output.finish_reason is None:
            _refuse(output)
            refused.append(output.request_id)
            board.metrics.count_error("engine")
        if output.stop_reason == BLOCK_REASON:
            _fill_prompt_logprobs(request)
    result = original(processor, outputs, *args, **kwargs)
    # The engine core knows nothing of it, and would go on.
    result.reqs_to_abort.extend(refused)
    for request_id, request in present.items():
        if request_id not in processor.request_states:
            board.finish(request)
    return result


def _detach(output: Any) -> Progress | None:
    """Take the guard's part off an output; a real KV connector's part stays."""
    carried = output.kv_transfer_params
    if not carried or CARRIER_KEY not in carried:
        return None
    progress = Progress(**carried.pop(CARRIER_KEY))
    output.kv_transfer_params = carried or None
    return progress


def _refuse(output: Any) -> None:
    """End a request whose tokens nobody vouches for, before any of them is text."""
    from vllm.v1.engine import FinishReason

    logger.error("The engine core sent tokens without a verdict; the request fails.")
    output.new_token_ids = []
    output.new_logprobs = None
    output.new_prompt_logprobs_tensors = None
    output.finish_reason = FinishReason.ERROR


def _fill_prompt_logprobs(request: Any) -> None:
    """Say "none" for each prompt token whose logprob a block held back.

    Where a client asks for `echo`, vLLM expects one entry per token.
    """
    processor = request.logprobs_processor
    known = processor.prompt_logprobs if processor is not None else None
    if known:  # otherwise not asked for, or already sent
        for _ in range(len(known), request.prompt_len):
            known.append(None)


def _abort_requests(
    original: Callable[..., list[str]],
    processor: Any,
    request_ids: Iterable[str],
    *args: Any,
    **kwargs: Any,
) -> list[str]:
    before = dict(processor.request_states)
    aborted = original(processor, request_ids, *args, **kwargs)
    for request_id in aborted:
        if request_id in before:
            _board().finish(before[request_id])
    return aborted


def _new_completion_output(
    original: Callable[..., Any],
    request: Any,
    token_ids: list[int],
    finish_reason: Any,
    stop_reason: Any,
) -> Any:
    """Name a block as OpenAI does, and let an offline caller read the verdict."""
    completion = original(request, token_ids, finish_reason, stop_reason)
    if stop_reason == BLOCK_REASON:
        completion.finish_reason = "content_filter"
    known = getattr(request, "guard_progress", None)
    completion.guard = known[0].to_json() if known is not None else None
    return completion


class ServingMiddleware(GuardMiddleware):
    """`GuardMiddleware` as `--middleware` builds it, closed until the guard is up."""

    def __init__(self, app: Any) -> None:
        """Stand in front of vLLM's application, outermost."""
        self._board = _board()
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
        """Add `/guard/ready` and `/guard/status`."""
        from fastapi.responses import JSONResponse
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
            offer = _board().desk.offer(authorization)
            return JSONResponse(await describe(self._client, offer))

    async def init_state(
        self, engine_client: Any, _state: Any, args: Namespace
    ) -> None:
        """Ask every engine whether it is guarded; the server opens only then.

        Raises:
            EngineError: One of them is not, or is guarded by another policy file.
            PolicyError: The key of a tenant is not among the server's.
        """
        self._client = engine_client
        board = _board()
        with context.reporting():
            board.desk.keys = read_keys(args, context.get().policy_file)
        await check_engines(engine_client)
        board.ready = True


def read_keys(args: Namespace, policy_file: PolicyFile) -> KeyRing:
    """Return the keys that vLLM's own check accepts, and whose they are.

    Raises:
        PolicyError: The key of a tenant is not among them.
    """
    given = args.api_key or [os.environ.get("VLLM_API_KEY")]
    return KeyRing(policy_file.tenants, accepted=[key for key in given if key])


async def ask_engines(client: Any) -> list[list[dict[str, Any]]]:
    """Return what each engine's core and workers say, one list per engine."""
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
        "default_policy": offer[0],
        "policies": {
            name: {
                "fingerprint": state.fingerprints[name],
                "mode": state.policy_file.policies[name].mode,
            }
            for name in offer
        },
        "engines": engines,
    }
