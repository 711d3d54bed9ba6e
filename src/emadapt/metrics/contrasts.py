"""Is one model better than another on the same slices? Paired differences, and Holm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from emadapt.errors import InputError
from emadapt.metrics.intervals import (
    Counts,
    Error,
    Floats,
    added,
    influence,
    of_seeds,
    sampling_error,
    sizes,
)

ALPHA = 0.05
MARGIN = 0.02
"""A model is as good as another when it is shown to be at most this much worse."""
LEAST_P = 2 / 10_001
"""Smaller p-values would trust the far tail of Student's t."""


@dataclass(frozen=True)
class Contrast:
    """Mean score of a minus that of b: foreground IoU from `paired`."""

    score: tuple[float, float]
    """Of a and of b, means over their seeds."""
    difference: float
    ci95: tuple[float, float]
    at_least: float
    """Lower end of the one-sided 95 % interval."""
    p_value: float
    """Two-sided, against a difference of 0; 1 with a single seed."""
    seeds: tuple[int, int]
    """Seeds of a and of b."""

    @property
    def as_good(self) -> bool:
        """Whether a is shown to be at most MARGIN worse than b; one seed shows nothing."""
        return bool(self.at_least >= -MARGIN) and min(self.seeds) > 1


def paired(a: Counts, b: Counts) -> Contrast:
    """Compare two sets of models that were tested on the same slices.

    What makes a place hard for both cancels (see `emadapt.metrics.intervals`). The spread over the
    seeds of each set is added.

    Args:
        a: (seeds, slices, [classes,] rows, columns, 3) pixels in both, predicted, labelled; in the
            order of z.
        b: the same for the other set; it may have other seeds.

    Raises:
        InputError: the labels are not those of the same slices.
    """
    if a.shape[1:] != b.shape[1:] or (np.concatenate([a, b])[..., 2] != a[0, ..., 2]).any():
        raise InputError(
            "paired difference",
            found="different slices or labels",
            expected="the same test slices under every model",
            do="Compare models tested on the same slices.",
        )
    (of_a, lifts_a), (of_b, lifts_b) = (_over_seeds(counts) for counts in (a, b))
    places = sampling_error(lifts_a - lifts_b, sizes(a) + sizes(b))
    return contrast(of_a, of_b, places)


def contrast(of_a: Floats, of_b: Floats, places: Error) -> Contrast:
    """Compare the scores of seeds, given the sampling error of the difference over places."""
    error = added(places, of_seeds(of_a), of_seeds(of_b))
    score = float(of_a.mean()), float(of_b.mean())
    difference, seeds = score[0] - score[1], (len(of_a), len(of_b))
    wide, one_sided = error.margin(0.975), error.margin(0.95)
    ci95 = max(-1.0, difference - wide), min(1.0, difference + wide)
    p = 1.0
    if error.freedom and difference and min(seeds) > 1:
        ratio = abs(difference) / error.variance**0.5 if error.variance else np.inf
        p = max(LEAST_P, 2 * float(t.sf(ratio, error.freedom)))
    at_least = max(-1.0, difference - one_sided)
    return Contrast(score, difference, ci95, at_least, p, seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979).

    The smallest is multiplied by their number, the next by one less, and so on, never falling.
    """
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = worst
    return corrected


def verdict(contrast: Contrast, p_corrected: float) -> str:
    """Whether a is `better`, `worse` or `undecided`; one seed never decides."""
    if p_corrected >= ALPHA or min(contrast.seeds) < 2:
        return "undecided"
    return "better" if contrast.difference > 0 else "worse"


def _over_seeds(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """(seeds,) IoU, and how much each cell lifts their mean."""
    values, lifts = zip(*(influence(own) for own in counts), strict=True)
    return np.array(values), np.mean(lifts, axis=0)
