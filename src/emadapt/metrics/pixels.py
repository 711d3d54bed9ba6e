"""IoU, Dice and boundary IoU of masks, pooled over slices, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.metrics.intervals import Counts, influence, over_seeds

COLUMN_NM = 1000.0
"""Side of the columns that are counted apart."""
MOST_COLUMNS = 8
"""In each direction; those of large images are wider."""

Mask = npt.NDArray[np.bool_]


def column_grid(shape: tuple[int, int], voxel_nm: Sequence[float]) -> tuple[int, int]:
    """Rows and columns of the grid of columns.

    Args:
        shape: (Y, X) of a slice, in pixels.
        voxel_nm: (z, y, x).
    """
    sides = [size * step / COLUMN_NM for size, step in zip(shape, voxel_nm[1:], strict=True)]
    rows, columns = (min(MOST_COLUMNS, max(1, round(side))) for side in sides)
    return rows, columns


def overlap_counts(predicted: Mask, label: Mask, grid: tuple[int, int] = (1, 1)) -> Counts:
    """Pixels that are in both, predicted, labelled, in each column of a grid: (rows, columns, 3).

    Args:
        predicted: (Y, X), or (classes, Y, X), which gives (classes, rows, columns, 3).
        label: of the same shape.
        grid: rows and columns, of nearly the same size.
    """
    counts = np.stack([predicted & label, predicted, label], -1)
    for axis, parts in enumerate(grid, counts.ndim - 3):
        starts = np.arange(parts) * counts.shape[axis] // parts
        counts = np.add.reduceat(counts, starts, axis, dtype=np.int64)
    return counts


def boundary_band(mask: Mask, width: float) -> Mask:
    """Foreground within `width` pixels, at least one, of its own boundary.

    Boundary IoU (Cheng et al. 2021). The image's edge is no boundary. Of masks (classes, Y, X) each
    by itself.
    """
    import cv2  # five times as fast as scipy.ndimage

    if mask.ndim > 2:
        return np.stack([boundary_band(own, width) for own in mask])
    if mask.all() or not mask.any():
        return np.zeros_like(mask)
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squared distances are whole numbers; float32 misses them by rounding.
    squared = np.rint(distance.astype(np.float64) ** 2)
    return np.asarray(mask & (np.sqrt(squared) <= max(width, 1)))


def of_volumes(counts: Counts, volumes: Sequence[int]) -> Counts:
    """Counts of slices as those of whole volumes, which are independent.

    Columns next to each other are taken to be half alike, so an empty one parts two volumes.

    Args:
        counts: (slices, [classes,] 1, 1, 3).
        volumes: the volume of each slice, equal ones together.

    Returns:
        ([classes,] 2 * volumes, 1, 3) as counts of a single slice, (1, ...).
    """
    starts = [k for k, own in enumerate(volumes) if not k or own != volumes[k - 1]]
    sums = np.add.reduceat(counts, starts)
    columns = np.moveaxis(sums[..., 0, 0, :], 0, -2)
    apart = np.stack([columns, np.zeros_like(columns)], -2)
    return apart.reshape(*columns.shape[:-2], 2 * len(starts), 1, 3)[None]


def summarise(
    area: Counts, boundary: Counts, slices: list[int], volumes: Sequence[int] = ()
) -> dict[str, Any]:
    """Scores of the test slices: pooled values with intervals, and values of each slice.

    Of several classes each value is the mean over them.

    Args:
        area: (slices, [classes,] rows, columns, 3) counts of the masks, in the order of z.
        boundary: likewise, of their boundary bands.
        slices: their numbers.
        volumes: of many volumes, the one of each slice; `counts` are then those of `of_volumes`.

    Returns:
        `n`; what `with_intervals` gives; `slices`, `counts`, `boundary_counts`, `per_slice`.
    """
    per_slice = {
        "iou": [_of_slice(counts, "iou") for counts in area],
        "dice": [_of_slice(counts, "dice") for counts in area],
        "boundary_iou": [_of_slice(counts, "iou") for counts in boundary],
    }
    if volumes:
        area, boundary = of_volumes(area, volumes), of_volumes(boundary, volumes)
    return {
        "n": len(slices),
        **with_intervals(area, boundary),
        "slices": slices,
        "counts": area.tolist(),
        "boundary_counts": boundary.tolist(),
        "per_slice": per_slice,
    }


def with_intervals(area: Counts, boundary: Counts) -> dict[str, Any]:
    """`iou`, `dice`, `boundary_iou`, each with `<metric>_ci95`; arguments as of `summarise`."""
    found = {
        "iou": over_seeds(area[None]),
        "dice": over_seeds(area[None], "dice"),
        "boundary_iou": over_seeds(boundary[None]),
    }
    means = {name: own["mean"] for name, own in found.items()}
    return means | {f"{name}_ci95": own["ci95"] for name, own in found.items()}


def _of_slice(counts: Counts, metric: str) -> float:
    return round(influence(counts[None], metric)[0], 6)
