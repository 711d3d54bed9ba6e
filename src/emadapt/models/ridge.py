"""Ridge regression of targets on tokens in closed form, for all regularisation strengths at once.

One pass over the tokens gives the sums, which merge by adding; one eigendecomposition of their
correlation gives every strength.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from emadapt.models.heads import Linear, with_background

Floats = npt.NDArray[np.float64]
STRENGTHS = tuple(float(f"{s:.3g}") for s in np.logspace(-6, 1, 15))
"""Penalties per token: scikit-learn's `alpha` divided by the number of tokens."""
EPS = 1e-5
"""Added to variances, as the linear head's BatchNorm does."""


@dataclass(frozen=True)
class Sums:
    """Sums over n tokens (D) and their targets, in float64. Those of parts add up.

    Attributes:
        n: number of tokens, or their total weight.
        x: (D,) sum of tokens.
        xx: (D, D) sum of outer products.
        y: (K,) sums of the targets.
        xy: (K, D) sums of tokens times targets.
    """

    n: float
    x: Floats
    xx: Floats
    y: Floats
    xy: Floats

    def __add__(self, other: Sums) -> Sums:
        return Sums(*map(operator.add, vars(self).values(), vars(other).values()))

    def weighted(self, weight: float) -> Sums:
        """The same with every token counted `weight` times."""
        return Sums(*(weight * value for value in vars(self).values()))


@dataclass(frozen=True)
class Solutions:
    """Ridge weights for several strengths; `predict` standardises with `mean` and `variance`.

    Attributes:
        strengths: S of them.
        mean, variance: (D,) of the tokens.
        weights: (S, K, D).
        intercept: (K,) mean targets.
    """

    strengths: tuple[float, ...]
    mean: Floats
    variance: Floats
    weights: Floats
    intercept: Floats

    def predict(self, tokens: torch.Tensor) -> torch.Tensor:
        """Predicted targets under every strength: (B, D, h, w) -> (S, K, B, h, w), float32."""
        slopes = self.weights / np.sqrt(self.variance + EPS)
        offsets = self.intercept - slopes @ self.mean
        flat = tokens.float().movedim(1, 0).flatten(1)  # B,D,h,w -> D,B*h*w
        found = torch.from_numpy(slopes.astype(np.float32)).to(flat.device) @ flat
        found += torch.from_numpy(offsets.astype(np.float32)).to(flat.device)[..., None]
        return found.unflatten(-1, (tokens.shape[0], *tokens.shape[2:]))

    def write(self, head: Linear, i: int, thresholds: Floats, slopes: Floats) -> None:
        """Make strength `i` the linear head.

        The logit of a class is slope * (target - threshold) above that of the background.
        """
        weight = with_background(torch.from_numpy(slopes[:, None] * self.weights[i]), 0)
        bias = with_background(torch.from_numpy(slopes * (self.intercept - thresholds)), 0)
        with torch.no_grad():
            head.norm.running_mean.copy_(torch.from_numpy(self.mean))  # type: ignore[union-attr]
            head.norm.running_var.copy_(torch.from_numpy(self.variance))  # type: ignore[union-attr]
            head.classify.weight.copy_(weight[:, :, None, None])
            head.classify.bias.copy_(bias)  # type: ignore[union-attr]


def sums_of(tokens: npt.NDArray[np.floating], targets: npt.NDArray[np.floating | np.bool_]) -> Sums:
    """Sums of tokens (n, D) and targets (n, K). Of targets (n,), all is without the axis K."""
    x, y = tokens.astype(np.float64), targets.astype(np.float64)
    return Sums(float(len(x)), x.sum(0), x.T @ x, y.sum(0), y.T @ x)


def solve(sums: Sums, strengths: tuple[float, ...] = STRENGTHS) -> Solutions:
    """Least squares on standardised tokens with an L2 penalty; the intercept has none."""
    mean, targets = sums.x / sums.n, sums.y / sums.n
    variance = np.maximum(np.diag(sums.xx) / sums.n - mean**2, 0.0)
    scale = np.sqrt(variance + EPS)
    gram = (sums.xx / sums.n - np.outer(mean, mean)) / np.outer(scale, scale)
    cross = (sums.xy / sums.n - np.multiply.outer(targets, mean)) / scale
    values, vectors = np.linalg.eigh(gram)
    along = cross @ vectors  # in the eigenvectors' frame every strength is a division
    weights = np.stack([along / (np.maximum(values, 0.0) + s) @ vectors.T for s in strengths])
    return Solutions(strengths, mean, variance, weights, targets)
