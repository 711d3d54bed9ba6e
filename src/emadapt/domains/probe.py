"""The domain probe: can logistic regression tell of which dataset tokens are?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

COMPONENTS = 64
"""Principal components that a probe sees, as in the reference study."""
TOLERANCE = 1e-3
"""Of the regression's gradient: half the iterations of the default, the same predictions."""

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Probe:
    """Balanced accuracy on tokens not fitted to, and its p-value under permuted labels.

    Attributes:
        balanced_accuracy: mean of both classes' recall, in [0, 1]; 0.5 is chance.
        p_value: from 1 / (1 + permutations drawn) to 1.
    """

    balanced_accuracy: float
    p_value: float


def domain_probe(
    datasets: Mapping[str, tuple[Array, Ints]], *, permutations: int, seed: int
) -> Probe:
    """How well logistic regression tells two datasets apart on z-blocks held out of both.

    Tokens of a z-block are too alike to be exchanged one by one. So each permutation swaps block k
    of one dataset with block k of the other, or not, and every fold keeps one block of each to hold
    out. Dealing the blocks out freely rejected up to 10 % of simulated null cases at a level of
    5 %. K blocks have 2^(K - 1) such labellings: with six blocks p is 0.031 at best.

    Args:
        datasets: the two by name, features (n, D) and the z-block (n,) of each; two blocks or more,
            the same in both.
        permutations: refits of the whole cross-validation, fewer if there are no more labellings.
        seed: of the permutations.
    """
    (x_a, blocks_a), (x_b, blocks_b) = datasets.values()
    blocks = np.concatenate([blocks_a, blocks_b])
    other = np.repeat([False, True], [len(x_a), len(x_b)])
    folds = _folds(np.concatenate([x_a, x_b]), blocks)
    names, block = np.unique(blocks, return_inverse=True)
    swaps = _swaps(len(names), permutations, seed)
    observed = _accuracy(folds, other)
    drawn = [_accuracy(folds, other ^ swap[block]) for swap in swaps]
    # With the observed among the draws, so never 0 (Phipson & Smyth 2010).
    return Probe(observed, (1 + sum(d >= observed for d in drawn)) / (1 + len(drawn)))


@dataclass(frozen=True)
class _Fold:
    """Which tokens are in the block, and the components of those outside and inside."""

    held_out: Mask
    train: Array
    test: Array


def _folds(x: Array, blocks: Ints) -> list[_Fold]:
    """One a z-block. Labels play no part, so that a permutation of them need not project again."""
    masks = [np.asarray(blocks == block) for block in np.unique(blocks)]
    return [_Fold(held_out, *_project(x[~held_out], x[held_out])) for held_out in masks]


def _project(train: Array, test: Array) -> tuple[Array, Array]:
    """Principal components of standardised features, fitted to `train`, in float64."""
    n, dim = train.shape
    # Exact solvers only: the randomised one would be a second source of chance.
    pca = PCA(min(COMPONENTS, n - 1, dim), svd_solver="covariance_eigh" if n > dim else "full")
    projection = make_pipeline(StandardScaler(), pca).fit(train)
    one, other = (projection.transform(x).astype(np.float64) for x in (train, test))
    return one, other


def _accuracy(folds: list[_Fold], labels: Mask) -> float:
    """Balanced accuracy of the pooled predictions of all folds."""
    predicted = np.zeros(len(labels), bool)
    for fold in folds:
        predicted[fold.held_out] = _predicted(fold.train, labels[~fold.held_out], fold.test)
    return float(balanced_accuracy_score(labels, predicted))


def _predicted(train: Array, labels: Mask, test: Array) -> Mask:
    """Classes by a logistic regression."""
    # newton-cholesky suits many samples of few features.
    model = LogisticRegression(
        class_weight="balanced", solver="newton-cholesky", tol=TOLERANCE, max_iter=200
    )
    return np.asarray(model.fit(train, labels).decision_function(test) > 0)


def _swaps(blocks: int, permutations: int, seed: int) -> Iterable[Mask]:
    """Z-blocks to swap, (blocks,) each: all ways or some. To swap the others is the same."""
    if 2 ** (blocks - 1) - 1 <= permutations:
        ways = itertools.product((False, True), repeat=blocks - 1)
        return (np.array((False, *way)) for way in ways if any(way))
    return np.random.default_rng(seed).random((permutations, blocks)) < 0.5
