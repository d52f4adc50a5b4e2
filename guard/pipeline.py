"""The guard at one hook point: what happens to a step's token rows there.

Runs in the worker, inside the graph, on buffers that live as long as the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from guard.calibration import Calibration
from guard.clamp import Clamp, Rows
from guard.drill import RecoveryEdit
from guard.errors import CalibrationError, DrillError
from guard.hook import HookPoint
from guard.monitor import Column, Monitor, list_columns
from guard.policy import MAX_DRILLS, MAX_RULES, PolicyFile
from guard.sae.model import Sae
from guard.score import SCORES, Activations, Statistics

__all__ = [
    "Dictionary",
    "Guard",
    "Marks",
    "SeenColumns",
    "StepBuffers",
    "build_guards",
    "read_resid",
    "read_statistics",
]

_TINY = 1e-12


class Marks(NamedTuple):
    """Notes on every row of a step, int32 `[num_tokens]`."""

    clamped: Tensor
    """Bit r is set where rule r of the row's policy changed the token."""
    fired: Tensor
    """Bit r is set where the sticky condition of rule r held at the token."""
    visits: Tensor
    """Hooks the row has passed: proof that it was guarded."""
    broken: Tensor
    """1 where what the model made of the row in the end is not finite."""


class StepBuffers(nn.Module):
    """Where a step's rows come in and its readings go out, shared by all hook points.

    Written before the step by the host, and during the step by every hook; fixed
    addresses, so that a captured graph can read them. What comes in is one tensor and
    what goes out another, so that each takes one copy.
    """

    banks: tuple[int, ...]
    """Those that the rows of the step use: the host knows, and a step of one generation
    of policies is not scored under the other."""
    rows_in: Tensor  # [max_tokens, 4] slot, request and start of `Rows`, and drill
    state: Tensor  # [max_requests + 1, MAX_RULES] sticky conditions met so far
    readings: Tensor  # [max_tokens, num_columns + 4] int32: bits of `scores`, `marks`

    def __init__(
        self,
        *,
        max_tokens: int,
        max_requests: int,
        num_columns: int,
        num_slots: int | None = None,
    ) -> None:
        """Allocate everything; nothing is allocated later.

        Args:
            max_tokens: Of a step.
            max_requests: Of a step.
            num_columns: Scores of a token.
            num_slots: Slots of each of two generations of policies; None where there
                is one generation.
        """
        super().__init__()
        self.num_slots = num_slots
        self.banks = (0,)

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            tensor = torch.zeros(shape, dtype=dtype)
            self.register_buffer(name, tensor, persistent=False)

        buffer("rows_in", (max_tokens, 4), torch.int64)
        buffer("state", (max_requests + 1, MAX_RULES), torch.uint8)
        buffer("readings", (max_tokens, num_columns + len(Marks._fields)), torch.int32)

    @property
    def scores(self) -> Tensor:
        """fp32 `[max_tokens, num_columns]`, a view of `readings`."""
        return self.readings[:, : -len(Marks._fields)].view(torch.float32)

    @property
    def marks(self) -> Tensor:
        """int32 `[max_tokens, 4]`, the fields of `Marks`, a view of `readings`."""
        return self.readings[:, -len(Marks._fields) :]

    def rows(self, num_tokens: int) -> Rows:
        """Return whose tokens the first `num_tokens` rows are."""
        slot, request, start, _ = self.rows_in[:num_tokens].unbind(1)
        return Rows(slot, request, start)

    def bank_of(self, slot: int) -> int:
        """Return the bank of a slot."""
        return int(self.num_slots is not None and slot > self.num_slots)

    def rows_of_banks(self, slot: Tensor) -> dict[int, Tensor]:
        """Return the rows of each generation, bool `[num_tokens]`, by bank.

        A captured graph runs for whatever comes, and so for both.
        """
        captures = slot.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.num_slots is None or (len(self.banks) == 1 and not captures):
            return {self.banks[0]: slot > 0}
        return {
            0: (slot > 0) & (slot <= self.num_slots),
            1: slot > self.num_slots,
        }

    def drills_of(self, num_tokens: int) -> Tensor:
        """Return the drill of each of the first `num_tokens` rows; 0 is none."""
        return self.rows_in[:num_tokens, 3]

    def marks_of(self, num_tokens: int) -> Marks:
        """Return what the hooks noted on the first `num_tokens` rows."""
        return Marks(*self.marks[:num_tokens].unbind(1))

    def clear(self) -> None:
        """Forget the step: no row belongs to a policy, and nothing was read."""
        self.rows_in.zero_()
        self.readings.zero_()


