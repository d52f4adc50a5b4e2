"""Scores: one number for every token, larger where it is less usual.

A score is one small pair of functions, fit and apply; `SCORES` lists them. `apply` runs
in the worker, inside the graph: fixed shapes, no branch on a value. `fit` runs where a
calibration is made.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from guard.errors import CalibrationError

__all__ = ["SCORES", "Activations", "Score", "Statistics", "drop_sinks"]

RANK = 64
"""Leading directions that `density` and `error` keep apart from all others."""
REGRESSION_RANK = 96
"""Of the regression by which `error` predicts the SAE's error from the stream."""
_RIDGE = 1e-3
"""Share of the stream's mean variance that is added to its covariance."""
_SINK_FACTOR = 10.0
"""How many times the median norm makes a token a sink."""
_TINY = 1e-12


class Activations(NamedTuple):
    """What a score may look at, after the clamp."""

    resid: Tensor
    """The residual stream, fp32 `[num_tokens, d_model]`."""
    error: Tensor | None = None
    """What the SAE does not explain: `resid - decode(encode(resid))`, same shape."""
    left: Tensor | None = None
    """What the clamp left: the largest clamped latent, encoded again, `[num_tokens]`;
    0 where nothing is clamped."""

    def select(self, rows: Tensor | slice) -> "Activations":
        """Return some of the tokens."""
        error = None if self.error is None else self.error[rows]
        left = None if self.left is None else self.left[rows]
        return Activations(self.resid[rows], error, left)


Statistics = Mapping[str, Tensor]


class Score(NamedTuple):
    """A number per token, and how to learn on benign traffic what is usual."""

    fit: Callable[[Activations], dict[str, Tensor]]
    """Benign activations to the statistics that `apply` needs."""
    apply: Callable[[Activations, Statistics], Tensor]
    """Activations and statistics to `[num_tokens]`; larger is less usual."""
    needs_sae: bool
    """Whether it looks at more than the stream itself."""


def drop_sinks(activations: Activations) -> Activations:
    """Leave out tokens with a huge norm: attention sinks would swamp a covariance.

    For fitting only. Whoever scores must score them: a norm test there would be a way
    around the monitor.
    """
    norms = activations.resid.norm(dim=1)
    return activations.select(norms <= _SINK_FACTOR * norms.median())


def fit_nothing(_activations: Activations) -> dict[str, Tensor]:
    """Return no statistics, for a score that needs none."""
    return {}


def error_norm(activations: Activations, _statistics: Statistics) -> Tensor:
    """Return the norm of the SAE's reconstruction error, `[num_tokens]`."""
    return _present(activations.error).norm(dim=1)


def clamp_residual(activations: Activations, _statistics: Statistics) -> Tensor:
    """Return the activation that clamped latents still have, `[num_tokens]`."""
    return _present(activations.left)


def fit_density(activations: Activations) -> dict[str, Tensor]:
    """Fit what `density` needs; see `_fit_ellipsoid`."""
    return _fit_ellipsoid(activations.resid)


def density(activations: Activations, statistics: Statistics) -> Tensor:
    """Return the Mahalanobis distance of `resid`, `[num_tokens]`."""
    return _distance(activations.resid, statistics)


def fit_error(activations: Activations) -> dict[str, Tensor]:
    """Fit what of the SAE's error the stream predicts, and how the rest is spread.

    Over 90 % of the error's norm is linearly predictable from the stream (arXiv
    2410.14670): a ridge regression, of reduced rank, takes that part off.

    Returns:
        `origin` `[d_model]`, `down` `[d_model, r]`, `up` `[r, d_model]`, and the
        ellipsoid of what is left.
    """
    resid = activations.resid.double()
    error = _present(activations.error).double()
    origin = resid.mean(0)
    centred = resid - origin
    covariance = centred.T @ centred / len(centred)
    ridge = _RIDGE * covariance.diagonal().mean().clamp(min=_TINY)
    covariance.diagonal().add_(ridge)
    slopes = torch.linalg.solve(covariance, centred.T @ error / len(centred))
    predicted = centred @ slopes
    _, vectors = torch.linalg.eigh(predicted.T @ predicted)
    up = vectors[:, -REGRESSION_RANK:]
    down = slopes @ up
    innovation = error - centred @ down @ up.T
    fitted = {"origin": origin, "down": down, "up": up.T.contiguous()}
    return {
        **{name: tensor.float() for name, tensor in fitted.items()},
        **_fit_ellipsoid(innovation),
    }


