"""What a token's nearest neighbours say: their dataset, and whether they are foreground."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from emadapt.domains.checks import check_features
from emadapt.errors import InputError

TEMPERATURE = 0.07
"""Of the neighbours' votes, in units of cosine similarity (Oquab et al. 2023)."""

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


def domain_mixing(x_a: Array, blocks_a: Ints, x_b: Array, blocks_b: Ints, k: int = 10) -> float:
    """Share of the k nearest neighbours from the other dataset, over that of one population.

    Slices of a block are near copies of each other, so a token's own z-block of its own dataset is
    not searched; what is expected of a token is the other dataset's share of what is searched. Mean
    over tokens, both datasets with equal weight.

    Args:
        x_a: (n_a, D) features of one dataset.
        blocks_a: (n_a,) z-block of each.
        x_b: (n_b, D) of the other.
        blocks_b: (n_b,).
        k: neighbours.

    Returns:
        0: apart; 1: mixed as one population would be; above 1: nearer to the other dataset than to
            other blocks of their own.

    Raises:
        InputError: fewer than k tokens to search, different D, features that are not finite.
    """
    check_features("domain mixing", (x_a, x_b), ("first dataset", "second dataset"))
    x = np.concatenate([x_a, x_b])
    other, blocks = (
        np.repeat([False, True], [len(x_a), len(x_b)]),
        np.concatenate([blocks_a, blocks_b]),
    )
    ratio = np.zeros(len(x))
    for dataset in (False, True):
        for block in np.unique(blocks[other == dataset]):
            own = (other == dataset) & (blocks == block)
            if (candidates := int((~own).sum())) < k:
                raise InputError(
                    "domain mixing",
                    found=f"{candidates} tokens outside z-block {block} of one dataset",
                    expected=f"at least k = {k}",
                    do="Use more tokens or fewer neighbours.",
                )
            nearest = (
                NearestNeighbors(n_neighbors=k, algorithm="brute")
                .fit(x[~own])
                .kneighbors(x[own], return_distance=False)
            )
            foreign = other[~own] != dataset
            ratio[own] = foreign[nearest].mean(1) / foreign.mean()
    return float((ratio[~other].mean() + ratio[other].mean()) / 2)


def segmentation_iou(
    x_train: Array, y_train: Mask, x_test: Array, y_test: Mask, k: int = 20
) -> float:
    """Foreground IoU of test tokens that take the label of their k nearest training tokens.

    Neighbours by cosine similarity s vote with weight exp(s / 0.07), as in Oquab et al. 2023.

    Args:
        x_train: (n, D) features.
        y_train: (n,) True in the foreground.
        x_test: (m, D).
        y_test: (m,).
        k: neighbours; all of the training tokens where there are fewer.

    Returns:
        IoU in [0, 1]; 1 where neither labels nor predictions have foreground.

    Raises:
        InputError: no tokens, different D, features that are not finite.
    """
    check_features("kNN segmentation", (x_train, x_test), ("training tokens", "test tokens"))
    vote = KNeighborsClassifier(
        min(k, len(x_train)), metric="cosine", algorithm="brute", weights=_weights
    )
    predicted = vote.fit(x_train, np.asarray(y_train, bool)).predict(x_test)
    return float(jaccard_score(np.asarray(y_test, bool), predicted, zero_division=1.0))


def _weights(distance: Array) -> Array:
    """Of neighbours at cosine distance 1 - s, up to a factor that no vote depends on."""
    return np.asarray(np.exp(-distance / TEMPERATURE))
