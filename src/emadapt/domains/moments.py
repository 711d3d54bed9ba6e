"""Counts, sums and second moments of the tokens of each slice; they add up exactly.

Mean, covariance, PCA and Fréchet distance of any choice of slices follow from them, so one pass
over the tokens serves every diagnostic, its null, its extrapolation and its bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Numbers = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Moments:
    """Raw moments of D-dimensional tokens in float64.

    Attributes:
        count: (slices,) tokens.
        total: (slices, D) their sums.
        outer: (slices, D, D) sums of their outer products; may be memory-mapped.
    """

    count: Floats
    total: Floats
    outer: Floats

    def merged(self, slices: Numbers) -> tuple[float, Floats, Floats]:
        """Number, mean (D,) and unbiased covariance (D, D) of the tokens of `slices`."""
        weights = np.bincount(np.asarray(slices), minlength=len(self.count)).astype(np.float64)
        count = float(weights @ self.count)
        mean = weights @ self.total / max(count, 1.0)
        outer = np.zeros(self.outer.shape[-2:])
        for at in np.flatnonzero(weights):  # all of `outer` may be larger than memory
            outer += weights[at] * self.outer[at]
        return count, mean, (outer - count * np.outer(mean, mean)) / max(count - 1.0, 1.0)

    def slice_means(self) -> Floats:
        """(slices, D) mean token of each slice, its image-level vector; NaN where it has none."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.total / self.count[:, None])


def slice_moments(tokens: npt.NDArray[np.float32]) -> tuple[float, Floats, Floats]:
    """Moments of one slice, count, total (D,), outer (D, D), of tokens (n, D)."""
    own = tokens.astype(np.float64)
    return float(len(own)), own.sum(0), own.T @ own


def z_blocks(n_slices: int, blocks: int) -> npt.NDArray[np.int64]:
    """Block number of each of `n_slices` slices along z: contiguous, as equal as can be."""
    return np.arange(n_slices) * blocks // n_slices
