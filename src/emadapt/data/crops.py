"""Augmented image crops of training slices, drawn from a seed alone."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from emadapt.data.batches import Draw, Item, Shapes
from emadapt.data.ingest import Volume
from emadapt.data.labelled import Tile
from emadapt.data.prepared import PreparedSlices
from emadapt.data.tiles import Grey, geometry_of, label_to_input
from emadapt.study.backbones import BackboneSettings

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its version


@functools.cache
def augmentation(elastic: bool) -> Any:
    """Flips and turns in plane, mild elastic changes if asked for, brightness and contrast."""
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # OpenCV's own threads get in the way of forked workers
    edge = cv2.BORDER_REFLECT_101
    warp = A.ElasticTransform(alpha=40, sigma=8, approximate=True, border_mode=edge, p=0.3)
    grey = A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.25, p=0.8)
    return A.Compose([A.D4(p=1.0), warp, grey] if elastic else [A.D4(p=1.0), grey])


def augment(image: Grey, label: Grey, seed: int) -> tuple[Grey, Grey]:
    """Flip, rotate by 90 degrees, mild elastic, brightness, contrast; a function of the seed."""
    compose = augmentation(elastic=True)
    compose.set_random_seed(seed)  # per sample: forked workers would otherwise repeat each other
    out = compose(image=np.ascontiguousarray(image), mask=np.ascontiguousarray(label))
    return out["image"], out["mask"]


def crop(
    image: Grey, label: Grey, tile: tuple[int, int], seed: int, augmented: bool
) -> tuple[Grey, Grey]:
    """A tile (h, w) at a random place of a padded slice (H, W) or (H, W, 3) and its label."""
    rng = np.random.default_rng(seed)
    y = int(rng.integers(0, label.shape[0] - tile[0] + 1))
    x = int(rng.integers(0, label.shape[1] - tile[1] + 1))
    place = np.s_[y : y + tile[0], x : x + tile[1]]
    image, label = image[place], label[place]
    return augment(image, label, int(rng.integers(2**31))) if augmented else (image, label)


class CropDataset(Dataset[Item]):
    """Image crops of the training slices, with the interface of `batches.Samples`.

    `tiles` are the labelled tiles of each volume, which `Draw.row` counts; without them it is a
    slice. `unlabelled` volumes are numbered after the others; their labels are zeros.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        spec: BackboneSettings,
        patch: int,
        augmented: bool,
        tiles: Sequence[Sequence[Tile]] = (),
        unlabelled: Sequence[Volume] = (),
    ) -> None:
        self.volumes, self.n_labelled = [*volumes, *unlabelled], len(volumes)
        self.augmented, self.tiles = augmented, tiles
        self.context = spec.context
        self.geos = [geometry_of(v, spec, patch) for v in self.volumes]
        self.slices = [
            PreparedSlices(v, geo, spec.context)
            for v, geo in zip(self.volumes, self.geos, strict=True)
        ]

    def rows(self) -> list[npt.NDArray[np.int64]]:
        if self.tiles:
            return [np.arange(len(own)) for own in self.tiles]
        return [np.asarray(v.split["train"]) for v in self.volumes[: self.n_labelled]]

    def unlabelled_rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.asarray(v.split["train"]) for v in self.volumes[self.n_labelled :]]

    def beside(self, draw: Draw, step: int) -> Draw:
        there = draw.row + step in self.volumes[draw.member].split["train"]
        return dataclasses.replace(draw, row=draw.row + step) if there else draw

    def shapes(self, member: int) -> Shapes:
        tile = self.geos[member].tile
        return (3 if self.context else 1, *tile), tile

    def __getitem__(self, draw: Draw) -> Item:
        """(1, h, w) float32 in [0, 1], of a backbone with `context` (3, h, w), and (h, w) int64."""
        volume, geo = self.volumes[draw.member], self.geos[draw.member]
        labelled = draw.member < self.n_labelled
        z, *corner = self.tiles[draw.member][draw.row] if self.tiles and labelled else (draw.row,)
        image = self.slices[draw.member][z]
        label = np.zeros(image.shape[:2], np.uint8)
        if labelled:
            label = label_to_input(volume.label[z], geo)
        if corner:
            y, x = corner
            image, label = (a[y : y + geo.tile[0], x : x + geo.tile[1]] for a in (image, label))
        image, label = crop(image, label, geo.tile, draw.seed, self.augmented)
        return as_input(image), torch.from_numpy(label.astype(np.int64))


def as_input(image: Grey) -> torch.Tensor:
    """(..., h, w) uint8 -> (..., 1, h, w) float32 in [0, 1]; (..., h, w, 3) -> (..., 3, h, w)."""
    scaled = torch.from_numpy(image.astype(np.float32)).div_(255.0)
    coloured = image.shape[-1] == 3  # no tile is 3 pixels wide
    return scaled.movedim(-1, -3) if coloured else scaled.unsqueeze(-3)
