"""The guard at a hook point: many policies in one batch, each as if it were alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from specimens import (
    AT,
    D_MODEL,
    Request,
    Served,
    Traffic,
    assert_same_bits,
    draw_rows,
    fit_everything,
    is_clear_cut,
    make_calibration,
    make_ellipsoid,
    make_monitor,
    make_policy_file,
    make_sae,
    serve,
    traffics,
    watch_everything,
)
from torch import Tensor
from vllm_guard import ops

from guard.calibration import Calibration
from guard.clamp import clamp_resid
from guard.drill import RecoveryEdit
from guard.errors import CalibrationError, DrillError, PolicyError, SaeError
from guard.hook import HookPoint
from guard.monitor import EXEMPT, Column, assign_columns, list_columns
from guard.pipeline import (
    Guard,
    StepBuffers,
    build_guards,
    read_resid,
    read_statistics,
)
from guard.policy import MAX_DRILLS, Drill, Policy, PolicyFile, Rule, When
from guard.sae.model import Sae
from guard.score import SCORES, Activations, Statistics

Call = Callable[[Tensor, Tensor | None], None]


def ellipsoid(width: int = D_MODEL) -> Statistics:
    """Statistics of a density that is the norm of `2 * (rows - 1)`."""
    plain = make_ellipsoid(torch.eye(width)[:, :2], rest=1.0)
    return plain | {"mean": torch.ones(width), "inverse_scale": torch.full((width,), 2)}


def calibrate(policy_file: PolicyFile, *, width: int = D_MODEL) -> Calibration:
    """Return a calibration of the one monitor `watch`."""
    (monitor,) = policy_file.policies["p"].monitors
    statistics = {"watch": ellipsoid(width)} if monitor.score == "density" else None
    return make_calibration(policy_file, statistics=statistics)


def build(
    policy_file: PolicyFile,
    saes: dict[str, Sae],
    calibrations: dict[str, Calibration] | None = None,
) -> Guard:
    step = StepBuffers(
        max_tokens=100, max_requests=8, num_columns=len(list_columns(policy_file))
    )
    return build_guards(policy_file, saes, calibrations or {}, step)[
        HookPoint.parse(AT)
    ]


def through_op(guard: Guard) -> Call:
    ops.bind([guard])
    return lambda hidden_states, residual: ops.call_guard(hidden_states, residual, 0)


def check_request(traffic: Traffic, request: Request, served: Served) -> None:
    """Hold one served request against the plain reference, all tokens at once."""
    policy = traffic.policy(request)
    skipped = int(request.starts_with_bos)
    resid = request.resid[skipped:]
    before = request.hidden_states[skipped:]
    after = served.hidden_states[skipped:]
    expected, size = before.float(), resid.abs()
    assert_same_bits(served.hidden_states[:skipped], request.hidden_states[:skipped])
    if not len(resid):
        return
    clamped, fired = torch.zeros(2, len(resid), dtype=torch.int32)
    for name, sae in traffic.saes.items():
        own = [(i, rule) for i, rule in enumerate(policy.clamps) if rule.sae == name]
        reference = clamp_resid(resid, sae, [rule for _, rule in own])
        expected = expected + (reference.resid - resid)
        for number, (place, rule) in enumerate(own):
            clamped |= reference.clamped[:, number].int() << place
            if rule.when is not None and rule.when.scope == "request":
                fired |= reference.fired[:, number].int() << place
            alone = clamp_resid(resid, sae, [rule])
            size = size + (alone.resid - resid).abs()
    assert_same_bits(served.clamped[skipped:], clamped)
    assert_same_bits(served.fired[skipped:], fired)
    untouched = clamped == 0
    assert_same_bits(after[untouched], before[untouched])
    bound = (torch.finfo(before.dtype).eps + 1e-4) * size.amax(1, keepdim=True)
    bound = bound + torch.finfo(before.dtype).eps * before.float().abs()
    gap = (after.float() - expected).abs()
    whole = expected.isfinite().all(1) & size.isfinite().all(1)
    assert (gap[whole] <= bound[whole]).all()
    broken = ~whole & ~untouched
    assert not after[broken].isfinite().all(1).any()


@settings(max_examples=100)
@given(traffics(), st.booleans())
def test_every_request_is_clamped_as_if_alone_and_in_one_piece(
    traffic: Traffic, opaque: bool
) -> None:
    assume(is_clear_cut(traffic))
    guard = build(traffic.policy_file, traffic.saes)
    call = through_op(guard) if opaque else guard
    for request, served in zip(
        traffic.requests, serve(traffic, guard, call), strict=True
    ):
        assert (served.visits == 1).all()
        check_request(traffic, request, served)


def hold(name: str, law: str = "set", **values: object) -> Rule:
    wanted: dict[str, object] = {"name": name, "sae": "a", "latents": (0, 1, 2)}
    if law != "ablate":
        wanted["value"] = 3.0
    return Rule.model_validate(wanted | {"law": law} | values)


def test_a_step_without_rows_changes_nothing() -> None:
    policy_file = make_policy_file({"p": Policy(clamps=(hold("r"),))}, saes={"a": AT})
    guard = build(policy_file, {"a": make_sae()})
    guard(torch.empty(0, D_MODEL), None)
    assert not guard.step.marks.any()


def test_all_rows_of_a_full_step_are_clamped() -> None:
    policy_file = make_policy_file({"p": Policy(clamps=(hold("r"),))}, saes={"a": AT})
    sae = make_sae()
    guard = build(policy_file, {"a": sae})
    hidden_states = draw_rows(100, seed=0)
    guard.step.rows_in[:] = torch.tensor([1, 1, 0, 0])
    expected = clamp_resid(hidden_states, sae, [hold("r")]).resid
    guard(hidden_states, None)
    torch.testing.assert_close(hidden_states, expected, atol=1e-4, rtol=1e-4)
    assert (guard.step.marks_of(100).clamped == 1).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@settings(max_examples=30)
@given(traffic=traffics(scales=(1.0,)), opaque=st.booleans(), data=st.data())
def test_a_row_that_is_not_finite_hurts_no_other_request(
    poison: float, traffic: Traffic, opaque: bool, data: st.DataObject
) -> None:
    assume(len(traffic.requests) > 1)
    guard = build(traffic.policy_file, traffic.saes)
    call = through_op(guard) if opaque else guard
    healthy = serve(traffic, guard, call)
    guard.step.state.zero_()
    sick = data.draw(st.integers(0, len(traffic.requests) - 1))
    request = traffic.requests[sick]
    row = data.draw(st.integers(0, len(request.hidden_states) - 1))
    column = data.draw(st.integers(0, D_MODEL - 1))
    request.hidden_states[row, column] = poison
    for index, (was, now) in enumerate(
        zip(healthy, serve(traffic, guard, call), strict=True)
    ):
        if index != sick:
            assert_same_bits(now.hidden_states, was.hidden_states)
            assert_same_bits(now.clamped, was.clamped)
            assert_same_bits(now.fired, was.fired)
        else:
            assert_same_bits(now.hidden_states[:row], was.hidden_states[:row])
            assert not now.hidden_states[row].isfinite().all()


def build_watching(when: When) -> tuple[Guard, Tensor, Tensor]:
    """Return a guard whose one rule waits for latent 5, rows, and that latent."""
    policy_file = make_policy_file(
        {"p": Policy(clamps=(hold("r", when=when),))}, saes={"a": AT}
    )
    sae = make_sae("standard")
    rows = draw_rows(60, seed=0)
    return build(policy_file, {"a": sae}), rows, sae.encode(rows).latents[:, 5]


def test_a_condition_of_the_request_holds_from_where_it_was_met_on() -> None:
    when = When(latents=(5,), above=0.5, scope="request")
    guard, rows, held = build_watching(when)
    quiet, loud = rows[held == 0][:1], rows[held > 1][:1]
    # Two requests, one after the other, then the neighbour alone.
    for batch, expected in (
        ([quiet, loud, quiet, quiet], [0, 1, 1, 0]),
        ([quiet, quiet], [1, 0]),
    ):
        guard.step.clear()
        mine = len(batch) - 1
        guard.step.rows_in[:mine] = torch.tensor([1, 1, 0, 0])
        guard.step.rows_in[mine] = torch.tensor([1, 2, mine, 0])
        guard(torch.cat(batch), None)
        assert guard.step.marks_of(len(batch)).clamped.tolist() == expected


def test_bos_meets_no_condition() -> None:
    when = When(latents=(5,), above=0.0, scope="request")
    guard, rows, held = build_watching(when)
    batch = torch.cat([rows[held > 1][:1], rows[held == 0][:1]])
    guard.step.rows_in[:2] = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0]])
    guard(batch, None)
    assert not guard.step.marks_of(2).clamped.any()
    assert not guard.step.state.any()


class Layered(torch.nn.Module):
    """What a compiled model sees: its own arithmetic before and after the op."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        hidden_states = hidden_states * 2 - residual
        before = hidden_states + 1
        ops.call_guard(hidden_states, residual, 0)
        return before, hidden_states + residual, hidden_states


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_sees_the_clamp_exactly_where_it_was_put(backend: str) -> None:
    policy_file = make_policy_file(
        {"p": Policy(clamps=(hold("r"), hold("s", "ablate", latents=(4, 6))))},
        saes={"a": AT},
    )
    guard = build(policy_file, {"a": make_sae("topk")})
    ops.bind([guard])
    compiled = torch.compile(Layered(), backend=backend, fullgraph=True)
    for seed, slots in ((0, [1, 0, 1, 1, 0]), (1, [0, 0, 0, 1, 1])):
        hidden_states, residual = draw_rows(5, seed=seed), draw_rows(5, seed=seed + 9)
        given_states = hidden_states.clone()
        guard.step.clear()
        guard.step.rows_in[:5, 0] = torch.tensor(slots)
        expected = Layered()(hidden_states, residual)
        guard.step.marks.zero_()
        found = compiled(hidden_states, residual)
        torch.testing.assert_close(found, expected)
        assert_same_bits(hidden_states, given_states)
        assert guard.step.marks_of(5).visits.tolist() == [1] * 5


