"""Ends the answers that are under way when the server is told to end.

Runs in each API server.
"""

from collections.abc import Callable
from typing import Any

from vllm_guard.patch import wrap

__all__ = ["install"]


def install(client: Any) -> None:
    """Wrap the end of an engine client.

    vLLM kills its engines, takes no more of their outputs, and then waits without end
    for the connections of those who still hope for one. Remove when it tells them.

    Args:
        client: vLLM's engine client of this process.
    """
    wrap(type(client), "shutdown", _shutdown)


def _shutdown(
    original: Callable[..., None], client: Any, *args: Any, **kwargs: Any
) -> None:
    original(client, *args, **kwargs)
    handler = client.output_handler
    if handler is not None and not handler.get_loop().is_closed():
        # Often called from another thread.
        handler.get_loop().call_soon_threadsafe(_give_up, client.output_processor)


def _give_up(processor: Any) -> None:
    """Tell every request in flight that its engine is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if processor.request_states:
        processor.propagate_error(EngineDeadError(suppress_context=True))
