"""The guard inside vLLM: entry points, and nothing that can fail at import.

vLLM logs and swallows an exception while it imports a plugin, but one raised inside
`register()` stops the start. So every import happens there.
"""

import os
import signal
import threading
from typing import Any, Literal

__all__ = ["endpoint", "register", "sampling_args"]


def register() -> None:
    """Put the guard into this process, if `GUARD_POLICY` names a policy file.

    vLLM calls it in every process, possibly more than once.

    Raises:
        GuardError: The policy or this engine cannot be used as it is.
    """
    from vllm_guard import context

    with context.reporting():
        if context.enter():
            context.keep_warnings()
            _outlive_hangups()
            from vllm_guard import (
                admission,
                ending,
                engine,
                hook,
                outputs,
                prefix,
                reload,
                runner_v1,
                runner_v2,
            )

            runners = (runner_v1, runner_v2)
            parts = (hook, *runners, admission, prefix, engine, outputs, reload, ending)
            for part in parts:
                part.install()


def _outlive_hangups() -> None:
    """Keep a SIGHUP to the group of `guard serve` from ending what serves.

    It means a reload there, and an engine core or a worker has no handler for it. The
    coordinator of vLLM's data parallelism loads no plugin, and is not kept.
    """
    from vllm_guard import context

    is_main = threading.current_thread() is threading.main_thread()
    would_end = signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    if context.SERVE_VARIABLE in os.environ and is_main and would_end:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def endpoint() -> Any:
    """Return vLLM's endpoint plugin: the guard's own routes, and its readiness."""
    from vllm_guard.server import GuardEndpoint

    return GuardEndpoint()


def sampling_args(
    policy: str,
    *,
    trace: Literal["none", "summary"] = "none",
    drill: str | None = None,
) -> dict[str, Any]:
    """Return `SamplingParams(extra_args=...)` that run a request under `policy`.

    For offline use, where whoever builds the request is the operator. The verdict is
    found on each output as `output.guard`.

    Args:
        policy: A policy of the file that `GUARD_POLICY` names.
        trace: `summary` adds every monitor's reading to the verdict.
        drill: A fire drill of that file.

    Raises:
        PolicyError: The policy file has no such policy or drill.
    """
    from vllm_guard import context

    return context.sampling_args(policy, trace=trace, drill=drill)
