"""A vLLM plugin that breaks the guard on purpose, wherever vLLM loads plugins.

`e2e.faults` puts it onto the path of a server. A fault is on while a file of its name
lies beside this one; what the file says is the fault's own affair.
"""

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_IS_API_SERVER = multiprocessing.parent_process() is None
_SLOW_SECONDS = 0.02


def is_on(fault: str) -> bool:
    """Whether a fault is on here: everywhere, or on the second rank alone."""
    if (_FOLDER / f"{fault}-on-rank-1").exists():
        return _rank() == 1
    return (_FOLDER / fault).exists()


def _rank() -> int:
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0
    return parallel_state.get_tensor_model_parallel_rank()


# vLLM loads this plugin before the guard's: its folder comes first on the path.
if is_on("unimportable") and not _IS_API_SERVER:
    sys.modules["vllm_guard"] = None  # type: ignore[assignment]


def register() -> None:
    if is_on("unimportable"):
        return
    from vllm_guard import engine, hook, outputs, reload, runner_v1

    from guard.pipeline import Guard

    switch(hook, "_hook_layer", fault="no-hooks")
    switch(Guard, "forward", fault="op-stops")
    switch(runner_v1, "attach", fault="readings-lost")
    switch(runner_v1, "slots_of_positions", fault="scores-lost")
    switch(engine, "_tell", fault="verdicts-lost")
    fail(reload, "stage_tables", fault="stage-fails")
    delay(runner_v1, "list_requests", fault="slow-steps")
    lag(runner_v1, "attach", fault="readings-late")
    lag_result(outputs, "_detach", fault="verdicts-late")
    delay(engine, "_report", fault="outputs-late")
    poison(Guard, "forward", fault="not-a-number")
    if is_on("file-changes") and not _IS_API_SERVER:
        about = (_FOLDER / "file-changes").read_text(encoding="utf-8")
        path, _, more = about.partition("\n")
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(more)


def switch(owner: Any, name: str, *, fault: str) -> None:
    """Let `owner.name` do nothing while the fault is on."""
    original = getattr(owner, name)

    def switched(*args: Any, **kwargs: Any) -> Any:
        return None if is_on(fault) else original(*args, **kwargs)

    setattr(owner, name, switched)


def fail(owner: Any, name: str, *, fault: str) -> None:
    """Let `owner.name` do its work while the fault is on, and then fail."""
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if is_on(fault):
            raise OSError("the disk is on fire")
        return result

    setattr(owner, name, failing)


def delay(owner: Any, name: str, *, fault: str) -> None:
    """Let `owner.name` take its time while the fault is on."""
    original = getattr(owner, name)

    def delayed(*args: Any, **kwargs: Any) -> Any:
        if is_on(fault):
            time.sleep(_SLOW_SECONDS)
        return original(*args, **kwargs)

    setattr(owner, name, delayed)


def lag(owner: Any, name: str, *, fault: str) -> None:
    """Let `owner.name(output, readings, seconds)` send what the call before had."""
    original = getattr(owner, name)
    kept: list[Any] = []

    def lagging(output: Any, *args: Any, **kwargs: Any) -> Any:
        sent = kept.pop() if kept and is_on(fault) else args
        kept[:] = [args]
        return original(output, *sent, **kwargs)

    setattr(owner, name, lagging)


def lag_result(owner: Any, name: str, *, fault: str) -> None:
    """Let `owner.name` return what it returned the call before."""
    original = getattr(owner, name)
    kept: list[Any] = [None]

    def lagging(*args: Any, **kwargs: Any) -> Any:
        kept.append(original(*args, **kwargs))
        before = kept.pop(0)
        return before if is_on(fault) else kept[0]

    setattr(owner, name, lagging)


def poison(owner: Any, name: str, *, fault: str) -> None:
    """Let `owner.name(self, hidden_states, ...)` find NaN, as the model had left it."""
    original = getattr(owner, name)

    def poisoned(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if is_on(fault):
            hidden_states.fill_(float("nan"))
        return original(self, hidden_states, *args, **kwargs)

    setattr(owner, name, poisoned)
