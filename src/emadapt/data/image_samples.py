"""Whole images with a class each, augmented lightly, as training draws them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from emadapt.data.batches import Draw, Item, Shapes
from emadapt.data.crops import CropDataset, as_input


@functools.cache
def augmentation() -> Any:
    """Mirrored left to right; turned, shifted and scaled a little; brightness and contrast."""
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # OpenCV's own threads get in the way of forked workers
    moved = A.Affine(
        scale=(0.9, 1.1),
        translate_percent=(-0.06, 0.06),
        rotate=(-10, 10),
        border_mode=cv2.BORDER_REFLECT_101,
        p=0.8,
    )
    grey = A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.8)
    return A.Compose([A.HorizontalFlip(p=0.5), moved, grey])


class ImageDataset(CropDataset):
    """Training images of datasets, with the interface of `batches.Samples`."""

    def shapes(self, member: int) -> Shapes:
        channels = 3 if self.volumes[member].image.ndim == 4 else 1
        return (channels, *self.geos[member].tile), (1, 1)

    def __getitem__(self, draw: Draw) -> Item:
        """(1 or 3, h, w) float32 in [0, 1], and the class, (1, 1) int64."""
        image = self.slices[draw.member][draw.row]
        if self.augmented:
            compose = augmentation()
            compose.set_random_seed(draw.seed)
            image = compose(image=np.ascontiguousarray(image))["image"]
        label = self.volumes[draw.member].label[draw.row]
        return as_input(image), torch.from_numpy(label.astype(np.int64))
