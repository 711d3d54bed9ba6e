"""Is one model better than another on the same slices? Paired block bootstrap, and Holm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emadapt.errors import InputError
from emadapt.metrics.intervals import REPLICATES as DRAWS  # block_bootstrap draws this many
from emadapt.metrics.intervals import Counts, Floats, block_bootstrap, widened
from emadapt.metrics.pixels import pooled

REPLICATES = 10_000
ALPHA = 0.05
MARGIN = 0.02
"""A model is as good as another when it is shown to be at most this much IoU worse."""


@dataclass(frozen=True)
class Contrast:
    """Mean foreground IoU of a minus that of b, from `paired_bootstrap`."""

    difference: float
    ci95: tuple[float, float]
    at_least: float
    """Lower end of the one-sided 95 % interval."""
    p_value: float
    """Two-sided, against a difference of 0; at least 2 / (replicates + 1)."""
    n: int
    """Slices."""
    seeds: tuple[int, int]
    """Seeds of a and of b."""

    @property
    def as_good(self) -> bool:
        """Whether a is shown to be at most MARGIN worse than b; one seed shows nothing."""
        return self.at_least >= -MARGIN and min(self.seeds) > 1


def paired_bootstrap(
    a: Counts, b: Counts, block: int, *, replicates: int = REPLICATES, seed: int = 0
) -> Contrast:
    """Compare two sets of models that were tested on the same slices.

    A replicate draws the same blocks of slices for a and b, so what makes a slice hard for both
    cancels. Deviations are widened because blocks are few (`widened`); plain percentiles of four
    blocks call one in six equal pairs different. Where a set has several seeds, Welch's t noise
    of the mean over them is added.

    Args:
        a: (seeds, slices, 3) pixels in both, predicted, labelled, in the order of z.
        b: the same for the other set; it may have other seeds.
        block: slices in a block, 1 to slices.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: the labels are not those of the same slices.
    """
    if a.shape[1:] != b.shape[1:] or (np.concatenate([a, b])[..., 2] != a[0, :, 2]).any():
        raise InputError(
            "paired bootstrap",
            found="different slices or labels",
            expected="the same test slices under every model",
            do="Compare models tested on the same slices.",
        )
    of_a, of_b = _iou(a), _iou(b)
    difference = float(of_a.mean() - of_b.mean())
    blocks, n, seeds = a.shape[1] // block, a.shape[1], (len(a), len(b))
    if blocks < 2:  # says nothing about others
        return Contrast(difference, (-1.0, 1.0), -1.0, 1.0, n, seeds)
    rng = np.random.default_rng(seed)
    draws = _slice_draws(a, block, replicates, seed) - _slice_draws(b, block, replicates, seed)
    draws = difference + widened(draws, blocks, rng) + _seed_noise(of_a, of_b, replicates, rng)
    low, at_least, high = np.clip(np.percentile(draws, [2.5, 5, 97.5]), -1, 1)
    beyond = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (beyond + 1) / (replicates + 1))
    return Contrast(difference, (float(low), float(high)), float(at_least), float(p), n, seeds)


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


def _slice_draws(counts: Counts, block: int, replicates: int, seed: int) -> Floats:
    """(replicates,) IoU, mean over seeds; the same `seed` draws the same blocks for all models."""
    rounds = range(math.ceil(replicates / DRAWS))
    ious = [
        np.concatenate([block_bootstrap(c, block, seed + r)[:, 0] for r in rounds]) for c in counts
    ]
    return np.asarray(np.mean(ious, axis=0)[:replicates])


def _seed_noise(a: Floats, b: Floats, replicates: int, rng: np.random.Generator) -> Floats:
    """(replicates,) error of the difference over seeds (Welch 1947); 0 for single seeds."""
    several = [iou for iou in (a, b) if len(iou) > 1]
    parts = [float(np.var(iou, ddof=1)) / len(iou) for iou in several]
    variance = sum(parts)
    if not variance:
        return np.zeros(replicates)
    freedom = variance**2 / sum(
        part**2 / (len(iou) - 1) for part, iou in zip(parts, several, strict=True)
    )
    return np.asarray(variance**0.5 * rng.standard_t(freedom, replicates))


def _iou(counts: Counts) -> Floats:
    """(seeds,) IoU pooled over the slices."""
    return np.array([pooled(c)["iou"] for c in counts])
