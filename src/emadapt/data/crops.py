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
from emadapt.data.tiles import (
    Geometry,
    Grey,
    geometry_of,
    label_to_input,
    to_input,
    with_neighbours,
)
from emadapt.study.backbones import BackboneSettings

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its version


ZOOM = 0.22
"""Standard deviation of the logarithm of the scale of jittered crops."""
KEPT_BYTES = 256 * 2**20
"""Memory that the prepared slices of a dataset may take in a process."""


@functools.cache
def augmentation(elastic: bool, jitter: bool = False) -> Any:
    """Flips and turns in plane, mild elastic changes if asked for, brightness and contrast.

    `jitter` adds what differs between microscopes: gamma, blur and noise.
    """
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # OpenCV's own threads get in the way of forked workers
    edge = cv2.BORDER_REFLECT_101
    warp = A.ElasticTransform(alpha=40, sigma=8, approximate=True, border_mode=edge, p=0.3)
    grey = A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.25, p=0.8)
    scope = [
        A.RandomGamma(gamma_limit=(65, 155), p=0.7),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.8), p=0.35),
        A.GaussNoise(std_range=(0.01, 0.08), p=0.5),
    ]
    return A.Compose([A.D4(p=1.0), *([warp] * elastic), grey, *(scope * jitter)])


def augment(image: Grey, label: Grey, seed: int, jitter: bool = False) -> tuple[Grey, Grey]:
    """Flip, rotate by 90 degrees, mild elastic, brightness, contrast; a function of the seed."""
    compose = augmentation(elastic=True, jitter=jitter)
    compose.set_random_seed(seed)  # per sample: forked workers would otherwise repeat each other
    out = compose(image=np.ascontiguousarray(image), mask=np.ascontiguousarray(label))
    return out["image"], out["mask"]


def corner(
    label: Grey, tile: tuple[int, int], classes: int, rng: np.random.Generator
) -> tuple[int, int]:
    """The upper left corner (y, x) of a tile (h, w) at a random place of a padded label (H, W).

    Of several classes one is drawn, or none; a tile holds a random pixel of it, so that rare
    classes are seen as often as others.
    """
    drawn = int(rng.integers(classes + 1)) if classes > 1 else 0
    pixels = np.flatnonzero(label == drawn) if drawn else np.empty(0, np.int64)
    if not len(pixels):
        y, x = (
            int(rng.integers(0, n - side + 1)) for n, side in zip(label.shape, tile, strict=True)
        )
        return y, x
    pixel = np.unravel_index(int(rng.choice(pixels)), label.shape)
    y, x = (
        min(max(int(at) - int(rng.integers(side)), 0), n - side)
        for at, n, side in zip(pixel, label.shape, tile, strict=True)
    )
    return y, x


def crop(
    image: Grey,
    label: Grey,
    tile: tuple[int, int],
    seed: int,
    augmented: bool,
    jitter: bool = False,
    classes: int = 1,
) -> tuple[Grey, Grey]:
    """A tile (h, w) of a padded slice (H, W) or (H, W, 3) and its label, at a place by `corner`.

    With `jitter`, crops that are augmented differ in scale, too, and as `augmentation` says.
    """
    rng = np.random.default_rng(seed)
    zoom = float(np.exp(np.clip(rng.normal(0, ZOOM), -0.6, 0.6))) if augmented and jitter else 1.0
    height, width = (
        min(round(side / zoom), whole) for side, whole in zip(tile, label.shape, strict=True)
    )
    y, x = corner(label, (height, width), classes, rng)
    place = np.s_[y : y + height, x : x + width]
    image, label = image[place], label[place]
    if zoom != 1:
        image, label = _resized(image, tile, smooth=True), _resized(label, tile, smooth=False)
    if not augmented:
        return image, label
    return augment(image, label, int(rng.integers(2**31)), jitter)


def _resized(array: Grey, size: tuple[int, int], smooth: bool) -> Grey:
    """(h, w) or (h, w, 3) at another size; labels are not smoothed."""
    import cv2

    finer = size[0] > array.shape[0]
    how = (cv2.INTER_CUBIC if finer else cv2.INTER_AREA) if smooth else cv2.INTER_NEAREST_EXACT
    return np.asarray(cv2.resize(array, size[::-1], interpolation=how), np.uint8)


class PreparedSlices:
    """Slices as they enter a model, kept as they come: to align and resize them takes long."""

    def __init__(self, volume: Volume, geo: Geometry, context: int = 0) -> None:
        self.volume, self.geo, self.context = volume, geo, context
        self._kept: dict[int, Grey] = {}
        self.free = KEPT_BYTES

    def __getitem__(self, z: int) -> Grey:
        """(H, W), or with `context` (H, W, 3), uint8, read only."""
        if z in self._kept:
            return self._kept[z]
        image = to_input(with_neighbours(self.volume, z, self.context), self.geo)
        image.setflags(write=False)
        if image.nbytes <= self.free:
            self._kept[z], self.free = image, self.free - image.nbytes
        return image


class CropDataset(Dataset[Item]):
    """Image crops of the training slices, with the interface of `batches.Samples`.

    `tiles` are the labelled tiles of each volume, which `Draw.row` counts; without them it is a
    slice. `unlabelled` volumes are numbered after the others; their labels are zeros.
    """

    on_device = False

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
        self.context, self.jitter = spec.context, spec.jitter
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
        volume, row = self.volumes[draw.member], draw.row + step
        there = row in volume.split["train"] and max(draw.row, row) not in volume.ends
        return dataclasses.replace(draw, row=row) if there else draw

    def shapes(self, member: int) -> Shapes:
        tile = self.geos[member].tile
        return (3 if self.context else 1, *tile), tile

    def __getitem__(self, draw: Draw) -> Item:
        """(1, h, w) float32 in [0, 1], of a backbone with `context` (3, h, w), and (h, w) int64."""
        volume, geo = self.volumes[draw.member], self.geos[draw.member]
        labelled = draw.member < self.n_labelled
        z, *at = self.tiles[draw.member][draw.row] if self.tiles and labelled else (draw.row,)
        image = self.slices[draw.member][z]
        label = np.zeros(image.shape[:2], np.uint8)
        if labelled:
            label = label_to_input(volume.label[z], geo)
        if at:
            y, x = at
            image, label = (a[y : y + geo.tile[0], x : x + geo.tile[1]] for a in (image, label))
        classes = len(volume.classes) if labelled and not at else 1
        image, label = crop(image, label, geo.tile, draw.seed, self.augmented, self.jitter, classes)
        return as_input(image), torch.from_numpy(label.astype(np.int64))


def as_input(image: Grey) -> torch.Tensor:
    """(..., h, w) uint8 -> (..., 1, h, w) float32 in [0, 1]; (..., h, w, 3) -> (..., 3, h, w)."""
    scaled = torch.from_numpy(image.astype(np.float32)).div_(255.0)
    coloured = image.shape[-1] == 3  # no tile is 3 pixels wide
    return scaled.movedim(-1, -3) if coloured else scaled.unsqueeze(-3)
