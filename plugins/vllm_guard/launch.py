"""`guard serve`: vLLM's own OpenAI-compatible server, with the guard in its place.

Runs in the API server process, which checks first what it can check cheaply, so that
a mistake is one line within seconds and not a stack trace after minutes.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from guard.check import check_policy, load_saes
from guard.errors import EngineError, GuardError
from guard.hook import HookPoint

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.config import VllmConfig

__all__ = ["serve"]

MIDDLEWARE = "vllm_guard.server.ServingMiddleware"


def serve(model: str, policy: Path, arguments: Sequence[str]) -> None:
    """Serve `model` under the policies of a file, until interrupted.

    Args:
        model: What vLLM takes: a folder or a name.
        policy: The policy file.
        arguments: Further arguments, vLLM's own.

    Raises:
        GuardError: Something does not fit; said before or during the start.
    """
    _set_environment(policy)
    import vllm_guard
    from vllm_guard import compat, context, hook

    vllm_guard.register()
    args = _parse(model, arguments)
    config = _make_config(args)
    compat.check_engine(config)
    state = context.get()
    check_policy(state.policy_file)
    saes = load_saes(state.policy_file)
    hook.check_widths(saes, config.model_config.get_hidden_size())
    for name in saes:
        at = HookPoint.parse(state.policy_file.saes[name].hook_point)
        hook.check_layer(at, config.model_config.get_total_num_hidden_layers())
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        fault = Path(folder, "fault")
        os.environ[context.FAULT_VARIABLE] = str(fault)
        try:
            _run(args)
        except GuardError:
            raise
        except BaseException as error:
            if fault.exists():
                raise EngineError(fault.read_text(encoding="utf-8")) from error
            raise


def _set_environment(policy: Path) -> None:
    os.environ["GUARD_POLICY"] = str(policy.resolve())
    plugins = os.environ.get("VLLM_PLUGINS")
    names = plugins.split(",") if plugins else []
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "guard"]))
    # V1 until the V2 adapter has passed on a GPU; GUARD_ALLOW_V2_RUNNER allows it.
    if "GUARD_ALLOW_V2_RUNNER" not in os.environ:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


def _parse(model: str, arguments: Sequence[str]) -> "Namespace":
    from vllm.entrypoints.launchers.cli_args import (
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="guard serve"))
    args = parser.parse_args(["--model", model, *arguments, "--middleware", MIDDLEWARE])
    validate_parsed_serve_args(args)
    return args


def _make_config(args: "Namespace") -> "VllmConfig":
    """Return the engine's configuration, or one line about why there is none."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        return AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        message = f"vLLM cannot serve {args.model!r} this way: {reason[:400]}"
        raise EngineError(message) from error


def _run(args: "Namespace") -> None:
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    uvloop.run(run_server(args))
