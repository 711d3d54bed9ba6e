"""How well objects are found: average precision and panoptic quality of connected components.

Voxels that share a face belong to one object. Where objects have cores, the components of these are
the objects, and other foreground goes to the nearest. A predicted and a labelled object match where
their IoU is above the threshold; from 0.5 on, a match is unique.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_VOXELS = 2**28
"""Larger test sets have no object metrics: components take about 9 bytes a voxel."""

PART = 0.1
"""Share of an object that a part must have to count as split off, or as merged."""

REACH_NM = 60.0
"""How far an object reaches from its core."""

Masks = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.integer[Any]]
Bits = npt.NDArray[np.uint8]


class Instances:
    """Collects prediction and label of the test slices, one bit a voxel, and scores them."""

    def __init__(
        self, slices: Sequence[int], shape: tuple[int, int], cored: Sequence[float] | None = None
    ) -> None:
        """`cored` is the voxel size (z, y, x) in nm of objects that have cores."""
        self.shape, self.cored = shape, cored
        self.wanted = len(slices) * shape[0] * shape[1] <= MOST_VOXELS
        self.slices: list[int] = []
        self.predicted: list[Bits] = []
        self.label: list[Bits] = []
        self.hidden: list[Bits] = []

    def add(self, z: int, predicted: Masks, label: Masks, known: Masks) -> None:
        """Take slice `z` (rising), (Y, X) each; scores are of what is `known`.

        With cores, prediction and label are (2, Y, X): the foreground, and the cores in it.
        """
        if self.wanted:
            self.slices.append(z)
            self.predicted.append(np.packbits(predicted))
            self.label.append(np.packbits(label))
            self.hidden.append(np.packbits(~known))

    def summary(self) -> dict[str, Any] | None:
        """`instance_metrics` of the slices; None if there are none or too many voxels."""
        if not self.slices:
            return None
        predicted, label = self._objects(self.predicted), self._objects(self.label)
        hidden = _stack(self.hidden, self.slices, self.shape)
        return instance_metrics(seen(predicted, hidden), label)

    def _objects(self, packed: list[Bits]) -> Labels:
        """Numbered objects."""
        if not self.cored:
            return _components(_stack(packed, self.slices, self.shape))
        whole, cores = np.moveaxis(_stack(packed, self.slices, (2, *self.shape)), 1, 0)
        numbers = _components(cores)
        step, found = math.ceil(REACH_NM / self.cored[0]), np.zeros_like(numbers)
        places = _places(self.slices)
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            end = run[-1] + 1
            for z in range(run[0], end, step):  # a part at a time: it takes 30 bytes a voxel
                near = slice(max(run[0], z - step), min(z + 2 * step, end))
                own = grown(numbers[near], whole[near], self.cored)[z - near.start :]
                found[z : min(z + step, end)] = own[:step]
        return found


def grown(cores: Labels, whole: Masks, voxel_nm: Sequence[float]) -> Labels:
    """Give the voxels of `whole` the number of the nearest core within REACH_NM, else 0."""
    from scipy.ndimage import distance_transform_edt

    if not cores.any():
        return cores
    away, nearest = distance_transform_edt(cores == 0, sampling=voxel_nm, return_indices=True)
    return np.where(whole & (away <= REACH_NM), cores[tuple(nearest)], 0)


def seen(predicted: Labels, hidden: Masks) -> Labels:
    """Numbered objects without what is hidden of them, and without those that are so mostly.

    As COCO treats crowds, and panoptic quality its void label (Kirillov et al. 2019).
    """
    if not hidden.any():
        return predicted
    n = int(predicted.max()) + 1
    mostly = 2 * np.bincount(predicted[hidden], minlength=n) > np.bincount(predicted.ravel())
    return np.where(hidden | mostly[predicted], 0, predicted)


def instance_metrics(predicted: Labels, label: Labels) -> dict[str, Any]:
    """Compare numbered objects.

    Args:
        predicted: object numbers from 1 on, 0 in the background.
        label: of the same shape, likewise.

    Returns:
        `ap50`, `ap75`: TP / (TP + FP + FN) at IoU above 0.5 and 0.75, average precision without
        scores (Caicedo et al. 2019). `pq`: panoptic quality, `sq` * `rq` (Kirillov et al. 2019).
        `sq`: mean IoU of the matches at 0.5. `rq`: TP / (TP + FP / 2 + FN / 2). All in [0, 1],
        and 1 where neither has an object. `predicted`, `labelled`, `matched`: numbers of objects.
        `split`: labelled objects of which two predicted ones or more have a share of PART each.
        `merged`: predicted objects that have such a share of two labelled ones or more. `vi_split`
        and `vi_merge`: the two parts of the variation of information (Meilă 2007) in bits, 0 or
        more, over labelled voxels, where what no object was predicted for is one more object.
    """
    one, other = (np.bincount(a.ravel()) for a in (predicted, label))
    n_predicted, n_labelled = int((one[1:] > 0).sum()), int((other[1:] > 0).sum())
    objects = n_predicted + n_labelled
    both = (predicted > 0) & (label > 0)
    pair = predicted[both].astype(np.int64) * len(other) + label[both]
    pairs, overlap = np.unique(pair, return_counts=True)
    mine, truth = pairs // len(other), pairs % len(other)
    iou = overlap / (one[mine] + other[truth] - overlap)
    parts = overlap > PART * other[truth]
    matched = iou[iou > 0.5]

    def precision(hits: int) -> float:
        return hits / (objects - hits) if objects else 1.0

    sq = float(matched.mean()) if len(matched) else float(not objects)
    rq = 2 * len(matched) / objects if objects else 1.0
    return {
        "ap50": round(precision(len(matched)), 6),
        "ap75": round(precision(int((iou > 0.75).sum())), 6),
        "pq": round(sq * rq, 6),
        "sq": round(sq, 6),
        "rq": round(rq, 6),
        "predicted": n_predicted,
        "labelled": n_labelled,
        "matched": len(matched),
        "split": int((np.bincount(truth[parts]) > 1).sum()),
        "merged": int((np.bincount(mine[parts]) > 1).sum()),
        **_variation_of_information(mine, truth, overlap, other),
    }


def _variation_of_information(
    mine: Labels, truth: Labels, overlap: Labels, sizes: Labels
) -> dict[str, float]:
    """Conditional entropies, from numbers of voxels that pairs of objects share.

    `sizes` are those of labelled objects, by number.
    """
    missed = sizes - np.bincount(truth, overlap, len(sizes)).astype(np.int64)
    left = np.flatnonzero(missed[1:]) + 1
    mine, truth = np.append(mine, np.zeros_like(left)), np.append(truth, left)
    share = np.append(overlap, missed[left]) / max(1, sizes[1:].sum())
    found = {}
    for name, given in (("vi_split", truth), ("vi_merge", mine)):
        whole = np.bincount(given, share)[given]
        found[name] = round(float((share * np.log2(whole / share)).sum()), 6)
    return found


def _places(slices: list[int]) -> npt.NDArray[np.int64]:
    """Where each slice is in `_stack`: an empty one parts those that are not neighbours."""
    steps = (1 if b == a + 1 else 2 for a, b in itertools.pairwise(slices))
    return np.cumsum([0, *steps])


def _stack(packed: list[Bits], slices: list[int], shape: tuple[int, ...]) -> Masks:
    """(Z, *shape), see `_places`."""
    places = _places(slices)
    mask = np.zeros((int(places[-1]) + 1, *shape), bool)
    for place, bits in zip(places, packed, strict=True):
        mask[place] = np.unpackbits(bits, count=math.prod(shape)).reshape(shape)
    return mask


def _components(mask: Masks) -> Labels:
    """Numbered components."""
    import cc3d

    return np.asarray(cc3d.connected_components(mask, connectivity=6))