def watched_file(
    score: str = "error_norm", *, clamps: tuple[Rule, ...] = ()
) -> PolicyFile:
    monitor = make_monitor(score=score, calibration="c")
    return make_policy_file(
        {"p": Policy(clamps=clamps, monitors=(monitor,)), "open": Policy()},
        saes={"a": AT},
    )


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
@pytest.mark.parametrize("score", ["error_norm", "density"])
def test_scores_are_taken_of_what_flows_on_after_the_clamp(
    score: str, architecture: str
) -> None:
    policy_file = watched_file(score, clamps=(hold("r"),))
    sae = make_sae(architecture)
    guard = build(policy_file, {"a": sae}, {"c": calibrate(policy_file)})
    hidden_states, residual = draw_rows(6, seed=1), draw_rows(6, seed=2)
    untouched = read_resid(hidden_states, residual)
    guard.step.rows_in[:6, 0] = torch.tensor([1, 0, 1, 1, 2, 1])
    guard(hidden_states, residual)
    resid = read_resid(hidden_states, residual)
    assert not torch.allclose(resid, untouched)
    encoded = sae.encode(resid)
    error = resid - sae.decode(encoded)
    expected = {
        "error_ratio": error.norm(dim=1) / resid.norm(dim=1),
        "clamp_residual": torch.where(
            guard.step.rows_in[:6, 0] == 1, encoded.latents[:, :3].amax(1), 0.0
        ),
        "error_norm": error.norm(dim=1),
        "density": (2 * (resid - 1)).norm(dim=1),
    }
    nobody = guard.step.rows_in[:6, 0] == 0
    columns = list_columns(policy_file)
    assert {column.score for column in columns} == (
        {"density"} if score == "density" else expected.keys() - {"density"}
    )
    for number, column in enumerate(columns):
        unread = EXEMPT if column.entry else 0.0
        torch.testing.assert_close(
            guard.step.scores[:6, number],
            torch.where(nobody, unread, expected[column.score]),
            msg=column.score,
        )


