"""The page of a certificate: it says what the data says, and hides no loss."""

import math
import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as Xml

import pytest
from redteam.paper import (
    ADAPTIVE,
    BUDGETS,
    MONITORS,
    RECOVERED,
    SAMPLES,
    UNAWARE,
    make_cell,
    make_certificate,
    make_headline,
    make_prompts,
    make_subject,
)

from guard.redteam.certificate import Benign, Certificate, Rate
from guard.redteam.page.markup import Markup, tag
from guard.redteam.page.wording import percent
from guard.redteam.report import render, write_report

HOSTILE = """</style><script src="http://x.example/a.js">'&"""


class Place(NamedTuple):
    """Where a marker was drawn, read off the axes."""

    budget: float
    share: float


def parse(page: str) -> Xml.Element:
    return Xml.fromstring(page.removeprefix("<!doctype html>"))


def words(element: Xml.Element) -> str:
    """Return all text, spaces alike."""
    return re.sub(r"\s+", " ", "".join(element.itertext()))


def section_named(page: Xml.Element, title: str) -> Xml.Element:
    return next(s for s in page.iter("section") if s.findtext("h2") == title)


def panels(section: Xml.Element) -> dict[str, Xml.Element]:
    return {f.get("data-position", ""): f for f in section.iter("figure")}


def affine(at: list[float], values: list[float]) -> tuple[float, float]:
    """Return slope and offset from the outermost ticks."""
    slope = (values[-1] - values[0]) / (at[-1] - at[0])
    return slope, values[0] - slope * at[0]


def group(figure: Xml.Element, css: str) -> Xml.Element:
    return next(g for g in figure.iter("g") if g.get("class") == css)


def read_marks(figure: Xml.Element, line: str) -> list[Place]:
    """Read markers back by the labels of the ticks, not by how they were placed."""
    shares = [
        (float(text.get("data-at", "")), float((text.text or "").split("\u00a0")[0]))
        for text in group(figure, "shares").iter("text")
    ]
    budgets = [
        (float(text.get("x", "")), math.log(float(text.text or "")))
        for text in group(figure, "budgets").iter("text")
    ]
    slope_y, zero_y = affine(*map(list, zip(*shares, strict=True)))
    slope_x, zero_x = affine(*map(list, zip(*budgets, strict=True)))
    places = []
    for mark in figure.iter("path"):
        if (mark.findtext("title") or "").startswith(f"{line},"):
            found = re.findall(r"-?[\d.]+", mark.get("transform", ""))
            x, y = map(float, found)
            at = math.exp(slope_x * x + zero_x)
            places.append(Place(at, (slope_y * y + zero_y) / 100))
    return places


def rows_of(table: Xml.Element) -> list[list[str]]:
    return [
        [words(cell) for cell in row.findall("td")]
        for row in table.iter("tr")
        if row.find("td") is not None
    ]


def tables_of(page: Xml.Element, title: str) -> list[Xml.Element]:
    return list(section_named(page, title).iter("table"))


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return make_certificate()


@pytest.fixture(scope="module")
def page(certificate: Certificate) -> Xml.Element:
    return parse(render(certificate))


RECOVERY = "How much comes back, and how much of it unseen"
DETECTION = "Which monitors notice"
ATTACKERS = "Every attacker"


def test_the_top_of_the_page_says_every_number_of_the_headline(
    page: Xml.Element, certificate: Certificate
) -> None:
    top = words(next(iter(page.iter("main")))).split(RECOVERY)[0]
    assert certificate.headline.sentence in top
    for said in (
        "“default”",
        "organism",
        certificate.subject.policy_fingerprint[:12],
        certificate.id[:12],
        certificate.issued,
        "1.3 %",
        "at most 4.1 %",
        "0.094 → 0.11",
        "95 % come back at 0.17 behind the clamp alone, unseen at no budget up to 1.",
        "69.3 %",
        "at most 75.5 %",
        "150 of 311 prompts",
        "at most 1 %",
    ):
        assert said in top, said


