"""Each score against its formula, written another way."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from specimens import D_MODEL, draw_probe, draw_rows
from torch import Tensor, nn

from guard.errors import CalibrationError
from guard.score import (
    RANK,
    SCORES,
    Activations,
    Statistics,
    density,
    drop_sinks,
    error,
    fit_density,
    fit_error,
)

POISON = [math.nan, math.inf, -math.inf]
WIDE = RANK + 20
"""A stream with more directions than `density` keeps apart."""


def draw_stream(num_tokens: int, width: int, *, seed: int) -> Tensor:
    """Return rows whose coordinates are correlated, and differ much in variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(99)
    rows = torch.randn(num_tokens, width, generator=generator)
    mixed = rows @ torch.randn(width, width, generator=mixing)
    spread = torch.logspace(-1, 1, width)
    return (mixed + 0.5 * rows) * spread + torch.arange(width)


def draw_activations(num_tokens: int, width: int, *, seed: int) -> Activations:
    """Return a stream, and an error of which the stream predicts a part."""
    resid = draw_stream(num_tokens, width, seed=seed)
    mixing = torch.Generator().manual_seed(98)
    slopes = 0.1 * torch.randn(width, width, generator=mixing)
    own = draw_stream(num_tokens, width, seed=seed + 500).flip(1)
    return Activations(resid, resid @ slopes + 0.1 * own, resid[:, 0].relu())


