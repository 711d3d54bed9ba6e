"""Is a dataset an outlier to the training slices of another, more than held-out slices are?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from emadapt.domains.checks import check_features

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class OutlierAUROC:
    """How well the outlier score tells another dataset from held-out data of the same one.

    Attributes:
        token: area under the ROC curve over tokens, in [0, 1]; 0.5: no more of an outlier than
            held-out data.
        slice: the same over slices, by the mean score of their tokens.
        n: tokens fitted to, held out, of the other dataset.
    """

    token: float
    slice: float
    n: tuple[int, int, int]


def mahalanobis_scores(x_train: Array, x: Array) -> npt.NDArray[np.float64]:
    """Squared Mahalanobis distances to `x_train`, covariance after Ledoit & Wolf (2004).

    Args:
        x_train: (m, D) features, two or more.
        x: (n, D) features to score, two or more.

    Returns:
        (n,), at least 0; about D for data like `x_train` with many more tokens than dimensions.

    Raises:
        InputError: fewer than two tokens, different D, features that are not finite.
    """
    check_features("outlier score", (x_train, x), ("training tokens", "scored tokens"), least=2)
    fitted = LedoitWolf().fit(x_train.astype(np.float64))
    return np.asarray(fitted.mahalanobis(x.astype(np.float64)))


def outlier_auroc(
    x_train: Array, x_same: Array, slices_same: Ints, x_other: Array, slices_other: Ints
) -> OutlierAUROC:
    """AUROC of another dataset against held-out data, by Mahalanobis distance to the training data.

    Args:
        x_train: (m, D) features of training slices.
        x_same: (n, D) of other slices of the same dataset.
        slices_same: (n,) slice of each.
        x_other: (p, D) of another dataset.
        slices_other: (p,) slice of each.

    Raises:
        InputError: as `mahalanobis_scores`, for any of the three.
    """
    names = ("training tokens", "held-out tokens", "other dataset")
    check_features("outlier score", (x_train, x_same, x_other), names, least=2)
    scores = mahalanobis_scores(x_train, np.concatenate([x_same, x_other]))
    same, other = np.split(scores, [len(x_same)])
    of_slices = _auroc(_slice_means(same, slices_same), _slice_means(other, slices_other))
    return OutlierAUROC(_auroc(same, other), of_slices, (len(x_train), len(x_same), len(x_other)))


def _slice_means(scores: Array, slices: Ints) -> Array:
    _, place = np.unique(slices, return_inverse=True)
    return np.asarray(np.bincount(place, scores) / np.bincount(place))


def _auroc(same: Array, other: Array) -> float:
    truth = np.repeat([False, True], [len(same), len(other)])
    return float(roc_auc_score(truth, np.concatenate([same, other])))