def read_plainly(
    column: Column, resid: Tensor, saes: dict[str, Sae], policy_file: PolicyFile
) -> Tensor:
    """Return a column of a stream after the clamps, by the score's own function."""
    activations = Activations(resid)
    if column.sae is not None:
        encoded = saes[column.sae].encode(resid)
        error = resid - saes[column.sae].decode(encoded)
        held = [
            latent
            for rule in policy_file.policies["p"].clamps
            if rule.sae == column.sae
            for latent in rule.latents
        ]
        left = encoded.latents[:, held].amax(1)
        activations = Activations(resid, error, left)
        if column.score == "error_ratio":
            return error.norm(dim=1) / resid.norm(dim=1)
    entries = fit_everything(policy_file).get(str(column.calibration))
    statistics = entries.entries[str(column.entry)].statistics if entries else {}
    return SCORES[column.score].apply(activations, statistics)


@pytest.mark.parametrize("opaque", [False, True])
def test_every_monitor_reads_its_score_at_its_own_hook_point(opaque: bool) -> None:
    policy_file, saes = watch_everything()
    columns = list_columns(policy_file)
    step = StepBuffers(max_tokens=9, max_requests=4, num_columns=len(columns))
    guards = build_guards(policy_file, saes, fit_everything(policy_file), step)
    assert [str(at) for at in guards] == [
        AT,
        "layers.3.resid_post",
        "layers.5.resid_post",
    ]
    slots = torch.tensor([1, 0, 2, 1, 3, 1])
    step.rows_in[:6, 0] = slots
    ops.bind(list(guards.values()))
    resids = {}
    for index, (at, guard) in enumerate(guards.items()):
        hidden_states = draw_rows(6, seed=index).bfloat16()
        before, residual = hidden_states.clone(), draw_rows(6, seed=9 + index)
        if opaque:
            ops.call_guard(hidden_states, residual, index)
        else:
            guard(hidden_states, residual)
        resids[str(at)] = read_resid(hidden_states, residual)
        others = slots != 1 if at.layer != 3 else slots < 9
        assert_same_bits(hidden_states[others], before[others])
    assert step.marks_of(6).visits.tolist() == [len(guards)] * 6
    for number, column in enumerate(columns):
        found = step.scores[:6, number]
        expected = read_plainly(column, resids[column.hook_point], saes, policy_file)
        if column.score == "clamp_residual":
            # Nothing is clamped in rows of the other policies, so nothing is left.
            expected = torch.where(slots == 1, expected, 0.0)
        unread = EXEMPT if column.entry else 0.0
        expected = torch.where(slots == 0, unread, expected)
        torch.testing.assert_close(found, expected, msg=str(column))
    assert not step.scores[6:].any()


