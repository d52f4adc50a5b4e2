"""`guard certify`: loads what is certified, runs a server, writes the result."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from guard.client import Client
from guard.errors import CertificateError
from guard.provenance import describe_run
from guard.redteam.certificate import Certificate, load_certificate
from guard.redteam.certify import PRESETS, certify, verify
from guard.redteam.forward import quiet_transformers
from guard.redteam.report import write_report
from guard.redteam.server import find_free_port, run_server, wait_until_ready
from guard.redteam.subject import load_subject

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from guard.redteam.certify import Preset
    from guard.redteam.subject import Subject

__all__ = ["Source", "make_certificate", "schema", "verify_certificate"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where what is certified lies."""

    model: Path
    policy: Path
    name: str
    """Of the policy."""
    prompts: Path

    def load(self, preset: Preset) -> Subject:
        """Load it, with as many prompts as a preset takes.

        Raises:
            GuardError: Something is missing or does not fit.
        """
        if not (self.model / "config.json").is_file():
            message = (
                f"{self.model}: holds no model; expected a folder that transformers "
                "loads, with config.json and weights."
            )
            raise CertificateError(message)
        plan = PRESETS[preset]
        quiet_transformers()
        return load_subject(
            self.model,
            self.policy,
            self.name,
            self.prompts,
            samples=plan.samples,
            benign=plan.benign,
        )


def make_certificate(
    source: Source,
    preset: Preset,
    *,
    seed: int,
    output: Path,
    url: str,
    serve: bool,
    api_key: str,
    console: Console,
) -> Certificate:
    """Attack a policy and write its certificate, as JSON and as a page to read.

    Args:
        source: What is certified.
        preset: How much is tried.
        seed: Of everything that is drawn.
        output: The JSON file; the page lies beside it.
        url: Of a server that runs the policy; one is started without.
        serve: Whether prompts go through a server at all.
        api_key: Where that checks keys.
        console: Where progress is shown.

    Raises:
        GuardError: Something is missing, does not fit, or does not answer.
    """
    if not output.parent.is_dir():
        message = f"{output.parent}: is no folder; expected one for the certificate."
        raise CertificateError(message)
    if output.is_dir() or output.suffix in (".html", ".parts"):
        message = f"{output}: is no name for a JSON file; expected one, as c.json."
        raise CertificateError(message)
    page, work = output.with_suffix(".html"), output.with_suffix(".parts")
    _use_one_thread()
    subject = source.load(preset)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Starting a server", total=1, visible=serve)
        with _server(source, subject, url, serve=serve, api_key=api_key) as client:
            progress.update(task, completed=1)
            found = certify(
                subject,
                preset,
                seed=seed,
                client=client,
                work=work,
                about=describe_run(),
                progress=progress,
            )
    text = json.dumps(found.model_dump(mode="json"), indent=1)
    try:
        output.write_text(text + "\n", encoding="utf-8")
        write_report(found, page)
    except OSError as error:
        message = (
            f"{error.filename or output}: cannot be written ({error.strerror}); what "
            f"was done is kept in {work}, for the same command again."
        )
        raise CertificateError(message) from error
    # Not before: an interrupted run goes on from its parts.
    shutil.rmtree(work)
    return found


@contextlib.contextmanager
def _server(
    source: Source, subject: Subject, url: str, *, serve: bool, api_key: str
) -> Iterator[Client | None]:
    """Yield a client of a server that runs the policy; None where none is wanted."""
    if url or not serve:
        yield Client(url, api_key=api_key) if url else None
        return
    port = find_free_port()
    calibration = next(iter(subject.calibrations.values()))
    command = ["guard", "serve", str(source.model), "--policy", str(source.policy)]
    command += ["--dtype", str(calibration.provenance.get("dtype", "auto"))]
    with tempfile.TemporaryDirectory(prefix="guard-certify-") as folder:
        log = Path(folder, "log")
        with run_server(command, port=port, log=log) as server:
            own = f"http://127.0.0.1:{port}"
            wait_until_ready(own, server, log)
            yield Client(own, api_key=api_key)  # it inherits VLLM_API_KEY


def verify_certificate(
    source: Source, path: Path, *, rows: int, console: Console
) -> None:
    """Hold a certificate against what it is about, and run some of it again.

    Raises:
        CertificateError: It is none, or does not hold; the first reason is named.
    """
    certificate = load_certificate(path)
    _use_one_thread()
    subject = source.load(certificate.protocol.preset)
    with console.status(f"Running {rows} of its cells again ..."):
        wrong = verify(certificate, subject, rows=rows)
    if wrong:
        more = f" And {len(wrong) - 1} more." if len(wrong) > 1 else ""
        message = f"{path} does not hold. {wrong[0]}{more}"
        raise CertificateError(message)


def schema() -> str:
    """Return the JSON schema of a certificate."""
    return json.dumps(Certificate.model_json_schema(), indent=2)


def _use_one_thread() -> None:
    """Let the same seed give the same numbers, whatever the machine has of cores."""
    torch.set_num_threads(1)
