"""Counts, sums and second moments of tokens for each slice and class; they add up exactly.

Mean, covariance, PCA and Fréchet distance of any choice of slices and classes follow from them, so
one pass over the tokens serves every diagnostic, its null, its extrapolation and its bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Numbers = Sequence[int] | npt.NDArray[np.int64]
CLASSES = {"all": (0, 1), "background": (0,), "foreground": (1,)}
"""Which of the two rows of a slice's moments make up a class."""


@dataclass(frozen=True)
class Moments:
    """Raw moments of D-dimensional tokens in float64.

    Attributes:
        count: (slices, 2) tokens of background and foreground.
        total: (slices, 2, D) their sums.
        outer: (slices, 2, D, D) sums of their outer products; may be memory-mapped.
    """

    count: Floats
    total: Floats
    outer: Floats

    def merged(self, slices: Numbers, cls: str) -> tuple[float, Floats, Floats]:
        """Number, mean (D,) and unbiased covariance (D, D) of a class over `slices`."""
        weights = np.bincount(np.asarray(slices), minlength=len(self.count)).astype(np.float64)
        total = np.zeros(self.total.shape[-1])
        outer = np.zeros(self.outer.shape[-2:])
        count = 0.0
        for row in CLASSES[cls]:
            count += float(weights @ self.count[:, row])
            total += weights @ self.total[:, row]
            for at in np.flatnonzero(weights):  # all of `outer` may be larger than memory
                outer += weights[at] * self.outer[at, row]
        mean = total / max(count, 1.0)
        return count, mean, (outer - count * np.outer(mean, mean)) / max(count - 1.0, 1.0)

    def slice_means(self) -> Floats:
        """(slices, D) mean token of each slice, its image-level vector."""
        return np.asarray(self.total.sum(1) / self.count.sum(1)[:, None])


def slice_moments(
    tokens: npt.NDArray[np.float32], foreground: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats, Floats]:
    """Moments of one slice, count (2,), total (2, D), outer (2, D, D), of tokens (n, D)."""
    classes = [tokens[mask].astype(np.float64) for mask in (~foreground, foreground)]
    count = np.asarray([float(len(own)) for own in classes])
    total = np.stack([own.sum(0) for own in classes])
    return count, total, np.stack([own.T @ own for own in classes])


def z_blocks(n_slices: int, blocks: int) -> npt.NDArray[np.int64]:
    """Block number of each of `n_slices` slices along z: contiguous, as equal as can be."""
    return np.arange(n_slices) * blocks // n_slices