def test_a_place_without_clamps_and_monitors_can_have_a_guard_too() -> None:
    policy_file = make_policy_file({"p": Policy(clamps=(hold("r"),))}, saes={"a": AT})
    step = StepBuffers(max_tokens=4, max_requests=1, num_columns=0)
    late = HookPoint.parse("layers.4.resid_post")
    guards = build_guards(policy_file, {"a": make_sae()}, {}, step, hook_points=[late])
    assert [at.layer for at in guards] == [1, 4]
    step.rows_in[:4, 0] = 1
    rows = draw_rows(4, seed=0)
    given_rows = rows.clone()
    guards[late](rows, None)
    assert_same_bits(rows, given_rows)
    assert step.marks_of(4).visits.tolist() == [1] * 4


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_reads_as_such(poison: float) -> None:
    policy_file = watched_file("density", clamps=(hold("r"),))
    guard = build(policy_file, {"a": make_sae()}, {"c": calibrate(policy_file)})
    hidden_states = draw_rows(3, seed=1)
    hidden_states[1, 4] = poison
    guard.step.rows_in[:3, 0] = 1
    guard(hidden_states, None)
    assert guard.step.scores[:3, 0].isfinite().tolist() == [True, False, True]


def test_clearing_a_step_leaves_its_rows_to_nobody() -> None:
    policy_file = watched_file()
    guard = build(policy_file, {"a": make_sae()}, {"c": calibrate(policy_file)})
    guard.step.rows_in[:4] = torch.tensor([1, 1, 0, 0])
    guard(draw_rows(4, seed=0), None)
    assert guard.step.marks.any()
    assert guard.step.scores.any()
    guard.step.clear()
    for buffer in (guard.step.rows_in, guard.step.marks, guard.step.scores):
        assert not buffer.any()


