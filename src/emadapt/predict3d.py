"""Foreground probabilities by a model in 3D: windows over blocks of neighbouring slices, blended with Gaussian weights.

In plane MONAI slides the window; along z it is done here, so that memory holds one row of windows and not a volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from emadapt.data.align import AS_IT_IS, Aligner
from emadapt.data.patches import as_input
from emadapt.data.splits import runs_of
from emadapt.data.tiles import FLIPS, Geometry, Grey, geometry, to_input, to_native
from emadapt.device import autocast
from emadapt.models.monai_parts import monai_part
from emadapt.models.segmenter import Segmenter

BATCH = 4
"""Windows at once."""
Probability = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float32]


def predict_block(segmenter: Segmenter, image: Grey, slices: Sequence[int], overlap: float | None = None,
                  aligner: Aligner = AS_IT_IS, flips: bool = False) -> Iterator[tuple[int, Probability]]:  # fmt: skip
    """Slice number and probability for each of `slices`, each run of consecutive ones by itself: others are not looked at.

    A run thinner than the patch is continued by reflection at both ends.

    Args:
        segmenter: of a regime in 3D, in eval mode.
        image: (Z, Y, X) uint8, may be memory-mapped.
        slices: numbers in z.
        overlap: share of a window that neighbours cover too, on each axis; None: what the segmenter was set up with.
        aligner: of the dataset.
        flips: mean over the slices and their mirror images, in plane.

    Yields:
        The number of a slice and (Y, X) float32 in [0, 1] at the slice's own resolution; numbers rise.
    """
    geo = geometry((image.shape[1], image.shape[2]), segmenter.spec, segmenter.backbone.arch.patch, aligner)
    share = segmenter.spec.overlap if overlap is None else overlap
    depth = segmenter.regime.patch[0]
    for run in runs_of(slices):
        missing = max(0, depth - len(run))
        before = missing // 2
        shown = np.pad(run, (before, missing - before), mode="symmetric")
        for at, probability in _blended(segmenter, image, shown, geo, share, FLIPS if flips else FLIPS[:1]):
            if before <= at < before + len(run):
                yield run[at - before], to_native(probability, geo)


def _blended(segmenter: Segmenter, image: Grey, shown: npt.NDArray[np.int64], geo: Geometry,
             share: float, mirrors: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, Probability]]:  # fmt: skip
    """Place in `shown` and (H, W) of each padded slice, as soon as no further window covers it."""
    depth = segmenter.regime.patch[0]
    weight = gaussian((depth,))
    first, starts = 0, z_starts(len(shown), depth, share)
    total, weights = np.zeros((0, *geo.padded), np.float32), np.zeros(0, np.float32)
    for start, following in zip(starts, [*starts[1:], len(shown)], strict=True):
        slab = np.stack([to_input(np.asarray(image[z]), geo) for z in shown[start : start + depth]])
        new = start + depth - (first + len(total))
        total = np.concatenate([total, np.zeros((new, *geo.padded), np.float32)])
        weights = np.concatenate([weights, np.zeros(new, np.float32)])
        for axes in mirrors:
            seen = np.flip(_slab(segmenter, np.flip(slab, axes), geo.tile, share), axes)
            total += seen * (weight / len(mirrors))[:, None, None]
        weights += weight
        for k in range(following - start):
            yield start + k, total[k] / weights[k]
        total, weights, first = total[following - start :], weights[following - start :], following


def z_starts(length: int, depth: int, share: float) -> list[int]:
    """First slices of the windows that cover `length` slices, as MONAI's `sliding_window_inference` places them."""
    step = max(1, int(depth * (1 - share)))
    return [*range(0, length - depth, step), length - depth]


def gaussian(window: Sequence[int]) -> Weights:
    """MONAI's weight of each voxel of a window of any number of axes, largest in its middle; never 0."""
    return np.asarray(monai_part("data.utils").compute_importance_map(tuple(window), mode="gaussian").numpy(), dtype=np.float32)


@torch.inference_mode()
def _slab(segmenter: Segmenter, slab: Grey, window: tuple[int, int], share: float) -> Probability:
    """Probabilities (z, H, W) of one row of windows as deep as the slab (z, H, W)."""
    sliding_window_inference = monai_part("inferers").sliding_window_inference
    on = next(segmenter.head.parameters()).device
    weights = torch.from_numpy(gaussian(window))[None].expand(len(slab), *window)

    def foreground(batch: torch.Tensor) -> torch.Tensor:
        with autocast(segmenter.spec.precision):
            logits = segmenter(batch, window)
        return logits.float().softmax(1)[:, 1:]

    found = sliding_window_inference(
        as_input(slab).transpose(0, 1)[None], (len(slab), *window), BATCH, foreground, overlap=(0.0, share, share),
        mode="gaussian", roi_weight_map=weights, sw_device=on, device="cpu",
    )  # fmt: skip
    return np.asarray(torch.as_tensor(found)[0, 0].numpy(), dtype=np.float32)
