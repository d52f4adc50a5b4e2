"""A certificate: made in parts, the same again, and found out when it was changed."""

import io
import json
from dataclasses import replace

import pytest
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from guard.certificate import certificate_id, read_certificate
from guard.client import Status
from guard.errors import CertificateError
from guard.redteam import certify as certify_module
from guard.redteam.certificate import Certificate, Rate, Served
from guard.redteam.certify import Plan, certify, crossing, verify

ABOUT = {
    "machine": {"cpu": "a"},
    "versions": {"python": "3"},
    "commit": None,
    "command": "guard certify",
}
SMALL = Plan(
    samples=6,
    benign=20,
    budgets=(0.4, 1.0),
    steps=3,
    restarts=1,
    queries=8,
    lengths=(32,),
    shares=(0.5,),
)


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certify_module, "PRESETS", {"quick": SMALL})
        yield


def make(subject, work, *, seed=0):
    progress = Progress(console=Console(file=io.StringIO()))
    return certify(
        subject,
        "quick",
        seed=seed,
        client=None,
        work=work,
        about=ABOUT,
        progress=progress,
    )


@pytest.fixture(scope="module")
def certificate(subject, small, tmp_path_factory):
    return make(subject, tmp_path_factory.mktemp("certify") / "parts")


def test_every_attacker_and_control_is_in_it(certificate):
    cells = {(cell.position, cell.budget) for cell in certificate.cells}
    assert cells == {(at, b) for at in ("last", "all", "every") for b in SMALL.budgets}
    for cell in certificate.cells:
        assert [row.attacker for row in cell.rows] == ["unaware", "adaptive"]
        assert len({control.control for control in cell.controls}) == 3
        assert cell.leak < 1e-5
        for row in cell.rows:
            assert row.undetected.hits <= row.undetected.count
        assert cell.rows[1].undetected.hits >= cell.rows[0].undetected.hits
    searches = [(row.search, row.attacker) for row in certificate.prompts]
    assert len(searches) == len(set(searches)) == 7
    assert certificate.controls["delta_zero"] == 0
    assert certificate.deployments
    assert certificate.benign.exact.count == 20


def test_its_id_is_that_of_its_content_and_a_server_reads_it(certificate, tmp_path):
    content = certificate.model_dump(mode="json")
    assert certificate.id == certificate_id(content)
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(content, indent=1))
    assert read_certificate(path).id == certificate.id
    assert Certificate.model_validate_json(path.read_bytes()) == certificate


@pytest.fixture(scope="module")
def resumed(subject, small, tmp_path_factory):
    """A second run of the same seed, interrupted after two cells.

    Returns:
        Its certificate; the cells made before the interruption, and in all.
    """
    work = tmp_path_factory.mktemp("resumed") / "parts"
    run_cell = certify_module.run_cell
    made, may_stop = [], True

    def run(subject, position, budget, **arguments):
        if may_stop and len(made) == 2:
            raise KeyboardInterrupt
        made.append((position, budget))
        return run_cell(subject, position, budget, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certify_module, "run_cell", run)
        with pytest.raises(KeyboardInterrupt):
            make(subject, work)
        before, may_stop = made[:], False
        return make(subject, work), before, made


def test_the_same_seed_gives_every_number_again(certificate, resumed):
    again, *_ = resumed
    assert again.cells == certificate.cells
    assert again.prompts == certificate.prompts
    assert again.replay == certificate.replay
    assert again.deployments == certificate.deployments


def test_another_seed_gives_other_numbers(subject, small, certificate, tmp_path):
    # Prompts are those of the same plan; its cells, which take long, are few.
    plan = replace(SMALL, budgets=SMALL.budgets[-1:], steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certify_module, "PRESETS", {"quick": plan})
        other = make(subject, tmp_path / "parts", seed=1)
    assert len(other.prompts) == len(certificate.prompts)
    assert other.prompts != certificate.prompts


def test_an_interrupted_run_goes_on_where_it_was(certificate, resumed):
    again, before, made = resumed
    assert again.cells == certificate.cells
    assert len(before) == 2
    assert len(made) == len(set(made)) == len(certificate.cells)
    assert made[:2] == before


def test_what_was_not_changed_holds(subject, small, certificate):
    assert verify(certificate, subject, rows=1) == []


def renumber(certificate):
    content = certificate.model_dump(mode="json")
    return certificate.model_copy(update={"id": certificate_id(content)})


def test_a_changed_number_is_found_whatever_was_changed_with_it(
    subject, small, certificate
):
    cell = certificate.cells[0]
    row = cell.rows[1]
    better = Rate.of(row.undetected.hits + 1, row.undetected.count)
    rows = (cell.rows[0], row.model_copy(update={"undetected": better}))
    cells = (cell.model_copy(update={"rows": rows}), *certificate.cells[1:])
    changed = certificate.model_copy(update={"cells": cells})
    assert "changed since" in verify(changed, subject, rows=0)[0]
    headline = certify_module.summarise(cells, certificate.prompts)
    forged = renumber(changed.model_copy(update={"headline": headline}))
    assert verify(forged, subject, rows=0) == []
    (found,) = verify(forged, subject, rows=len(cells))
    assert "come out otherwise" in found