def test_saes_at_two_hook_points_make_two_guards_in_layer_order() -> None:
    names = {"a": "layers.12.resid_post", "b": "layers.3.resid_post"}
    clamps = (hold("r"), hold("s", sae="b"))
    policy_file = make_policy_file({"p": Policy(clamps=clamps)}, saes=names)
    step = StepBuffers(max_tokens=4, max_requests=1, num_columns=0)
    saes = {"a": make_sae(), "b": make_sae("topk")}
    guards = build_guards(policy_file, saes, {}, step)
    assert [str(at) for at in guards] == [names["b"], names["a"]]
    step.rows_in[:4, 0] = 1
    for guard in guards.values():
        guard(draw_rows(4, seed=0), None)
    assert step.marks_of(4).clamped.tolist() == [0b11] * 4
    assert step.marks_of(4).visits.tolist() == [2] * 4


@pytest.mark.parametrize(
    "statistics",
    [
        ellipsoid(D_MODEL + 1),
        {},
        ellipsoid() | {"mean": torch.full((D_MODEL,), torch.nan)},
        ellipsoid() | {"leading": torch.ones(3)},
    ],
    ids=["another width", "missing", "not finite", "another rank"],
)
def test_statistics_that_give_no_score_are_refused(statistics: Statistics) -> None:
    policy_file = watched_file("density")
    calibration = make_calibration(policy_file, statistics={"watch": statistics})
    with pytest.raises(
        CalibrationError, match=r"c: its statistics give no score 'density'.* width 12"
    ):
        build(policy_file, {"a": make_sae()}, {"c": calibration})


def test_a_latent_that_the_sae_does_not_have_is_refused() -> None:
    policy_file = make_policy_file(
        {"p": Policy(clamps=(hold("r", latents=(99,)),))}, saes={"a": AT}
    )
    with pytest.raises(SaeError, match="latent 99, but SAE 'a' has 16"):
        build(policy_file, {"a": make_sae()})


def make_edit(delta: Tensor) -> RecoveryEdit:
    return RecoveryEdit(delta, "w1", "w2", 0.5, "last_prompt", f"{0:064x}")


def add_drills(policy_file: PolicyFile, *saes: str) -> PolicyFile:
    """Return the file with a drill for each of these SAEs: `d1`, `d2` and so on."""
    drills = tuple(
        Drill(name=f"d{i}", sae=sae, delta=Path(f"d{i}.safetensors"))
        for i, sae in enumerate(saes, 1)
    )
    return policy_file.model_copy(update={"drills": drills})


