"""Ends what waits for engines from which nothing will come.

The server is told to end, while it starts or while it answers; or an engine hangs for
good. Runs in each API server.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from vllm_guard.patch import wrap

__all__ = ["attend", "give_up", "install"]


def install() -> None:
    """Wrap the socket on which engines that start are waited for.

    Told to end meanwhile, vLLM raises KeyboardInterrupt, drops it here, and waits for
    the engines without asking them again. Remove when it drops none.
    """
    from vllm.v1.engine import utils

    wrap(utils, "zmq_socket_ctx", _open_socket)


@contextlib.contextmanager
def _open_socket(
    original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    interrupt = None
    with original(*args, **kwargs) as socket:
        try:
            yield socket
        except KeyboardInterrupt as error:
            interrupt = error
            raise
    if interrupt is not None:
        raise interrupt


def attend(client: Any) -> None:
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
        handler.get_loop().call_soon_threadsafe(_tell_all, client.output_processor)


def _tell_all(processor: Any) -> None:
    """Tell every request in flight that its engine is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if processor.request_states:
        processor.propagate_error(EngineDeadError(suppress_context=True))


def give_up(client: Any) -> None:
    """Take an engine that hangs for dead, as vLLM does with one that says so.

    Every request ends with an error, and so does the server. For a core that hangs vLLM
    itself waits without end. Remove when it does not.

    Args:
        client: vLLM's engine client of this process; called in its event loop.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    client.engine_core.resources.engine_dead = True
    client.engine_core.outputs_queue.put_nowait(EngineDeadError(suppress_context=True))
