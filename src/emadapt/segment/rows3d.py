"""Blocks of a volume through a model in 3D: what `emadapt.models.predict3d` gives for the whole of it, which is never held.

Windows have their places in the whole volume. A block looks at those that reach into it, with the slices and rows beside it that
they cover, so that blocks can be segmented one by one, in any order, and leave no seams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from emadapt.data.tiles import Geometry, Grey
from emadapt.models.predict import Probability
from emadapt.models.predict3d import blended, continued, window_starts
from emadapt.models.segmenter import Segmenter
from emadapt.segment.job import Block, Runner
from emadapt.segment.model import WHOLE_SLICE
from emadapt.segment.rows import Input, real_rows, resized_along_x, taps
from emadapt.volumes.grey import to_uint8
from emadapt.volumes.source import Array

Read = Callable[[int, int, int], Grey]
"""(z, y0, y1) -> rows [y0, y1) of slice z as (y1 - y0, X) uint8, at its own resolution, aligned."""


@dataclass(frozen=True)
class Reach:
    """What a block needs.

    Attributes:
        starts: of windows along z, counted from the first slice, or from the first reflected one of a thin volume.
        slices: [first, last) of the volume.
        padded: rows [top, bottom) of the padded slice.
        rows: [top, bottom) of the slice itself, which these are made of.
    """

    starts: tuple[int, ...]
    slices: tuple[int, int]
    padded: tuple[int, int]
    rows: tuple[int, int]


def reach_of(segmenter: Segmenter, geo: Geometry, block: Block, length: int) -> Reach:
    """What a block of a volume of `length` slices needs."""
    depth, share = (
        segmenter.regime.patch[0],
        geo.overlap,
    )  # more than in training where slices of training entered whole
    shown, before = continued(range(length), depth)
    starts = _over(
        window_starts(len(shown), depth, share), depth, block.z0 + before, block.z1 + before
    )
    seen = shown[starts[0] : starts[-1] + depth]
    tops = _over(
        window_starts(geo.padded[0], geo.tile[0], share), geo.tile[0], *_resized_rows(geo, block)
    )
    padded = tops[0], tops[-1] + geo.tile[0]
    return Reach(
        tuple(starts),
        (int(seen.min()), int(seen.max()) + 1),
        padded,
        Input(_nothing, geo).native(*padded),
    )


def predict_rows_3d(
    segmenter: Segmenter, read: Read, geo: Geometry, block: Block, length: int, flips: bool = False
) -> Iterator[tuple[int, Probability]]:
    """Foreground probability of a block.

    Memory holds as many slices of the block's rows as a patch is deep.

    Args:
        segmenter: of a regime in 3D, in eval mode.
        read: gives rows of slices: those of `reach_of`.
        geo: of the whole slices.
        block: whole rows of some slices.
        length: slices of the volume.
        flips: mean over each window and its mirror images, in plane.

    Yields:
        The number of a slice and (rows of the block, X) float32 in [0, 1].
    """
    reach = reach_of(segmenter, geo, block, length)
    shown, before = continued(range(length), segmenter.regime.patch[0])
    first, stop = _resized_rows(geo, block)
    back = (
        taps(geo.resized[0], geo.native[0], Image.Resampling.BILINEAR)
        if geo.resized[0] != geo.native[0]
        else None
    )

    def entering(at: int) -> Grey:
        return Input(functools.partial(read, int(shown[at])), geo).rows(*reach.padded)

    for at, found in blended(segmenter, entering, reach.starts, geo.tile, geo.overlap, flips):
        if block.z0 <= at - before < block.z1:
            own = found[first - reach.padded[0] : stop - reach.padded[0], : geo.resized[1]]
            wide = resized_along_x(own, geo.native[1], Image.Resampling.BILINEAR)
            yield at - before, real_rows(wide, first, back, block.y0, block.y1) if back else wide


class Runner3d(Runner):
    """A job with its volume and a model in 3D open."""

    def load(self, block: Block) -> Array:
        """The slices and rows that the block's windows cover; of alignments that need whole slices, these."""
        reach = self._reach(block)
        return self.source.read(*reach.slices, *self._loaded(reach))

    def probability(
        self, block: Block, loaded: Array | None
    ) -> Iterator[tuple[int, int, Probability]]:
        """The block's slices as they are done: number of the slice, number of the first row, (n, X) in [0, 1]."""
        reach = self._reach(block)
        have = self.load(block) if loaded is None else loaded
        top = self._loaded(reach)[0]

        def read(z: int, y0: int, y1: int) -> Grey:
            image = have[z - reach.slices[0]]
            if self._whole:
                return self.geo.aligner(to_uint8(image, *self.job.window))[y0:y1]
            return self.geo.aligner(to_uint8(image[y0 - top : y1 - top], *self.job.window))

        found = predict_rows_3d(
            self.model.segmenter, read, self.geo, block, self.job.shape[0], self.job.flips
        )
        return ((z, block.y0, np.ascontiguousarray(rows)) for z, rows in found)

    def _reach(self, block: Block) -> Reach:
        return reach_of(self.model.segmenter, self.geo, block, self.job.shape[0])

    def _loaded(self, reach: Reach) -> tuple[int, int]:
        return (0, self.job.shape[1]) if self._whole else reach.rows

    @property
    def _whole(self) -> bool:
        return self.geo.aligner.facts.get("method") in WHOLE_SLICE


def _over(starts: list[int], side: int, first: int, stop: int) -> list[int]:
    """The windows that reach into [first, stop)."""
    return [start for start in starts if start < stop and start + side > first]


def _resized_rows(geo: Geometry, block: Block) -> tuple[int, int]:
    """Rows [first, stop) of the resized slice that the block's are made of."""
    if geo.resized[0] == geo.native[0]:
        return block.y0, block.y1
    back = taps(geo.resized[0], geo.native[0], Image.Resampling.BILINEAR)
    return int(back.first[block.y0]), int(back.stop[block.y1 - 1])


def _nothing(y0: int, y1: int) -> Grey:
    raise AssertionError("asks where rows lie, and reads none")
