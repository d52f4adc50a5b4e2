"""Random SAEs, policies and batches that several tests draw from."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from guard.calibration import Calibration, Entry
from guard.certificate import certificate_id
from guard.clamp import native_values
from guard.fingerprint import clamps_digest
from guard.pipeline import Guard, read_resid
from guard.policy import Monitor, Policy, PolicyFile, Rule, SaeSource, When
from guard.sae.config import SaeConfig
from guard.sae.load import build_sae
from guard.sae.model import Sae
from guard.score import SCORES, Activations, Statistics

D_MODEL, D_SAE, TOPK = 12, 16, 5
AT = "layers.1.resid_post"
ARCHITECTURES = ["standard", "jumprelu", "topk"]
NORMALISATIONS = ["none", "constant_norm_rescale", "layer_norm"]
LAWS = ["ablate", "set", "cap", "floor", "scale"]


def draw_rows(num_rows: int, *, seed: int, scale: float = 1.0) -> Tensor:
    """Return random rows of a stream, `[num_rows, D_MODEL]`."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return scale * torch.randn(num_rows, D_MODEL, generator=generator)


def make_sae(
    architecture: str = "jumprelu", *, normalisation: str = "none", seed: int = 0
) -> Sae:
    """Return a random SAE in which about half of the latents are active."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "W_enc": 0.5 * draw(D_MODEL, D_SAE),
        "W_dec": draw(D_SAE, D_MODEL),
        "b_enc": 0.3 * draw(D_SAE),
        "b_dec": 0.3 * draw(D_MODEL),
        "latent_max": 1.0 + draw(D_SAE).abs(),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = 0.3 * draw(D_SAE).abs()
    config = SaeConfig.model_validate(
        {
            "architecture": architecture,
            "d_model": D_MODEL,
            "d_sae": D_SAE,
            "hook_point": AT,
            "k": TOPK if architecture == "topk" else None,
            "normalize_activations": normalisation,
        }
    )
    return build_sae(config, tensors)


def make_policy_file(
    policies: Mapping[str, Policy], *, saes: Mapping[str, str]
) -> PolicyFile:
    """Return a policy file over SAEs at the given hook points, by name."""
    sources = {
        name: SaeSource(
            path=Path(name),
            format="guard",
            hook_point=hook_point,
            sha256=f"{index:064x}",
        )
        for index, (name, hook_point) in enumerate(saes.items())
    }
    return PolicyFile(
        version=1,
        max_policies=len(policies),
        saes=sources,
        policies=policies,
        default_policy=next(iter(policies)),
    )


def make_monitor(name: str = "watch", **values: Any) -> Monitor:
    """Return a monitor that blocks, unless told otherwise."""
    wanted = {
        "name": name,
        "sae": "a",
        "score": "error_norm",
        "calibration": Path("calibration"),
        "target_fpr": 0.1,
        "on_alarm": "block",
    }
    if values.get("hook_point"):
        del wanted["sae"]
    return Monitor.model_validate(wanted | values)


def make_entry(policy_file: PolicyFile, monitor: Monitor, **values: Any) -> Entry:
    """Return what a calibration says of a monitor that was calibrated as it is."""
    needs_sae = SCORES[monitor.score].needs_sae
    wanted = {
        "score": monitor.score,
        "hook_point": policy_file.hook_point(monitor),
        "stage": monitor.stage,
        "window": monitor.window,
        "drift": monitor.drift,
        "statistics": {},
        "sae_sha256": policy_file.saes[str(monitor.sae)].sha256 if needs_sae else None,
    }
    return Entry(**(wanted | values))


def make_calibration(
    policy_file: PolicyFile,
    name: str = "",
    *,
    maxima: Sequence[Tensor] = (torch.arange(1.0, 20.0),),
    lengths: Sequence[int] = (100,),
    statistics: Mapping[str, Statistics] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Calibration:
    """Return a calibration that fits a policy in every respect, on a plain scale.

    Args:
        policy_file: Holds the policy.
        name: Of the policy; the default without.
        maxima: Of each bucket, `[num_requests, num_monitors]`, or `[num_requests]`
            where all monitors have the same.
        lengths: Of each bucket.
        statistics: By name of the monitor; none without.
        provenance: Besides the clamps.
    """
    name = name or policy_file.default_policy
    monitors = policy_file.policies[name].monitors
    width = len(monitors)
    scale = torch.tensor([0.0, 1.0])
    return Calibration(
        entries={
            monitor.name: make_entry(
                policy_file,
                monitor,
                statistics=(statistics or {}).get(monitor.name, {}),
            )
            for monitor in monitors
        },
        lengths=tuple(lengths),
        scales=tuple(scale.repeat(width, 1) for _ in lengths),
        maxima=tuple(
            one if one.dim() == 2 else one[:, None].expand(-1, width) for one in maxima
        ),
        provenance={"clamps": clamps_digest(policy_file, name), **(provenance or {})},
    )


def write_certificate(path: Path, policy_fingerprint: str, **values: Any) -> str:
    """Write what a server reads of a certificate, and `values`; return its id."""
    said = {
        "issued": "2026-07-25",
        "subject": {"policy_fingerprint": policy_fingerprint},
        **values,
    }
    own = certificate_id(said)
    path.write_text(json.dumps({"id": own, **said}))
    return own


def make_ellipsoid(basis: Tensor, *, rest: float = 0.0) -> dict[str, Tensor]:
    """Return statistics under which a density is the norm of `rows @ basis`.

    Args:
        basis: `[d_model, num_directions]`
        rest: How much what lies off an orthonormal basis counts.
    """
    d_model, directions = basis.shape
    return {
        "mean": torch.zeros(d_model),
        "inverse_scale": torch.ones(d_model),
        "basis": basis,
        "leading": torch.ones(directions),
        "rest": torch.tensor(rest),
    }


def draw_probe(*, hidden: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Return the weights of a random probe."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "weight": draw(D_MODEL),
        "inward": draw(D_MODEL, hidden),
        "bias": draw(hidden),
        "outward": draw(hidden),
        "offset": draw(1)[0],
    }


def watch_everything() -> tuple[PolicyFile, dict[str, Sae]]:
    """Return policies that watch every score, at three hook points, under clamps.

    `p` and `q` have monitors at the SAEs `a` and `b`, and between them; `open` none.
    """
    between = "layers.3.resid_post"
    share = {"target_fpr": 0.05}
    clamps = (
        Rule(name="hold", sae="a", latents=(0, 1, 2), law="set", value=3.0),
        Rule(name="dim", sae="b", latents=(4,), law="ablate"),
    )
    policies = {
        "p": Policy(
            clamps=clamps,
            monitors=(
                make_monitor("far", score="density", **share),
                make_monitor("odd", score="error", window=3, **share),
                make_monitor("apart", score="density", hook_point=between, **share),
                make_monitor(
                    "content",
                    score="probe",
                    hook_point=AT,
                    probe="x",
                    stage="output",
                    **share,
                ),
                make_monitor("left", score="clamp_residual", **share),
                make_monitor("late", sae="b", stage="prompt", **share),
            ),
        ),
        "q": Policy(
            monitors=(
                make_monitor("far", score="density", calibration="q"),
                make_monitor(
                    "content",
                    score="probe",
                    hook_point=between,
                    probe="x",
                    calibration="q",
                ),
            )
        ),
        "open": Policy(),
    }
    policy_file = make_policy_file(policies, saes={"a": AT, "b": "layers.5.resid_post"})
    return policy_file, {"a": make_sae("topk"), "b": make_sae("jumprelu", seed=1)}


def fit_everything(policy_file: PolicyFile) -> dict[str, Calibration]:
    """Return calibrations of `watch_everything`, fitted on random rows, by path."""
    found = {}
    for seed, (name, path) in enumerate((("p", "calibration"), ("q", "q"))):
        rows = draw_rows(300, seed=seed)
        benign = Activations(rows @ draw_rows(D_MODEL, seed=9), rows)
        found[path] = make_calibration(
            policy_file,
            name,
            statistics={
                monitor.name: draw_probe(seed=seed)
                if monitor.score == "probe"
                else SCORES[monitor.score].fit(benign)
                for monitor in policy_file.policies[name].monitors
            },
        )
    return found


@st.composite
def whens(draw: st.DrawFn) -> When | None:
    """A condition, or none."""
    scope = draw(st.sampled_from([None, "token", "request"]))
    if scope is None:
        return None
    latents = draw(st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=3))
    above = draw(st.sampled_from([0.0, 0.4, 1.0, 3.0]))
    return When(latents=tuple(latents), above=above, scope=scope)


@st.composite
def rules(draw: st.DrawFn, *, name: str, sae: str, latents: Sequence[int]) -> Rule:
    """A rule on some of `latents`."""
    law = draw(st.sampled_from(LAWS))
    values: dict[str, Any] = {"law": law}
    if law != "ablate":
        values["value"] = draw(st.sampled_from([-2.0, 0.0, 0.25, 1.0, 1.5, 4.0]))
    if law == "set":
        values["if_active"] = draw(st.booleans())
    if law not in ("ablate", "scale"):
        values["unit"] = draw(st.sampled_from(["native", "unit_norm", "max"]))
    held = draw(st.lists(st.sampled_from(latents), min_size=1, unique=True))
    return Rule(name=name, sae=sae, latents=tuple(held), when=draw(whens()), **values)


@st.composite
def policies(draw: st.DrawFn, *, saes: Sequence[str] = ("a",)) -> Policy:
    """A policy with up to three rules for each of `saes`, each on other latents."""
    drawn = []
    for sae in saes:
        for part in range(draw(st.integers(0, 3))):
            latents = range(part * 5, part * 5 + 5)
            name = f"{sae}{part}"
            drawn.append(draw(rules(name=name, sae=sae, latents=latents)))
    order = draw(st.permutations(drawn))
    return Policy(clamps=tuple(order))


@dataclass(frozen=True, slots=True)
class Request:
    """One request's tokens at the hook point, and how they come: in which pieces."""

    slot: int
    hidden_states: Tensor
    residual: Tensor | None
    starts_with_bos: bool
    chunks: tuple[int, ...]
    """Tokens of each step it is part of; together all of them."""

    @property
    def resid(self) -> Tensor:
        """The stream before the clamp, fp32."""
        return read_resid(self.hidden_states, self.residual)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of several policies, batched together."""

    policy_file: PolicyFile
    saes: dict[str, Sae]
    requests: tuple[Request, ...]
    padding: int
    """Rows behind each step that are nobody's."""

    def policy(self, request: Request) -> Policy:
        """Return what a request runs under."""
        policies = list(self.policy_file.policies.values())
        return policies[request.slot - 1] if request.slot else Policy()


