"""Foreground IoU, Dice and boundary IoU of masks, pooled over slices, with 95 % intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.metrics.intervals import Counts, block_bootstrap, block_slices, interval95

Mask = npt.NDArray[np.bool_]


def overlap_counts(predicted: Mask, label: Mask) -> tuple[int, int, int]:
    """Pixels that are in both, predicted, labelled."""
    return int((predicted & label).sum()), int(predicted.sum()), int(label.sum())


def boundary_band(mask: Mask, width: float) -> Mask:
    """Foreground within `width` pixels of its own boundary (Cheng et al. 2021, Boundary IoU).

    The image's edge is no boundary.
    """
    import cv2  # five times as fast as scipy.ndimage

    if mask.all() or not mask.any():
        return np.zeros_like(mask)
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squared distances are whole numbers; float32 misses them by rounding.
    squared = np.rint(distance.astype(np.float64) ** 2)
    return np.asarray(mask & (np.sqrt(squared) <= width))


def pooled(counts: Counts) -> dict[str, float]:
    """IoU and Dice of summed counts (..., 3). Two empty masks agree: 1.0."""
    both, predicted, labelled = (int(c) for c in counts.reshape(-1, 3).sum(0))
    union = predicted + labelled - both
    return {
        "iou": both / union if union else 1.0,
        "dice": 2 * both / (predicted + labelled) if union else 1.0,
    }


def iou_with_interval(counts: Counts, block: int) -> dict[str, Any]:
    """`iou` pooled over the slices, 0 to 1, and `iou_ci95`, rounded to 6 digits.

    Args:
        counts: (slices, 3) from `overlap_counts`, in the order of z.
        block: slices in a block of the bootstrap.
    """
    iou, draws = pooled(counts)["iou"], block_bootstrap(counts, block)[:, 0]
    return {"iou": round(iou, 6), "iou_ci95": interval95(iou, draws, len(counts) // block)}


def summarise(
    area: Counts, boundary: Counts, voxel_z_nm: float, slices: list[int]
) -> dict[str, Any]:
    """Scores of the test slices: pooled values with intervals, and values of each slice.

    Args:
        area: (slices, 3) counts of the masks, in the order of z.
        boundary: (slices, 3) counts of their boundary bands.
        voxel_z_nm: thickness of a slice.
        slices: their numbers.

    Returns:
        `n`, `block_slices`, `iou`, `dice`, `boundary_iou`, each with `<metric>_ci95`; `slices`,
        `counts`, `per_slice`.
    """
    block = block_slices(len(slices), voxel_z_nm)
    draws, boundary_draws = block_bootstrap(area, block), block_bootstrap(boundary, block)
    values = {**pooled(area), "boundary_iou": pooled(boundary)["iou"]}
    columns = {"iou": draws[:, 0], "dice": draws[:, 1], "boundary_iou": boundary_draws[:, 0]}
    blocks = len(slices) // block
    each = [pooled(counts) for counts in area]
    return {
        "n": len(slices),
        "block_slices": block,
        **{name: round(value, 6) for name, value in values.items()},
        **{f"{name}_ci95": interval95(values[name], c, blocks) for name, c in columns.items()},
        "slices": slices,
        "counts": area.tolist(),
        "per_slice": {
            "iou": [round(scores["iou"], 6) for scores in each],
            "dice": [round(scores["dice"], 6) for scores in each],
            "boundary_iou": [round(pooled(counts)["iou"], 6) for counts in boundary],
        },
    }
