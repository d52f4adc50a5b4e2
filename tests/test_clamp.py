"""The plain reference, by hand; and the compiled clamp against it."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from specimens import (
    D_MODEL,
    D_SAE,
    Traffic,
    draw_rows,
    is_clear_cut,
    make_sae,
    policies,
    traffics,
)
from torch import Tensor
from torch.testing import assert_close

from guard.clamp import Clamp, Rows, clamp_resid, native_values
from guard.errors import PolicyError, SaeError
from guard.policy import MAX_RULES, Policy, Rule, When
from guard.sae.config import SaeConfig
from guard.sae.load import build_sae
from guard.sae.model import Sae


def make_mirror(width: int = 3, **extra: Tensor) -> Sae:
    """Return an SAE whose latent i is twice the positive part of `resid[:, i]`."""
    identity = torch.eye(width)
    config = SaeConfig(
        architecture="standard",
        d_model=width,
        d_sae=width,
        hook_point="layers.0.resid_post",
    )
    tensors = {
        "W_enc": 2 * identity,
        "W_dec": 5 * identity,
        "b_enc": torch.zeros(width),
        "b_dec": torch.full((width,), 7.0),
    }
    return build_sae(config, tensors | extra)


def make_rule(law: str, value: float | None = None, **values: object) -> Rule:
    wanted = {"name": "r", "sae": "a", "latents": (0,), "law": law, "value": value}
    return Rule.model_validate(wanted | values)


@pytest.mark.parametrize(
    ("law", "value", "held"),
    [
        ("ablate", None, [0.0, 0.0]),
        ("set", 3.0, [3.0, 3.0]),
        ("set", -3.0, [-3.0, -3.0]),
        ("cap", 1.0, [1.0, 0.0]),
        ("cap", 9.0, [4.0, 0.0]),
        ("cap", -1.0, [-1.0, -1.0]),
        ("floor", 1.0, [4.0, 1.0]),
        ("floor", 9.0, [9.0, 9.0]),
        ("scale", 0.5, [2.0, 0.0]),
        ("scale", -1.0, [-4.0, 0.0]),
    ],
)
def test_a_law_moves_the_stream_along_the_latent_by_the_change(
    law: str, value: float | None, held: list[float]
) -> None:
    resid = torch.tensor([[2.0, 1.0, -1.0], [-2.0, 1.0, -1.0]])
    result = clamp_resid(resid, make_mirror(), [make_rule(law, value)])
    change = torch.tensor(held) - torch.tensor([4.0, 0.0])
    expected = resid + change[:, None] * torch.tensor([5.0, 0.0, 0.0])
    assert torch.equal(result.resid, expected)
    assert torch.equal(result.clamped[:, 0], change != 0)


def test_setting_active_latents_leaves_the_others_alone() -> None:
    resid = torch.tensor([[2.0, 1.0, -1.0], [-2.0, 1.0, -1.0]])
    rule = make_rule("set", -3.0, if_active=True)
    result = clamp_resid(resid, make_mirror(), [rule])
    assert result.resid.tolist() == [[2.0 + 5 * (-3 - 4), 1.0, -1.0], [-2.0, 1.0, -1.0]]
    assert result.clamped.tolist() == [[True], [False]]


def test_rules_add_up_over_the_activations_of_the_untouched_stream() -> None:
    resid = torch.tensor([[2.0, 1.0, 3.0]])
    rules = [make_rule("ablate"), make_rule("scale", 2.0, name="s", latents=(1, 2))]
    result = clamp_resid(resid, make_mirror(), rules)
    assert result.resid.tolist() == [[2.0 - 20, 1.0 + 10, 3.0 + 30]]


@pytest.mark.parametrize(
    ("unit", "held"), [("native", 3.0), ("unit_norm", 3.0 / 5), ("max", 3.0 * 10)]
)
def test_a_value_counts_in_the_unit_it_is_given_in(unit: str, held: float) -> None:
    sae = make_mirror(latent_max=torch.tensor([10.0, 20.0, 30.0]))
    rule = make_rule("set", 3.0, unit=unit)
    assert native_values(rule, sae).tolist() == pytest.approx([held])
    result = clamp_resid(torch.zeros(1, 3), sae, [rule])
    assert result.resid[0].tolist() == pytest.approx([5 * held, 0, 0])


def test_a_unit_that_the_file_has_no_numbers_for_is_refused() -> None:
    rule = make_rule("set", 3.0, unit="max")
    with pytest.raises(SaeError, match="no latent_max; expected unit 'native'"):
        native_values(rule, make_mirror())
    with pytest.raises(SaeError, match="no latent_max"):
        Clamp([Policy(clamps=(rule,))], sae_name="a", sae=make_mirror())


@pytest.mark.parametrize(
    ("scope", "clamped"),
    [("token", [False, True, False]), ("request", [False, True, True])],
)
def test_a_condition_holds_at_its_token_or_from_there_on(
    scope: str, clamped: list[bool]
) -> None:
    resid = torch.tensor([[2.0, 0.5, 0.0], [2.0, 0.6, 0.0], [2.0, 0.1, 0.0]])
    rule = make_rule("ablate", when={"latents": (1, 2), "above": 1.0, "scope": scope})
    result = clamp_resid(resid, make_mirror(), [rule])
    assert result.clamped[:, 0].tolist() == clamped
    assert result.fired[:, 0].tolist() == [False, True, False]


def test_only_a_condition_of_the_request_remembers_what_came_before() -> None:
    resid = torch.tensor([[2.0, 0.0, 0.0]])
    for scope, expected in (("token", False), ("request", True)):
        rule = make_rule("ablate", when={"latents": (1,), "above": 1.0, "scope": scope})
        result = clamp_resid(resid, make_mirror(), [rule], fired_before=[True])
        assert result.clamped.item() is expected


@given(st.integers(0, 99), st.integers(1, 5), policies())
def test_the_reference_does_not_care_how_a_request_is_cut(
    seed: int, cut: int, policy: Policy
) -> None:
    sae, resid = make_sae(seed=seed), draw_rows(6, seed=seed)
    whole = clamp_resid(resid, sae, policy.clamps)
    head = clamp_resid(resid[:cut], sae, policy.clamps)
    met = head.fired.any(0).tolist()
    tail = clamp_resid(resid[cut:], sae, policy.clamps, fired_before=met)
    assert torch.equal(torch.cat([head.clamped, tail.clamped]), whole.clamped)
    torch.testing.assert_close(
        torch.cat([head.resid, tail.resid]), whole.resid, atol=1e-4, rtol=1e-4
    )


@given(traffics(scales=(1.0,)))
def test_the_compiled_clamp_remembers_exactly_the_sticky_conditions_that_were_met(
    traffic: Traffic,
) -> None:
    assume(is_clear_cut(traffic))
    sae = traffic.saes["a"]
    clamp = Clamp(list(traffic.policy_file.policies.values()), sae_name="a", sae=sae)
    for request in traffic.requests:
        policy = traffic.policy(request)
        state = torch.zeros(3, MAX_RULES, dtype=torch.uint8)
        slots = torch.full((len(request.resid),), request.slot)
        rows = Rows(slots, torch.full_like(slots, 2), torch.zeros_like(slots))
        clamp(request.resid, rows, state=state)
        met = [
            place
            for place, rule in enumerate(policy.clamps)
            if rule.sae == "a"
            and rule.when is not None
            and rule.when.scope == "request"
            and clamp_resid(request.resid, sae, [rule]).fired.any()
        ]
        assert state[2].nonzero().flatten().tolist() == met
        assert not state[:2].any()


@pytest.mark.parametrize("value", [0.0, 1.0, 1.0001])
def test_a_law_that_changes_nothing_leaves_no_mark(value: float) -> None:
    sae = make_mirror()
    clamp = Clamp([Policy(clamps=(make_rule("scale", value),))], sae_name="a", sae=sae)
    resid = torch.tensor([[-1.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
    rows = Rows(torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([0, 0]))
    found = clamp(resid, rows, state=torch.zeros(2, MAX_RULES, dtype=torch.uint8))
    assert found.touched.tolist() == [False, value != 1.0]
    assert found.clamped.tolist() == [0, int(value != 1.0)]


def test_every_rule_that_a_policy_may_have_has_its_own_bit() -> None:
    sae = make_sae("standard")
    rules = [
        make_rule("set", 50.0 + i, name=f"r{i}", latents=(i % D_SAE,), sae=name)
        for i, name in enumerate(["a"] * D_SAE + ["b"] * (MAX_RULES - D_SAE))
    ]
    found = 0
    for name in ("a", "b"):
        clamp = Clamp([Policy(clamps=tuple(rules))], sae_name=name, sae=sae)
        one = torch.tensor([1])
        state = torch.zeros(2, MAX_RULES, dtype=torch.uint8)
        rows = Rows(one, one, one - 1)
        found |= clamp(draw_rows(1, seed=0), rows, state=state).clamped.item()
    assert found == 2**MAX_RULES - 1


def test_what_the_clamp_left_is_the_largest_clamped_latent() -> None:
    sae = make_mirror()
    several = [Policy(clamps=(make_rule("ablate", latents=(0, 2)),)), Policy()]
    clamp = Clamp(several, sae_name="a", sae=sae)
    encoded = sae.encode(torch.tensor([[1.0, 9.0, 3.0]] * 3))
    left = clamp.residual_activation(encoded, torch.tensor([0, 1, 2]))
    assert left.tolist() == [0.0, 6.0, 0.0]


@pytest.mark.parametrize(
    "rule",
    [
        make_rule("ablate", latents=(D_SAE,)),
        make_rule("ablate", when=When(latents=(D_SAE,))),
    ],
    ids=["clamped", "watched"],
)
def test_a_latent_beyond_the_last_is_refused(rule: Rule) -> None:
    with pytest.raises(SaeError, match=rf"latent {D_SAE}.*expected 0 to {D_SAE - 1}"):
        Clamp([Policy(clamps=(rule,))], sae_name="a", sae=make_sae())


def test_a_clamp_without_rules_is_still_a_clamp() -> None:
    clamp = Clamp([Policy()], sae_name="a", sae=make_sae("topk"))
    rows = Rows(*torch.ones(3, 2, dtype=torch.int64).unbind())
    state = torch.zeros(2, MAX_RULES, dtype=torch.uint8)
    found = clamp(draw_rows(2, seed=0), rows, state=state)
    assert found.delta.shape == (2, D_MODEL)
    assert not found.delta.any()
    assert not found.touched.any()


def run(clamp: Clamp, resid: Tensor, slot: int) -> Tensor:
    """Return what the rows of one request become."""
    slots = torch.full((len(resid),), slot)
    rows = Rows(slots, torch.ones_like(slots), torch.zeros_like(slots))
    state = torch.zeros(2, MAX_RULES, dtype=torch.uint8)
    return resid + clamp(resid, rows, state=state).delta


def test_another_bank_is_written_while_the_first_one_runs() -> None:
    sae, resid = make_sae(), draw_rows(6, seed=3)
    whens = [When(latents=(n + 5,), above=0.0) for n in range(4)]
    generations = [
        [Policy(clamps=(make_rule("set", 2.0, latents=(n, n + 1), when=whens[n]),))]
        for n in range(4)
    ]
    clamp = Clamp(generations[0], sae_name="a", sae=sae, num_slots=2)
    tables = [(name, buffer.data_ptr()) for name, buffer in clamp.named_buffers()]
    for number, newest in enumerate(generations):
        if number:
            clamp.write(newest, bank=number % 2)
        for alive in generations[max(number - 1, 0) : number + 1]:
            slot = 1 + 2 * (generations.index(alive) % 2)
            expected = clamp_resid(resid, sae, alive[0].clamps).resid
            assert_close(run(clamp, resid, slot), expected)
            assert_close(run(clamp, resid, slot + 1), resid)
    assert tables == [(name, b.data_ptr()) for name, b in clamp.named_buffers()]


def test_a_bank_that_has_no_room_says_so_and_leaves_the_other_alone() -> None:
    sae, resid = make_sae(), draw_rows(6, seed=3)
    first = Policy(clamps=(make_rule("ablate", latents=(0,)),))
    clamp = Clamp([first], sae_name="a", sae=sae, num_slots=1)
    room = len(clamp.columns) - 1
    assert room >= 16
    before = run(clamp, resid, 1)
    conditional = [
        make_rule("ablate", name=f"r{i}", latents=(i,), when=When(latents=(0,)))
        for i in range(5)
    ]
    for too_many, words in (
        ([Policy(), Policy()], "2 policies"),
        ([Policy(clamps=tuple(conditional))], "conditions"),
    ):
        with pytest.raises(PolicyError, match=f"no room for {words}.*needs a restart"):
            clamp.write(too_many, bank=1)
        assert torch.equal(run(clamp, resid, 1), before)
    clamp.write([first], bank=1)
    assert_close(run(clamp, resid, 2), before)


def test_latents_of_both_banks_share_the_room_there_is() -> None:
    first = Policy(clamps=(make_rule("ablate", latents=(0,)),))
    clamp = Clamp([first], sae_name="a", sae=make_mirror(64), num_slots=1)
    room = len(clamp.columns)
    most = Policy(clamps=(make_rule("ablate", latents=tuple(range(room))),))
    many = Policy(clamps=(make_rule("ablate", latents=tuple(range(1, room + 1))),))
    with pytest.raises(PolicyError, match="17 latents of SAE 'a' besides those in use"):
        clamp.write([many], bank=1)
    clamp.write([most], bank=1)
    clamp.write([Policy()], bank=0)
    clamp.write([many], bank=1)
    assert clamp.latents == list(range(1, room + 1))


def test_whoever_clamps_nothing_pays_for_no_room() -> None:
    clamp = Clamp([Policy()], sae_name="a", sae=make_sae(), num_slots=4)
    assert len(clamp.columns) == 0
