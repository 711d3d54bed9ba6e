"""How well single objects are found: average precision and panoptic quality of connected components.

Components are those of `emadapt.segment.instances`: voxels that share a face belong together. A predicted and a labelled object
match where their IoU is above the threshold; from 0.5 on a match is unique.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_VOXELS = 2**28
"""Of the test slices: components take about 9 bytes for each. Larger ones have no instance metrics."""
VALUES = ("ap50", "ap75", "pq", "sq", "rq")

Masks = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.integer[Any]]


class Instances:
    """Prediction and label of test slices, a bit a voxel, until all are there."""

    def __init__(self, slices: Sequence[int], shape: tuple[int, int]) -> None:
        self.shape = shape
        self.wanted = len(slices) * shape[0] * shape[1] <= MOST_VOXELS
        self.slices: list[int] = []
        self.packed: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = []

    def add(self, z: int, predicted: Masks, label: Masks) -> None:
        """Slice `z` (rising), (Y, X) each."""
        if self.wanted:
            self.slices.append(z)
            self.packed.append((np.packbits(predicted), np.packbits(label)))

    def summary(self) -> dict[str, Any] | None:
        """`instance_metrics` of the slices; None where they are too many, or none."""
        if not self.packed:
            return None
        predicted, label = (
            _components([p[i] for p in self.packed], self.slices, self.shape) for i in range(2)
        )
        return instance_metrics(predicted, label)


def instance_metrics(predicted: Labels, label: Labels) -> dict[str, Any]:
    """Compare numbered objects.

    Args:
        predicted: numbers from 1 on, 0 in the background.
        label: of the same shape, likewise.

    Returns:
        `ap50` and `ap75`: TP / (TP + FP + FN) at IoU above 0.5 and 0.75 (average precision without scores, as Caicedo et al.
        2019 and StarDist have it); `pq` = `sq` * `rq`, panoptic quality: mean IoU of the matches at 0.5, and
        TP / (TP + FP / 2 + FN / 2) (Kirillov et al. 2019). All in [0, 1], 1 where neither has an object. `predicted`,
        `labelled`: how many objects; `matched`: at 0.5.
    """
    one, other = (np.bincount(a.ravel()) for a in (predicted, label))
    n_predicted, n_labelled = int((one[1:] > 0).sum()), int((other[1:] > 0).sum())
    both = (predicted > 0) & (label > 0)
    pairs, overlap = np.unique(
        predicted[both].astype(np.int64) * len(other) + label[both], return_counts=True
    )
    iou = overlap / (one[pairs // len(other)] + other[pairs % len(other)] - overlap)
    matched = iou[iou > 0.5]
    objects = n_predicted + n_labelled

    def precision(hits: int) -> float:
        return hits / (objects - hits) if objects else 1.0

    sq = float(matched.mean()) if len(matched) else float(not objects)
    rq = 2 * len(matched) / objects if objects else 1.0
    values = dict(
        zip(
            VALUES,
            (precision(len(matched)), precision(int((iou > 0.75).sum())), sq * rq, sq, rq),
            strict=True,
        )
    )
    counts = {"predicted": n_predicted, "labelled": n_labelled, "matched": len(matched)}
    return {**{name: round(value, 6) for name, value in values.items()}, **counts}


def _components(
    packed: list[npt.NDArray[np.uint8]], slices: list[int], shape: tuple[int, int]
) -> npt.NDArray[np.int32]:
    """Numbered components; slices that are no neighbours in the volume are none here, for an empty slice lies between them."""
    from scipy.ndimage import label

    places = np.cumsum([0, *(1 if b == a + 1 else 2 for a, b in itertools.pairwise(slices))])
    mask = np.zeros((int(places[-1]) + 1, *shape), bool)
    for place, bits in zip(places, packed, strict=True):
        mask[place] = np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape)
    labels = np.empty(mask.shape, np.int32)
    label(mask, output=labels)
    return labels
