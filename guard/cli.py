"""`guard`: every command a person types, and one clear line when it cannot work."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer
from rich.console import Console
from typer.exceptions import TyperException

from guard import __version__
from guard.certificate import load_certificates
from guard.errors import CalibrationError, EngineError, GuardError, PolicyError
from guard.fingerprint import fingerprint
from guard.policy import PolicyFile, load_policy
from guard.prompt import read_prompts
from guard.schema import policy_schema

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
AdminOption = Annotated[
    str,
    typer.Option(
        envvar="GUARD_ADMIN_TOKEN",
        help="As the server was given it; everybody sees an argument, so rather in the "
        "environment.",
    ),
]
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
def serve(
    context: typer.Context,
    model: str,
    policy: PolicyOption,
    *,
    watch: Annotated[
        bool, typer.Option("--watch", help="Reload the policy file when it changes.")
    ] = False,
    audit_log: Annotated[
        Path | None,
        typer.Option(help="Write each flagged or blocked request there, as JSON."),
    ] = None,
) -> None:
    """Serve MODEL under a policy file; further options are vLLM's own."""
    try:
        from vllm_guard import launch
    except ImportError as error:
        message = f"The vLLM plugin cannot be imported ({error}); install it anew."
        raise EngineError(message) from error
    launch.serve(model, policy, context.args, watch=watch, audit_log=audit_log)


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
def check(
    policy: Annotated[Path | None, typer.Argument(help="The policy file.")] = None,
    *,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print its JSON schema and stop.")
    ] = False,
) -> None:
    """Check a policy file with its SAEs and calibrations, without an engine."""
    from guard.check import check_policy

    if schema:
        typer.echo(json.dumps(policy_schema(), indent=2))
        return
    if policy is None:
        message = "No policy file was named; expected one, or --schema."
        raise PolicyError(message)
    policy_file = load_policy(policy)
    check_policy(policy_file)
    certificates = load_certificates(policy_file)
    for name, entry in policy_file.policies.items():
        certified = certificates.get(name)
        typer.echo(
            f"{name}: {entry.mode}, {len(entry.clamps)} clamps, "
            f"{len(entry.monitors)} monitors, {fingerprint(policy_file, name)[:12]}"
            + (f", certificate {certified.id[:12]}" if certified else "")
        )
    for drill in policy_file.drills:
        typer.echo(f"drill {drill.name}: {drill.position} behind {drill.sae}")


probe_app = typer.Typer(no_args_is_help=True)
app.add_typer(probe_app, name="probe", help="Probes that a policy's monitors watch.")

ModelArgument = Annotated[
    str, typer.Argument(help="What vLLM takes; not needed with --url.")
]
NameOption = Annotated[
    str, typer.Option(help="The policy of the file; its default without.")
]
MonitorOption = Annotated[
    list[str] | None,
    typer.Option(help="Whose probe is trained; those of all monitors without."),
]
PromptsOption = Annotated[Path, typer.Option(help="JSON lines, see docs/monitors.md.")]
DtypeOption = Annotated[str, typer.Option(help="As the server will run it.")]
LengthOption = Annotated[int | None, typer.Option(help="Longest context, in tokens.")]


@app.command()
def calibrate(
    policy: PolicyOption,
    prompts: PromptsOption,
    model: ModelArgument = "",
    *,
    name: NameOption = "",
    url: Annotated[
        str, typer.Option(help="Of a running server that sets thresholds anew.")
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Re-measure false alarms, write nothing.")
    ] = False,
    target_fpr: Annotated[
        float | None, typer.Option(help="A rate the prompts must support, besides.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Largest total length of each bucket: 64,256,1024.")
    ] = "",
    dtype: DtypeOption = "auto",
    max_model_len: LengthOption = None,
    api_key: KeyOption = "",
) -> None:
    """Fit a policy's monitors and their thresholds on benign prompts."""
    from guard.client import Client
    from guard.command import calibrate as command

    policy_file = load_policy(policy)
    chosen = _choose(policy_file, name)
    lines = read_prompts(prompts)
    console = Console(stderr=True)
    if target_fpr is not None:
        command.check_target(target_fpr, lines, recorded=not (url or check))
    options = {"dtype": dtype, "max_model_len": max_model_len}
    if url or check:
        server = (
            Client(url, api_key=api_key, policy=chosen)
            if url
            else _offline().GuardedEngine(_given(model), policy, chosen, **options)
        )
        if not check:
            path = command.renew_thresholds(
                policy_file, chosen, lines, server=server, console=console
            )
            typer.echo(f"Wrote {path}")
        elif not command.check_calibration(
            policy_file, chosen, lines, server=server, console=console
        ):
            message = "More benign requests alarm than the policy promises."
            raise CalibrationError(message)
        return
    path = command.make_calibration(
        policy_file,
        chosen,
        lines,
        start=lambda: _offline().RecordingEngine(
            _given(model), policy, chosen, **options
        ),
        model=_given(model),
        lengths=_read_lengths(lengths),
        console=console,
    )
    typer.echo(f"Wrote {path}")


