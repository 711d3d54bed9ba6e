"""What a token's nearest neighbours say: their dataset, and what class they are of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

TEMPERATURE = 0.07
"""Of the neighbours' votes, in units of cosine similarity (Oquab et al. 2023)."""

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


def domain_mixing(x_a: Array, blocks_a: Ints, x_b: Array, blocks_b: Ints, k: int = 10) -> float:
    """Share of the k nearest neighbours from the other dataset, over that of one population.

    Slices of a block are near copies of each other, so a token's own z-block of its own dataset is
    not searched. What is expected of a token is the other dataset's share of what is searched.

    Args:
        x_a: (n_a, D) features of one dataset.
        blocks_a: (n_a,) z-block of each.
        x_b: (n_b, D) of the other.
        blocks_b: (n_b,).
        k: neighbours.

    Returns:
        Mean over tokens, datasets weighted equally. 0: apart; 1: mixed as one population; above 1:
        nearer to the other dataset than to other blocks of their own.
    """
    x = np.concatenate([x_a, x_b])
    other = np.repeat([False, True], [len(x_a), len(x_b)])
    blocks = np.concatenate([blocks_a, blocks_b])
    ratio = np.zeros(len(x))
    for dataset, block in np.unique(np.stack([other, blocks]), axis=1).T:
        own = (other == dataset) & (blocks == block)
        search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x[~own])
        nearest = search.kneighbors(x[own], return_distance=False)
        foreign = other[~own] != dataset
        ratio[own] = foreign[nearest].mean(1) / foreign.mean()
    return float((ratio[~other].mean() + ratio[other].mean()) / 2)


def segmentation_iou(
    x_train: Array, y_train: Ints, x_test: Array, y_test: Ints, classes: int = 1, k: int = 20
) -> npt.NDArray[np.float64]:
    """IoU of each class, of test tokens that take the class of their k nearest training tokens.

    Neighbours by cosine similarity s vote with weight exp(s / 0.07), as in Oquab et al. 2023.

    Args:
        x_train: (n, D) features.
        y_train: (n,) class ids, 0 in the background.
        x_test: (m, D).
        y_test: (m,).
        classes: how many there are.
        k: neighbours, or all training tokens if there are fewer.

    Returns:
        (classes,) in [0, 1]; 1 where neither labels nor predictions have any of a class.
    """
    neighbours = min(k, len(x_train))
    vote = KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute", weights=_weights)
    predicted = vote.fit(x_train, y_train).predict(x_test)
    ids = range(1, classes + 1)
    found = jaccard_score(y_test, predicted, labels=ids, average=None, zero_division=1.0)
    return np.asarray(found)


def _weights(distance: Array) -> Array:
    """Votes at cosine distance 1 - s, up to a factor that no vote depends on."""
    return np.asarray(np.exp(-distance / TEMPERATURE))