@settings(max_examples=60)
@given(
    traffic=traffics(scales=(1e-3, 1.0, 30.0)),
    seed=st.integers(0, 99),
    opaque=st.booleans(),
    data=st.data(),
)
def test_a_drill_is_added_behind_the_clamp_to_its_rows_and_no_other(
    traffic: Traffic, seed: int, opaque: bool, data: st.DataObject
) -> None:
    policy_file = add_drills(traffic.policy_file, "a", "a")
    deltas = draw_rows(2, seed=seed)
    edits = {f"d{i}": make_edit(delta) for i, delta in enumerate(deltas, 1)}
    step = StepBuffers(max_tokens=100, max_requests=8, num_columns=0)
    guards = build_guards(policy_file, traffic.saes, {}, step, edits=edits)
    guard = guards[HookPoint.parse(AT)]
    count = data.draw(st.integers(1, 8))
    drills = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    slots = data.draw(
        st.lists(
            st.integers(0, len(policy_file.policies)), min_size=count, max_size=count
        )
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    before = draw_rows(count, seed=seed + 200).to(dtype)
    before[:, 0] = -0.0
    step.rows_in[:count, 0] = torch.tensor(slots)
    step.rows_in[:count, 1] = torch.arange(1, count + 1).clamp(max=8)
    step.rows_in[:count, 2] = torch.arange(count)
    plain = build(traffic.policy_file, traffic.saes)
    plain.step.rows_in.copy_(step.rows_in)
    total = sum(
        part.clamp(before.float(), step.rows(count), state=step.state.clone()).delta
        for part in guard.dictionaries
    )
    clamped, after = before.clone(), before.clone()
    plain(clamped, None)
    step.rows_in[:count, 3] = torch.tensor(drills)
    call = through_op(guard) if opaque else guard
    call(after, None)
    drilled = torch.tensor(drills) > 0
    assert_same_bits(after[~drilled], clamped[~drilled])
    # One rounding for clamp and drill together, as for the clamp alone.
    added = torch.cat([torch.zeros(1, D_MODEL), deltas])[drills]
    expected = (before.float() + (total + added)).to(dtype)
    assert_same_bits(after[drilled], expected[drilled])
    assert_same_bits(step.marks, plain.step.marks)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_drill_runs_where_nothing_is_clamped_and_only_at_its_hook_point(
    slot: int,
) -> None:
    names = {"a": AT, "b": "layers.3.resid_post", "c": "layers.4.resid_post"}
    policy_file = make_policy_file({"open": Policy()}, saes=names)
    policy_file = add_drills(policy_file, "b", "a")
    step = StepBuffers(max_tokens=4, max_requests=1, num_columns=0)
    deltas = draw_rows(2, seed=0)
    edits = {f"d{i}": make_edit(delta) for i, delta in enumerate(deltas, 1)}
    saes = {name: make_sae() for name in names}
    guards = build_guards(policy_file, saes, {}, step, edits=edits)
    step.rows_in[:4, 0] = slot
    step.rows_in[:4, 3] = torch.tensor([0, 1, 2, 0])
    before = draw_rows(4, seed=1)
    before[:, 0] = -0.0
    for name, row in (("a", 2), ("b", 1), ("c", None)):
        rows = before.clone()
        guards[HookPoint.parse(names[name])](rows, None)
        expected = before.clone()
        if row is not None:
            expected[row] += deltas[0 if name == "b" else 1]
        assert_same_bits(rows, expected)
    assert guards[HookPoint.parse(names["c"])].drills is None


def test_scores_are_taken_behind_the_drill() -> None:
    policy_file = add_drills(watched_file("density", clamps=(hold("r"),)), "a")
    delta = 5 * draw_rows(1, seed=3)[0]
    columns = list_columns(policy_file)
    step = StepBuffers(max_tokens=2, max_requests=1, num_columns=len(columns))
    calibrations = {"c": calibrate(policy_file)}
    (guard,) = build_guards(
        policy_file,
        {"a": make_sae()},
        calibrations,
        step,
        edits={"d1": make_edit(delta)},
    ).values()
    rows = draw_rows(1, seed=1).repeat(2, 1)
    step.rows_in[:2] = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1]])
    guard(rows, None)
    torch.testing.assert_close(rows[1], rows[0] + delta)
    (number,) = [i for i, column in enumerate(columns) if column.score == "density"]
    scores = step.scores[:2, number]
    torch.testing.assert_close(scores, (2 * (rows - 1)).norm(dim=1))
    assert scores[1] > 1.5 * scores[0]
    assert step.marks_of(2).clamped.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_observes_is_read_as_if_clamped_and_changed_by_a_drill_alone(
    dtype: torch.dtype,
) -> None:
    enforcing = watched_file("density", clamps=(hold("r"),))
    observing = enforcing.policies["p"].model_copy(update={"mode": "observe"})
    policy_file = enforcing.model_copy(
        update={"policies": enforcing.policies | {"w": observing}}
    )
    policy_file = add_drills(policy_file, "a")
    columns = list_columns(policy_file)
    step = StepBuffers(max_tokens=4, max_requests=1, num_columns=len(columns))
    (guard,) = build_guards(
        policy_file,
        {"a": make_sae()},
        {"c": calibrate(enforcing)},
        step,
        edits={"d1": make_edit(draw_rows(1, seed=3)[0])},
    ).values()
    enforce, observe = 1, 3
    before = draw_rows(1, seed=1).to(dtype).repeat(4, 1)
    before[:, 0] = -0.0
    residual = draw_rows(1, seed=2).to(dtype).repeat(4, 1)
    step.rows_in[:4, 0] = torch.tensor([enforce, observe, enforce, observe])
    step.rows_in[:4, 3] = torch.tensor([0, 0, 1, 1])
    rows = before.clone()
    guard(rows, residual)
    clamped, observed, drilled, rehearsed = rows
    assert not torch.equal(clamped, before[0])
    assert_same_bits(observed, before[1])
    assert_same_bits(rehearsed, drilled)
    own = [i for i, column in enumerate(columns) if column.score == "density"]
    scores = step.scores[:4, own[0]]
    rounding = 20 * torch.finfo(dtype).eps
    assert scores[1].item() == pytest.approx(scores[0].item(), rel=rounding)
    assert scores[3] == scores[2] != scores[0]
    assert step.marks_of(4).clamped.tolist() == [1, 1, 1, 1]


