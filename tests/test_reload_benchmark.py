"""The benchmark of reloads: what falls short in its results is named."""

import copy
from typing import Any

import pytest

from benchmarks.reload import find_faults

RESULT: dict[str, Any] = {
    "reloads_asked": 45,
    "reloads": {"good 200": 41, "bad 422": 4},
    "refused_counted": 4.0,
    "requests_by_fingerprint": {"first": 30, "second": 20},
    "lost": 0,
    "mismatched": 0,
    "memory": {"rss_mb": [1900.0, 2000.0, 2010.0, 2020.0]},
}


def test_a_run_in_which_nothing_is_lost_has_no_fault() -> None:
    assert find_faults(RESULT) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r["reloads"].update({"good 200": 40}), "ended otherwise"),
        (lambda r: r["reloads"].update({"good 422": 1}), "ended otherwise"),
        (lambda r: r.update(refused_counted=3.0), "other refusals"),
        (lambda r: r["requests_by_fingerprint"].pop("second"), "answered nobody"),
        (lambda r: r["requests_by_fingerprint"].update(third=1), "answered nobody"),
        (lambda r: r.update(lost=1), "lost an answer"),
        (lambda r: r.update(mismatched=1), "its verdict names"),
        (lambda r: r["memory"]["rss_mb"].append(2031.0), "memory grew until"),
    ],
)
def test_what_falls_short_is_named(spoil: Any, words: str) -> None:
    spoiled = copy.deepcopy(RESULT)
    spoil(spoiled)
    (fault,) = find_faults(spoiled)
    assert words in fault
