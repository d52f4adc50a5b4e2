"""Calibrations whose real score alarms exactly where a test wants it.

No fault is injected: a `density` calibration whose ellipsoid is thin in one chosen
direction scores the stream along it, and the direction is solved for on transformers'
own forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from e2e.serving import HOOK_POINT, Toy
from specimens import make_ellipsoid
from torch import Tensor

from guard.calibration import Calibration, Entry, save_calibration
from guard.score import Activations, density

PROMPT = "w3 w14 w15 w92 w65 w35 w89 w79 w32"
"""Its greedy continuation repeats itself late; 10 tokens with BOS."""
LOOPING_PROMPT = "w23 w58 w14 w61 w44 w90"
"""Its greedy continuation repeats one token: what an n-gram drafter guesses right."""
LONG_PROMPT = " ".join("w110" if i == 49 else f"w{i % 20}" for i in range(130))
"""Four full KV blocks of 32 tokens, and one word that is not like the others."""
BOS = 1
MAX_TOKENS = 24
DRAFTED_OUTPUT = 8
"""Output token on which `drafted` lies: in the middle of the loop."""
MIDDLE_OUTPUT = 5
HOLDS = (1, 4, 40)
"""Tokens that policies keep back; the last of them is more than an answer has."""
LONG_POSITION = 50

_OVERFLOW = 3e38
_CLEAR = 0.02


@dataclass(frozen=True)
class Tripwire:
    """A place in a request, and the score that alarms there."""

    prompt: str
    position: int
    """Where it alarms in the greedy run."""
    directions: Tensor
    """Along which a row scores its length, `[d_model, num_directions]`."""
    threshold: float
    with_bos: bool = True


class Tripwires:
    """All tripwires of the toy model, and what transformers says about them."""

    def __init__(self, toy: Toy) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._toy = toy
        self._model = AutoModelForCausalLM.from_pretrained(toy.model)
        self._tokenizer = AutoTokenizer.from_pretrained(toy.model)
        self.by_name = self._lay()
        for name, tripwire in self.by_name.items():
            self._save(name, tripwire)

    def encode(self, prompt: str, *, with_bos: bool = True) -> list[int]:
        return list(self._tokenizer(prompt).input_ids)[0 if with_bos else 1 :]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    def continue_greedily(self, tokens: Sequence[int], *, count: int) -> list[int]:
        output = self._model.generate(
            torch.tensor([tokens]),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return list(output[0, len(tokens) :].tolist())

    def alarm_position(self, name: str, tokens: Sequence[int]) -> int | None:
        """Return where a request of these tokens must alarm first, if anywhere.

        Raises:
            ValueError: A score is too close to the threshold to tell.
        """
        tripwire = self.by_name[name]
        first = int(tokens[0] == BOS)
        scores = density(
            Activations(self._resid(tokens)[first:]),
            make_ellipsoid(tripwire.directions),
        )
        over = ~(scores <= tripwire.threshold)
        if not over.any():
            return None
        position = int(over.int().argmax())
        ratios = scores[: position + 1] / tripwire.threshold
        if ((ratios - 1).abs() < _CLEAR).any():
            raise ValueError(f"{name}: {ratios} are too close to 1; use other tokens.")
        return first + position

    def add_to(self, policies: str) -> str:
        """Add policies per tripwire to a policy file.

        NAME blocks, NAME-observed does not, and NAME-hold-N blocks and keeps N tokens
        back; open-hold-N has no monitor that could block.
        """
        body: dict[str, Any] = yaml.safe_load(policies)
        holds = {f"-hold-{hold}": {"hold_tokens": hold} for hold in HOLDS}
        kinds = {"": {}, "-observed": {"mode": "observe"}, **holds}
        for name in self.by_name:
            for suffix, settings in kinds.items():
                monitor = {
                    "name": "tripwire",
                    "sae": "s",
                    "score": "density",
                    "calibration": f"tripwires/{name}.safetensors",
                    "target_fpr": 0.5,
                    "on_alarm": "block",
                }
                policy = {**settings, "monitors": [monitor]}
                body["policies"][f"{name}{suffix}"] = policy
        body["policies"] |= {f"open{suffix}": holds[suffix] for suffix in holds}
        body["public_policies"] = [name for name in body["policies"] if name != "staff"]
        body["max_policies"] = 64
        return yaml.safe_dump(body, sort_keys=False)

    def _resid(self, tokens: Sequence[int]) -> Tensor:
        """Return the stream at the hook point, `[num_tokens, d_model]`."""
        with torch.no_grad():
            answer = self._model(torch.tensor([tokens]), output_hidden_states=True)
        return answer.hidden_states[2][0]

    def _lay(self) -> dict[str, Tripwire]:
        prompt = self.encode(PROMPT)
        bare = self.encode(PROMPT, with_bos=False)
        greedy = self.continue_greedily(prompt, count=MAX_TOKENS)
        looping = self.encode(LOOPING_PROMPT)
        loop = self.continue_greedily(looping, count=MAX_TOKENS)
        long = self.encode(LONG_PROMPT)
        last, middle = len(prompt) - 1, len(prompt) + MIDDLE_OUTPUT
        drafted = len(looping) + DRAFTED_OUTPUT
        first_output = _directions_off(self._resid(prompt)[1:])
        overflow = torch.full((len(self._resid(prompt)[0]), 1), _OVERFLOW)

        def along(tokens: list[int], position: int) -> Tensor:
            rows = self._resid(tokens)
            return _direction_at(rows, position, first=int(tokens[0] == BOS))

        return {
            "position-zero": Tripwire(PROMPT, 0, along(bare, 0), 0.5, with_bos=False),
            "first-prompt": Tripwire(PROMPT, 1, along(prompt, 1), 0.5),
            "last-prompt": Tripwire(PROMPT, last, along(prompt, last), 0.5),
            "first-output": Tripwire(PROMPT, last + 1, first_output, 0.5),
            "middle-output": Tripwire(
                PROMPT, middle, along(prompt + greedy[: MIDDLE_OUTPUT + 1], middle), 0.5
            ),
            "drafted": Tripwire(
                LOOPING_PROMPT,
                drafted,
                along(looping + loop[: DRAFTED_OUTPUT + 1], drafted),
                0.5,
            ),
            "cached": Tripwire(
                LONG_PROMPT, LONG_POSITION, along(long, LONG_POSITION), 0.4
            ),
            "not-finite": Tripwire(PROMPT, 1, overflow, _OVERFLOW),
        }

    def _save(self, name: str, tripwire: Tripwire) -> None:
        statistics = make_ellipsoid(tripwire.directions)
        calibration = Calibration(
            entries={"tripwire": Entry("density", HOOK_POINT, None, 1, statistics)},
            lengths=(2048,),
            scales=(torch.tensor([[0.0, 1.0]]),),
            maxima=(torch.tensor([[tripwire.threshold]]),),
            provenance=self._toy.provenance,
        )
        folder: Path = self._toy.folder / "tripwires"
        save_calibration(calibration, folder / f"{name}.safetensors")


def _direction_at(rows: Tensor, position: int, *, first: int) -> Tensor:
    """Return w with `rows @ w` of 1 at a position and of nearly 0 at the others."""
    wanted = torch.zeros(len(rows) - first, 1, dtype=torch.float64)
    wanted[position - first] = 1
    solve: Callable[..., Any] = torch.linalg.lstsq
    return solve(rows[first:].double(), wanted, driver="gelsd").solution.float()


def _directions_off(rows: Tensor) -> Tensor:
    """Return a basis of everything that lies off these rows, which all score 0."""
    *_, right = torch.linalg.svd(rows.double(), full_matrices=True)
    return right[len(rows) :].T.float().contiguous()
