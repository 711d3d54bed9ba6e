"""Is a dataset an outlier to the training slices of another, more than held-out slices are?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from emadapt.domains.checks import check_features

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


def mahalanobis_scores(x_train: Array, x: Array) -> Array:
    """Squared Mahalanobis distances (n,) of (n, D) to (m, D); covariance of Ledoit & Wolf 2004."""
    fitted = LedoitWolf().fit(x_train.astype(np.float64))
    return np.asarray(fitted.mahalanobis(x.astype(np.float64)))


def outlier_auroc(
    x_train: Array, x_same: Array, slices_same: Ints, x_other: Array, slices_other: Ints
) -> tuple[float, float]:
    """AUROC of another dataset against held-out data, by Mahalanobis distance to training data.

    Args:
        x_train: (m, D) features of training slices.
        x_same: (n, D) of other slices of the same dataset.
        slices_same: (n,) slice of each.
        x_other: (p, D) of another dataset.
        slices_other: (p,) slice of each.

    Returns:
        Over tokens, and over slices by the mean score of their tokens; in [0, 1]. At 0.5 the other
        dataset is no more of an outlier than held-out data.

    Raises:
        InputError: fewer than two tokens, different D, features that are not finite.
    """
    named = {"training tokens": x_train, "held-out tokens": x_same, "other dataset": x_other}
    check_features("outlier score", named, least=2)
    scores = mahalanobis_scores(x_train, np.concatenate([x_same, x_other]))
    same, other = np.split(scores, [len(x_same)])
    of_slices = _auroc(_slice_means(same, slices_same), _slice_means(other, slices_other))
    return _auroc(same, other), of_slices


def _slice_means(scores: Array, slices: Ints) -> Array:
    _, place = np.unique(slices, return_inverse=True)
    return np.asarray(np.bincount(place, scores) / np.bincount(place))


def _auroc(same: Array, other: Array) -> float:
    truth = np.repeat([False, True], [len(same), len(other)])
    return float(roc_auc_score(truth, np.concatenate([same, other])))
