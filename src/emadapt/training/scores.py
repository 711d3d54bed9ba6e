"""Scores of a model on the test slices of a dataset, and pictures of three slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from emadapt.data.ingest import Volume
from emadapt.metrics.instances import Instances
from emadapt.metrics.intervals import Counts
from emadapt.metrics.pixels import (
    Mask,
    boundary_band,
    column_grid,
    overlap_counts,
    pooled,
    summarise,
)
from emadapt.models.predict import predict_slices
from emadapt.models.segmenter import Probability, Segmenter
from emadapt.models.tokens import TokenView

BOUNDARY_NM = 25.0
"""Width of the band inside the boundary that boundary IoU looks at: 5 pixels of 5 nm."""


def score_volumes(
    segmenter: Segmenter, volumes: list[Volume], view: TokenView | None, folder: Path, title: str
) -> list[dict[str, Any]]:
    """Predict the test slices once, and score them on every volume's labels (see `Scores.summary`).

    Args:
        segmenter: in eval mode, adapters merged.
        volumes: of the same images, with the same test slices.
        view: cached tokens of the first, or None to run the backbone.
        folder: gets the overlays.
        title: of the overlays.
    """
    several = [Scores(volume) for volume in volumes]
    for z, probability in predict_slices(segmenter, volumes[0], volumes[0].split["test"], view):
        for scores in several:
            scores.add(z, probability)
    for scores in several:
        scores.draw(folder, title)
    return [scores.summary() for scores in several]


class Scores:
    """Counts over test slices; and the slice in the middle, the best and the worst."""

    def __init__(self, volume: Volume) -> None:
        self.volume, self.slices = volume, volume.split["test"]
        self.band = BOUNDARY_NM / float(np.mean(volume.manifest["voxel_nm"][1:]))
        shape = volume.image.shape[1], volume.image.shape[2]
        self.grid = column_grid(shape, volume.manifest["voxel_nm"])
        self.area: list[Counts] = []
        self.boundary: list[Counts] = []
        self.instances = Instances(self.slices, shape)
        # By file ending: IoU, slice, prediction; three slices in memory, not all.
        self.shown: dict[str, tuple[float, int, Mask]] = {}

    def add(self, z: int, probability: Probability) -> None:
        label, known = self.volume.truth(z)
        predicted = (probability > 0.5) & known
        near = boundary_band(known, self.band)  # there, what is not known may hide a boundary
        bands = [boundary_band(mask, self.band) & known & ~near for mask in (predicted, label)]
        self.instances.add(z, probability > 0.5, label, known)
        self.area.append(overlap_counts(predicted, label, self.grid))
        self.boundary.append(overlap_counts(bands[0], bands[1], self.grid))
        iou = pooled(self.area[-1])["iou"]
        if z == self.slices[len(self.slices) // 2]:
            self.shown[""] = iou, z, predicted
        if not label.any():
            return
        for which, sign in (("-best", 1), ("-worst", -1)):
            if which not in self.shown or sign * iou > sign * self.shown[which][0]:
                self.shown[which] = iou, z, predicted

    def draw(self, folder: Path, title: str) -> None:
        """Write overlay-<dataset>.png, overlay-<dataset>-best.png and -worst.png."""
        from emadapt.training.overlays import overlay_png

        folder.mkdir(parents=True, exist_ok=True)
        name = self.volume.name
        for which, (iou, z, predicted) in self.shown.items():
            slice_named = f"{which.removeprefix('-')} slice {z}".strip()
            overlay_png(
                folder / f"overlay-{name}{which}.png",
                np.asarray(self.volume.image[z]),
                self.volume.truth(z)[0],
                predicted,
                f"{title} on {name}, {slice_named}, IoU {iou:.3f}",
            )

    def summary(self) -> dict[str, Any]:
        """What `summarise` gives of the test slices.

        `instances`, where there are not too many voxels (see `emadapt.metrics.instances`).
        """
        scores = summarise(np.asarray(self.area), np.asarray(self.boundary), self.slices)
        if instances := self.instances.summary():
            scores["instances"] = instances
        return scores
