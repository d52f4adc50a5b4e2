import json
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.verdict import Alarm, Verdict, decide, worst


@dataclass
class FakeReading:
    monitor: str
    score: float = 7.1
    threshold: float = 4.0
    position: int | None = 161
    stage: Any = "output"
    alarm: bool = True
    action: Any = "block"

    @property
    def ratio(self) -> float:
        return self.score / self.threshold


ENFORCE: Any = SimpleNamespace(mode="enforce")
OBSERVE: Any = SimpleNamespace(mode="observe")


def make_verdict(action: Any = "allow", **values: Any) -> Verdict:
    return Verdict("id", "default", "ab12", "enforce", action, **values)


def test_json_is_the_object_of_the_contract():
    alarm = Alarm("recovery", 7.1, 4.0, 1.775, 161, "output", "block")
    verdict = make_verdict(
        "block",
        stage="output",
        alarms=(alarm,),
        clamped_tokens={"jailbreak": 3},
        tokens_seen=212,
    )
    assert verdict.to_json() == {
        "schema": 1,
        "id": "id",
        "policy": "default",
        "fingerprint": "ab12",
        "mode": "enforce",
        "action": "block",
        "stage": "output",
        "alarms": [
            {
                "monitor": "recovery",
                "score": 7.1,
                "threshold": 4.0,
                "ratio": 1.775,
                "position": 161,
            }
        ],
        "clamped_tokens": {"jailbreak": 3},
        "tokens_seen": 212,
    }


def test_a_reason_is_shown_only_when_there_is_one():
    assert "reason" not in make_verdict().to_json()
    assert make_verdict("block", reason="unscored").to_json()["reason"] == "unscored"


def test_a_drill_is_shown_only_when_one_ran():
    assert "drill" not in make_verdict().to_json()
    assert make_verdict(drill="fire").to_json()["drill"] == "fire"


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_not_finite_is_null_in_json(score):
    alarm = Alarm("m", score, 4.0, score, 1, "prompt", "block")
    body = make_verdict("block", alarms=(alarm,)).to_json()
    text = json.dumps(body, allow_nan=False)
    assert json.loads(text)["alarms"][0]["score"] is None
    assert math.isnan(Verdict.from_json(body).alarms[0].score)


alarms = st.builds(
    Alarm,
    monitor=st.text(),
    score=st.floats(allow_nan=False, allow_infinity=False),
    threshold=st.floats(allow_nan=False, allow_infinity=False),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    position=st.none() | st.integers(0),
    stage=st.sampled_from(["prompt", "output"]),
    action=st.sampled_from(["flag", "block"]),
)
verdicts = st.builds(
    Verdict,
    id=st.text(),
    policy=st.text(),
    fingerprint=st.text(),
    mode=st.sampled_from(["observe", "enforce"]),
    action=st.sampled_from(["allow", "flag", "block"]),
    stage=st.sampled_from(["prompt", "output", None]),
    alarms=st.lists(alarms, max_size=3).map(tuple),
    clamped_tokens=st.dictionaries(st.text(), st.integers(0)),
    tokens_seen=st.integers(0),
    reason=st.none() | st.text(),
    drill=st.none() | st.text(),
)


@given(verdicts)
def test_nothing_is_lost_on_the_wire(verdict):
    text = json.dumps(verdict.to_wire(), allow_nan=False)
    assert Verdict.from_json(json.loads(text)) == verdict


@given(verdicts)
def test_a_client_can_read_a_verdict_back(verdict):
    body = verdict.to_json()
    assert Verdict.from_json(body).to_json() == body


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match="expected 1"):
        Verdict.from_json({**make_verdict().to_json(), "schema": 2})


def test_the_worst_verdict_is_the_most_severe_and_the_first_of_those():
    allow, flag, block = map(make_verdict, ("allow", "flag", "block"))
    late = make_verdict("block", tokens_seen=9)
    assert worst([allow, flag]) is flag
    assert worst([allow, block, flag, late]) is block
    assert worst([allow]) is allow


def test_there_is_no_worst_of_nothing():
    with pytest.raises(ValueError, match="empty"):
        worst([])


def test_no_alarm_allows():
    readings = [FakeReading("a", alarm=False), FakeReading("b", alarm=False)]
    assert decide(ENFORCE, readings) == ("allow", None, ())
    assert decide(ENFORCE, []) == ("allow", None, ())


def test_enforcing_takes_the_strongest_action_of_the_alarmed_monitors():
    readings = [
        FakeReading("a", action="flag", stage="prompt", position=2),
        FakeReading("b", action="block", stage="output", position=9),
        FakeReading("c", action="block", alarm=False),
    ]
    action, stage, raised = decide(ENFORCE, readings)
    assert (action, stage) == ("block", "output")
    assert [(alarm.monitor, alarm.action) for alarm in raised] == [
        ("a", "flag"),
        ("b", "block"),
    ]


def test_a_quiet_blocking_monitor_does_not_strengthen_a_flag():
    readings = [FakeReading("a", action="flag"), FakeReading("b", alarm=False)]
    assert decide(ENFORCE, readings)[0] == "flag"


def test_observing_flags_at_most():
    action, _, (alarm,) = decide(OBSERVE, [FakeReading("a", action="block")])
    assert (action, alarm.action) == ("flag", "flag")


def test_the_stage_is_that_of_the_earliest_decisive_alarm():
    readings = [
        FakeReading("a", stage="output", position=40),
        FakeReading("b", stage="prompt", position=3),
    ]
    assert decide(ENFORCE, readings)[1] == "prompt"


def test_an_alarm_without_a_finite_score_is_an_alarm():
    reading = FakeReading("a", score=math.inf, position=None)
    action, _, (alarm,) = decide(ENFORCE, [reading])
    assert action == "block"
    assert alarm.ratio == math.inf
