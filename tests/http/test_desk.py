import time

import pytest

from guard.errors import RequestError
from guard.http import PolicyDesk
from guard.http.keys import AdminToken, KeyRing
from guard.request import GuardField, read_ticket
from guard.verdict import Verdict

SECRET = b"a secret of the test, 32 bytes.."


def make_verdict(guard_id, **values):
    known = {"policy": "default", "fingerprint": "f-default", "mode": "enforce"}
    return Verdict(**{"id": guard_id, **known, "action": "allow", **values})


@pytest.fixture
def guard_id(desk):
    return desk.admit(GuardField(), authorization=None, choices=1).guard_id


def test_nothing_asked_is_the_default_policy(desk):
    admission = desk.admit(GuardField(), authorization=None, choices=1)
    ticket = read_ticket(admission.ticket, SECRET, now=time.time())
    assert ticket is not None
    assert (ticket.guard_id, ticket.policy) == (admission.guard_id, "default")
    assert admission.policy == "default"


def test_a_public_policy_is_granted_with_its_trace(desk):
    field = GuardField(policy="open", trace="summary")
    admission = desk.admit(field, authorization=None, choices=1)
    ticket = read_ticket(admission.ticket, SECRET, now=time.time())
    assert (ticket.policy, ticket.trace) == ("open", "summary")


def test_a_ticket_lives_for_ten_minutes(desk):
    text = desk.admit(GuardField(), authorization=None, choices=1).ticket
    assert read_ticket(text, SECRET, now=time.time() + 590) is not None
    assert read_ticket(text, SECRET, now=time.time() + 610) is None


def test_a_ticket_lets_in_as_many_requests_as_the_answer_has_choices(desk):
    text = desk.admit(GuardField(), authorization=None, choices=3).ticket
    assert read_ticket(text, SECRET, now=time.time()).choices == 3


@pytest.mark.parametrize(("policy", "status"), [("nowhere", 400), ("private", 403)])
def test_another_policy_is_refused_without_naming_any(desk, policy, status):
    with pytest.raises(RequestError) as caught:
        desk.admit(GuardField(policy=policy), authorization=None, choices=1)
    assert (caught.value.status, caught.value.param) == (status, "guard.policy")
    for name in ("open", "private"):
        assert name not in caught.value.message.replace("not open to", "")


def test_every_request_has_its_own_id(desk):
    ids = {
        desk.admit(GuardField(), authorization=None, choices=1).guard_id
        for _ in range(100)
    }
    assert len(ids) == 100


def test_the_latest_verdict_of_each_choice_is_kept(desk, guard_id):
    desk.record(guard_id, 0, make_verdict(guard_id, tokens_seen=1))
    desk.record(guard_id, 1, make_verdict(guard_id, tokens_seen=2))
    desk.record(guard_id, 0, make_verdict(guard_id, tokens_seen=3))
    seen = {index: v.tokens_seen for index, v in desk.verdicts(guard_id).items()}
    assert seen == {0: 3, 1: 2}


def test_a_closed_request_is_forgotten_and_stays_so(desk, guard_id):
    desk.record(guard_id, 0, make_verdict(guard_id))
    desk.close(guard_id)
    desk.record(guard_id, 0, make_verdict(guard_id))
    assert desk.verdicts(guard_id) == {}
    desk.close(guard_id)


@pytest.mark.parametrize(
    "values", [{"policy": "open"}, {"fingerprint": "f-open"}, {"fingerprint": ""}]
)
def test_a_verdict_of_another_policy_is_no_verdict(desk, guard_id, values):
    desk.record(guard_id, 0, make_verdict(guard_id))
    desk.record(guard_id, 0, make_verdict(guard_id, **values))
    assert desk.verdicts(guard_id) == {}


def test_an_unknown_request_is_not_recorded(desk):
    desk.record("guard-x", 0, make_verdict("guard-x"))
    assert desk.verdicts("guard-x") == {}


def test_one_request_too_many_is_refused_and_the_others_stay(policy_file):
    prints = dict.fromkeys(policy_file.policies, "f")
    desk = PolicyDesk(policy_file, prints, secret=SECRET, max_open=2)

    def admit():
        return desk.admit(GuardField(), authorization=None, choices=1).guard_id

    ids = [admit(), admit()]
    with pytest.raises(RequestError, match="2 requests open; expected fewer") as full:
        admit()
    assert full.value.status == 503
    for guard_id in ids:
        desk.record(guard_id, 0, make_verdict(guard_id, fingerprint="f"))
    assert [len(desk.verdicts(guard_id)) for guard_id in ids] == [1, 1]
    desk.close(ids[0])
    assert admit()


def change(desk, policy_file, **changed):
    """Offer other terms: every fingerprint is another one."""
    prints = {name: f"g-{name}" for name in policy_file.policies}
    keys = changed.pop("keys", KeyRing((), accepted=()))
    desk.offer_terms(
        policy_file.model_copy(update=changed), prints, keys=keys, generation=2
    )


def test_a_request_is_held_to_the_terms_it_was_let_in_under(desk, policy_file):
    before = desk.admit(GuardField(), authorization=None, choices=1)
    change(desk, policy_file, default_policy="open")
    after = desk.admit(GuardField(), authorization=None, choices=1)
    assert (before.policy, after.policy) == ("default", "open")
    now = time.time()
    tickets = [read_ticket(a.ticket, SECRET, now=now) for a in (before, after)]
    assert [ticket.generation for ticket in tickets] == [1, 2]
    for admission, right, wrong in ((before, "f", "g"), (after, "g", "f")):
        for kind, count in ((wrong, 0), (right, 1), (wrong, 0)):
            values = {
                "policy": admission.policy,
                "fingerprint": f"{kind}-{admission.policy}",
            }
            verdict = make_verdict(admission.guard_id, **values)
            desk.record(admission.guard_id, 0, verdict)
            assert len(desk.verdicts(admission.guard_id)) == count


def test_the_oldest_generation_is_that_of_the_oldest_open_request(desk, policy_file):
    assert desk.oldest_generation == 1
    before = desk.admit(GuardField(), authorization=None, choices=1)
    change(desk, policy_file)
    after = desk.admit(GuardField(), authorization=None, choices=1)
    assert desk.oldest_generation == 1
    desk.close(before.guard_id)
    assert desk.oldest_generation == 2
    desk.close(after.guard_id)
    assert desk.oldest_generation == 2


def test_keys_and_drills_change_with_the_terms(desk, policy_file):
    desk.admin = AdminToken("an-administrators-token")
    keys = KeyRing((), accepted=["sk"])
    change(desk, policy_file, keys=keys, drills=())
    assert not desk.lets_in(None)
    assert desk.lets_in("Bearer sk")
    with pytest.raises(RequestError, match="does not exist"):
        desk.admit(
            GuardField(drill="fire"),
            authorization="Bearer sk",
            choices=1,
            admin_token="an-administrators-token",
        )
