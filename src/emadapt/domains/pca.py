"""Principal components of the tokens of several datasets together, from their moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emadapt.domains.features import Features

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """Mean (D,) and the first components (D, k), orthonormal, largest variance first."""

    mean: Floats
    axes: Floats

    def project(self, tokens: npt.NDArray[np.floating]) -> Floats:
        """(..., D) tokens to (..., k) scores."""
        return np.asarray((tokens - self.mean) @ self.axes)


def fit(features: Mapping[str, Features], k: int) -> tuple[Components, list[float]]:
    """PCA of all tokens, each dataset with the same weight whatever its size.

    Returns:
        The components, and the share of the variance that each of them explains.
    """
    means, seconds = [], []
    for f in features.values():
        _, mean, cov = f.moments.merged(np.arange(len(f.slices)))
        means.append(mean)
        seconds.append(cov + np.outer(mean, mean))
    mean = np.mean(means, 0)
    values, vectors = np.linalg.eigh(np.mean(seconds, 0) - np.outer(mean, mean))
    values, vectors = values[::-1].clip(0), vectors[:, ::-1][:, :k]
    largest = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    axes = vectors * np.sign(largest)  # eigenvectors have no sign of their own
    return Components(mean, axes), [float(f"{v:.6g}") for v in values[:k] / values.sum()]
