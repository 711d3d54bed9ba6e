"""Linear probes: can logistic regression tell the dataset, or the foreground, of tokens?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emadapt.domains.checks import check_features
from emadapt.errors import InputError

COMPONENTS = 64
"""Principal components that a probe sees, as in the reference study."""
TOLERANCE = 1e-3
"""Of the regression's gradient: half the iterations of the default, the same predictions."""

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Probe:
    """Scores of a linear probe on tokens that it was not fitted to.

    Attributes:
        balanced_accuracy: mean of both classes' recall, in [0, 1]; 0.5 is chance.
        auroc: area under the ROC curve of the held-out scores, in [0, 1].
        p_value: of the balanced accuracy under permuted labels, from 1 / (1 + permutations drawn)
            to 1.
        n: tokens of the first and second dataset; of `foreground_probe`, tokens fitted to and
            scored.
    """

    balanced_accuracy: float
    auroc: float
    p_value: float
    n: tuple[int, int]


def domain_probe(
    x_a: Array,
    blocks_a: Ints,
    x_b: Array,
    blocks_b: Ints,
    *,
    permutations: int,
    seed: int,
    names: tuple[str, str],
) -> Probe:
    """How well logistic regression tells two datasets apart on z-blocks held out of both.

    The p-value comes from exchanging datasets between whole z-blocks, whose tokens are too alike to
    be exchanged one by one: each permutation swaps block k of one dataset with block k of the
    other, or not. So every fold keeps one block of each to hold out; dealing the blocks out freely
    would not, and rejected up to 10 % of simulated null cases at a level of 5 %. K blocks have 2^(K
    - 1) such labellings, of which all are used where `permutations` allows it: with six blocks p is
    0.031 at best.

    Args:
        x_a: (n_a, D) features of the first dataset.
        blocks_a: (n_a,) z-block of each.
        x_b: (n_b, D) of the second.
        blocks_b: (n_b,), the same ids.
        permutations: at most so many refits of the whole cross-validation.
        seed: of the permutations.
        names: of the datasets, for errors.

    Raises:
        InputError: a dataset without tokens, fewer than two z-blocks, a z-block that one dataset
            lacks, different D, NaN.
    """
    check_features("domain probe", (x_a, x_b), names)
    for blocks, others, name in ((blocks_a, blocks_b, names[0]), (blocks_b, blocks_a, names[1])):
        _check_blocks(blocks, f"domain probe, {name}")
        if lacking := sorted(set(np.unique(others).tolist()) - set(np.unique(blocks).tolist())):
            raise InputError(
                f"domain probe, {name}",
                found=f"no tokens in z-blocks {lacking}",
                expected="both datasets in every z-block",
                do="Use fewer z-blocks or more slices.",
            )
    blocks = np.concatenate([blocks_a, blocks_b])
    other = np.repeat([False, True], [len(x_a), len(x_b)])
    folds = _folds(np.concatenate([x_a, x_b]), blocks)
    observed, scores = _held_out(folds, other)
    _, block = np.unique(blocks, return_inverse=True)
    drawn = [
        _held_out(folds, other ^ swap[block])[0]
        for swap in _swaps(int(block.max()) + 1, permutations, seed)
    ]
    return Probe(
        observed,
        float(roc_auc_score(other, scores)),
        _p_value(observed, drawn),
        (len(x_a), len(x_b)),
    )


