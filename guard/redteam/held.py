"""What a policy clamps, layer by layer, and how a model is held to it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from guard.clamp import clamp_resid
from guard.errors import CertificateError
from guard.hook import HookPoint
from guard.redteam.forward import Edit
from guard.redteam.jacobian import later_latents

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from guard.policy import PolicyFile, Rule
    from guard.redteam.jacobian import Later
    from guard.sae.model import Sae

__all__ = ["Held", "held_layers", "policy_clamp", "unseen_later"]


class Held(NamedTuple):
    """What a policy clamps at one layer."""

    layer: int
    """Index of the decoder layer."""
    sae: Sae
    """Whose latents."""
    rules: tuple[Rule, ...]
    """All that the policy has for it."""


def held_layers(
    policy_file: PolicyFile, name: str, saes: Mapping[str, Sae]
) -> tuple[Held, ...]:
    """Return what a policy clamps, layer by layer.

    Raises:
        CertificateError: It clamps nothing, or by two SAEs at one hook point, or under
            a condition that needs to know which rows are one request.
    """
    rules = policy_file.policies[name].clamps
    places = {
        key: HookPoint.parse(policy_file.saes[key].hook_point).layer
        for key in dict.fromkeys(rule.sae for rule in rules)
    }
    is_plain = rules and not any(rule.when for rule in rules)
    if not is_plain or len(set(places.values())) != len(places):
        message = (
            f"Policy {name!r} is not a plain clamp; expected rules for one SAE at each "
            "hook point, without 'when'."
        )
        raise CertificateError(message)
    return tuple(
        Held(layer, saes[key], tuple(rule for rule in rules if rule.sae == key))
        for layer, key in sorted((layer, key) for key, layer in places.items())
    )


def policy_clamp(held: Sequence[Held]) -> Edit:
    """Return the plain clamps of a policy: the first one, and the later ones with it.

    Args:
        held: What is clamped, layer by layer.
    """
    first, *later = (Edit(at.layer, _clamp(at)) for at in held)
    return replace(first, later=tuple(later))


def _clamp(held: Held) -> Callable[[Tensor], Tensor]:
    return lambda resid: clamp_resid(resid, held.sae, held.rules).resid


def unseen_later(held: Sequence[Held]) -> tuple[Later, ...]:
    """Return what an edit behind the first clamp must not show to.

    Args:
        held: What is clamped, layer by layer.

    Raises:
        CertificateError: The SAE of a later layer normalises its input.
    """
    try:
        return tuple(later_latents(at.sae, at.rules, layer=at.layer) for at in held[1:])
    except ValueError as error:
        raise CertificateError(str(error)) from error
