"""The mix of the long soak, for a minute: everything adds up as it must there.

`benchmarks.soak` is the long one; model, crowd, accounts and checks are the same.
"""

import copy
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deployment import make_toy
from benchmarks.series import fit_slope
from benchmarks.soak import find_faults, soak

TOKENS = 25_000


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("soak")
    return soak(make_toy(folder / "deployment"), folder / "soak", tokens=TOKENS)


def test_everything_adds_up_afterwards(part: dict[str, Any]) -> None:
    assert find_faults(part) == []
    assert part["tokens_computed"] >= TOKENS
    assert part["crowd"]["choices"] <= part["verdicts"]
    assert all(part["actions"].values()), part["actions"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.update(tokens_counted=p["tokens_counted"] - 1), "not counted"),
        (lambda p: p.update(verdicts=p["verdicts"] + 1), "no verdict, or two"),
        (lambda p: p["crowd"].update(lost=1), "lost an answer"),
        (lambda p: p["held_afterwards"].update(open=1), "held that is over"),
        (lambda p: p["unscored"].update(no_score=1), "no reading or no score"),
        (lambda p: p["errors"].update(http=1), "noticed an error"),
        (lambda p: p.update(preemptions=0), "nobody was preempted"),
        (lambda p: p.update(cached_tokens=0), "never hit"),
        (lambda p: p["crowd"].pop("drill"), "a kind of client"),
        (lambda p: p["reloads"].update({"good 422": 1}), "reloads"),
        (lambda p: p["memory"].update(rss_end_mb=2 * 2**20), "memory grew"),
    ],
)
def test_what_does_not_add_up_is_named(
    part: dict[str, Any], spoil: Any, words: str
) -> None:
    spoiled = copy.deepcopy(part)
    spoil(spoiled)
    (fault,) = find_faults(spoiled)
    assert words in fault


def test_no_process_is_left_behind(part: dict[str, Any]) -> None:
    names = part["memory"]["processes_end_mb"]
    assert len(names) >= 3
    deadline = time.monotonic() + 10
    while any(map(is_alive, names)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [name for name in names if is_alive(name)] == []


def is_alive(name: str) -> bool:
    """Whether a process lives; whom nobody buries, as in some containers, does not."""
    try:
        stat = Path("/proc", name.split()[-1], "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(") ")[2][0] not in "ZX"


def test_a_slope_is_that_of_the_line_and_its_interval_that_of_the_noise() -> None:
    line = [(float(x), 3.0 * x + 1) for x in range(40)]
    slope = fit_slope(line)
    assert slope is not None
    assert slope == pytest.approx((3, 3, 3))
    noisy = [(x, y + (-1) ** (int(x) // 4) * 5) for x, y in line]
    wide = fit_slope(noisy)
    assert wide is not None
    assert wide.low < 3 < wide.high
    assert wide.high - wide.low > 0.1
    assert fit_slope(line[:9]) is None
