"""A part of a volume through a model, with the same result as if the whole volume were in memory.

Tiles and blocks of slices have fixed places in the whole volume. A part needs the slices and rows
that are covered by those which reach into it. So parts can be segmented one by one, in any order,
and leave no seams. (Of a volume that is resampled, a grey value may be rounded another way.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from emadapt.data.tiles import Geometry, Grey, around, window_starts
from emadapt.models.predict import along_z, continued
from emadapt.models.segmenter import Probability, Segmenter

Read = Callable[[int, int, int], Grey]
"""(z, y0, y1) -> rows [y0, y1) of slice z as (y1 - y0, X) uint8, aligned, not yet resized."""
Range = tuple[int, int]
"""First and end of some slices or rows."""


@dataclass(frozen=True)
class Strip(Geometry):
    """Rows from `top` on of padded slices, with the tiles of the `whole` slices."""

    whole: Geometry | None = None
    top: int = 0

    def corners(self, overlap: float | None = None) -> list[tuple[int, int]]:
        """Upper left corners (y, x), in the strip, of the tiles that are inside."""
        assert self.whole is not None
        last = self.padded[0] - self.tile[0]
        found = ((y - self.top, x) for y, x in self.whole.corners(overlap))
        return [(y, x) for y, x in found if 0 <= y <= last]


class View:
    """How a model looks at a volume of `length` slices.

    It is sure of `depth` slices at once, and the next such block starts `step` slices on.
    """

    def __init__(self, segmenter: Segmenter, geo: Geometry, length: int) -> None:
        self.segmenter, self.geo, self.length = segmenter, geo, length
        self.depth, self.context = segmenter.depth, segmenter.spec.context
        self.step = max(1, int(self.depth * (1 - geo.overlap)))
        self.shown, self.before = continued(range(length), self.depth)
        self.starts = window_starts(len(self.shown), self.depth, geo.overlap)

    def slices(self, z0: int, z1: int) -> Range:
        """Slices that the model must see for [z0, z1)."""
        inside = _reaching(self.starts, self.depth, z0 + self.before, z1 + self.before)
        seen = self.shown[inside[0] : inside[-1] + self.depth]
        first, end = int(seen.min()) - self.context, int(seen.max()) + 1 + self.context
        return max(first, 0), min(end, self.length)

    def rows(self, y0: int, y1: int) -> Range:
        """Rows of the padded slice that it must see for rows [y0, y1)."""
        inside = _reaching(
            self.segmenter.tops(self.geo), self.geo.tile[0], *_resized_rows(self.geo, y0, y1)
        )
        return inside[0], inside[-1] + self.geo.tile[0]

    def native_rows(self, y0: int, y1: int) -> Range:
        """Rows of the slice itself that must be read for rows [y0, y1)."""
        top, bottom = self.rows(y0, y1)
        height = self.geo.resized[0]
        return _rows_below(self.geo.native[0], height, top, min(bottom, height), 2)

    def predict(self, read: Read, z: Range, y: Range) -> Iterator[tuple[int, Probability]]:
        """Foreground probability of slices `z` and rows `y`, both [first, end).

        `read` gives the slices `slices(*z)` and the rows `native_rows(*y)`.

        Yields:
            The number of a slice and (rows, X) float32 in [0, 1], or (classes, rows, X).
        """
        geo, (top, bottom), (first, end) = self.geo, self.rows(*y), _resized_rows(self.geo, *y)
        size, scale = (bottom - top, geo.padded[1]), geo.resized[0] / geo.native[0]
        strip = Strip(**{**vars(geo), "padded": size}, whole=geo, top=top)
        z0, z1 = z[0] + self.before, z[1] + self.before

        @functools.lru_cache(maxsize=2 * self.context + 1)
        def enter(k: int) -> Grey:
            return entering(read, geo, k, top, bottom)

        def slab(start: int) -> Probability:
            block = self.shown[start : start + self.depth]
            return self.segmenter.slab(np.stack([self.seen(enter, int(k)) for k in block]), strip)

        starts = _reaching(self.starts, self.depth, z0, z1)
        for at, found in along_z(slab, starts, self.depth):
            if z0 <= at < z1:
                merged = found[..., first - top : end - top, : geo.resized[1]]
                place = y[0] * scale - first, y[1] * scale - first
                shape = y[1] - y[0], geo.native[1]
                yield at - self.before, _resized(merged, shape, place, Image.Resampling.BILINEAR)

    def seen(self, enter: Callable[[int], Grey], z: int) -> Grey:
        """(h, w) of a slice, or (h, w, 3) if the model sees it with its neighbours."""
        if not self.context:
            return enter(z)
        return np.stack([enter(k) for k in around(z, 0, self.length - 1)], -1)


def entering(read: Read, geo: Geometry, z: int, top: int, bottom: int) -> Grey:
    """Rows [top, bottom) of a slice as they enter a model: resized bicubically, then padded."""
    stop = min(bottom, geo.resized[0])
    n0, n1 = _rows_below(geo.native[0], geo.resized[0], top, stop, 2)
    scale = geo.native[0] / geo.resized[0]
    place = top * scale - n0, stop * scale - n0
    size = stop - top, geo.resized[1]
    rows = _resized(read(z, n0, n1), size, place, Image.Resampling.BICUBIC)
    missing = [(0, bottom - stop), (0, geo.padded[1] - geo.resized[1])]
    return np.pad(rows, missing, mode="symmetric") if missing != [(0, 0), (0, 0)] else rows


def _reaching(starts: list[int], side: int, first: int, end: int) -> list[int]:
    """Of tiles or blocks those that reach into [first, end)."""
    return [start for start in starts if start < end and start + side > first]


def _resized_rows(geo: Geometry, y0: int, y1: int) -> Range:
    """Rows of the resized slice that rows [y0, y1) of the slice are made of."""
    return _rows_below(geo.resized[0], geo.native[0], y0, y1, 1)


def _rows_below(n_in: int, n_out: int, first: int, end: int, taps: int) -> Range:
    """Of n_in rows those that rows [first, end) of n_out depend on, by a filter of so many taps."""
    if n_in == n_out:
        return first, end
    scale = n_in / n_out
    reach = taps * max(scale, 1.0) + 1
    start, stop = math.floor(first * scale - reach), math.ceil(end * scale + reach)
    return max(start, 0), min(stop, n_in)


def _resized(
    rows: npt.NDArray[Any], size: tuple[int, int], place: tuple[float, float], how: Image.Resampling
) -> npt.NDArray[Any]:
    """Pillow's resize, of the rows between the two edges of `place`.

    First along x, then along y: Pillow chooses the order by the size of a part and rounds in
    between, which would leave seams. Of (classes, rows, X) each class.
    """
    if rows.ndim > 2:
        return np.stack([_resized(own, size, place, how) for own in rows])
    height, width = size
    if rows.shape[1] != width:
        wide = Image.fromarray(np.ascontiguousarray(rows))
        rows = np.asarray(wide.resize((width, len(rows)), how))
    if place == (0, len(rows)) and height == len(rows):
        return rows
    image = Image.fromarray(np.ascontiguousarray(rows))
    return np.asarray(image.resize((width, height), how, (0, place[0], width, place[1])))
