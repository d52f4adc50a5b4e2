"""`guard serve`: vLLM's own OpenAI-compatible server, with the guard in its place.

Runs in the API server process, which checks first what it can check cheaply, so that
a mistake is one line within seconds and not a stack trace after minutes.
"""

import logging
import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, NoReturn

from pydantic import ValidationError

from guard.audit import check_audit_log
from guard.check import check_origin, check_policy, load_calibrations
from guard.errors import EngineError, GuardError
from guard.hook import HookPoint
from guard.policy import load_policy
from vllm_guard import context

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.config import VllmConfig

__all__ = ["serve"]

logger = logging.getLogger(__name__)

MIDDLEWARE = "vllm_guard.server.ServingMiddleware"


def serve(
    model: str,
    policy: Path,
    arguments: Sequence[str],
    *,
    watch: bool = False,
    audit_log: Path | None = None,
) -> None:
    """Serve `model` under the policies of a file, until interrupted.

    Args:
        model: What vLLM takes: a folder or a name.
        policy: The policy file.
        arguments: Further arguments, vLLM's own.
        watch: Whether the policy file is reloaded when it changes.
        audit_log: Where flagged and blocked requests are written down.

    Raises:
        GuardError: Something does not fit; said before or during the start.
    """
    _check_config_option(arguments)
    policy_file = load_policy(policy)
    saes = check_policy(policy_file)
    _check_model(model)
    if audit_log is not None:
        check_audit_log(audit_log)
    _set_environment(policy, watch=watch, audit_log=audit_log)
    # Only now: importing vLLM takes longer than all of the above.
    import vllm_guard
    from vllm_guard import compat, hook, server

    vllm_guard.register()
    args = _parse(model, arguments)
    compat.check_frontend(args)
    server.read_keys(args, policy_file)
    server.read_admin()
    config = _make_config(args)
    compat.check_engine(config)
    hook.check_widths(saes, config.model_config.get_hidden_size())
    for at in policy_file.hook_points:
        num_layers = config.model_config.get_total_num_hidden_layers()
        hook.check_layer(HookPoint.parse(at), num_layers)
    check_origin(
        load_calibrations(policy_file),
        model=compat.digest(config.model_config),
        dtype=compat.dtype_name(config.model_config),
    )
    del saes, config
    _run(args)


def _check_config_option(arguments: Sequence[str]) -> None:
    """Refuse what vLLM would accept and overlook, API keys in it included."""
    for word in arguments:
        if word.startswith("--config="):
            message = (
                f"{word}: vLLM overlooks a file that is named this way; expected two "
                "words, --config FILE."
            )
            raise EngineError(message)


def _check_model(model: str) -> None:
    """Refuse what is meant as a folder and is none, before anything is imported."""
    if model.startswith((".", "/", "~")) and not Path(model, "config.json").is_file():
        message = (
            f"{model}: has no config.json; expected the folder of a model, or its name."
        )
        raise EngineError(message)


def _set_environment(policy: Path, *, watch: bool, audit_log: Path | None) -> None:
    # A start of its own, whatever the environment brought along.
    context.reset()
    # A link stays one: what it leads to may be another file at the next reload.
    os.environ[context.POLICY_VARIABLE] = str(policy.absolute())
    os.environ[context.SERVE_VARIABLE] = "1"
    os.environ.pop(context.WATCH_VARIABLE, None)
    if watch:
        os.environ[context.WATCH_VARIABLE] = "1"
    os.environ.pop(context.AUDIT_VARIABLE, None)
    if audit_log is not None:
        os.environ[context.AUDIT_VARIABLE] = str(audit_log.absolute())
    plugins = os.environ.get("VLLM_PLUGINS")
    names = plugins.split(",") if plugins else []
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "guard"]))
    # What a worker leaves when it is killed is cleaned up all the same, by a process
    # whose warnings would stand below the one line that says what is wrong.
    filters = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))
    # V1 until the V2 adapter has passed on a GPU with a vLLM that is supported;
    # GUARD_ALLOW_V2_RUNNER allows it.
    if "GUARD_ALLOW_V2_RUNNER" not in os.environ:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


def _parse(model: str, arguments: Sequence[str]) -> "Namespace":
    from vllm.entrypoints.launchers.cli_args import (
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise EngineError(f"{message}; expected the options of `vllm serve`.")

    cli_env_setup()
    parser = make_arg_parser(Parser(prog="guard serve"))
    args = parser.parse_args(["--model", model, *arguments, "--middleware", MIDDLEWARE])
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise EngineError(_explain(error, model)) from error
    return args


def _make_config(args: "Namespace") -> "VllmConfig":
    """Return the engine's configuration, or one line about why there is none."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        return AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except GuardError:
        raise
    except Exception as error:  # vLLM raises any kind, assertions among them
        raise EngineError(_explain(error, args.model)) from error


def _explain(error: Exception, model: str) -> str:
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
    reason = " ".join(str(text).split()) or type(error).__name__
    return f"vLLM cannot serve {model!r} this way: {shorten(reason, 400)}"


def _run(args: "Namespace") -> None:
    """Serve until interrupted.

    Raises:
        GuardError: A process could not start; the line is its own, where it left one.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    signal.signal(signal.SIGHUP, _pass_on)
    try:
        home = tempfile.TemporaryDirectory(prefix="guard-", ignore_cleanup_errors=True)
    except OSError as error:
        message = f"No place for temporary files ({error}); expected room in TMPDIR."
        raise EngineError(message) from error
    with home as folder:
        fault = Path(folder, "fault")
        os.environ[context.FAULT_VARIABLE] = str(fault)
        try:
            # As `vllm serve` does: it knows when one API server is not enough.
            ServeSubcommand.cmd(args)
        except GuardError:
            raise
        except Exception as error:  # vLLM only says that a process has died
            if fault.exists():
                raise EngineError(fault.read_text(encoding="utf-8")) from error
            logger.exception("The server ended.")
            raise EngineError(_explain(error, args.model)) from error


def _pass_on(number: int, _frame: object) -> None:
    """Let one API server reload, where this process is none and only starts several.

    Where it is the API server itself, that has a handler of its own once it is up;
    until then there is nothing to reload, and one that is started would be killed.
    """
    servers = [
        child.pid
        for child in multiprocessing.active_children()
        if child.name.startswith("ApiServer") and child.pid is not None
    ]
    if ready := [process for process in servers if _catches(process, number)]:
        os.kill(ready[0], number)


def _catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as Linux says."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:  # it is gone
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)