class Served(NamedTuple):
    """What came back for one request; `[num_tokens, ...]`."""

    hidden_states: Tensor
    clamped: Tensor
    fired: Tensor
    visits: Tensor
    scores: Tensor


@st.composite
def traffics(
    draw: st.DrawFn, *, scales: Sequence[float] = (1e-20, 1e-3, 1.0, 30.0, 1e4, 1e20)
) -> Traffic:
    """Up to five requests under up to three policies on one or two SAEs."""
    saes = {
        name: make_sae(
            draw(st.sampled_from(ARCHITECTURES)),
            normalisation=draw(st.sampled_from(NORMALISATIONS)),
            seed=draw(st.integers(0, 99)),
        )
        for name in draw(st.sampled_from([["a"], ["a", "b"]]))
    }
    several = draw(st.lists(policies(saes=list(saes)), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    has_residual = draw(st.booleans())
    requests = []
    for number in range(draw(st.integers(0, 5))):
        chunks = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        scale = draw(st.sampled_from(scales))
        seed = draw(st.integers(0, 999))
        hidden_states, residual = (
            draw_rows(sum(chunks), seed=seed + part, scale=scale).to(dtype)
            for part in (0, 5000)
        )
        hidden_states[:, number % D_MODEL] = -0.0
        requests.append(
            Request(
                slot=draw(st.integers(0, len(several))),
                hidden_states=hidden_states,
                residual=residual if has_residual else None,
                starts_with_bos=draw(st.booleans()),
                chunks=chunks,
            )
        )
    return Traffic(
        policy_file=make_policy_file(
            {f"p{i}": policy for i, policy in enumerate(several)},
            saes=dict.fromkeys(saes, AT),
        ),
        saes=saes,
        requests=tuple(requests),
        padding=draw(st.integers(0 if requests else 1, 3)),
    )


def serve(
    traffic: Traffic, guard: Guard, call: Callable[[Tensor, Tensor | None], None]
) -> list[Served]:
    """Send every request through `call`, step by step, batched with all others."""
    parts: list[list[Served]] = [[] for _ in traffic.requests]
    for number in range(max((len(r.chunks) for r in traffic.requests), default=1)):
        present = [
            (index, sum(request.chunks[:number]), request.chunks[number])
            for index, request in enumerate(traffic.requests)
            if number < len(request.chunks)
        ]
        for index, served in zip(
            [index for index, _, _ in present],
            _serve_step(traffic, guard, call, present),
            strict=True,
        ):
            parts[index].append(served)
    return [
        Served(*(torch.cat(tensors) for tensors in zip(*served, strict=True)))
        for served in parts
    ]


def _serve_step(
    traffic: Traffic,
    guard: Guard,
    call: Callable[[Tensor, Tensor | None], None],
    present: list[tuple[int, int, int]],
) -> list[Served]:
    step = guard.step
    step.clear()
    halves: list[list[Tensor]] = [[], []]
    shares, row = [], 0
    for index, first, count in present:
        request = traffic.requests[index]
        share = slice(row, row + count)
        step.rows_in[share] = torch.tensor([request.slot, index + 1, row, 0])
        if first == 0 and request.starts_with_bos:
            step.rows_in[row, 0] = 0
        for half, tensor in zip(
            halves, (request.hidden_states, request.residual), strict=True
        ):
            if tensor is not None:
                half.append(tensor[first : first + count])
        shares.append(share)
        row += count
    dtype = halves[0][0].dtype if present else torch.float32
    garbage = draw_rows(traffic.padding, seed=7, scale=100.0).to(dtype)
    hidden_states = torch.cat([*halves[0], garbage])
    residual = torch.cat([*halves[1], garbage]) if halves[1] else None
    call(hidden_states, residual)
    if traffic.padding:
        assert_same_bits(hidden_states[row:], garbage)
    marks = step.marks_of(len(hidden_states))
    tensors = hidden_states, marks.clamped, marks.fired, marks.visits, step.scores
    return [Served(*(tensor[share].clone() for tensor in tensors)) for share in shares]


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    """Fail where a bit differs; -0.0 is not 0.0, and a NaN is the same NaN."""
    kind = {2: torch.int16, 4: torch.int32}[one.element_size()]
    assert torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def assert_same_calibration(one: Calibration, other: Calibration) -> None:
    """Fail where two calibrations differ in a bit."""
    assert (one.lengths, one.provenance) == (other.lengths, other.provenance)
    for tensors in (
        zip(one.scales, other.scales, strict=True),
        zip(one.maxima, other.maxima, strict=True),
    ):
        assert all(torch.equal(*pair) for pair in tensors)
    assert list(one.entries) == list(other.entries)
    for name, entry in one.entries.items():
        twin = other.entries[name]
        assert replace(entry, statistics={}) == replace(twin, statistics={})
        assert entry.statistics.keys() == twin.statistics.keys()
        for key, value in entry.statistics.items():
            assert torch.equal(value, twin.statistics[key])


def is_clear_cut(traffic: Traffic) -> bool:
    """Whether no activation lies within rounding of where a decision tips."""
    return all(
        _is_far(request.resid, traffic.saes[rule.sae], rule)
        for request in traffic.requests
        for rule in traffic.policy(request).clamps
    )


def _is_far(resid: Tensor, sae: Sae, rule: Rule) -> bool:
    watched = rule.when.latents if rule.when else ()
    columns = torch.tensor(rule.latents + watched)
    rows = sae._normalise(resid)[0]
    acts = rows @ sae.W_enc + sae.b_enc
    margin = 1e-5 * (rows.abs() @ sae.W_enc.abs() + sae.b_enc.abs())
    tips = [sae.threshold.expand_as(acts)[:, columns]]
    if sae.config.k is not None:
        ranked = acts.sort(dim=1, descending=True).values
        at = ranked[:, sae.config.k - 1 : sae.config.k + 1]
        if ((at[:, 0] - at[:, 1]) <= margin.amax(1)).any():
            return False
    if rule.when is not None:
        tips.append(torch.full_like(tips[0], rule.when.above))
    tips += [torch.full_like(tips[0], v) for v in native_values(rule, sae).tolist()]
    return all(
        bool(((acts[:, columns] - tip).abs() > margin[:, columns]).all())
        for tip in tips
    )
