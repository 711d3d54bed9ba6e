"""The threshold on probabilities that validation slices choose, from one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

GRID = (np.arange(101) / 100).astype(np.float32)
"""Thresholds: foreground has a higher probability."""

Counts = npt.NDArray[np.int64]


def histogram(probability: npt.NDArray[np.float32], label: npt.NDArray[Any]) -> Counts:
    """(2, 102) pixels of background and foreground, by how many thresholds of `GRID` their probability is above."""
    above = np.searchsorted(GRID, probability.ravel(), side="left")
    foreground = np.asarray(label).ravel() > 0
    return np.bincount(above + foreground * (len(GRID) + 1), minlength=2 * (len(GRID) + 1)).reshape(
        2, -1
    )


def iou_by_threshold(counts: Counts) -> npt.NDArray[np.float64]:
    """(101,) foreground IoU at each threshold of `GRID` of pixels counted by `histogram`."""
    wrong, hit = (np.cumsum(c[::-1])[::-1][1:] for c in counts)
    union = wrong + counts[1].sum()
    return np.divide(hit, union, out=np.ones(len(GRID)), where=union > 0)


def choose_threshold(datasets: Sequence[Counts]) -> tuple[float, float]:
    """The threshold with the highest IoU, the mean over datasets, and that IoU; of equals the one nearest to 0.5."""
    iou = np.mean([iou_by_threshold(counts) for counts in datasets], 0)
    best = np.flatnonzero(iou >= iou.max() - 1e-12)
    chosen = best[np.argmin(np.abs(best - len(GRID) // 2))]
    return round(float(GRID[chosen]), 2), float(iou[chosen])
