"""Runs a `guard` command whose engine also writes down what it records, or tells.

`python commands.py OUT COMMAND ...`. A recording engine computes its prompts in small
chunks, and records the dialogues of `OUT.jsonl`, if it is there, when the command is
done.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.serving import guard_environment
from safetensors.torch import load_file, save_file

from guard.prompt import Prompt, read_prompts
from guard.recording import Recording
from guard.traffic import Told


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    output: str
    complaint: str
    recordings: list[Recording]
    """Of its prompts in their order, then of the dialogues."""
    told: list[Told]


def run_command(folder: Path, *words: object, dialogues: Sequence[Prompt] = ()) -> Done:
    """Run a command in a process of its own; `folder` takes what its engine shows."""
    out = folder / "out"
    for old in folder.glob("out*"):
        old.unlink()
    lines = [one.model_dump_json(exclude_defaults=True) for one in dialogues]
    if lines:
        out.with_suffix(".jsonl").write_text("\n".join(lines))
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, __file__, str(out), *map(str, words)],
        env=guard_environment({"PYTHONPATH": tests}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    told = json.loads(out.read_text()) if out.exists() else []
    return Done(
        code=done.returncode,
        output=done.stdout,
        complaint=done.stderr,
        recordings=_load_recordings(out.with_suffix(".safetensors")),
        told=[Told(s, frozenset(alarms), total) for s, alarms, total in told],
    )


def _load_recordings(path: Path) -> list[Recording]:
    tensors = load_file(path) if path.exists() else {}
    found: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        number, at = name.split("/")
        found.setdefault(int(number), {})[at] = tensor
    return [
        Recording(
            {at: resid for at, resid in parts.items() if at != "sizes"},
            *parts["sizes"].tolist(),
        )
        for _, parts in sorted(found.items())
    ]


def main() -> None:
    import torch
    from vllm_guard import offline

    from guard.cli import main as run_guard

    out = Path(sys.argv[1])
    tensors: dict[str, torch.Tensor] = {}
    engines = []

    class Showing(offline.RecordingEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            chunks = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
            super().__init__(*args, **options, **chunks)
            engines.append(self)

        def record(self, prompts: Sequence[Prompt]) -> Iterator[Recording]:
            for recording in super().record(prompts):
                number = len({name.split("/")[0] for name in tensors})
                sizes = recording.prompt_length, recording.total_length
                tensors[f"{number}/sizes"] = torch.tensor(sizes)
                for at, resid in recording.resid.items():
                    tensors[f"{number}/{at}"] = resid.contiguous()
                yield recording

    class Telling(offline.GuardedEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            # That it reads the same compiled is what tests/e2e/test_parity.py is about.
            super().__init__(*args, **options, enforce_eager=True)

        def ask(self, prompts: Sequence[Prompt]) -> Iterator[Told]:
            told = list(super().ask(prompts))
            found = [(t.scores, sorted(t.alarms), t.total_length) for t in told]
            out.write_text(json.dumps(found))
            yield from told

    offline.RecordingEngine = Showing
    offline.GuardedEngine = Telling
    sys.argv = ["guard", *sys.argv[2:]]
    try:
        run_guard()
    finally:
        dialogues = out.with_suffix(".jsonl")
        if dialogues.exists() and engines:
            list(engines[0].record(read_prompts(dialogues)))
        if tensors:
            save_file(tensors, out.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
