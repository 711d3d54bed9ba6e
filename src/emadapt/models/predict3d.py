"""Foreground probabilities by a model in 3D: windows over blocks of neighbouring slices, blended with Gaussian weights.

In plane MONAI slides the window; along z it is done here, so that memory holds one row of windows and not a volume.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from emadapt.data.align import AS_IT_IS, Aligner
from emadapt.data.crops import as_input
from emadapt.data.splits import runs_of
from emadapt.data.tiles import FLIPS, Geometry, Grey, geometry, to_input, to_native
from emadapt.models.device import autocast
from emadapt.models.monai_parts import monai_part
from emadapt.models.segmenter import Segmenter

BATCH = 4
"""Windows at once."""
Probability = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float32]


def predict_block(
    segmenter: Segmenter,
    image: Grey,
    slices: Sequence[int],
    overlap: float | None = None,
    aligner: Aligner = AS_IT_IS,
    flips: bool = False,
) -> Iterator[tuple[int, Probability]]:
    """Slice number and probability for each of `slices`, each run of consecutive ones by itself: others are not looked at.

    A run thinner than the patch is continued by reflection at both ends.

    Args:
        segmenter: of a regime in 3D, in eval mode.
        image: (Z, Y, X) uint8, may be memory-mapped.
        slices: numbers in z.
        overlap: share of a window that neighbours cover too, on each axis; None: what the segmenter was set up with.
        aligner: of the dataset.
        flips: mean over each window and its mirror images, in plane.

    Yields:
        The number of a slice and (Y, X) float32 in [0, 1] at the slice's own resolution; numbers rise.
    """
    geo = geometry(
        (image.shape[1], image.shape[2]), segmenter.spec, segmenter.backbone.arch.patch, aligner
    )
    share = segmenter.spec.overlap if overlap is None else overlap
    depth = segmenter.regime.patch[0]
    for run in runs_of(slices):
        shown, before = continued(run, depth)
        read = functools.partial(_entering, image, geo, shown)
        for at, probability in blended(
            segmenter, read, window_starts(len(shown), depth, share), geo.tile, share, flips
        ):
            if before <= at < before + len(run):
                yield run[at - before], to_native(probability, geo)


def _entering(image: Grey, geo: Geometry, shown: npt.NDArray[np.int64], at: int) -> Grey:
    return to_input(np.asarray(image[shown[at]]), geo)


def continued(run: Sequence[int], depth: int) -> tuple[npt.NDArray[np.int64], int]:
    """A run of slices, reflected at both ends until it is as long as a patch is deep, and how many come before its first."""
    missing = max(0, depth - len(run))
    return np.pad(
        np.asarray(run, np.int64), (missing // 2, missing - missing // 2), mode="symmetric"
    ), missing // 2


def blended(
    segmenter: Segmenter,
    read: Callable[[int], Grey],
    starts: Sequence[int],
    window: tuple[int, int],
    share: float,
    flips: bool = False,
) -> Iterator[tuple[int, Probability]]:
    """Slice after slice as soon as no further window covers it, of windows along z that begin at `starts`.

    Args:
        segmenter: of a regime in 3D, in eval mode.
        read: (h, w) uint8 of a slice as the model sees it, by its number; h and w are at least those of the window.
        starts: the windows' first slices, rising, without gaps between windows.
        window: (h, w) in plane.
        share: of a window that its neighbours in plane cover too.
        flips: mean over each window and its mirror images.

    Yields:
        The number of a slice and (h, w) float32 in [0, 1].
    """
    depth, mirrors = segmenter.regime.patch[0], FLIPS if flips else FLIPS[:1]
    weight = gaussian((depth,))
    total: Probability | None = None
    weights = np.zeros(depth, np.float32)
    for start, following in itertools.pairwise([*starts, starts[-1] + depth]):
        slab = np.stack([read(z) for z in range(start, start + depth)])
        total = np.zeros(slab.shape, np.float32) if total is None else total
        total += _slab(segmenter, slab, window, share, mirrors) * weight[:, None, None]
        weights += weight
        done = following - start
        for k in range(done):
            yield start + k, total[k] / weights[k]
        for array in (total, weights):  # what is left moves to the front
            array[: depth - done], array[depth - done :] = array[done:].copy(), 0


def window_starts(length: int, side: int, share: float) -> list[int]:
    """Where windows of `side` begin that cover an axis of `length`, as MONAI's `sliding_window_inference` places them."""
    step = max(1, int(side * (1 - share)))
    return [*range(0, length - side, step), length - side]


def gaussian(window: Sequence[int]) -> Weights:
    """MONAI's weight of each voxel of a window of any number of axes, largest in its middle; never 0."""
    return np.asarray(
        monai_part("data.utils").compute_importance_map(tuple(window), mode="gaussian").numpy(),
        dtype=np.float32,
    )


@torch.inference_mode()
def _slab(
    segmenter: Segmenter,
    slab: Grey,
    window: tuple[int, int],
    share: float,
    mirrors: Sequence[tuple[int, ...]],
) -> Probability:
    """Probabilities (z, H, W) of one row of windows as deep as the slab (z, H, W)."""
    sliding_window_inference = monai_part("inferers").sliding_window_inference
    on = next(segmenter.head.parameters()).device
    weights = torch.from_numpy(gaussian(window))[None].expand(len(slab), *window)

    def foreground(batch: torch.Tensor) -> torch.Tensor:
        found = []
        for axes in mirrors:
            with autocast(segmenter.spec.precision):
                logits = segmenter(batch.flip(axes), window)
            found.append(logits.float().softmax(1)[:, 1:].flip(axes))
        return torch.stack(found).mean(0) if len(found) > 1 else found[0]

    found = sliding_window_inference(
        as_input(slab).transpose(0, 1)[None],
        (len(slab), *window),
        BATCH,
        foreground,
        overlap=(0.0, share, share),
        mode="gaussian",
        roi_weight_map=weights,
        sw_device=on,
        device="cpu",
    )
    return np.asarray(torch.as_tensor(found)[0, 0].numpy(), dtype=np.float32)