def fit_covariance(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance as the docstring of the fit describes them.

    Ledoit and Wolf (2004), section 3.3, as the paper has it: sums over samples.
    """
    count, width = rows.shape
    mean = rows.mean(0)
    deviations = np.sqrt(((rows - mean) ** 2).mean(0))
    standard = (rows - mean) / deviations
    sample = np.cov(standard.T, bias=True)
    level = np.trace(sample) / width
    spread = ((sample - level * np.eye(width)) ** 2).sum() / width
    noise = sum(((np.outer(x, x) - sample) ** 2).sum() / width for x in standard)
    weight = min(noise / count**2, spread) / spread
    assert 0 < weight < 1
    shrunk = weight * level * np.eye(width) + (1 - weight) * sample
    # Probabilistic PCA: the trailing directions share their mean variance.
    values, vectors = np.linalg.eigh(shrunk)
    kept = min(RANK, width - 1)
    values[: width - kept] = values[: width - kept].mean()
    correlation = vectors @ np.diag(values) @ vectors.T
    return mean, deviations[:, None] * correlation * deviations


def measure_distances(
    rows: np.ndarray, mean: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    inverse = np.linalg.inv(covariance)
    return np.array([math.sqrt((x - mean) @ inverse @ (x - mean)) for x in rows])


@pytest.mark.parametrize("num_tokens", [40, 400, 4000])
@pytest.mark.parametrize("width", [D_MODEL, WIDE])
def test_density_is_the_mahalanobis_distance_under_the_shrunk_covariance(
    width: int, num_tokens: int
) -> None:
    statistics = fit_density(Activations(draw_stream(num_tokens, width, seed=1)))
    rows = draw_stream(num_tokens, width, seed=1).double().numpy()
    fresh = 3 * draw_stream(6, width, seed=3)
    found = density(Activations(fresh), statistics)
    expected = measure_distances(fresh.double().numpy(), *fit_covariance(rows))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)


def test_density_keeps_as_few_directions_apart_as_it_says() -> None:
    statistics = fit_density(Activations(draw_stream(400, WIDE, seed=1)))
    assert {name: tuple(value.shape) for name, value in statistics.items()} == {
        "mean": (WIDE,),
        "inverse_scale": (WIDE,),
        "basis": (WIDE, RANK),
        "leading": (RANK,),
        "rest": (),
    }
    assert all(value.dtype == torch.float32 for value in statistics.values())


def test_density_of_four_points_is_computed_by_hand() -> None:
    # Both coordinates have mean 1 and deviation 2, and nothing is correlated.
    resid = torch.tensor([[3.0, 3.0], [-1.0, 3.0], [3.0, -1.0], [-1.0, -1.0]])
    statistics = fit_density(Activations(resid))
    fresh = torch.tensor([[1.0, 1.0], [5.0, 1.0], [1.0, -1.0], [7.0, 9.0]])
    found = density(Activations(fresh), statistics)
    assert found.tolist() == pytest.approx([0.0, 2.0, 1.0, 5.0], abs=1e-5)


@pytest.mark.parametrize("width", [1, 4])
def test_density_of_one_point_repeated_is_finite(width: int) -> None:
    resid = torch.ones(9, width)
    found = density(Activations(2 * resid), fit_density(Activations(resid)))
    assert found.isfinite().all()
    assert (found > 1e4).all()


def predict_error(benign: Activations, resid: np.ndarray) -> np.ndarray:
    """Return what a ridge regression in the dual form makes of a stream.

    Of full rank: for a stream no wider than `REGRESSION_RANK`.
    """
    assert benign.error is not None
    x, y = benign.resid.double().numpy(), benign.error.double().numpy()
    centred = x - x.mean(0)
    ridge = 1e-3 * centred.var(0).mean() * len(x)
    gram = centred @ centred.T + ridge * np.eye(len(x))
    return (resid - x.mean(0)) @ centred.T @ np.linalg.solve(gram, y)


@pytest.mark.parametrize("width", [D_MODEL, WIDE])
def test_error_is_t_squared_plus_q_of_what_the_stream_does_not_predict(
    width: int,
) -> None:
    benign = draw_activations(300, width, seed=1)
    statistics = fit_error(benign)
    assert benign.error is not None
    innovation = benign.error.double().numpy() - predict_error(
        benign, benign.resid.double().numpy()
    )
    mean, covariance = fit_covariance(innovation)
    fresh = draw_activations(6, width, seed=5)
    assert fresh.error is not None
    left = fresh.error.double().numpy() - predict_error(
        benign, fresh.resid.double().numpy()
    )
    # By its definition: T-squared of the leading components, Q of all others.
    deviations = innovation.std(0)
    standard = (left - mean) / deviations
    values, vectors = np.linalg.eigh(covariance / np.outer(deviations, deviations))
    kept = min(RANK, width - 1)
    components = standard @ vectors
    t_squared = (components[:, width - kept :] ** 2 / values[width - kept :]).sum(1)
    q = (components[:, : width - kept] ** 2).sum(1) / values[0]
    found = error(fresh, statistics)
    np.testing.assert_allclose(found.numpy(), np.sqrt(t_squared + q), rtol=2e-3)


def test_error_is_blind_to_what_the_stream_predicts_and_to_nothing_else() -> None:
    benign = draw_activations(2000, D_MODEL, seed=1)
    statistics = fit_error(benign)
    fresh = draw_activations(50, D_MODEL, seed=7)
    assert fresh.error is not None
    usual = error(fresh, statistics)
    step = draw_rows(1, seed=3, scale=30.0)
    explained = torch.from_numpy(
        predict_error(benign, (fresh.resid + step).double().numpy())
        - predict_error(benign, fresh.resid.double().numpy())
    ).float()
    followed = Activations(fresh.resid + step, fresh.error + explained)
    torch.testing.assert_close(error(followed, statistics), usual, rtol=0.02, atol=0.02)
    alone = Activations(fresh.resid, fresh.error + explained)
    assert (error(alone, statistics) > 2 * usual).all()


def test_error_norm_is_the_norm_of_the_error_and_nothing_else() -> None:
    deviation = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    score = SCORES["error_norm"]
    assert score.fit(Activations(deviation, deviation)) == {}
    found = score.apply(Activations(1e9 + deviation, deviation), {})
    assert found.tolist() == [5.0, 0.0]


def test_what_the_clamp_left_is_read_as_it_is() -> None:
    score = SCORES["clamp_residual"]
    rows, left = draw_rows(3, seed=0), torch.tensor([0.0, 2.5, 1.0])
    assert score.fit(Activations(rows, rows, left)) == {}
    assert torch.equal(score.apply(Activations(rows, rows, left), {}), left)


@torch.no_grad()
def test_a_probe_is_a_linear_layer_beside_one_hidden_layer() -> None:
    statistics = draw_probe()
    linear = nn.Linear(D_MODEL, 1)
    hidden = nn.Linear(D_MODEL, len(statistics["bias"]))
    outwards = nn.Linear(len(statistics["bias"]), 1, bias=False)
    linear.weight[0] = statistics["weight"]
    linear.bias[0] = statistics["offset"]
    hidden.weight[:] = statistics["inward"].T
    hidden.bias[:] = statistics["bias"]
    outwards.weight[0] = statistics["outward"]
    deep = nn.Sequential(hidden, nn.ReLU(), outwards)
    rows = draw_rows(20, seed=1)
    found = SCORES["probe"].apply(Activations(rows), statistics)
    unlikely = torch.sigmoid(-(linear(rows) + deep(rows))[:, 0].double())
    torch.testing.assert_close(found, -unlikely.log().float())
    assert (found >= 0).all()


def test_a_probe_is_not_fitted_on_benign_traffic() -> None:
    with pytest.raises(CalibrationError, match="`guard probe train` trains it"):
        SCORES["probe"].fit(Activations(draw_rows(9, seed=0)))


def fit(name: str) -> Statistics:
    """Return the statistics of any score for a stream of the usual width."""
    if name == "probe":
        return draw_probe()
    return SCORES[name].fit(draw_activations(200, D_MODEL, seed=0))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_a_score_is_one_number_a_token_whoever_its_neighbours_are(
    name: str, num_tokens: int
) -> None:
    statistics = fit(name)
    rows = draw_activations(5, D_MODEL, seed=2)
    found = SCORES[name].apply(rows.select(torch.arange(num_tokens)), statistics)
    assert found.shape == (num_tokens,)
    assert found.dtype == torch.float32
    whole = SCORES[name].apply(rows, statistics)
    torch.testing.assert_close(found, whole[:num_tokens])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("poison", POISON)
def test_a_score_of_what_is_not_finite_is_not_finite(name: str, poison: float) -> None:
    statistics = fit(name)
    clean = draw_activations(3, D_MODEL, seed=2)
    for sick in range(3 if SCORES[name].needs_sae else 1):
        parts = [part.clone() for part in clean if part is not None]
        parts[sick].view(3, -1)[1, -1] = poison
        if name not in ("error", "density") and not _reads(name, sick):
            continue
        # A stream that is not finite leaves an error that is none either.
        if sick == 0:
            parts[1][1, -1] = poison
            parts[2][1] = poison
        if name == "error" and sick == 2:
            continue
        found = SCORES[name].apply(Activations(*parts), statistics)
        assert found.isfinite().tolist() == [True, False, True], sick


def _reads(name: str, part: int) -> bool:
    return part in {"error_norm": (0, 1), "clamp_residual": (0, 2), "probe": (0,)}[name]


@pytest.mark.parametrize("name", ["density", "error", "error_norm"])
def test_a_score_grows_without_end_along_every_line_outwards(name: str) -> None:
    statistics = fit(name)
    usual = draw_activations(1, D_MODEL, seed=2)
    assert usual.error is not None
    for seed in range(20):
        away = draw_rows(1, seed=seed)
        steps = torch.tensor([[1e2], [1e3], [1e4], [1e5]])
        moved = Activations(
            usual.resid + (steps * away if name == "density" else 0 * steps),
            usual.error + steps * away,
        )
        found = SCORES[name].apply(moved, statistics)
        assert (found.diff() > 0).all()
        assert found[-1] > 100 * SCORES[name].apply(usual, statistics)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_traces_into_one_graph(name: str) -> None:
    statistics = fit(name)
    plain = SCORES[name].apply

    def apply(resid: Tensor, error: Tensor, left: Tensor) -> Tensor:
        return plain(Activations(resid, error, left), statistics)

    compiled: Callable[..., Tensor] = torch.compile(
        apply, backend="eager", fullgraph=True
    )
    parts = draw_activations(4, D_MODEL, seed=3)
    assert torch.equal(compiled(*parts), apply(*parts))


def test_sinks_are_left_out_of_fitting_and_nothing_else_is() -> None:
    benign = draw_activations(100, D_MODEL, seed=1)
    median = benign.resid.norm(dim=1).median()
    away = benign.resid / benign.resid.norm(dim=1, keepdim=True) * median
    sizes = torch.ones(100)
    sizes[[3, 50]] = torch.tensor([10.1, 1e6])
    sizes[7] = 9.9
    parts = Activations(away * sizes[:, None], benign.error, benign.left)
    kept = torch.ones(100, dtype=torch.bool)
    kept[[3, 50]] = False
    for part, whole in zip(drop_sinks(parts), parts, strict=True):
        assert part is not None
        assert whole is not None
        assert torch.equal(part, whole[kept])


def test_a_sink_is_scored_like_any_other_token() -> None:
    statistics = fit("density")
    sink = Activations(draw_rows(1, seed=0, scale=1e6))
    assert SCORES["density"].apply(sink, statistics) > 1e4


def test_activations_are_selected_together_and_what_is_missing_stays_missing() -> None:
    rows = draw_rows(3, seed=0)
    some = Activations(rows).select(torch.tensor([2, 0]))
    assert torch.equal(some.resid, rows[[2, 0]])
    assert some.error is None
    assert some.left is None
