"""What a policy's rules do to the latents of one SAE.

Two forms of one thing, and tests that hold them together: `clamp_resid`, the plain
exact reference (one request, one policy, rule after rule), and `Clamp`, the rules of
all policies compiled to buffers, where the policy of a token row is buffer content.
`Clamp` runs in the worker, inside the graph: no branch on a value, no allocation whose
size depends on one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from guard.errors import PolicyError, SaeError
from guard.policy import MAX_RULES, Policy, Rule
from guard.sae.model import Encoded, Sae

__all__ = ["Clamp", "Clamped", "Rows", "clamp_resid", "native_values"]

_SPARE_LATENTS = 16
"""Least room for latents that a later generation of policies may clamp besides."""
_SPARE_CONDITIONS = 4
"""The same of conditions."""
_NEUTRAL: Mapping[str, float | bool | int] = {
    "gain": 1.0,
    "offset": 0.0,
    "low": -torch.inf,
    "high": torch.inf,
    "if_active": False,
    "rule_of": MAX_RULES,
}
"""What each table of laws holds where no rule applies."""


class Clamped(NamedTuple):
    """What the reference clamp did to the tokens of one request."""

    resid: Tensor
    """The stream after the clamp, fp32 `[num_tokens, d_model]`."""
    clamped: Tensor
    """Whether a rule changed a latent of a token, bool `[num_tokens, num_rules]`."""
    fired: Tensor
    """Whether a rule's condition held at the token itself, bool, same shape."""


class Rows(NamedTuple):
    """Whose token each row of a step is. Every field is `[num_tokens]`, int64."""

    slot: Tensor
    """Policy slot of the row; 0 is no policy: padding, or a BOS at position 0."""
    request: Tensor
    """Index of the row's request in `Clamp`'s state; 0 belongs to nobody."""
    start: Tensor
    """First row of the same request in this step."""


class ClampDelta(NamedTuple):
    """What the compiled clamp adds to the stream."""

    delta: Tensor
    """fp32 `[num_tokens, d_model]`."""
    touched: Tensor
    """Rows with any change, bool `[num_tokens]`."""
    clamped: Tensor
    """Bit r is set where rule r of the row's policy changed a latent, int32."""
    fired: Tensor
    """Bit r is set where the condition of rule r held at this token, int32."""


def native_values(rule: Rule, sae: Sae) -> Tensor:
    """Return a rule's value for each of its latents, in the SAE file's own unit.

    `unit_norm` counts activations as if decoder rows had norm 1; `max` counts in
    multiples of the largest activation seen in training (`latent_max`).

    Returns:
        fp32 `[num_latents]`; a gain (`scale`) has no unit and is returned as it is.

    Raises:
        SaeError: `unit: max`, but the SAE's files carry no `latent_max`.
    """
    value = 0.0 if rule.value is None else rule.value
    latents = torch.tensor(rule.latents, device=sae.W_dec.device)
    values = torch.full((len(rule.latents),), value, device=sae.W_dec.device)
    if rule.law in ("ablate", "scale") or rule.unit == "native":
        return values
    if rule.unit == "unit_norm":
        return values / sae.directions(latents).norm(dim=1)
    if sae.latent_max is None:
        message = (
            f"Clamp {rule.name!r} gives its value in multiples of the largest "
            "activation, but the SAE's files hold no latent_max; "
            "expected unit 'native' or 'unit_norm'."
        )
        raise SaeError(message)
    return values * sae.latent_max[latents]


def apply_law(latents: Tensor, rule: Rule, values: Tensor) -> Tensor:
    """Return g(z) of a rule for activations z `[num_tokens, num_latents]`."""
    match rule.law:
        case "ablate":
            return torch.zeros_like(latents)
        case "set":
            held = values.expand_as(latents)
            return torch.where(latents > 0, held, latents) if rule.if_active else held
        case "cap":
            return torch.minimum(latents, values)
        case "floor":
            return torch.maximum(latents, values)
        case "scale":
            return latents * values
        case _:
            message = f"Clamp law {rule.law!r} has no implementation."
            raise NotImplementedError(message)


