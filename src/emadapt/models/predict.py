"""Foreground probabilities of whole slices, from images or from cached tokens: tiles, then a blend without seams."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from emadapt.data.align import AS_IT_IS, Aligner, aligner_of
from emadapt.data.crops import Inputs, as_input
from emadapt.data.ingest import Volume
from emadapt.data.tiles import FLIPS, Grey, blend, geometry, to_input, with_neighbours
from emadapt.models.closest import domain_of
from emadapt.models.device import autocast
from emadapt.models.heads import needs_image
from emadapt.models.predict3d import predict_block
from emadapt.models.sam2 import Sam2
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView

BATCH_TILES = 16

Probability = npt.NDArray[np.float32]


def predict_slice(
    segmenter: Segmenter,
    image: Grey,
    overlap: float | None = None,
    aligner: Aligner = AS_IT_IS,
    flips: bool = False,
) -> Probability:
    """Foreground probability of one slice.

    Args:
        segmenter: in eval mode; for `lora` merge the adapters first to save time.
        image: (Y, X) uint8; for a backbone with `context` (Y, X, 3), see `data.tiles.with_neighbours`.
        overlap: share of a tile that neighbours cover too; None: what the segmenter was set up with.
        aligner: of the slice's dataset.
        flips: mean over each tile and its mirror images.

    Returns:
        (Y, X) float32 in [0, 1], at the slice's own resolution.
    """
    geo = geometry(
        (image.shape[0], image.shape[1]), segmenter.spec, segmenter.backbone.arch.patch, aligner
    )
    padded, (h, w) = to_input(image, geo), geo.tile
    corners = geo.corners(overlap)
    tiles = [as_input(padded[y : y + h, x : x + w]) for y, x in corners]
    batches = [torch.stack(tiles[i : i + BATCH_TILES]) for i in range(0, len(tiles), BATCH_TILES)]
    out = [over_flips(segmenter, batch, geo.tile, flips) for batch in batches]
    return blend(np.concatenate(out), corners, geo)


def predict_cached(
    segmenter: Segmenter,
    view: TokenView,
    z: int,
    native: tuple[int, int],
    aligner: Aligner = AS_IT_IS,
    flips: bool = False,
) -> Probability:
    """The same from the token cache's plain view, for a segmenter whose backbone is frozen (below the view's cut).

    With `flips` the view must come with its mirrored ones (`tokens.plain_view`).
    """
    geo = geometry(native, segmenter.spec, segmenter.backbone.arch.patch, aligner)
    corners = [(int(y), int(x)) for _, y, x in view.index[view.rows_of_slice(z)]]
    seen = (
        [
            np.flip(_cached_tiles(segmenter, shown, z, geo.tile), axes)
            for shown, axes in zip((view, *view.mirrored), FLIPS, strict=True)
        ]
        if flips
        else None
    )
    return blend(_mean(seen) if seen else _cached_tiles(segmenter, view, z, geo.tile), corners, geo)


def _cached_tiles(
    segmenter: Segmenter, view: TokenView, z: int, size: tuple[int, int]
) -> Probability:
    """Probabilities (n, H, W) of a slice's tiles in a view."""
    rows = view.rows_of_slice(z)
    blocks = [
        slice(rows[i], rows[i] + min(BATCH_TILES, len(rows) - i))
        for i in range(0, len(rows), BATCH_TILES)
    ]  # neighbours
    return np.concatenate(
        [
            foreground(segmenter, view.read(block, needs_image(segmenter.head_name)), size)
            for block in blocks
        ]
    )