@dataclass(frozen=True, slots=True)
class SeenColumns:
    """The columns an SAE fills for the metrics alone."""

    error_ratio: int
    """Of |error| / |resid|."""
    clamp_residual: int
    """Of the largest clamped latent, encoded again."""


@dataclass(frozen=True, slots=True)
class Dictionary:
    """One SAE at the hook point, with what the policies want of it."""

    name: str
    """In the policy file."""
    sae: Sae
    clamp: Clamp
    monitor: Monitor
    """The scores that need it."""
    seen: SeenColumns | None
    """None where no score needs it, and nothing needs to be decoded."""


class Guard(nn.Module):
    """Clamp and monitor at one hook point, for the rows of all policies at once."""

    drills: Tensor | None

    def __init__(
        self,
        hook_point: HookPoint,
        dictionaries: Sequence[Dictionary],
        monitor: Monitor,
        step: StepBuffers,
        *,
        drills: Tensor | None = None,
    ) -> None:
        """Keep the parts; `build_guards` makes them from a policy file.

        Args:
            hook_point: Where it reads and writes.
            dictionaries: The SAEs there.
            monitor: The scores that need none.
            step: What the guards of all hook points share.
            drills: What each drill adds here, fp32 `[num_drills + 1, d_model]`, row 0
                and those of drills of other hook points zeros; None without one here.
                With two generations, `[2 * MAX_DRILLS + 1, d_model]`.
        """
        super().__init__()
        self.hook_point = hook_point
        self.dictionaries = tuple(dictionaries)
        self.monitor = monitor
        self.step = step
        # Registered, so that the tensors follow the model they are attached to.
        self.clamps = nn.ModuleList(part.clamp for part in dictionaries)
        self.monitors = nn.ModuleList(part.monitor for part in dictionaries)
        self.register_buffer("drills", drills, persistent=False)
        self.has_clamps = any(len(part.clamp.columns) for part in dictionaries)
        self.has_monitors = len(monitor) > 0 or any(map(_decodes, dictionaries))

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Clamp the rows in place, score what flows on, and leave the readings.

        Args:
            hidden_states: A layer's output, `[num_tokens, d_model]`, any float dtype;
                the clamp's delta is added to it, and behind it that of a drill.
            residual: The other half of the stream, where the layer returns two.
        """
        rows = self.step.rows(len(hidden_states))
        if self.has_clamps or self.drills is not None:
            resid = self._clamp(hidden_states, residual, rows)
        else:
            resid = read_resid(hidden_states, residual)
        if self.has_monitors:
            self._monitor(resid, rows)
        self.step.marks_of(len(hidden_states)).visits.add_(1)

    def write(
        self,
        policy_file: PolicyFile,
        statistics: Mapping[int, Statistics],
        edits: Mapping[str, RecoveryEdit],
        *,
        bank: int,
    ) -> None:
        """Compile another generation of policies into a bank that no row uses.

        Args:
            policy_file: The new one.
            statistics: By number of the column.
            edits: Of each drill of the file, by name.
            bank: 0 or 1; whatever it held is gone, even where this fails.

        Raises:
            GuardError: It does not fit, or needs more than was reserved.
        """
        policies = list(policy_file.policies.values())
        for part in self.dictionaries:
            part.clamp.write(policies, bank=bank)
            part.monitor.write(statistics, bank=bank)
        self.monitor.write(statistics, bank=bank)
        if self.drills is not None:
            table = _compile_drills(policy_file, edits, self.dictionaries)
            first = bank * MAX_DRILLS + 1
            own = self.drills[first : first + MAX_DRILLS]
            own.zero_()
            if table is not None:
                own[: len(table) - 1].copy_(table[1:])

    def _clamp(
        self, hidden_states: Tensor, residual: Tensor | None, rows: Rows
    ) -> Tensor:
        """Clamp the rows of who enforces, and return all as if they were clamped.

        A drill rehearses what would be done: its rows are clamped in any case.
        """
        resid = read_resid(hidden_states, residual)
        marks = self.step.marks_of(len(resid))
        total = torch.zeros_like(resid)
        touched = torch.zeros_like(rows.slot, dtype=torch.bool)
        observed = torch.zeros_like(touched)
        for part in self.dictionaries:
            if not len(part.clamp.columns):
                continue
            clamped = part.clamp(resid, rows, state=self.step.state)
            total += clamped.delta
            touched |= clamped.touched
            observed |= ~part.clamp.enforces[rows.slot]
            marks.clamped.bitwise_or_(clamped.clamped)
            marks.fired.bitwise_or_(clamped.fired)
        if self.drills is not None:
            edit = self.drills[self.step.drills_of(len(resid))]
            total += edit
            edited = edit.ne(0).any(1)
            touched |= edited
            observed &= ~edited
        moved = hidden_states.float() + total
        observed = (observed & touched)[:, None]
        # A row that nothing touches keeps its bits: -0.0 + 0.0 would not.
        written = touched[:, None] & ~observed
        rounded = moved.to(hidden_states.dtype)
        hidden_states.copy_(torch.where(written, rounded, hidden_states))
        if not self.has_monitors:
            return resid
        flowing = read_resid(hidden_states, residual)
        return torch.where(observed, read_resid(moved, residual), flowing)

    def _monitor(self, resid: Tensor, rows: Rows) -> None:
        scores = self.step.scores[: len(resid)]
        banks = self.step.rows_of_banks(rows.slot)
        self.monitor(Activations(resid), out=scores, keep=banks)
        for part in self.dictionaries:
            if part.seen is None:
                continue
            encoded = part.sae.encode(resid)
            error = resid - part.sae.decode(encoded)
            left = part.clamp.residual_activation(encoded, rows.slot)
            part.monitor(Activations(resid, error, left), out=scores, keep=banks)
            ratio = error.norm(dim=1) / resid.norm(dim=1).clamp(min=_TINY)
            ratio = torch.where(rows.slot > 0, ratio, 0.0)
            scores[:, part.seen.error_ratio] = ratio
            scores[:, part.seen.clamp_residual] = left


def _decodes(part: Dictionary) -> bool:
    return part.seen is not None


def read_resid(hidden_states: Tensor, residual: Tensor | None) -> Tensor:
    """Return the residual stream in fp32, from vLLM's halves or from one tensor."""
    resid = hidden_states.float()
    return resid if residual is None else resid + residual.float()


