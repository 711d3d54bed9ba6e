"""Scores of a model on the test slices of a dataset, and pictures of three slices."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.data.foreground import IGNORE, masks_of, most_probable
from emadapt.data.ingest import Volume
from emadapt.metrics import classification
from emadapt.metrics.instances import Instances
from emadapt.metrics.intervals import Counts, influence
from emadapt.metrics.pixels import (
    boundary_band,
    column_grid,
    overlap_counts,
    summarise,
    with_intervals,
)
from emadapt.models.classifier import Classifier
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


def score_images(classifier: Classifier, volume: Volume, view: TokenView | None) -> dict[str, Any]:
    """Scores of the test images of a dataset of whole images; arguments of `score_volumes`."""
    test = volume.split["test"]
    truth = np.asarray(volume.label[test], np.int64).ravel()
    groups = [volume.manifest["groups"][n] for n in test]
    return classification.summarise(truth, classifier.classify(volume, test, view), groups)


class Scores:
    """Counts over test slices; and the slice in the middle, the best and the worst."""

    def __init__(self, volume: Volume) -> None:
        self.volume, self.slices = volume, volume.split["test"]
        self.band = BOUNDARY_NM / float(np.mean(volume.manifest["voxel_nm"][1:]))
        shape, ends = (volume.image.shape[1], volume.image.shape[2]), volume.ends
        self.grid = (1, 1) if volume.of_volumes else column_grid(shape, volume.manifest["voxel_nm"])
        self.parts = {z: bisect.bisect(ends, z) for z in self.slices}
        self.area: list[Counts] = []
        self.boundary: list[Counts] = []
        cored = volume.manifest["voxel_nm"] if volume.scored != volume.classes else None
        self.instances = [Instances(self.slices, shape, cored) for _ in volume.scored]
        ids = len(volume.classes) + 1
        self.confusion = np.zeros((ids, ids), np.int64)
        # By file ending: IoU, slice, predicted ids; three slices in memory, not all.
        self.shown: dict[str, tuple[float, int, npt.NDArray[np.uint8]]] = {}

    def add(self, z: int, probability: Probability) -> None:
        label, known = self.volume.truth(z)
        ids = most_probable(probability)
        found = masks_of(ids, len(self.instances))
        predicted = found & known
        near = boundary_band(known, self.band)  # there, what is not known may hide a boundary
        bands = [boundary_band(mask, self.band) & known & ~near for mask in (predicted, label)]
        truth = np.asarray(self.volume.label[z])
        objects = [masks.reshape(-1, *ids.shape) for masks in (found, label)]
        if self.volume.scored != self.volume.classes:  # with the interior of objects
            pairs = zip((found, label), (ids, truth), strict=True)
            objects = [np.stack([whole, own == 1])[None] for whole, own in pairs]
        for instances, *pair in zip(self.instances, *objects, strict=True):
            # Objects end with their part: the numbers leave one out in between.
            instances.add(z + self.parts[z], *pair, known)
        np.add.at(self.confusion, (truth[known], ids[known]), 1)
        self.area.append(overlap_counts(predicted, label, self.grid))
        self.boundary.append(overlap_counts(bands[0], bands[1], self.grid))
        iou, _ = influence(self.area[-1][None])
        ids = np.where(known, ids, np.uint8(0))
        if z == self.slices[len(self.slices) // 2]:
            self.shown[""] = iou, z, ids
        if not label.any():
            return
        for which, sign in (("-best", 1), ("-worst", -1)):
            if which not in self.shown or sign * iou > sign * self.shown[which][0]:
                self.shown[which] = iou, z, ids

    def draw(self, folder: Path, title: str) -> None:
        """Write overlay-<dataset>.png, overlay-<dataset>-best.png and -worst.png."""
        from emadapt.training.overlays import overlay_png

        folder.mkdir(parents=True, exist_ok=True)
        name = self.volume.name
        for which, (iou, z, predicted) in self.shown.items():
            slice_named = f"{which.removeprefix('-')} slice {z}".strip()
            label = np.asarray(self.volume.label[z])
            overlay_png(
                folder / f"overlay-{name}{which}.png",
                np.asarray(self.volume.image[z]),
                np.where(label == IGNORE, np.uint8(0), label),
                predicted,
                f"{title} on {name}, {slice_named}, IoU {iou:.3f}",
                self.volume.classes,
            )

    def summary(self) -> dict[str, Any]:
        """What `summarise` gives of the test slices.

        `instances`, where there are not too many voxels (see `emadapt.metrics.instances`). Of
        several classes, `classes` has `with_intervals` and `instances` of each by name, and
        `confusion` the numbers of pixels, (labelled, predicted), by class id.
        """
        area, boundary = np.asarray(self.area), np.asarray(self.boundary)
        volumes = list(self.parts.values()) if self.volume.of_volumes else []
        scores = summarise(area, boundary, self.slices, volumes)
        objects = [own.summary() for own in self.instances]
        found = [{"instances": own} if own else {} for own in objects]
        if len(found) == 1:
            return scores | found[0]
        area, boundary = (np.array(scores[name]) for name in ("counts", "boundary_counts"))
        by_class = {
            name: with_intervals(area[:, k], boundary[:, k]) | found[k]
            for k, name in enumerate(self.volume.scored)
        }
        return scores | {"classes": by_class, "confusion": self.confusion.tolist()}