def predict_slices(
    segmenter: Segmenter,
    volume: Volume,
    slices: list[int],
    view: TokenView | None = None,
    overlap: float | None = None,
    *,
    averaged: bool = True,
) -> Iterator[tuple[int, Probability]]:
    """Slice number and probability for each of `slices` (rising), from the cache where a view is given.

    `averaged`: smoothed along z (`smooth_z_nm`) and over mirror images (`flips`), as the backbone's settings say. A regime in 3D
    sees runs of consecutive slices together (see `emadapt.models.predict3d`).
    """
    native, aligner = (
        (volume.image.shape[1], volume.image.shape[2]),
        aligner_of(volume, segmenter.spec),
    )
    if segmenter.domains and slices:
        segmenter.use(*domain_of(segmenter, volume, slices, view))
    flips = segmenter.spec.flips and averaged

    def probability(z: int) -> Probability:
        if isinstance(segmenter.backbone, Sam2) and segmenter.backbone.oracle:
            return segmenter.backbone.prompted(
                np.asarray(volume.image[z]), np.asarray(volume.label[z]) > 0
            )
        if view is not None:
            return predict_cached(segmenter, view, z, native, aligner, flips)
        return predict_slice(
            segmenter, with_neighbours(volume, z, segmenter.spec.context), overlap, aligner, flips
        )

    found: Iterator[tuple[int, Probability]] = ((z, probability(z)) for z in slices)
    if segmenter.regime.is_3d:
        found = predict_block(segmenter, volume.image, slices, overlap, aligner, flips)
    sigma = segmenter.spec.smooth_z_nm if averaged else 0.0
    return smooth_z(found, sigma / float(volume.manifest["voxel_nm"][0])) if sigma else found


def smooth_z(
    slices: Iterable[tuple[int, Probability]], sigma: float
) -> Iterator[tuple[int, Probability]]:
    """Means of each slice and its neighbours with Gaussian weights, in one pass with a window of slices in memory.

    Only slices that are there take part, by their distance in z: what is predicted alone stays as it is.

    Args:
        slices: number and probability, numbers rising.
        sigma: standard deviation in slices; the window reaches three of it to each side. Below a sixth, slices stay as they are.
    """
    if not (reach := smoothing_reach(sigma)):
        yield from slices
        return
    window: deque[tuple[int, Probability]] = deque()
    waiting: deque[int] = deque()

    def mean(z: int) -> tuple[int, Probability]:
        near = [
            (math.exp(-((other - z) ** 2) / (2 * sigma**2)), p)
            for other, p in window
            if abs(other - z) <= reach
        ]
        return z, np.asarray(
            sum(w * p for w, p in near) / sum(w for w, _ in near), dtype=np.float32
        )

    for z, probability in slices:
        while waiting and waiting[0] + reach < z:
            yield mean(waiting.popleft())
        while window and window[0][0] + reach < (waiting[0] if waiting else z):
            window.popleft()
        window.append((z, probability))
        waiting.append(z)
    while waiting:
        yield mean(waiting.popleft())


def smoothing_reach(sigma: float) -> int:
    """Slices to each side of which `smooth_z` takes the mean."""
    return int(3 * sigma + 0.5)


def over_flips(
    segmenter: Segmenter, images: torch.Tensor, size: tuple[int, int], flips: bool
) -> Probability:
    """`foreground` of images, with `flips` the mean over their mirror images."""
    if not flips:
        return foreground(segmenter, images, size)
    return _mean([np.flip(foreground(segmenter, images.flip(axes), size), axes) for axes in FLIPS])


def _mean(seen: Sequence[Probability]) -> Probability:
    return np.asarray(sum(seen[1:], seen[0]) / np.float32(len(seen)))


@torch.inference_mode()
def foreground(segmenter: Segmenter, batch: Inputs, size: tuple[int, int]) -> Probability:
    """Foreground probabilities (B, H, W) float32 of images (B, 1 or 3, H, W) in [0, 1], or of what is cached of them."""
    own = itertools.chain(
        segmenter.head.parameters(), segmenter.head.buffers(), segmenter.parameters()
    )
    batch = batch.to(
        next(own).device
    )  # the head of kNN has buffers only, that of an outside system nothing
    with autocast(segmenter.spec.precision):
        logits = segmenter(batch, size)
    return np.asarray(logits.float().softmax(1)[:, 1].cpu().numpy())
