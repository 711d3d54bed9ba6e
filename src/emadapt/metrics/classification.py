"""Scores of models that classify whole images, with intervals over images and seeds.

Each score comes with its linearisation: by how much an image lifts it. Sums of lifts over groups
(patients) give the sampling error, as columns do for masks (`metrics/intervals.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from emadapt.metrics.contrasts import Contrast, contrast
from emadapt.metrics.intervals import Error, Floats, mean_with_interval

Classes = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.floating[Any]]


def auroc(truth: Classes, probability: Probabilities) -> tuple[float, Floats]:
    """Mean over classes of the area under the ROC curve, a class against the others.

    Args:
        truth: (n,) class of each image.
        probability: (n, K) of each class; ties count half.

    Returns:
        0 to 1 (0.5: chance), and (n,) lifts (DeLong et al. 1988).
    """
    areas, lifts = [], np.zeros(len(truth))
    kinds = range(1 if probability.shape[1] == 2 else 0, probability.shape[1])
    for kind in kinds:
        score, own = probability[:, kind], truth == kind
        ranks, n_own, n_rest = rankdata(score), own.sum(), (~own).sum()
        above = (ranks[own] - rankdata(score[own])) / n_rest  # share of the others below each
        below = 1 - (ranks[~own] - rankdata(score[~own])) / n_own
        areas.append(float(above.mean()))
        lifts[own] += (above - areas[-1]) / n_own / len(kinds)
        lifts[~own] += (below - areas[-1]) / n_rest / len(kinds)
    return float(np.mean(areas)), lifts


def accuracy(truth: Classes, probability: Probabilities) -> tuple[float, Floats]:
    """Share of images whose most probable class is theirs, and lifts; arguments of `auroc`."""
    right = (probability.argmax(1) == truth).astype(float)
    return float(right.mean()), (right - right.mean()) / len(right)


def balanced_accuracy(truth: Classes, probability: Probabilities) -> tuple[float, Floats]:
    """The mean of `accuracy` over classes, and lifts; arguments of `auroc`."""
    right, n = (probability.argmax(1) == truth).astype(float), np.bincount(truth)
    recall = np.bincount(truth, right) / n
    return float(recall.mean()), (right - recall[truth]) / n[truth] / len(n)


SCORES: dict[str, Callable[[Classes, Probabilities], tuple[float, Floats]]] = {
    "auroc": auroc,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
}
"""By name, the headline first. All classes must be among the images."""


def over_seeds(tests: Sequence[dict[str, Any]], score: str) -> dict[str, Any]:
    """A score over seeds, as `intervals.over_seeds` gives it.

    Args:
        tests: of each seed, what `summarise` gives.
        score: a key of SCORES.
    """
    values, lifts = _of_seeds(tests, score)
    return mean_with_interval(values, _over_groups(lifts, tests[0]["groups"]))


def paired(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> Contrast:
    """Compare the AUROC of two models, by seeds, on the same images; arguments of `over_seeds`."""
    (of_a, lifts_a), (of_b, lifts_b) = (_of_seeds(tests, "auroc") for tests in (a, b))
    return contrast(of_a, of_b, _over_groups(lifts_a - lifts_b, a[0]["groups"]))


def summarise(truth: Classes, probability: Probabilities, groups: Sequence[int]) -> dict[str, Any]:
    """Scores of a seed with 95 % intervals over groups, and what they are made of.

    Returns:
        `n` images; each of SCORES and its `<score>_ci95`; `truth`, `probability` (6 digits),
        `groups`.
    """
    made_of = {
        "n": len(truth),
        "truth": truth.tolist(),
        "probability": probability.astype(float).round(6).tolist(),
        "groups": list(groups),
    }
    found = {score: over_seeds([made_of], score) for score in SCORES}
    ends = {f"{score}_ci95": own["ci95"] for score, own in found.items()}
    return {score: own["mean"] for score, own in found.items()} | ends | made_of


def _of_seeds(tests: Sequence[dict[str, Any]], score: str) -> tuple[Floats, Floats]:
    """(seeds,) values, and (n,) lifts of their mean."""
    found = [SCORES[score](np.array(t["truth"]), np.array(t["probability"])) for t in tests]
    values, lifts = zip(*found, strict=True)
    return np.array(values), np.mean(lifts, axis=0)


def _over_groups(lifts: Floats, groups: Sequence[int]) -> Error:
    """Variance of a sum over independent groups."""
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], lifts)
    n = len(sums)
    return Error(float((sums**2).sum()) * n / (n - 1), n - 1.0) if n > 1 else Error(0.0, 0.0)