def foreground_probe(
    x_train: Array,
    y_train: Mask,
    blocks_train: Ints,
    x_test: Array | None = None,
    y_test: Mask | None = None,
    *,
    permutations: int,
    seed: int,
    names: tuple[str, str],
) -> Probe:
    """How well logistic regression tells foreground from background in tokens it has not seen.

    The p-value compares the predictions, which stay, with labels that are shifted along the
    sequence of tokens, end to start. A shift keeps the labels' autocorrelation, which a permutation
    would destroy. Shifts by a few tokens or by whole slices leave many labels as they are, which
    makes the test conservative.

    Args:
        x_train: (n, D) features, sorted by slice and position.
        y_train: (n,) True in the foreground.
        blocks_train: (n,) z-block of each; the folds, where there is no `x_test`.
        x_test: (m, D) features of another dataset to score, sorted likewise; None: cross-validation
            within `x_train`.
        y_test: (m,) of these.
        permutations: shifts, drawn without replacement.
        seed: of the shifts.
        names: of the dataset fitted to and the one scored, for errors.

    Raises:
        InputError: no tokens of a class (in a dataset, or outside a z-block), fewer than two
            z-blocks, different D, NaN.
    """
    what = "foreground probe"
    _check_classes(y_train, f"{what}, {names[0]}")
    if x_test is None or y_test is None:
        check_features(what, (x_train,), names[:1])
        _check_blocks(blocks_train, f"{what}, {names[0]}")
        for block in np.unique(blocks_train):
            _check_classes(
                y_train[blocks_train != block], f"{what}, {names[0]} without z-block {block}"
            )
        truth = np.asarray(y_train, bool)
        accuracy, scores = _held_out(_folds(x_train, blocks_train), truth)
    else:
        check_features(what, (x_train, x_test), names)
        _check_classes(y_test, f"{what}, {names[1]}")
        truth, (train, test) = np.asarray(y_test, bool), _project(x_train, x_test)
        scores = _scores(train, np.asarray(y_train, bool), test)
        accuracy = float(balanced_accuracy_score(truth, scores > 0))
    rng = np.random.default_rng(seed)
    shifts = rng.choice(np.arange(1, len(truth)), min(permutations, len(truth) - 1), replace=False)
    drawn = [float(balanced_accuracy_score(np.roll(truth, shift), scores > 0)) for shift in shifts]
    return Probe(
        accuracy,
        float(roc_auc_score(truth, scores)),
        _p_value(accuracy, drawn),
        (len(x_train), len(truth)),
    )


@dataclass(frozen=True)
class _Fold:
    """What a fold's regression sees: features of the tokens outside the block, and in it.

    Attributes:
        held_out: (n,) True in the block.
        train: (tokens outside, components).
        test: (tokens inside, components).
    """

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
    return projection.transform(train).astype(np.float64), projection.transform(test).astype(
        np.float64
    )


def _held_out(folds: list[_Fold], labels: Mask) -> tuple[float, Array]:
    """Balanced accuracy and scores (n,) of the pooled predictions of all folds."""
    scores = np.zeros(len(labels))
    for fold in folds:
        scores[fold.held_out] = _scores(fold.train, labels[~fold.held_out], fold.test)
    return float(balanced_accuracy_score(labels, scores > 0)), scores


def _scores(train: Array, labels: Mask, test: Array) -> Array:
    """Decision function of a logistic regression; above 0 is True."""
    # newton-cholesky suits many samples of few features: a handful of iterations of a (64, 64)
    # system.
    model = LogisticRegression(
        class_weight="balanced", solver="newton-cholesky", tol=TOLERANCE, max_iter=200
    )
    return np.asarray(model.fit(train, labels).decision_function(test))


def _swaps(blocks: int, permutations: int, seed: int) -> Iterable[Mask]:
    """Z-blocks to swap, (blocks,) each: all ways or some. To swap the others is the same."""
    if 2 ** (blocks - 1) - 1 <= permutations:
        return (
            np.array((False, *rest))
            for rest in itertools.product((False, True), repeat=blocks - 1)
            if any(rest)
        )
    return np.random.default_rng(seed).random((permutations, blocks)) < 0.5


def _p_value(observed: float, drawn: list[float]) -> float:
    """With the observed among the draws, so never 0 (Phipson & Smyth 2010)."""
    return (1 + sum(d >= observed for d in drawn)) / (1 + len(drawn))


def _check_blocks(blocks: Ints, what: str) -> None:
    if (found := len(np.unique(blocks))) < 2:
        raise InputError(
            what,
            found=f"{found} z-block",
            expected="at least two, one to hold out and one to fit to",
            do="Use more slices, or thinner z-blocks.",
        )


def _check_classes(y: Mask, what: str) -> None:
    for value, name in ((True, "foreground"), (False, "background")):
        if not np.any(np.asarray(y, bool) == value):
            raise InputError(
                what,
                found=f"no {name} tokens",
                expected="tokens of both classes",
                do="Use more slices, or look at the labels and at `foreground` of the dataset.",
            )
