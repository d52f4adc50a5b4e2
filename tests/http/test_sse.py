import itertools

from fuzz.limits import fuzz
from hypothesis import given
from hypothesis import strategies as st

from guard.http.sse import Event, EventReader, write_event

STREAM = (
    'data: {"a": 1}\n\n'
    ": keep-alive\n\n"
    "\n\n"
    "event: x\r\ndata: one\r\ndata:two\r\n\r\n"
    "data: ü€😀\r\r"
    "data\n\n"
    "datas: no\n\n"
    "data: [DONE]\n\n"
    "data: unfinished"
).encode()


def read(chunks: list[bytes]) -> list[Event]:
    reader = EventReader()
    events = [event for chunk in chunks for event in reader.feed(chunk)]
    return events + list(reader.close())


@st.composite
def cuts(
    draw: st.DrawFn, stream: st.SearchStrategy[bytes]
) -> tuple[bytes, list[bytes]]:
    whole = draw(stream)
    at = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    ends = [0, *at, len(whole)]
    return whole, [whole[a:b] for a, b in itertools.pairwise(ends)]


def test_data_lines_comments_and_line_endings_are_understood():
    assert [event.data for event in read([STREAM])] == [
        '{"a": 1}',
        None,
        None,
        "one\ntwo",
        "ü€😀",
        "",
        None,
        "[DONE]",
        "unfinished",
    ]


@fuzz
@given(cuts(st.just(STREAM)))
def test_any_cut_gives_the_same_events(cut):
    assert read(cut[1]) == read([STREAM])


soup = st.lists(
    st.sampled_from([b"\r", b"\n", b"data", b":", b" ", b"x", b"\xff"]), max_size=40
).map(b"".join)


@fuzz
@given(cuts(soup))
def test_any_cut_of_any_bytes_gives_the_same_events_and_loses_no_byte(cut):
    whole, chunks = cut
    events = read(chunks)
    assert events == read([whole])
    assert b"".join(event.raw for event in events) == whole


def test_an_event_is_complete_with_its_blank_line_and_not_later():
    reader = EventReader()
    assert list(reader.feed(b"data: a\n")) == []
    assert [event.data for event in reader.feed(b"\n")] == ["a"]


@fuzz
@given(st.text().filter(lambda text: not set(text) & {"\r", "\n"}))
def test_what_is_written_is_read_back(text):
    assert [event.data for event in read([write_event(text)])] == [text]