def error(activations: Activations, statistics: Statistics) -> Tensor:
    """Return how unusual the error is that the stream does not predict, `[num_tokens]`.

    T-squared of this innovation in its leading directions plus Q outside them (Jackson
    and Mudholkar, "Control procedures for residuals associated with principal component
    analysis", 1979), and the root of it.
    """
    centred = activations.resid - statistics["origin"]
    predicted = centred @ statistics["down"] @ statistics["up"]
    return _distance(_present(activations.error) - predicted, statistics)


def fit_probe(_activations: Activations) -> dict[str, Tensor]:
    """Refuse: what a probe looks for is learned from labels, not from benign traffic.

    Raises:
        CalibrationError: Always.
    """
    message = "A probe is not fitted on benign traffic; `guard probe train` trains it."
    raise CalibrationError(message)


def probe(activations: Activations, statistics: Statistics) -> Tensor:
    """Return how little a probe doubts, `-log(1 - p)` in nats, `[num_tokens]`.

    The log-odds of p are a linear part and one small hidden layer: `x @ weight + relu(x
    @ inward + bias) @ outward + offset`. Never negative: in the mean over a window no
    harmless token outweighs others.
    """
    resid = activations.resid
    hidden = (resid @ statistics["inward"] + statistics["bias"]).relu()
    linear = resid @ statistics["weight"]
    odds = linear + hidden @ statistics["outward"] + statistics["offset"]
    return functional.softplus(odds)


SCORES: dict[str, Score] = {
    "error_norm": Score(fit_nothing, error_norm, needs_sae=True),
    "error": Score(fit_error, error, needs_sae=True),
    "density": Score(fit_density, density, needs_sae=False),
    "probe": Score(fit_probe, probe, needs_sae=False),
    "clamp_residual": Score(fit_nothing, clamp_residual, needs_sae=True),
}


def _fit_ellipsoid(rows: Tensor) -> dict[str, Tensor]:
    """Fit mean and covariance, low rank plus diagonal, to rows `[num_tokens, d]`.

    The correlation matrix is shrunk towards the identity by the closed form of Ledoit
    and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices"
    (2004), section 3.3. Its `RANK` leading directions keep their variances, all others
    share their mean (Tipping and Bishop, "Probabilistic principal component analysis",
    1999), so that a distance costs `2 * d * RANK` multiply-adds.

    Returns:
        `mean` and `inverse_scale` `[d]`, `basis` `[d, r]`, and the inverse variances
        `leading` `[r]` and `rest` `[]`.
    """
    rows = rows.double()
    mean = rows.mean(0)
    scale = rows.std(0, correction=0)
    # What varies by less than rounding does not vary; a constant has no scale at all.
    scale = scale.clamp(min=1e-6 * rows.square().mean().sqrt().clamp(min=_TINY))
    values, vectors = torch.linalg.eigh(_shrunk_correlation((rows - mean) / scale))
    rank = min(RANK, len(values) - 1)
    rest = values[:-rank].mean() if rank else values.mean()
    fitted = {
        "mean": mean,
        "inverse_scale": 1 / scale,
        "basis": vectors[:, len(values) - rank :].contiguous(),
        "leading": 1 / values[len(values) - rank :].clamp(min=_TINY),
        "rest": 1 / rest.clamp(min=_TINY),
    }
    return {name: tensor.float() for name, tensor in fitted.items()}


def _shrunk_correlation(rows: Tensor) -> Tensor:
    """Return the shrunk second moments of rows with mean 0 and variance 1."""
    num_tokens, width = rows.shape
    moments = rows.T @ rows / num_tokens
    scale = moments.diagonal().mean()
    target = scale * torch.eye(width, dtype=rows.dtype)
    distance = (moments - target).square().sum()
    noise = rows.square().sum(1).square().sum() / num_tokens
    noise = (noise - moments.square().sum()) / num_tokens
    shrinkage = (noise / distance).clamp(0, 1) if distance > 0 else 1.0
    return shrinkage * target + (1 - shrinkage) * moments


def _distance(rows: Tensor, statistics: Statistics) -> Tensor:
    """Return the Mahalanobis distance of rows `[num_tokens, d]` from an ellipsoid."""
    basis = statistics["basis"]
    scaled = (rows - statistics["mean"]) * statistics["inverse_scale"]
    leading = scaled @ basis
    # Not the difference of two squared norms: it would cancel where little is left.
    rest = scaled - leading @ basis.mT
    squared = leading.square() @ statistics["leading"]
    return (squared + rest.square().sum(1) * statistics["rest"]).sqrt()


def _present(part: Tensor | None) -> Tensor:
    assert part is not None, "a score was given less than it needs"
    return part