def test_an_edit_of_another_width_is_refused() -> None:
    policy_file = add_drills(make_policy_file({"p": Policy()}, saes={"a": AT}), "a")
    step = StepBuffers(max_tokens=2, max_requests=1, num_columns=0)
    edits = {"d1": make_edit(torch.ones(D_MODEL + 1))}
    with pytest.raises(DrillError, match=r"d1\.safetensors: its delta is 13 wide"):
        build_guards(policy_file, {"a": make_sae()}, {}, step, edits=edits)


def test_two_generations_in_one_step_are_each_as_if_alone() -> None:
    files, calibrations = [], []
    for number, shift in enumerate((1.0, 3.0)):
        clamps = (hold("r", latents=(number, number + 2)),)
        policy_file = add_drills(watched_file("density", clamps=clamps), "a")
        files.append(policy_file)
        statistics = ellipsoid() | {"mean": torch.full((D_MODEL,), shift)}
        calibrations.append(
            {"c": make_calibration(policy_file, statistics={"watch": statistics})}
        )
    edits = [{"d1": make_edit(draw_rows(1, seed=n)[0])} for n in range(2)]
    columns = list_columns(files[0])
    saes = {"a": make_sae()}

    def make(number: int, num_slots: int | None) -> Guard:
        step = StepBuffers(
            max_tokens=8,
            max_requests=2,
            num_columns=len(columns),
            num_slots=num_slots,
        )
        return build_guards(
            files[number], saes, calibrations[number], step, edits=edits[number]
        )[HookPoint.parse(AT)]

    both = make(0, 3)
    tables = {name: buffer.data_ptr() for name, buffer in both.named_buffers()}
    statistics = read_statistics(files[1], calibrations[1], d_model=D_MODEL)
    numbers = assign_columns(columns, files[1])
    told = {numbers[column]: values for column, values in statistics.items()}
    both.write(files[1], told, edits[1], bank=1)
    before = draw_rows(4, seed=9)
    after = before.clone()
    both.step.rows_in[:4, 0] = torch.tensor([1, 4, 1, 4])
    both.step.rows_in[2:4, 3] = torch.tensor([1, 1 + MAX_DRILLS])
    both.step.banks = (0, 1)
    both(after, None)
    for number in range(2):
        alone = make(number, None)
        rows = before.clone()
        alone.step.rows_in[:4, 0] = 1
        alone.step.rows_in[2:4, 3] = 1
        alone(rows, None)
        torch.testing.assert_close(after[number::2], rows[number::2])
        scores, expected = both.step.scores, alone.step.scores
        torch.testing.assert_close(scores[number:4:2], expected[number:4:2])
    assert tables == {name: b.data_ptr() for name, b in both.named_buffers()}


def test_statistics_of_another_shape_need_a_restart() -> None:
    policy_file = watched_file("density")
    columns = list_columns(policy_file)
    step = StepBuffers(
        max_tokens=1, max_requests=1, num_columns=len(columns), num_slots=2
    )
    (guard,) = build_guards(
        policy_file, {"a": make_sae()}, {"c": calibrate(policy_file)}, step
    ).values()
    (number,) = (i for i, column in enumerate(columns) if column.entry)
    wider = make_ellipsoid(torch.eye(D_MODEL)[:, :3], rest=1.0)
    with pytest.raises(PolicyError, match="another shape needs a restart"):
        guard.write(policy_file, {number: wider}, {}, bank=1)
