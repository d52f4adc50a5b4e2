import itertools

import pytest

from guard.redteam.bound import clopper_pearson, upper_bound, wilson


# R: binom.test(hits, n) and prop.test(hits, n, correct = FALSE).
@pytest.mark.parametrize(
    ("hits", "n", "exact", "score"),
    [
        (0, 10, (0.0, 0.3085), (0.0, 0.2775)),
        (5, 10, (0.1871, 0.8129), (0.2366, 0.7634)),
        (23, 24, (0.7888, 0.9989), (0.7976, 0.9926)),
        (10, 10, (0.6915, 1.0), (0.7225, 1.0)),
    ],
)
def test_intervals_are_those_of_the_literature(hits, n, exact, score):
    assert clopper_pearson(hits, n) == pytest.approx(exact, abs=5e-5)
    assert wilson(hits, n) == pytest.approx(score, abs=5e-5)


@pytest.mark.parametrize(("hits", "n", "bound"), [(0, 20, 0.1391), (1, 20, 0.2161)])
def test_one_sided_bound_is_that_of_the_literature(hits, n, bound):
    assert upper_bound(hits, n) == pytest.approx(bound, abs=5e-5)


def test_without_hits_the_bound_has_a_closed_form():
    assert upper_bound(0, 64) == pytest.approx(1 - 0.05 ** (1 / 64), abs=1e-12)


def test_nothing_is_known_of_no_sample():
    assert wilson(0, 0) == clopper_pearson(0, 0) == (0.0, 1.0)
    assert upper_bound(0, 0) == 1.0


def test_bounds_hold_for_more_samples_than_a_float_can_count():
    low, high = clopper_pearson(2500, 5000)
    assert low == pytest.approx(0.4860, abs=1e-4)
    assert high == pytest.approx(0.5140, abs=1e-4)


def test_more_hits_never_lower_a_bound():
    for n in (1, 7, 40):
        bounds = [upper_bound(hits, n) for hits in range(n + 1)]
        assert all(a < b for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("rate", [wilson, clopper_pearson, upper_bound])
@pytest.mark.parametrize("hits", [-1, 4])
def test_hits_that_cannot_be_are_refused(rate, hits):
    with pytest.raises(ValueError, match="expected 0 to 3"):
        rate(hits, 3)
