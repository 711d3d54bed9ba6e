"""Is one model better than another on the same test slices? A paired bootstrap over blocks of slices, and Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emadapt.errors import InputError
from emadapt.metrics.pixels import REPLICATES as DRAWS  # block_bootstrap draws this many
from emadapt.metrics.pixels import Counts, Floats, block_bootstrap, pooled, widened

REPLICATES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Mean foreground IoU of a minus that of b."""

    difference: float
    ci95: tuple[float, float]
    p_value: float
    """Two-sided, against a difference of 0; not below 1 / replicates, which is what so many draws can show."""
    n: int
    """Test slices."""
    seeds: tuple[int, int]
    """Seeds of a and of b."""


def paired_bootstrap(
    a: Counts, b: Counts, block: int, *, replicates: int = REPLICATES, seed: int = 0
) -> Comparison:
    """Compare two sets of models that were tested on the same slices.

    A replicate draws blocks of slices, the same for a and b: what makes a slice hard for both cancels. Few blocks vary too little
    when they are drawn again, so each replicate's deviation is widened as Student's t widens a normal: plain percentiles of four
    blocks call one in six equal pairs different even where slices are independent. Which seeds were trained adds Welch's t noise
    of the two means, where there is more than one; resampling two or three seeds instead would call one in three, or one in six,
    equal pairs different.

    Args:
        a: (seeds, slices, 3) pixels that are (in both, predicted, labelled), in the order of z.
        b: the same for the other set; its seeds may be others.
        block: slices a block, 1 to slices.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: shapes that do not fit, or labels that are not of the same slices.
    """
    _check(a, b, block)
    difference, rng = float(_iou(a).mean() - _iou(b).mean()), np.random.default_rng(seed)
    low, high, p = -1.0, 1.0, 1.0  # one block says nothing about others
    if (blocks := a.shape[1] // block) > 1:
        draws = _slice_draws(a, block, replicates, seed) - _slice_draws(b, block, replicates, seed)
        draws = (
            widened(draws, blocks, rng)
            + difference
            + _seed_noise(_iou(a), _iou(b), replicates, rng)
        )
        low, high = np.clip(np.percentile(draws, [2.5, 97.5]), -1, 1)
        p = min(1.0, max(2 * min((draws <= 0).mean(), (draws >= 0).mean()), 1 / replicates))
    return Comparison(
        difference, (float(low), float(high)), float(p), n=a.shape[1], seeds=(len(a), len(b))
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the smallest p times their number, the next times one less, never falling."""
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = worst
    return corrected


def _slice_draws(counts: Counts, block: int, replicates: int, seed: int) -> Floats:
    """(replicates,) mean over seeds of the pooled IoU; the same `seed` draws the same blocks for every model."""
    rounds = range(math.ceil(replicates / DRAWS))
    ious = [
        np.concatenate([block_bootstrap(c, block, seed + r)[:, 0] for r in rounds]) for c in counts
    ]
    return np.asarray(np.mean(ious, axis=0)[:replicates])


def _seed_noise(a: Floats, b: Floats, replicates: int, rng: np.random.Generator) -> Floats:
    """(replicates,) how far the difference of two means over seeds may be off (Welch 1947); 0 where single seeds cannot tell."""
    variance = np.array([np.var(iou, ddof=1) / len(iou) if len(iou) > 1 else 0.0 for iou in (a, b)])
    if not variance.any():
        return np.zeros(replicates)
    freedom = variance.sum() ** 2 / sum(
        v**2 / (len(iou) - 1) for v, iou in zip(variance, (a, b), strict=True) if v
    )
    return np.asarray(variance.sum() ** 0.5 * rng.standard_t(freedom, replicates))


def _iou(counts: Counts) -> Floats:
    """(seeds,) IoU pooled over the slices."""
    return np.array([pooled(c)["iou"] for c in counts])


def _check(a: Counts, b: Counts, block: int) -> None:
    def wrong(found: str, expected: str) -> InputError:
        return InputError(
            "paired bootstrap",
            found=found,
            expected=expected,
            do="Compare models tested on the same slices.",
        )

    for counts in (a, b):
        if counts.ndim != 3 or counts.shape[2] != 3 or 0 in counts.shape:
            raise wrong(f"counts of shape {counts.shape}", "(seeds, slices, 3), none of them empty")
        if (counts < 0).any() or (counts[..., :1] > counts[..., 1:]).any():
            raise wrong(
                "negative counts, or more pixels in both than predicted or labelled",
                "overlap counts",
            )
    labels = np.concatenate([a[..., 2], b[..., 2]]) if a.shape[1] == b.shape[1] else None
    if labels is None or (labels != labels[0]).any():
        raise wrong("different slices or labels", "the same test slices under every model")
    if not 1 <= block <= a.shape[1]:
        raise wrong(f"blocks of {block} slices", f"1 to {a.shape[1]}")
