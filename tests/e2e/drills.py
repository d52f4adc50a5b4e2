"""Drills of the toy model: random edits, large enough to change every answer.

What each of them brings back is what transformers says it does: a forward hook that
adds the same edit to the same tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import yaml
from e2e.serving import HOOK_POINT, Toy
from torch import Tensor

from guard.drill import RecoveryEdit, save_edit
from guard.hook import HookPoint
from guard.policy import Position

ADMIN_TOKEN = "of-an-administrator"
PROMPT = "w21 w7 w33 w54"
POSITIONS: dict[str, Position] = {"last": "last_prompt", "whole": "all_prompt"}
"""By the name of the drill, where it stands."""
NUM_GOLD = 6


class Drills:
    """Two drills of the toy: at the last token of a prompt, and at all of them."""

    def __init__(self, toy: Toy) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._toy = toy
        self._model = AutoModelForCausalLM.from_pretrained(toy.model)
        self._tokenizer = AutoTokenizer.from_pretrained(toy.model)
        generator = torch.Generator().manual_seed(12)
        self.deltas = {
            name: 20 * torch.randn(64, generator=generator) for name in POSITIONS
        }
        for name, delta in self.deltas.items():
            self._save(name, delta)

    def add_to(self, policies: str) -> str:
        """Add the drills to a policy file."""
        body: dict[str, Any] = yaml.safe_load(policies)
        body["drills"] = [
            {
                "name": name,
                "sae": "s",
                "delta": f"drills/{name}.safetensors",
                "position": position,
            }
            for name, position in POSITIONS.items()
        ]
        return yaml.safe_dump(body, sort_keys=False)

    def encode(self, prompt: str, *, with_bos: bool = True) -> list[int]:
        return list(self._tokenizer(prompt).input_ids)[0 if with_bos else 1 :]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    def continue_drilled(
        self, tokens: Sequence[int], drill: str, *, count: int
    ) -> list[int]:
        """Return the greedy answer of transformers with a drill and without clamps."""
        begin = len(tokens) - 1 if POSITIONS[drill] == "last_prompt" else 0
        begin = max(begin, int(tokens[0] == 1))

        def add(_module: object, _inputs: object, output: Any) -> Any:
            resid: Tensor = output[0] if isinstance(output, tuple) else output
            if resid.shape[1] == len(tokens):
                resid[:, begin:] += self.deltas[drill]
            return output

        layer = self._model.model.layers[HookPoint.parse(HOOK_POINT).layer]
        handle = layer.register_forward_hook(add)
        try:
            output = self._model.generate(
                torch.tensor([tokens]),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        finally:
            handle.remove()
        return list(output[0, len(tokens) :].tolist())

    def _save(self, name: str, delta: Tensor) -> None:
        # A chat's prompt has no BOS here.
        chat = self.encode(PROMPT, with_bos=False)
        gold = self.continue_drilled(chat, name, count=NUM_GOLD)
        edit = RecoveryEdit(
            delta=delta,
            prompt=PROMPT,
            gold=self.decode(gold),
            budget=1.0,
            position=POSITIONS[name],
            sae_sha256=self._toy.digest,
        )
        save_edit(self._toy.folder / "drills" / f"{name}.safetensors", edit)
