import math
import time

import pytest
from fuzz.limits import fuzz
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import RequestError
from guard.request import (
    GuardField,
    Ticket,
    TicketBook,
    read_field,
    read_ticket,
    sign_ticket,
)

SECRET = b"0123456789abcdef0123456789abcdef"
NOW = 1_000_000.0
TICKET = Ticket("guard-1", "research", "summary", NOW + 60)


def test_a_ticket_is_read_back_as_it_was_signed():
    assert read_ticket(sign_ticket(TICKET, SECRET), SECRET, now=NOW) == TICKET


@fuzz
@given(
    st.text(),
    st.text(),
    st.floats(min_value=1.0, max_value=1e12),
    st.none() | st.text(),
)
def test_any_names_survive_the_ticket(guard_id, policy, expires, drill):
    ticket = Ticket(guard_id, policy, "none", expires, drill=drill)
    text = sign_ticket(ticket, SECRET)
    assert text.isascii()
    assert read_ticket(text, SECRET, now=0.0) == ticket


def test_a_ticket_is_one_url_safe_string():
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.=")
    assert set(sign_ticket(TICKET, SECRET)) <= allowed


@fuzz
@given(st.data())
def test_a_ticket_with_any_character_changed_is_worthless(data):
    text = sign_ticket(TICKET, SECRET)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters().filter(lambda char: char != text[at]))
    assert read_ticket(text[:at] + other + text[at + 1 :], SECRET, now=NOW) is None


@pytest.mark.parametrize("choices", [1, 3])
def test_a_ticket_that_is_shown_once_too_often_lets_in_nobody(choices):
    book = TicketBook()
    text = sign_ticket(Ticket("g", "open", "none", NOW + 60, choices), SECRET)
    other = sign_ticket(Ticket("h", "open", "none", NOW + 60, 1), SECRET)
    shown = [book.redeem(text, SECRET, now=NOW) for _ in range(choices + 2)]
    assert [ticket is not None for ticket in shown] == [True] * choices + [False] * 2
    assert book.redeem(other, SECRET, now=NOW) is not None


def test_a_ticket_made_for_offline_use_lets_in_any_number():
    book, text = TicketBook(), sign_ticket(TICKET, SECRET)
    assert all(book.redeem(text, SECRET, now=NOW) == TICKET for _ in range(100))


def test_a_book_forgets_what_has_expired_and_only_that():
    book = TicketBook()
    for number in range(50):
        ticket = Ticket(f"g{number}", "open", "none", NOW + 10 + number, 1)
        text = sign_ticket(ticket, SECRET)
        assert book.redeem(text, SECRET, now=NOW + number) is not None
        assert book.redeem(text, SECRET, now=NOW + number) is None
        assert len(book._shown) <= 11


def test_every_cut_of_a_ticket_is_worthless():
    text = sign_ticket(TICKET, SECRET)
    assert all(
        read_ticket(text[:end], SECRET, now=NOW) is None for end in range(len(text))
    )


@fuzz
@given(
    st.one_of(
        st.text(),
        st.binary(),
        st.none(),
        st.integers(),
        st.lists(st.text()),
        st.from_regex(r"g1\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]{43}=", fullmatch=True),
    )
)
def test_whatever_else_is_offered_is_no_ticket_and_raises_nothing(value):
    assert read_ticket(value, SECRET, now=NOW) is None


def test_lone_surrogates_raise_nothing():
    assert read_ticket("\ud800.x.y", SECRET, now=NOW) is None


def test_a_ticket_of_another_start_is_worthless():
    assert read_ticket(sign_ticket(TICKET, SECRET[::-1]), SECRET, now=NOW) is None


@pytest.mark.parametrize("late", [0.0, 1.0, math.inf])
def test_an_expired_ticket_is_worthless(late):
    text = sign_ticket(TICKET, SECRET)
    assert read_ticket(text, SECRET, now=TICKET.expires + late) is None


def test_an_expiry_that_is_no_number_has_expired():
    text = sign_ticket(Ticket("g", "p", "none", math.nan), SECRET)
    assert read_ticket(text, SECRET, now=time.time()) is None


def test_a_short_secret_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        sign_ticket(TICKET, b"short")


def test_no_field_asks_for_nothing():
    assert read_field(None) == GuardField() == read_field({})


def test_a_field_names_policy_and_trace():
    field = read_field({"policy": "research", "trace": "summary"})
    assert (field.policy, field.trace, field.drill) == ("research", "summary", None)


def test_a_field_names_a_drill():
    assert read_field({"drill": "last-token"}).drill == "last-token"


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("off", "guard"),
        ([], "guard"),
        (False, "guard"),
        ({"enabled": False}, "guard.enabled"),
        ({"policy": 3}, "guard.policy"),
        ({"policy": ""}, "guard.policy"),
        ({"policy": ["a"]}, "guard.policy"),
        ({"policy": "x" * 129}, "guard.policy"),
        ({"trace": "all"}, "guard.trace"),
        ({"trace": None}, "guard.trace"),
        ({"drill": ""}, "guard.drill"),
        ({"drill": 1}, "guard.drill"),
        ({"drill": "x" * 129}, "guard.drill"),
    ],
)
def test_a_malformed_field_is_refused_by_name(value, param):
    with pytest.raises(RequestError) as caught:
        read_field(value)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert "expected" in caught.value.message


def test_a_trace_of_every_token_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="'tokens' is not supported yet") as refused:
        read_field({"trace": "tokens"})
    assert refused.value.param == "guard.trace"


def test_a_full_book_lets_nobody_in_twice_and_the_newest_in_once() -> None:
    book = TicketBook(max_tickets=2)
    texts = [
        sign_ticket(Ticket(f"id-{n}", "p", expires=100.0 + n, choices=1), SECRET)
        for n in range(5)
    ]
    for text in texts:
        assert book.redeem(text, SECRET, now=0.0) is not None
        assert len(book._shown) <= 2
    for text in texts:
        assert book.redeem(text, SECRET, now=0.0) is None
