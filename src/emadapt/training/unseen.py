"""IoU over the whole of a dataset whose labels a model has never seen.

Test slices are few because a dataset's other slices train and validate. To a model that saw none of
its labels these are as new as the test slices, and four sections of a volume say much less about it
than twenty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from emadapt.data.foreground import masks_of, most_probable
from emadapt.data.ingest import Volume
from emadapt.metrics.intervals import over_seeds
from emadapt.metrics.pixels import column_grid, overlap_counts
from emadapt.models.predict import predict_slices, smoothing_reach
from emadapt.models.published import Published
from emadapt.models.segmenter import Segmenter
from emadapt.study.study import Study, Unit

SPACING_NM = 20.0
"""Distance of scored slices. Nearer ones of FIB-SEM are almost copies."""


def unseen_by(study: Study, unit: Unit, segmenter: Segmenter) -> list[str]:
    """Datasets of which neither `unit` nor its sources saw a label.

    Images without labels may have been seen. A dataset on the same images counts as seen. None
    where that is not known (a start from a folder, a published system), where slices must be
    neighbours (a model of blocks), of mispaired datasets, and of many volumes.
    """
    chain = [unit, *study.sources_of(unit)]
    from_folder = study.warm_start_of(chain[-1])
    if isinstance(segmenter.backbone, Published) or from_folder or segmenter.depth > 1:
        return []
    train_sets = [study.train_set_settings[at.train_set] for at in chain]
    seen = {study.images_of(name) for train_set in train_sets for name in train_set.datasets}
    known = {name: study.dataset_settings[name] for name in study.tested}
    fair = [n for n, own in known.items() if not (own.mispaired or own.of_volumes)]
    return [name for name in fair if study.images_of(name) not in seen]


def spaced(slices: int, voxel_z_nm: float) -> list[int]:
    """Slice numbers from 0, SPACING_NM apart."""
    return list(range(0, slices, max(1, math.ceil(SPACING_NM / voxel_z_nm))))


def score_unseen(
    segmenter: Segmenter, volume: Volume, slices: Sequence[int], counts: Sequence[Any]
) -> dict[str, Any]:
    """IoU pooled over slices of the whole volume.

    Args:
        segmenter: as `predict_slices` takes it.
        volume: of which it has not seen labels.
        slices: that were scored already (the test slices) and are not predicted again.
        counts: theirs, ([classes,] rows, columns, 3) each.

    Returns:
        `n`, `slices`, `iou`, `iou_ci95` and `counts`, as for test slices.
    """
    voxel_nm = volume.manifest["voxel_nm"]
    voxel_z_nm = float(voxel_nm[0])
    grid = column_grid((volume.image.shape[1], volume.image.shape[2]), voxel_nm)
    chosen = spaced(len(volume.image), voxel_z_nm)
    cells = {z: np.asarray(own) for z, own in zip(slices, counts, strict=True)}
    wanted = set(chosen) - set(cells)
    reach = smoothing_reach(segmenter.spec.smooth_z_nm / voxel_z_nm)
    for first, end in itertools.pairwise(volume.ends):
        inside = {z for z in wanted if first <= z < end}
        near = {n for z in inside for n in range(max(first, z - reach), min(end, z + reach + 1))}
        for z, probability in predict_slices(segmenter, volume, sorted(near)):
            if z in inside:  # the others are there for `smooth_z_nm`
                label, sure = volume.truth(z)
                predicted = masks_of(most_probable(probability), len(volume.scored)) & sure
                cells[z] = overlap_counts(predicted, label, grid)
    ordered = np.array([cells[z] for z in chosen])
    found = over_seeds(ordered[None])
    iou = {"iou": found["mean"], "iou_ci95": found["ci95"]}
    return {"n": len(chosen), "slices": chosen, **iou, "counts": ordered.tolist()}
