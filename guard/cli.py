"""`guard`: every command a person types, and one clear line when it cannot work."""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from guard import __version__
from guard.errors import EngineError, GuardError
from guard.policy import fingerprint, load_policy

__all__ = ["app", "main"]

app = typer.Typer(
    name="guard",
    help="Clamp SAE latents inside vLLM, and watch what the clamp cannot see.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_LOCAL = "http://localhost:8000"
_INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended."""

UrlOption = Annotated[str, typer.Option("--url", help="Of the server.")]
KeyOption = Annotated[
    str,
    typer.Option("--api-key", envvar="VLLM_API_KEY", help="Where it checks keys."),
]
PolicyOption = Annotated[Path, typer.Option("--policy", help="The policy file.")]


@app.callback(invoke_without_command=True)
def _version(
    *,
    version: Annotated[bool, typer.Option("--version", help="Show it.")] = False,
) -> None:
    if version:
        typer.echo(f"vllm-guard {__version__}")
        raise typer.Exit


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def serve(context: typer.Context, model: str, policy: PolicyOption) -> None:
    """Serve MODEL under a policy file; further options are vLLM's own."""
    try:
        from vllm_guard import launch
    except ImportError as error:
        message = f"The vLLM plugin cannot be imported ({error}); install it anew."
        raise EngineError(message) from error
    launch.serve(model, policy, context.args)


@app.command()
def demo(
    *,
    once: Annotated[bool, typer.Option(help="Exit after the table.")] = False,
    port: Annotated[int, typer.Option(help="Where to listen; 0 picks one.")] = 8000,
    rebuild: Annotated[
        bool, typer.Option(help="Train model and SAE anew (minutes).")
    ] = False,
) -> None:
    """Serve the organism, show what the guard does to it, and stay up."""
    if rebuild:
        from guard.demo.rebuild import main as rebuild_organism

        raise typer.Exit(rebuild_organism([]))
    from guard.demo.show import run_demo

    run_demo(port=port, once=once)


@app.command()
def check(policy: Annotated[Path, typer.Argument(help="The policy file.")]) -> None:
    """Check a policy file with its SAEs and calibrations, without an engine."""
    from guard.check import check_policy

    policy_file = load_policy(policy)
    check_policy(policy_file)
    for name, entry in policy_file.policies.items():
        typer.echo(
            f"{name}: {entry.mode}, {len(entry.clamps)} clamps, "
            f"{len(entry.monitors)} monitors, {fingerprint(policy_file, name)[:12]}"
        )
    for drill in policy_file.drills:
        typer.echo(f"drill {drill.name}: {drill.position} behind {drill.sae}")


@app.command()
def drill(
    *,
    url: UrlOption = _LOCAL,
    admin_token: Annotated[
        str,
        typer.Option(envvar="GUARD_ADMIN_TOKEN", help="As the server was given it."),
    ] = "",
    api_key: KeyOption = "",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Run them under; may be given again. Default: the server's."),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Send prompts as plain text, not as a chat.")
    ] = False,
) -> None:
    """Bring the suppressed behaviour back on purpose, and see who notices."""
    from guard.exercise import run_drills

    run_drills(
        url,
        admin_token=admin_token,
        api_key=api_key,
        policies=policy or [None],
        route="completions" if text else "chat/completions",
    )


@app.command()
def status(url: UrlOption = _LOCAL, api_key: KeyOption = "") -> None:
    """Show what a running server says of its guard."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(f"{url}/guard/status", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            typer.echo(json.dumps(json.load(answer), indent=2))
    except (urllib.error.URLError, ValueError) as error:
        message = f"{url} does not answer as a guarded server: {error}."
        raise EngineError(message) from error


def main() -> None:
    """Run the command line; an error is one line and a non-zero exit."""
    try:
        code = app(prog_name="guard", standalone_mode=False)
    except GuardError as error:
        _complain(str(error))
        code = 1
    except TyperException as error:
        # Without arguments the help was shown, and nothing is left to say.
        if message := error.format_message():
            command = getattr(getattr(error, "ctx", None), "command_path", "guard")
            _complain(f"{message.rstrip('.')}; expected what `{command} --help` shows.")
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    sys.exit(code)


def _complain(message: str) -> None:
    sys.stderr.write(f"guard: {' '.join(message.split())}\n")
