"""Augmented blocks of neighbouring training slices, for models in 3D."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emadapt.data.batches import Draw, Item, Shapes
from emadapt.data.crops import CropDataset, as_input, augmentation, corner
from emadapt.data.splits import check_depth, starts_in
from emadapt.data.tiles import Grey, label_to_input
from emadapt.errors import InputError

Patch = tuple[int, int, int]  # voxels (z, y, x)


def augment(image: Grey, label: Grey, seed: int) -> tuple[Grey, Grey]:
    """Flip each axis, turn by 90 degrees in plane, change brightness and contrast; (z, y, x)."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        image, label = image[::-1], label[::-1]
    compose = augmentation(elastic=False)
    # Per sample: forked workers would otherwise repeat each other.
    compose.set_random_seed(int(rng.integers(2**31)))
    out = compose(images=np.ascontiguousarray(image), masks=np.ascontiguousarray(label))
    return out["images"], out["masks"]


class BlockDataset(CropDataset):
    """3D patches of the training slices, with the interface of `batches.Samples`.

    `Draw.row` counts through `tiles`, the labelled patches of each volume; without them through the
    slices that a patch may begin with, and its place in plane comes from the seed. A patch has
    voxels of the resized slices.

    Args:
        given: of `CropDataset`, without `context`; `patch` there is the stride of the model's
            deepest level.
        patch: voxels (z, y, x).

    Raises:
        InputError: a patch is deeper than the training slices, or larger than a slice.
    """

    def __init__(self, *given: Any, patch: Patch) -> None:
        super().__init__(*given)
        self.patch = patch
        for volume, geo in zip(self.volumes, self.geos, strict=True):
            check_depth(volume.name, volume.runs("train"), patch)
            if any(have < want for have, want in zip(geo.padded, patch[1:], strict=True)):
                raise InputError(
                    volume.name,
                    found=f"slices of {geo.resized[0]} x {geo.resized[1]} pixels as they enter",
                    expected=f"at least those of `patch: {list(patch)}`",
                    do="Make `patch` smaller, or `scale` of the backbone larger.",
                )
        self.starts = [np.asarray(starts_in(v.runs("train"), patch[0])) for v in self.volumes]

    def rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.arange(len(own)) for own in self.tiles or self.starts[: self.n_labelled]]

    def unlabelled_rows(self) -> list[npt.NDArray[np.int64]]:
        return [np.arange(len(own)) for own in self.starts[self.n_labelled :]]

    def beside(self, draw: Draw, step: int) -> Draw:
        return draw  # blocks hold their neighbours

    def shapes(self, member: int) -> Shapes:
        return (1, *self.patch), self.patch

    def __getitem__(self, draw: Draw) -> Item:
        """(1, z, y, x) float32 in [0, 1] and (z, y, x) int64."""
        volume, geo = self.volumes[draw.member], self.geos[draw.member]
        depth, height, width = self.patch
        rng = np.random.default_rng(draw.seed)
        labelled = draw.member < self.n_labelled
        at = self.tiles[draw.member][draw.row] if self.tiles and labelled else None
        first = at[0] if at else int(self.starts[draw.member][draw.row])
        block = range(first, first + depth)
        label = np.zeros((depth, *geo.padded), np.uint8)
        if labelled:
            label = np.stack([label_to_input(volume.label[z], geo) for z in block])
        classes = len(volume.classes) if labelled else 1
        y, x = at[1:] if at else corner(label[depth // 2], (height, width), classes, rng)
        place = np.s_[y : y + height, x : x + width]
        image = np.stack([self.slices[draw.member][z][place] for z in block])
        label = label[:, *place]
        if self.augmented:
            image, label = augment(image, label, int(rng.integers(2**31)))
        return as_input(image).transpose(0, 1), torch.from_numpy(label.astype(np.int64))