def clamp_resid(
    resid: Tensor,
    sae: Sae,
    rules: Sequence[Rule],
    *,
    fired_before: Sequence[bool] | None = None,
) -> Clamped:
    """Clamp the consecutive tokens of one request: the plain, exact reference.

    `resid + sum_i (g(z_i) - z_i) * W_dec[i]` over the clamped latents, the SAE's error
    kept (arXiv 2606.18322, section 3).

    Args:
        resid: Any float dtype, `[num_tokens, d_model]`.
        sae: The dictionary the rules are written for.
        rules: The rules of one policy for this SAE.
        fired_before: For each rule, whether its condition held at an earlier token;
            `when.scope: request` remembers that.
    """
    resid = resid.float()
    encoded = sae.encode(resid)
    delta = torch.zeros_like(resid)
    clamped, fired = [], []
    for index, rule in enumerate(rules):
        holds = _condition(rule, encoded.latents)
        fired.append(holds)
        if rule.when is not None and rule.when.scope == "request":
            before = fired_before is not None and fired_before[index]
            holds = (holds.cumsum(0) > 0) | before
        latents = encoded.latents[:, list(rule.latents)]
        held = apply_law(latents, rule, native_values(rule, sae))
        applies = holds[:, None] & (held != latents)
        change = torch.where(applies, held - latents, 0.0)
        directions = sae.directions(torch.tensor(rule.latents, device=resid.device))
        touched = applies.any(1)
        moved = encoded.scale * (change @ directions)
        # An endless scale times no change at all would be NaN.
        delta += torch.where(touched[:, None], moved, 0.0)
        clamped.append(touched)
    empty = resid.new_zeros(len(resid), 0, dtype=torch.bool)
    return Clamped(
        resid=resid + delta,
        clamped=torch.stack(clamped, 1) if clamped else empty,
        fired=torch.stack(fired, 1) if fired else empty,
    )


def _condition(rule: Rule, latents: Tensor) -> Tensor:
    if rule.when is None:
        return torch.ones(len(latents), dtype=torch.bool, device=latents.device)
    return (latents[:, list(rule.when.latents)] > rule.when.above).any(1)