@pytest.mark.parametrize(
    ("prompt", "worst", "verdicts", "warned"),
    [
        ((0.01, 0.03), (0.05, 0.1), ["Holds", "Holds"], []),
        ((0.05, 0.1), (0.2, 0.3), ["Holds in part", "Holds in part"], []),
        (
            (0.1, 0.16),
            (0.69, 0.76),
            ["Not shown to hold (too few samples)", "Does not hold"],
            ["Against prompts: not shown to hold", "behind the clamp: does not hold"],
        ),
        (
            (0.3, 0.4),
            (0.1, 0.15),
            ["Does not hold", "Holds"],
            ["Against prompts: does not hold"],
        ),
        (None, (0.1, 0.15), ["Not measured", "Holds"], ["prompts: not measured"]),
    ],
)
def test_a_policy_that_loses_is_told_so_first(
    prompt: tuple[float, float] | None,
    worst: tuple[float, float],
    verdicts: list[str],
    warned: list[str],
) -> None:
    headline = make_headline(prompt=prompt, worst=worst)
    page = parse(render(make_certificate(headline=headline)))
    cards = list(page.iter("article"))
    found = [p.text for c in cards for p in c.iter("p") if p.get("class") == "verdict"]
    assert found == verdicts
    tones = ["bad" if "hold" in v and "Holds" not in v else "" for v in verdicts]
    lost = [str(c.get("class")).endswith(" bad") for c in cards]
    assert lost == [bool(tone) for tone in tones]
    warnings = [p for p in page.iter("p") if "warning" in p.get("class", "")]
    assert bool(warnings) == bool(warned)
    for said in warned:
        assert said in words(warnings[0])


def test_a_bound_that_is_no_number_is_a_loss() -> None:
    headline = make_headline(worst=(0.1, math.nan))
    page = parse(render(make_certificate(headline=headline)))
    assert [c.get("class") for c in page.iter("article")][1] == "card bad"


@pytest.mark.parametrize("title", [RECOVERY, DETECTION])
def test_each_position_has_its_plot(page: Xml.Element, title: str) -> None:
    assert list(panels(section_named(page, title))) == list(RECOVERED)


@pytest.mark.parametrize("position", RECOVERED)
@pytest.mark.parametrize(
    ("line", "hits"),
    [
        ("clamp alone", RECOVERED),
        ("undetected, unaware attacker", UNAWARE),
        ("undetected, adaptive attacker", ADAPTIVE),
    ],
)
def test_points_of_recovery_lie_where_the_numbers_say(
    page: Xml.Element, position: str, line: str, hits: dict[str, tuple[int, ...]]
) -> None:
    places = read_marks(panels(section_named(page, RECOVERY))[position], line)
    assert [p.budget for p in places] == pytest.approx(BUDGETS, rel=0.01)
    wanted = [count / SAMPLES for count in hits[position]]
    assert [p.share for p in places] == pytest.approx(wanted, abs=0.002)


def test_points_of_detection_are_shares_of_what_came_back(page: Xml.Element) -> None:
    figure = panels(section_named(page, DETECTION))["last"]
    places = read_marks(figure, "all together, in time")
    hits = zip(RECOVERED["last"], UNAWARE["last"], strict=True)
    wanted = [1 - unseen / recovered for recovered, unseen in hits]
    assert [p.share for p in places] == pytest.approx(wanted, abs=0.002)
    for place, monitor in enumerate(MONITORS):
        rows = [make_cell("last", n).row("unaware") for n in range(len(BUDGETS))]
        wanted = [row.alarms[monitor] / row.recovered.hits for row in rows]
        found = [p.share for p in read_marks(figure, monitor)]
        assert found == pytest.approx(wanted, abs=0.002), place


def test_a_point_without_a_recovered_run_is_not_drawn() -> None:
    nothing = Rate.of(0, SAMPLES)
    first, second = make_cell("last", 0), make_cell("last", 4)
    row = first.row("unaware").model_copy(
        update={"recovered": nothing, "undetected": nothing, "alarms": {"intent": 0}}
    )
    cells = (first.model_copy(update={"rows": (row,)}), second)
    page = parse(render(make_certificate(cells=cells)))
    figure = panels(section_named(page, DETECTION))["last"]
    assert [round(p.budget, 2) for p in read_marks(figure, "intent")] == [0.3]
    figure = panels(section_named(page, RECOVERY))["last"]
    assert len(read_marks(figure, "clamp alone")) == 2


def test_every_attacker_has_a_row_with_its_numbers(
    page: Xml.Element, certificate: Certificate
) -> None:
    prompts, edits, _ = map(rows_of, tables_of(page, ATTACKERS))
    wanted = [
        [
            row.attacker,
            f"{cell.budget:g}",
            str(row.recovered.count),
            str(row.recovered.hits),
            str(row.undetected.hits),
            percent(row.undetected.upper).replace("\u00a0", " "),
            str(row.undetected_groups),
        ]
        for cell in certificate.cells
        for row in cell.rows
    ]
    found = [
        [*row[:3], *(cell.split("(")[1].rstrip(")") for cell in row[3:5]), *row[5:7]]
        for row in edits
    ]
    assert found == wanted
    assert [int(row[3]) for row in prompts] == [
        row.recovered.count for row in certificate.prompts
    ]
    assert "14 sent: 1 came back, 13 blocked, 13 flagged" in prompts[1][9]


