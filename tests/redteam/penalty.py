"""A penalty to test prompt attackers with: the stream may not lie one way."""

import torch

from guard.hook import HookPoint


class Ceiling:
    """Charges what of any row lies along a direction above a height."""

    def __init__(self, layer, *, height, weight=1.0):
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(128, generator=generator)
        self.layers = (layer,)
        self.direction = direction / direction.norm()
        self.height, self.weight = height, weight
        self.asked = []

    def __call__(self, found, batch, behind):
        assert sorted(found) == list(self.layers)
        assert found[self.layers[0]].shape[:2] == batch.tokens.shape
        self.asked.append((batch, list(behind)))
        along = (found[self.layers[0]] @ self.direction).masked_fill(~batch.rows, -1e9)
        return self.weight * (along.amax(dim=1) - self.height).clamp(min=0)

    def highest(self, recording):
        """What of a recording lies furthest along the direction."""
        at = str(HookPoint(self.layers[0]))
        return float((recording.resid[at] @ self.direction).amax())