@probe_app.command("train")
def train_probe(
    model: ModelArgument,
    policy: PolicyOption,
    prompts: PromptsOption,
    *,
    name: NameOption = "",
    monitor: MonitorOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: LengthOption = None,
) -> None:
    """Train the probes of a policy on labelled prompts, judged on unseen groups."""
    from guard.check import load_saes
    from guard.command.probe import make_probes
    from guard.recording import Reader

    policy_file = load_policy(policy)
    chosen = _choose(policy_file, name)
    options = {"dtype": dtype, "max_model_len": max_model_len}
    make_probes(
        Reader(policy_file, chosen, load_saes(policy_file)),
        read_prompts(prompts),
        names=monitor or (),
        start=lambda: _offline().RecordingEngine(model, policy, chosen, **options),
        console=Console(stderr=True),
    )


def _choose(policy_file: PolicyFile, name: str) -> str:
    chosen = name or policy_file.default_policy
    if chosen not in policy_file.policies:
        known = ", ".join(policy_file.policies)
        message = f"Unknown policy {chosen!r}; expected one of {known}."
        raise PolicyError(message)
    return chosen


def _given(model: str) -> str:
    if not model:
        message = "No model was named; expected one, or --url of a running server."
        raise EngineError(message)
    return model


def _read_lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        message = f"--lengths {text!r} are not numbers; expected e.g. 64,256,1024."
        raise CalibrationError(message) from error


def _offline() -> ModuleType:
    """Return the module of the plugin that runs an engine without a server."""
    try:
        from vllm_guard import offline
    except ImportError as error:
        message = f"The vLLM plugin cannot be imported ({error}); install it anew."
        raise EngineError(message) from error
    return offline


@app.command()
def certify(
    policy: PolicyOption,
    model: Annotated[
        Path | None, typer.Argument(help="Its folder; `model` beside the policy file.")
    ] = None,
    *,
    name: NameOption = "",
    prompts: Annotated[
        Path | None,
        typer.Option(help="What is attacked; `certify.jsonl` beside the policy file."),
    ] = None,
    preset: Annotated[
        Literal["quick", "full"],
        typer.Option(help="How much is tried: minutes, or a night."),
    ] = "quick",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    output: Annotated[
        Path, typer.Option(help="The certificate; a page to read goes beside it.")
    ] = Path("certificate.json"),
    url: Annotated[
        str, typer.Option(help="Of a server that runs the policy, instead of its own.")
    ] = "",
    serve: Annotated[
        bool, typer.Option(help="Send the attacked prompts through a server.")
    ] = True,
    verify: Annotated[
        Path | None, typer.Option(help="A certificate to hold against all this.")
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="How many cells --verify runs again.")
    ] = 2,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema and stop.")
    ] = False,
    api_key: KeyOption = "",
) -> None:
    """Attack a policy in every way there is, and say how far it can be trusted."""
    from guard.redteam import command

    if schema:
        typer.echo(command.schema())
        return
    chosen = _choose(load_policy(policy), name)
    subject = command.Source(
        model=model or policy.parent / "model",
        policy=policy,
        name=chosen,
        prompts=prompts or policy.parent / "certify.jsonl",
    )
    console = Console(stderr=True)
    if verify is not None:
        command.verify_certificate(subject, verify, rows=rows, console=console)
        typer.echo(f"{verify} holds.")
        return
    found = command.make_certificate(
        subject,
        preset,
        seed=seed,
        output=output,
        url=url,
        serve=serve,
        api_key=api_key,
        console=console,
    )
    typer.echo(found.headline.sentence)
    typer.echo(f"Wrote {output} and {output.with_suffix('.html')}")


@app.command()
def drill(
    *,
    url: UrlOption = _LOCAL,
    admin_token: AdminOption = "",
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
    from guard.command.drill import run_drills

    run_drills(
        url,
        admin_token=admin_token,
        api_key=api_key,
        policies=policy or [None],
        route="completions" if text else "chat/completions",
    )


@app.command()
def doctor(
    *,
    policy: Annotated[
        Path | None,
        typer.Option(envvar="GUARD_POLICY", help="The policy file to look at."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The folder of the model it is for.")
    ] = None,
    url: Annotated[str, typer.Option("--url", help="Of a running server.")] = "",
    api_key: KeyOption = "",
) -> None:
    """Look for what is broken, and say what mends it; exit with 1 if anything is."""
    from guard.command.doctor import Subject, run_doctor

    subject = Subject(policy=policy, model=model, url=url, api_key=api_key)
    if not run_doctor(subject, console=Console()):
        raise typer.Exit(1)


@app.command()
def status(
    url: Annotated[
        list[str] | None,
        typer.Option(help=f"Of a server, {_LOCAL} without; may be given again."),
    ] = None,
    *,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay, and ask again and again.")
    ] = False,
    every: Annotated[
        float, typer.Option(min=0.2, help="How many seconds --watch waits between.")
    ] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print /guard/status as it comes.")
    ] = False,
    api_key: KeyOption = "",
    admin_token: AdminOption = "",
) -> None:
    """Show what running servers say of their guard, and what it did."""
    from guard.client import Client
    from guard.command import status as command

    urls = url or [_LOCAL]
    connect = partial(Client, api_key=api_key, admin_token=admin_token)
    if as_json:
        for said in command.tell_status(urls, connect=connect):
            typer.echo(said)
    elif watch:
        command.watch_servers(urls, connect=connect, every=every, console=Console())
    else:
        command.show_servers(urls, connect=connect, console=Console())


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
