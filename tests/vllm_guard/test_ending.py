"""Nobody waits for an engine that was told to end, or that hangs for good."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.v1.engine import utils
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources
from vllm.v1.engine.exceptions import EngineDeadError
from vllm_guard import ending


class Processor:
    def __init__(self, *requests: str) -> None:
        self.request_states = dict.fromkeys(requests)
        self.told: list[Exception] = []

    def propagate_error(self, error: Exception) -> None:
        self.told.append(error)


def make_client(processor: Processor, handler: Any) -> Any:
    class Client:
        output_processor = processor
        output_handler = handler
        timeout: float

        def shutdown(self, timeout: float) -> None:
            self.timeout = timeout

    client = Client()
    ending.attend(client)
    return client


def end(processor: Processor) -> None:
    """Begin to take outputs, and end as vLLM does: in another thread."""

    async def serve() -> None:
        handler = asyncio.ensure_future(asyncio.sleep(60))
        client = make_client(processor, handler)
        await asyncio.to_thread(client.shutdown, timeout=3.0)
        assert client.timeout == 3.0
        await asyncio.sleep(0)
        handler.cancel()

    asyncio.run(serve())


def test_who_waits_for_an_answer_is_told() -> None:
    processor = Processor("a", "b")
    end(processor)
    (error,) = processor.told
    assert isinstance(error, EngineDeadError)


def test_where_nobody_waits_nothing_has_failed() -> None:
    processor = Processor()
    end(processor)
    assert processor.told == []


def test_before_the_first_request_and_after_the_last_word_it_is_vllms_affair() -> None:
    processor = Processor("a")
    make_client(processor, None).shutdown(timeout=0)

    async def begin() -> Any:
        return asyncio.ensure_future(asyncio.sleep(0))

    make_client(processor, asyncio.run(begin())).shutdown(timeout=0)
    assert processor.told == []


class Core(AsyncMPClient):
    """vLLM's own client of engine cores, without any."""

    def __init__(self) -> None:
        self.resources = BackgroundResources(ctx=zmq.Context.instance())
        self.outputs_queue = asyncio.Queue()

    def _ensure_output_queue_task(self) -> None:
        """Nobody puts anything into it."""


def test_an_engine_that_is_given_up_is_dead_to_vllm() -> None:
    async def serve() -> None:
        core = Core()
        ending.give_up(SimpleNamespace(engine_core=core))
        with pytest.raises(EngineDeadError):
            await core.get_output_async()
        with pytest.raises(EngineDeadError):
            core.ensure_alive()

    asyncio.run(serve())


def test_told_to_end_nobody_waits_for_engines_that_start() -> None:
    ending.install()
    with pytest.raises(KeyboardInterrupt), utils.zmq_socket_ctx("inproc://a", zmq.PAIR):
        raise KeyboardInterrupt
    with utils.zmq_socket_ctx("inproc://a", zmq.PAIR) as socket:
        assert not socket.closed
    assert socket.closed
