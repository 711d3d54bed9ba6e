"""Two more views of likeness: MMD between samples of two datasets, CKA between two models on the same tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics.pairwise import euclidean_distances

from emadapt.domains.checks import check_features
from emadapt.errors import InputError

Array = npt.NDArray[np.floating]


def mmd2(x: Array, y: Array) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with an RBF kernel exp(-d² / (2 s²)).

    s is the median distance within the pooled sample (the median heuristic of the same paper, section 8).

    Args:
        x: (m, D), two or more.
        y: (n, D), likewise.

    Returns:
        About 0 for one population, negative as often as positive; at most 2.

    Raises:
        InputError: fewer than two of a sample, different D, features that are not finite, all features alike.
    """
    check_features("MMD", (x, y), ("first sample", "second sample"), least=2)
    pooled = np.concatenate([x, y]).astype(np.float64)
    squared = euclidean_distances(pooled, squared=True)
    width = np.median(squared[np.triu_indices_from(squared, 1)])  # s²: the root keeps the median
    if width == 0:
        raise InputError(
            "MMD",
            found="features that are nearly all the same",
            expected="features that vary",
            do="Look at the images: are they empty?",
        )
    kernel = np.exp(squared / (-2 * width))
    m, n = len(x), len(y)
    within = sum(
        (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel[:m, :m], kernel[m:, m:])
    )
    return float(within - 2 * kernel[:m, m:].sum() / (m * n))


def linear_cka(x: Array, y: Array) -> float:
    """Linear centred kernel alignment of the same tokens under two models (Kornblith et al. 2019, section 3, linear kernel).

    |Y'X|² / (|X'X| |Y'Y|) in Frobenius norms of the centred features: it does not change under rotation or a common scale.

    Args:
        x: (n, D) features under one model.
        y: (n, E) of the same tokens, in the same order, under the other.

    Returns:
        In [0, 1]; 1: the same up to rotation and scale.

    Raises:
        InputError: different n, fewer than two tokens, features that are not finite, features without variance.
    """
    for one, name in ((x, "first model"), (y, "second model")):  # of any D, so one by one
        check_features("CKA", (one,), (name,), least=2)
    if len(x) != len(y):
        raise InputError(
            "CKA",
            found=f"{len(x)} and {len(y)} tokens",
            expected="the same tokens under two models",
            do="Compute both from the same slices.",
        )
    x, y = (v - v.mean(0, dtype=np.float64) for v in (x, y))
    if min(np.abs(x).max(), np.abs(y).max()) == 0:
        raise InputError(
            "CKA",
            found="features that are all the same",
            expected="features that vary",
            do="Look at the images: are they empty?",
        )
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))
