"""Probabilities of the slices of a volume, from images or from cached tokens.

A model sees blocks of neighbouring slices, most models of a single one. Blocks overlap along z and
are blended there with Gaussian weights; memory holds one block, not the volume.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from emadapt.data.ingest import Volume
from emadapt.data.splits import runs_of
from emadapt.data.tiles import Geometry, geometry_of, merge_tiles, to_native, window_starts
from emadapt.models.segmenter import BATCH_TILES, Probability, Segmenter
from emadapt.models.tokens import TokenView

Slab = Callable[[int], Probability]
"""The first slice of a block to the probabilities of its slices, as `Segmenter.slab` gives them."""


def predict_slices(
    segmenter: Segmenter,
    volume: Volume,
    slices: Sequence[int],
    view: TokenView | None = None,
    overlap: float | None = None,
    *,
    smoothed: bool = True,
) -> Iterator[tuple[int, Probability]]:
    """Slice number and probability for each of `slices`.

    Each run of consecutive slices of a part (`train`, `test`, a volume of many) is seen by itself:
    a model of blocks looks at no others, and where a run is thinner than its block, it is continued
    by reflection at both ends.

    Args:
        segmenter: in eval mode; merge LoRA's adapters first to save time.
        volume: the dataset.
        slices: their numbers, rising.
        view: the token cache's plain view of the volume, to be read in the place of images.
        overlap: share of a tile that its neighbours cover too; None: that of the settings.
        smoothed: along z, as `smooth_z_nm` of the settings says.

    Yields:
        The number of a slice and (Y, X) float32 in [0, 1] at its own resolution, of several classes
        (classes, Y, X); numbers rise.
    """
    sigma = segmenter.spec.smooth_z_nm if smoothed else 0.0
    for own in volume.by_part(slices):
        found = _slices(segmenter, volume, own, view, overlap)
        yield from smooth_z(found, sigma / float(volume.manifest["voxel_nm"][0]))


def _slices(
    segmenter: Segmenter,
    volume: Volume,
    slices: Sequence[int],
    view: TokenView | None,
    overlap: float | None,
) -> Iterator[tuple[int, Probability]]:
    geo, depth = geometry_of(volume, segmenter.spec, segmenter.patch), segmenter.depth
    share = geo.overlap if overlap is None else overlap
    for run in runs_of(slices, volume.ends):
        shown, before = continued(run, depth)

        def slab(first: int, shown: npt.NDArray[np.int64] = shown) -> Probability:
            if view is not None:
                return _cached_slab(segmenter, view, int(shown[first]), geo)
            block = [segmenter.shown(volume, int(z), geo) for z in shown[first : first + depth]]
            return segmenter.slab(np.stack(block), geo, overlap)

        for at, found in along_z(slab, window_starts(len(shown), depth, share), depth):
            if before <= at < before + len(run):
                yield run[at - before], to_native(found, geo)


def _cached_slab(segmenter: Segmenter, view: TokenView, z: int, geo: Geometry) -> Probability:
    """Probabilities (1, ..., H, W) of a slice from the cache's plain view; its overlap is fixed."""
    corners = [(int(y), int(x)) for _, y, x in view.index[view.rows_of_slice(z)]]
    tiles = [segmenter.foreground(some, geo.tile) for some in view.batches(z, BATCH_TILES)]
    return merge_tiles(np.concatenate(tiles), corners, geo)[None]


def along_z(slab: Slab, starts: Sequence[int], depth: int) -> Iterator[tuple[int, Probability]]:
    """Slice after slice, as soon as no further block covers it.

    Args:
        slab: probabilities of a block.
        starts: the blocks' first slices, rising, without gaps between blocks.
        depth: slices of a block.

    Yields:
        The number of a slice and (..., H, W) float32 in [0, 1].
    """
    weight = _bell(depth)
    total: Probability | None = None
    weights = np.zeros(depth, np.float32)
    for start, following in itertools.pairwise([*starts, starts[-1] + depth]):
        found = slab(start)
        weighted = found * weight.reshape(-1, *[1] * (found.ndim - 1))
        total = weighted if total is None else np.add(total, weighted, out=total)
        weights += weight
        done = following - start
        for k in range(done):
            yield start + k, total[k] / weights[k]
        for array in (total, weights):  # what is left moves to the front
            array[: depth - done], array[depth - done :] = array[done:].copy(), 0


def continued(run: Sequence[int], depth: int) -> tuple[npt.NDArray[np.int64], int]:
    """A run of slices, reflected at both ends to the depth of a block; and how many came first."""
    missing = max(0, depth - len(run))
    ends = (missing // 2, missing - missing // 2)
    return np.pad(np.asarray(run, np.int64), ends, mode="symmetric"), ends[0]


def _bell(depth: int) -> npt.NDArray[np.float32]:
    """MONAI's Gaussian weight of each slice of a block, largest in its middle, never 0."""
    places = torch.arange(-(depth - 1) / 2, (depth - 1) / 2 + 1)
    weight = torch.exp(places**2 / (-2 * (0.125 * depth) ** 2))
    return np.asarray(weight.clamp_min(max(float(weight.min()), 1e-3)).numpy(), dtype=np.float32)


def smooth_z(
    slices: Iterable[tuple[int, Probability]], sigma: float
) -> Iterator[tuple[int, Probability]]:
    """Mean of each slice and its neighbours with Gaussian weights, in one pass.

    Only slices that are given take part, by their distance in z: what is predicted alone stays as
    it is. A probability of exactly 0 is of a place without an image: it stays, and takes no
    part.

    Args:
        slices: number and probability, numbers rising.
        sigma: standard deviation in slices; the window reaches three of it to each side. Below a
            sixth, slices stay as they are.
    """
    if not (reach := smoothing_reach(sigma)):
        yield from slices
        return
    window: deque[tuple[int, Probability]] = deque()
    waiting: deque[int] = deque()

    def mean(z: int) -> tuple[int, Probability]:
        near = [(other - z, p) for other, p in window if abs(other - z) <= reach]
        weights = [math.exp(-(away**2) / (2 * sigma**2)) for away, _ in near]
        total = sum(w * p for w, (_, p) in zip(weights, near, strict=True))
        seen = sum(w * (p > 0) for w, (_, p) in zip(weights, near, strict=True))
        own = next(p for away, p in near if away == 0)
        return z, np.divide(total, seen, out=np.zeros_like(own), where=own > 0)

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