def test_a_headline_that_its_rows_do_not_bear_out_is_found(subject, small, certificate):
    headline = certificate.headline.model_copy(update={"sentence": "All is well."})
    changed = renumber(certificate.model_copy(update={"headline": headline}))
    assert verify(changed, subject, rows=0)[0].startswith("Its headline says sentence")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {"cells": c.cells[1:]},
        lambda c: {"cells": (*c.cells, c.cells[0])},
        lambda c: {"cells": ()},
        lambda c: {"cells": (without_adaptive(c.cells[0]), *c.cells[1:])},
        lambda c: {"prompts": c.prompts[:-1]},
    ],
)
def test_what_was_left_out_is_found(subject, small, certificate, change):
    forged = renumber(certificate.model_copy(update=change(certificate)))
    assert verify(forged, subject, rows=0) == [
        "Its rows are not those of preset 'quick', each of them once."
    ]


def without_adaptive(cell):
    return cell.model_copy(update={"rows": cell.rows[:1]})


@pytest.mark.parametrize("search", ["none", "suffix", "prefilled"])
@pytest.mark.parametrize(
    "change",
    [
        lambda row: {
            "recovered": Rate.of(abs(row.recovered.hits - 1), row.recovered.count)
        },
        lambda row: {"prompts": ()},
        lambda row: {"beginnings": (*row.beginnings[1:], "to")},
        # Words that bring nothing back, where the row says that they do.
        lambda row: {
            "prompts": ("how do i heat the door ?", *row.prompts[1:]),
            "recovered": Rate.of(row.recovered.count, row.recovered.count),
        },
    ],
)
def test_prompts_that_do_otherwise_are_found(
    subject, small, certificate, search, change
):
    rows = list(certificate.prompts)
    number = next(n for n, row in enumerate(rows) if row.search == search)
    row = rows[number]
    rows[number] = row.model_copy(update=change(row))
    headline = certify_module.summarise(certificate.cells, rows)
    changed = {"prompts": tuple(rows), "headline": headline}
    forged = renumber(certificate.model_copy(update=changed))
    (found,) = verify(forged, subject, rows=0)
    assert found == f"The prompts of search {search!r}, {row.attacker}, do otherwise."


def test_what_a_server_let_through_is_in_the_headline(certificate):
    served = Served(attempts=24, recovered=3, blocked=20, flagged=0)
    rows = [row.model_copy(update={"served": served}) for row in certificate.prompts]
    told = certify_module.summarise(certificate.cells, rows[:2]).sentence
    assert told.endswith(
        "Of 48 replies that a server gave to such prompts 6 held the suppressed "
        "behaviour."
    )
    # Twin: nothing is said of a server that let nothing through.
    assert "replies" not in certificate.headline.sentence


def test_a_rate_has_the_bounds_of_its_counts():
    rate = Rate.of(1, 8).model_dump()
    assert Rate.model_validate(rate) == Rate.of(1, 8)
    for change in ({"upper": 0.1}, {"low": 0.1}, {"hits": 9}, {"hits": -1}):
        with pytest.raises(ValidationError):
            Rate.model_validate(rate | change)


def test_who_constrains_decoding_attacks_where_the_policy_lets_him(subject):
    def attackers(policy):
        return {search for search, _ in certify_module.list_prompt_attackers(policy)}

    assert subject.policy.constrained_decoding == "refuse"
    lenient = subject.policy.model_copy(update={"constrained_decoding": "allow"})
    assert attackers(lenient) - attackers(subject.policy) == {"constrained"}
    file = subject.policy_file
    policies = {**file.policies, subject.name: lenient}
    changed = file.model_copy(update={"policies": policies})
    said = [
        " ".join(certify_module.list_limits(one))
        for one in (subject, replace(subject, policy_file=changed))
    ]
    assert ["refuses requests that constrain" in one for one in said] == [True, False]


def test_a_certificate_of_another_policy_is_found(subject, small, certificate):
    other = replace(subject, name="watch")
    found = verify(certificate, other, rows=0)
    assert any("policy_fingerprint" in one for one in found)


@pytest.mark.parametrize(
    ("points", "level", "budget"),
    [
        ([(0.1, 0.0), (0.2, 1.0)], 0.5, 0.15),
        ([(0.2, 1.0)], 0.5, 0.1),
        ([(0.1, 0.2), (0.2, 0.4)], 0.5, None),
        ([(0.1, 0.6), (0.2, 0.1)], 0.5, 0.5 / 6),
    ],
)
def test_a_level_is_crossed_where_a_line_between_the_points_does(points, level, budget):
    found = crossing(points, level)
    assert found == (None if budget is None else pytest.approx(budget))


def test_a_server_of_another_policy_is_refused(certificate):
    class Other:
        def read_status(self):
            served = {"mode": "enforce", "fingerprint": "ab" * 32}
            about = {"version": "1", "generation": 1, "fingerprint": "cd" * 32}
            return Status.model_validate({**about, "policies": {"default": served}})

    with pytest.raises(CertificateError, match="runs policy 'default' of fingerprint"):
        certify_module.check_server(Other(), certificate.subject)