def build_guards(
    policy_file: PolicyFile,
    saes: Mapping[str, Sae],
    calibrations: Mapping[str, Calibration],
    step: StepBuffers,
    *,
    edits: Mapping[str, RecoveryEdit] = MappingProxyType({}),
    d_model: int | None = None,
    hook_points: Iterable[HookPoint] = (),
) -> dict[HookPoint, Guard]:
    """Compile a policy file into one guard for each hook point it uses.

    Where `step` has slots for two generations, there is room for another file too.

    Args:
        policy_file: Slot s is its s-th policy, counted from 1.
        saes: The SAEs any policy uses, by name.
        calibrations: By path, as the monitors name them.
        step: What all guards read and write.
        edits: Of each drill of the file, by name.
        d_model: Width of the stream; that of the SAEs when left out.
        hook_points: Further places that get a guard, for whoever records there.

    Raises:
        DrillError: The edit of a drill is not as wide as its SAE.
        CalibrationError: A calibration's statistics do not fit the stream.
        SaeError: A rule does not fit its SAE.
    """
    columns = list(enumerate(list_columns(policy_file)))
    policies = list(policy_file.policies.values())
    for sae in saes.values():
        d_model = d_model or sae.d_model
    statistics = read_statistics(policy_file, calibrations, d_model=d_model)
    banks = 1 if step.num_slots is None else 2

    def make_monitor(own: list[tuple[int, Column]]) -> Monitor:
        scored = [(i, column) for i, column in own if column in statistics]
        values = [statistics[column] for _, column in scored]
        return Monitor(scored, values, banks=banks)

    places: dict[HookPoint, list[Dictionary]] = {at: [] for at in hook_points}
    for _, column in columns:
        places.setdefault(HookPoint.parse(column.hook_point), [])
    for name, sae in saes.items():
        own = [(i, column) for i, column in columns if column.sae == name]
        numbers = {column.score: i for i, column in own if column.entry is None}
        part = Dictionary(
            name=name,
            sae=sae,
            clamp=Clamp(policies, sae_name=name, sae=sae, num_slots=step.num_slots),
            monitor=make_monitor(own),
            seen=SeenColumns(**numbers) if numbers else None,
        )
        at = HookPoint.parse(policy_file.saes[name].hook_point)
        places.setdefault(at, []).append(part)
    guards = {}
    for at, parts in sorted(places.items()):
        bare = [
            (i, column)
            for i, column in columns
            if column.sae is None and HookPoint.parse(column.hook_point) == at
        ]
        drills = _compile_drills(policy_file, edits, parts)
        if drills is not None and banks == 2:
            room = 2 * MAX_DRILLS + 1 - len(drills)
            drills = torch.cat([drills, drills.new_zeros(room, drills.shape[1])])
        guards[at] = Guard(at, parts, make_monitor(bare), step, drills=drills)
    return guards