def test_time_to_alarm_tells_the_prompt_from_the_output(page: Xml.Element) -> None:
    _, edits, _ = map(rows_of, tables_of(page, ATTACKERS))
    assert {row[8] for row in edits} == {"never", "prompt", "token 3", "token 4.5"}


def test_controls_show_how_many_came_back_and_were_blocked(page: Xml.Element) -> None:
    *_, controls = map(rows_of, tables_of(page, ATTACKERS))
    assert len(controls) == len(RECOVERED) * len(BUDGETS)
    assert controls[-1][:3] == ["1", "6.7 % (10 of 150)", "80 % (120 of 150)"]


def test_later_chapters_say_what_was_measured(page: Xml.Element) -> None:
    text = words(page)
    for said in (
        "every second token",
        "17 of 2000 benign requests",
        "4 steps later",
        "0.214 s",
        "guard certify --verify FILE --policy POLICY",
        "20260725",
        "2.13.0",
        "45 min 12 s",
    ):
        assert said in text, said


def test_a_broken_promise_of_false_alarms_is_called_broken() -> None:
    benign = make_certificate().benign.model_copy(
        update={"false_alarms": Rate.of(60, 2000)}
    )
    assert "The promise is broken." in render(make_certificate(benign=benign))
    assert "The promise is broken." not in render(make_certificate())


def test_hostile_names_and_prompts_are_text() -> None:
    certificate = make_certificate(
        subject=make_subject(policy=HOSTILE, model=HOSTILE, monitors=(HOSTILE,)),
        prompts=make_prompts(prompts=(HOSTILE,), alarms={HOSTILE: 1}),
        attribution=HOSTILE,
        limits=(HOSTILE,),
        machine={HOSTILE: [HOSTILE]},
        versions={HOSTILE: HOSTILE},
        command=HOSTILE,
    )
    page = render(certificate)
    assert HOSTILE not in page
    assert not list(parse(page).iter("script"))
    assert words(parse(page)).count(HOSTILE) > 8
    assert next(parse(page).iter("title")).text == f"Certificate of {HOSTILE}"


def test_only_markup_is_left_as_it_is() -> None:
    assert tag("p", "<", Markup("<br/>"), title='"') == (
        '<p title="&quot;">&lt;<br/></p>'
    )


def test_the_page_refers_to_nothing_outside(page: Xml.Element) -> None:
    names = {name for element in page.iter() for name in element.attrib}
    assert names.isdisjoint({"src", "href", "srcset", "data", "action"})
    tags = {element.tag for element in page.iter()}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    style = next(iter(page.iter("style"))).text or ""
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_a_certificate_with_nothing_measured_says_so() -> None:
    certificate = make_certificate(
        id="",
        headline=make_headline(prompt=None),
        controls={},
        cells=(),
        prompts=(),
        replay=(),
        attribution="",
        deployments=(),
        benign=Benign(
            exact=Rate.of(0, 0),
            false_alarms=Rate.of(0, 0),
            promised=0.01,
            hold_tokens=0,
        ),
        limits=(),
        machine={},
        versions={},
        commit=None,
    )
    page = parse(render(certificate))
    for title in (RECOVERY, DETECTION, ATTACKERS, "Other ways to deploy the clamp"):
        assert "not measured" in words(section_named(page, title)), title
    benign = words(section_named(page, "What benign users pay"))
    assert benign.count("not measured") == 3


@pytest.mark.parametrize("budgets", [1, 2])
def test_few_budgets_still_make_a_plot(budgets: int) -> None:
    cells = tuple(make_cell("all", place) for place in range(4, 4 + budgets))
    page = parse(render(make_certificate(cells=cells)))
    found = panels(section_named(page, RECOVERY))
    assert list(found) == ["all"]
    places = read_marks(found["all"], "clamp alone")
    wanted = [cell.budget for cell in cells]
    assert [p.budget for p in places] == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("share", "said"),
    [(0, "0"), (1e-4, "<0.1"), (0.5, "50"), (0.1234, "12.3"), (0.9999, ">99.9")],
)
def test_a_share_is_never_rounded_to_nothing_or_all(share: float, said: str) -> None:
    assert percent(share) == f"{said}\u00a0%"


def test_the_page_is_written_as_utf8(tmp_path: Path, certificate: Certificate) -> None:
    write_report(certificate, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes().decode() == render(certificate)
