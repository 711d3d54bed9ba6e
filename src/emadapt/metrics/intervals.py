"""95 % intervals of a metric: over the slices that were tested, and over the seeds trained."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_NM = 100.0
"""Thickness of the blocks of slices that the bootstrap draws, unless that leaves under four."""
REPLICATES = 2000

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def block_slices(n: int, spacing_nm: float) -> int:
    """Slices in a block: BLOCK_NM of them or a quarter of all, at least one.

    Args:
        n: slices that were scored.
        spacing_nm: distance from one to the next.
    """
    return max(1, min(math.ceil(BLOCK_NM / spacing_nm), n // 4))


def block_bootstrap(counts: Counts, block: int, seed: int = 0) -> Floats:
    """Pooled IoU and Dice when blocks of neighbouring slices are drawn again (Künsch 1989).

    Args:
        counts: (slices, 3) pixels that are in both, predicted, labelled; in the order of z.
        block: slices in a block.
        seed: of the draws.

    Returns:
        (REPLICATES, 2): IoU, Dice.
    """
    drawn = _times_drawn(len(counts), block, seed)
    both, predicted, labelled = (drawn @ counts.astype(float)).T  # whole numbers, so exact
    size = predicted + labelled
    iou = np.divide(both, size - both, out=np.ones_like(both), where=size > both)
    dice = np.divide(2 * both, size, out=np.ones_like(both), where=size > 0)
    return np.stack([iou, dice], 1)


@functools.lru_cache(maxsize=16)  # models tested on the same slices share the draws
def _times_drawn(n: int, block: int, seed: int) -> Floats:
    """(REPLICATES, n) how often each slice is drawn, n slices in a replicate."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, n - block + 1, size=(REPLICATES, math.ceil(n / block)))
    chosen = (starts[..., None] + np.arange(block)).reshape(REPLICATES, -1)[:, :n]
    numbers = chosen + n * np.arange(REPLICATES)[:, None]
    return np.bincount(numbers.ravel(), minlength=REPLICATES * n).reshape(-1, n).astype(float)


def widened(draws: Floats, blocks: int, rng: np.random.Generator) -> Floats:
    """Deviations of bootstrap draws from their mean, widened because the blocks are few.

    Few blocks vary too little when they are drawn again. Each deviation is multiplied by
    sqrt(blocks / chi-square of blocks - 1): the variance becomes unbiased, and a normal
    distribution becomes Student's t.

    Args:
        draws: (replicates,).
        blocks: that were drawn from, at least 2.
        rng: of the chi-square.

    Returns:
        (replicates,) around 0.
    """
    factor = np.sqrt(blocks / rng.chisquare(blocks - 1, len(draws)))
    return np.asarray((draws - draws.mean()) * factor)


def interval95(value: float, draws: Floats, blocks: int) -> list[float]:
    """95 % interval of a metric between 0 and 1. One block says nothing about others: [0, 1].

    Args:
        value: the metric, 0 to 1.
        draws: (replicates,) of it, from `block_bootstrap`.
        blocks: of slices that were drawn from.

    Returns:
        Low and high, 0 to 1, rounded to 6 digits.
    """
    if blocks < 2:
        return [0.0, 1.0]
    deviations = widened(draws, blocks, np.random.default_rng(0))
    low, high = value + np.percentile(deviations, [2.5, 97.5])
    return [round(max(0.0, float(low)), 6), round(min(1.0, float(high)), 6)]


def over_seeds(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One metric over seeds: mean, standard deviation, values, and 95 % interval of the mean.

    The interval has two independent sources of error, which add in quadrature. All seeds are
    tested on the same slices, so their half-widths are averaged and do not shrink with more
    seeds. Which seeds were trained gives Student's t interval of the mean. It is wide for few
    seeds, as it must be: Student's factor is 12.7 for two seeds, 2.8 for five.

    Args:
        values: the metric of each seed, 0 to 1.
        intervals: each seed's low and high, from `interval95`.

    Returns:
        `mean`, `std` (n - 1; 0 for one seed), `values`, `ci95` clipped to [0, 1]; 6 digits.
    """
    mean = float(np.mean(values))
    low, high = np.mean(intervals, axis=0)
    below, above, std = mean - low, high - mean, 0.0
    if len(values) > 1:
        from scipy.stats import t

        std = float(np.std(values, ddof=1))
        of_seeds = t.ppf(0.975, len(values) - 1) * std / len(values) ** 0.5
        below, above = np.hypot(below, of_seeds), np.hypot(above, of_seeds)
    ends = max(0.0, mean - below), min(1.0, mean + above)
    return {
        "mean": round(mean, 6),
        "std": round(std, 6),
        "values": [round(float(value), 6) for value in values],
        "ci95": [round(float(end), 6) for end in ends],
    }