class Clamp(nn.Module):
    """The rules of every policy for one SAE, compiled to tables.

    Rule r of a policy keeps its place r among all of that policy's rules as its bit,
    whichever SAE it clamps, so that several hook points can share one word per row.
    A law is kept as `clip(gain * z + offset, low, high)`, which all of them are.
    """

    # All tables start with a row for slot 0, which no rule applies to. U is the number
    # of latents any rule needs, W the number of conditions, the first one "always";
    # both with room for what a reload may bring.
    columns: Tensor  # [U] latents to encode
    gain: Tensor  # [slots, U]
    offset: Tensor  # [slots, U]
    low: Tensor  # [slots, U]
    high: Tensor  # [slots, U]
    if_active: Tensor  # [slots, U]
    rule_of: Tensor  # [slots, U]; MAX_RULES where no rule applies
    condition_of: Tensor  # [slots, MAX_RULES]
    sticky: Tensor  # [slots, MAX_RULES] scope: request
    enforces: Tensor  # [slots] mode: enforce
    above: Tensor  # [W]
    watched: Tensor  # [W, U]
    bits: Tensor  # [MAX_RULES]

    def __init__(
        self,
        policies: Sequence[Policy],
        *,
        sae_name: str,
        sae: Sae,
        num_slots: int | None = None,
    ) -> None:
        """Compile the rules that clamp `sae_name`; slot s is policy `s - 1`.

        Args:
            policies: Of the first generation.
            sae_name: In the policy file.
            sae: The dictionary itself.
            num_slots: Slots of each of two generations, for `write`; there is room
                for one generation, and for nothing that it does not need, when left
                out.

        Raises:
            SaeError: A rule names a latent that the SAE does not have, or gives a
                value in a unit that the SAE's files do not support.
        """
        super().__init__()
        self.sae = sae
        self.sae_name = sae_name
        self.num_slots = len(policies) if num_slots is None else num_slots
        self._columns_of: list[dict[int, int]] = [{}, {}]
        self._conditions_of: list[set[int]] = [set(), set()]
        rules = [rule for _, _, rule in _rules_of(policies, sae_name)]
        _check_latents(rules, sae, sae_name)
        width = len({latent for rule in rules for latent in _needed_latents(rule)})
        conditions = sum(rule.when is not None for rule in rules)
        # Whoever clamps nothing here pays for nothing.
        has_room = num_slots is not None and width > 0
        self._allocate(
            width + max(width, _SPARE_LATENTS) * has_room,
            num_slots=(1 if num_slots is None else 2) * self.num_slots + 1,
            num_conditions=conditions + max(conditions, _SPARE_CONDITIONS) * has_room,
        )
        self.write(policies, bank=0)
        self.has_sticky = bool(self.sticky.any())

    @property
    def latents(self) -> list[int]:
        """Those that any rule needs, each once; `columns` may have room for more."""
        return sorted(set().union(*self._columns_of))

    def write(self, policies: Sequence[Policy], *, bank: int) -> None:
        """Compile another generation of policies, while the one in the other bank runs.

        Nothing that a row of the other bank reads is touched, and no address changes.

        Args:
            policies: Slot s of the bank is the s-th, counted from 1.
            bank: 0 or 1; whatever it held is gone, even where this fails.

        Raises:
            PolicyError: There is no room for as many slots, latents or conditions.
            SaeError: A rule does not fit the SAE.
        """
        self._columns_of[bank], self._conditions_of[bank] = {}, set()
        first = bank * self.num_slots + 1
        self._clear(slice(first, first + self.num_slots))
        rules = _rules_of(policies, self.sae_name)
        _check_latents([rule for _, _, rule in rules], self.sae, self.sae_name)
        if len(policies) > self.num_slots:
            _refuse_more(f"{len(policies)} policies", self.num_slots)
        column_of = self._place_latents(rules, bank)
        for latent, column in column_of.items():
            self.columns[column] = latent
        self._columns_of[bank] = column_of
        free = self._find_free_conditions(bank)
        for slot, policy in enumerate(policies, first):
            self.enforces[slot] = policy.mode == "enforce"
        for slot, place, rule in rules:
            where = first + slot
            self._compile_law(where, place, rule, column_of)
            if rule.when is None:
                continue
            if not free:
                _refuse_more("conditions", len(self.above) - 1)
            condition = free.pop(0)
            self._conditions_of[bank].add(condition)
            self.condition_of[where, place] = condition
            self.sticky[where, place] = rule.when.scope == "request"
            self.above[condition] = rule.when.above
            self.watched[condition] = False
            for latent in rule.when.latents:
                self.watched[condition, column_of[latent]] = True

    def _place_latents(
        self, rules: Sequence[tuple[int, int, Rule]], bank: int
    ) -> dict[int, int]:
        """Return the column of each latent: where it is, or one that is free."""
        needed = {latent for _, _, rule in rules for latent in _needed_latents(rule)}
        other = self._columns_of[1 - bank]
        free = [i for i in range(len(self.columns)) if i not in set(other.values())]
        missing = sorted(needed - other.keys())
        if len(missing) > len(free):
            _refuse_more(
                f"{len(missing)} latents of SAE {self.sae_name!r} besides those in use",
                len(free),
            )
        new = dict(zip(missing, free, strict=False))
        return {latent: new.get(latent, other.get(latent, 0)) for latent in needed}

    def _find_free_conditions(self, bank: int) -> list[int]:
        taken = self._conditions_of[1 - bank]
        return [i for i in range(1, len(self.above)) if i not in taken]

    def _allocate(self, width: int, *, num_slots: int, num_conditions: int) -> None:
        device = self.sae.W_dec.device

        def table(name: str, shape: tuple[int, ...], value: float | bool | int) -> None:
            tensor = torch.full(shape, value, device=device)
            self.register_buffer(name, tensor, persistent=False)

        for name, value in _NEUTRAL.items():
            table(name, (num_slots, width), value)
        table("condition_of", (num_slots, MAX_RULES), 0)
        table("sticky", (num_slots, MAX_RULES), False)
        table("enforces", (num_slots,), False)
        table("above", (num_conditions + 1,), torch.inf)
        table("watched", (num_conditions + 1, width), False)
        table("columns", (width,), 0)
        bits = 1 << torch.arange(MAX_RULES, device=device, dtype=torch.int32)
        self.register_buffer("bits", bits, False)

    def _clear(self, slots: slice) -> None:
        """Let no rule apply to the rows of some slots."""
        for name, value in _NEUTRAL.items():
            getattr(self, name)[slots] = value
        self.condition_of[slots] = 0
        self.sticky[slots] = False
        self.enforces[slots] = False

    def _compile_law(
        self, slot: int, place: int, rule: Rule, column_of: dict[int, int]
    ) -> None:
        values = native_values(rule, self.sae).tolist()
        for latent, value in zip(rule.latents, values, strict=True):
            where = slot, column_of[latent]
            self.rule_of[where] = place
            match rule.law:
                case "ablate":
                    self.gain[where] = 0.0
                case "set":
                    self.gain[where] = 0.0
                    self.offset[where] = value
                    self.if_active[where] = rule.if_active
                case "cap":
                    self.high[where] = value
                case "floor":
                    self.low[where] = value
                case "scale":
                    self.gain[where] = value

    def forward(self, resid: Tensor, rows: Rows, *, state: Tensor) -> ClampDelta:
        """Return what to add to `resid` so that every row obeys its policy.

        For a policy that observes, what would be added: `enforces` says which do not.

        Args:
            resid: fp32 `[num_tokens, d_model]`.
            rows: Whose tokens these are.
            state: Which sticky conditions have held so far, uint8
                `[max_requests, MAX_RULES]`; brought up to date in place.
        """
        encoded = self.sae.encode_columns(resid, self.columns)
        fired = self._fired(encoded.latents, rows)
        holds = self._remember(fired, rows, state) if self.has_sticky else fired
        change = self._change(encoded.latents, rows.slot, holds)
        delta = encoded.scale * (change @ self.sae.directions(self.columns))
        changed = change != 0  # NaN counts: it differs from 0
        touched = changed.any(1)
        by_rule = torch.zeros(
            len(resid), MAX_RULES + 1, dtype=torch.int32, device=resid.device
        ).scatter_reduce_(1, self.rule_of[rows.slot], changed.int(), "amax")
        return ClampDelta(
            # An endless scale times no change at all would be NaN.
            delta=torch.where(touched[:, None], delta, 0.0),
            touched=touched,
            clamped=self._pack(by_rule[:, :MAX_RULES]),
            fired=self._pack((fired & self.sticky[rows.slot]).int()),
        )

    def _fired(self, latents: Tensor, rows: Rows) -> Tensor:
        """Whether each rule's condition holds here, bool `[num_tokens, MAX_RULES]`."""
        over = latents[:, None, :] > self.above[:, None]
        held = (over & self.watched).any(2)
        held[:, 0] = True
        return held.gather(1, self.condition_of[rows.slot]) & (rows.slot > 0)[:, None]

    def _remember(self, fired: Tensor, rows: Rows, state: Tensor) -> Tensor:
        """Let a sticky condition hold from the first token where it was met."""
        count = fired.int().cumsum(0)
        before = (count - fired.int())[rows.start]
        met = (count > before) | state[rows.request].bool()
        sticky = self.sticky[rows.slot]
        index = rows.request[:, None].expand_as(met)
        state.scatter_reduce_(0, index, (met & sticky).to(state.dtype), "amax")
        return torch.where(sticky, met, fired)

    def _change(self, latents: Tensor, slot: Tensor, holds: Tensor) -> Tensor:
        gain = self.gain[slot]
        scaled = torch.where(gain == 0, 0.0, gain * latents)  # 0 * inf is NaN
        held = (scaled + self.offset[slot]).clamp(self.low[slot], self.high[slot])
        rule = self.rule_of[slot]
        applies = holds.gather(1, rule.clamp(max=MAX_RULES - 1)) & (rule < MAX_RULES)
        applies &= ~self.if_active[slot] | (latents > 0)
        applies &= held != latents  # inf - inf is NaN where nothing changes
        return torch.where(applies, held - latents, 0.0)

    def _pack(self, flags: Tensor) -> Tensor:
        return (flags * self.bits).sum(1, dtype=torch.int32)

    def residual_activation(self, encoded: Encoded, slot: Tensor) -> Tensor:
        """Return what the clamp left: the largest clamped latent, encoded again.

        Args:
            encoded: All latents of the stream after the clamp.
            slot: Policy slot of each row, `[num_tokens]`.

        Returns:
            `[num_tokens]`, native units; 0 where the row's policy clamps nothing.
        """
        if not len(self.columns):
            return encoded.latents.new_zeros(len(slot))
        latents = encoded.latents.index_select(1, self.columns)
        clamped = self.rule_of[slot] < MAX_RULES
        return torch.where(clamped, latents, 0.0).amax(1)


def _rules_of(policies: Sequence[Policy], sae_name: str) -> list[tuple[int, int, Rule]]:
    """Return policy, place in it, and rule of each that clamps an SAE."""
    return [
        (index, place, rule)
        for index, policy in enumerate(policies)
        for place, rule in enumerate(policy.clamps)
        if rule.sae == sae_name
    ]


def _refuse_more(what: str, room: int) -> NoReturn:
    message = f"there is no room for {what}, only for {room}; that needs a restart"
    raise PolicyError(message)


def _needed_latents(rule: Rule) -> tuple[int, ...]:
    return rule.latents + (rule.when.latents if rule.when is not None else ())


def _check_latents(rules: Sequence[Rule], sae: Sae, sae_name: str) -> None:
    for rule in rules:
        for latent in _needed_latents(rule):
            if latent >= sae.d_sae:
                message = (
                    f"Clamp {rule.name!r} names latent {latent}, but SAE "
                    f"{sae_name!r} has {sae.d_sae}; expected 0 to {sae.d_sae - 1}."
                )
                raise SaeError(message)