def read_statistics(
    policy_file: PolicyFile,
    calibrations: Mapping[str, Calibration],
    *,
    d_model: int | None,
) -> dict[Column, Statistics]:
    """Return the statistics of each scored column of a policy file.

    Args:
        policy_file: Whose monitors they are.
        calibrations: By path, as the monitors name them.
        d_model: Width of the stream, where it is known.

    Raises:
        CalibrationError: They do not fit the stream.
    """
    statistics: dict[Column, Statistics] = {
        column: calibrations[column.calibration].entries[str(column.entry)].statistics
        for column in list_columns(policy_file)
        if column.calibration is not None
    }
    for column, values in statistics.items():
        _check_statistics(column, values, d_model)
    return statistics


def _compile_drills(
    policy_file: PolicyFile,
    edits: Mapping[str, RecoveryEdit],
    parts: Sequence[Dictionary],
) -> Tensor | None:
    """Return what each drill adds at the hook point of `parts`, None if none does."""
    widths = {part.name: part.sae.d_model for part in parts}
    own = [(i, d) for i, d in enumerate(policy_file.drills, 1) if d.sae in widths]
    if not own:
        return None
    width = widths[own[0][1].sae]
    table = torch.zeros(len(policy_file.drills) + 1, width)
    for number, drill in own:
        delta = edits[drill.name].delta
        if len(delta) != width:
            message = (
                f"{drill.delta}: its delta is {len(delta)} wide; expected {width}, as "
                f"SAE {drill.sae!r} is."
            )
            raise DrillError(message)
        table[number] = delta
    return table


def _check_statistics(
    column: Column, statistics: Statistics, d_model: int | None
) -> None:
    """Score one row of zeros, so that what does not fit is known before serving."""
    vectors = [value for value in statistics.values() if value.dim() == 1]
    width = d_model or (len(vectors[0]) if vectors else 1)
    row = torch.zeros(1, width)
    try:
        activations = Activations(row, row, row[:, 0])
        score = SCORES[column.score].apply(activations, statistics)
        fits = score.shape == (1,) and bool(score.isfinite().all())
    except (KeyError, RuntimeError):
        fits = False
    if not fits:
        message = (
            f"{column.calibration}: its statistics give no score {column.score!r} for "
            f"a stream of width {width}; expected what `guard calibrate` wrote."
        )
        raise CalibrationError(message)
