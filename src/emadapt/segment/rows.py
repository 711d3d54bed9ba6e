"""A part of a volume through a model, with the same result as if the whole volume were in memory.

Tiles and windows have fixed places in the whole volume. A part needs the slices and rows that are
covered by those which reach into it. So parts can be segmented one by one, in any order, and leave
no seams. (Of a volume that is resampled, a grey value may be rounded another way.) `view_of` is the only place that asks whether a model works in 2D or in 3D.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from emadapt.data.crops import as_input
from emadapt.data.tiles import Geometry, Grey, around, window
from emadapt.models.predict import along_z, continued, window_starts
from emadapt.models.segmenter import BATCH_TILES, Probability, Segmenter

Read = Callable[[int, int, int], Grey]
"""(z, y0, y1) -> rows [y0, y1) of slice z as (y1 - y0, X) uint8, aligned, not yet resized."""
Enter = Callable[[int], Grey]
"""z -> rows of slice z as they enter the model, resized and padded."""
Range = tuple[int, int]
"""First and end of some slices or rows."""


class View(Protocol):
    """How a model looks at a volume.

    Attributes:
        depth: slices of a window.
        step: slices from one window to the next.
    """

    depth: int
    step: int

    def slices(self, z0: int, z1: int) -> Range:
        """Slices that the model must see for [z0, z1)."""

    def rows(self, r0: int, r1: int) -> Range:
        """Rows of the padded slice that it must see for rows [r0, r1) of the resized slice."""

    def predict(
        self, enter: Enter, z0: int, z1: int, rows: Range
    ) -> Iterator[tuple[int, Probability]]:
        """Slice number and probability of these rows, for each slice in [z0, z1)."""

    def seen(self, enter: Enter, z: int) -> Grey:
        """(h, w) of a slice, or (h, w, 3) where the model sees it with its neighbours."""


class TileView:
    """Slices one by one, in tiles; a model with `context` also sees the slices below and above."""

    depth = step = 1

    def __init__(self, segmenter: Segmenter, geo: Geometry, length: int) -> None:
        self.segmenter, self.geo, self.length = segmenter, geo, length
        self.context = segmenter.spec.context

    def slices(self, z0: int, z1: int) -> Range:
        """See `View`."""
        return max(z0 - self.context, 0), min(z1 + self.context, self.length)

    def rows(self, r0: int, r1: int) -> Range:
        """See `View`."""
        tops = sorted({y for y, _ in self.geo.corners()})
        return _covered(tops, self.geo.tile[0], r0, r1)

    def predict(
        self, enter: Enter, z0: int, z1: int, rows: Range
    ) -> Iterator[tuple[int, Probability]]:
        """See `View`."""
        (top, bottom), (h, w) = rows, self.geo.tile
        corners = [(y - top, x) for y, x in self.geo.corners() if top <= y <= bottom - h]
        weights = window(self.geo.tile)
        enter = functools.lru_cache(maxsize=3)(enter)
        for z in range(z0, z1):
            image = self.seen(enter, z)
            total, weight = np.zeros((2, *image.shape[:2]), np.float32)
            for start in range(0, len(corners), BATCH_TILES):
                some = corners[start : start + BATCH_TILES]
                tiles = torch.stack([as_input(image[y : y + h, x : x + w]) for y, x in some])
                found = self.segmenter.foreground(tiles, self.geo.tile)
                for tile, (y, x) in zip(found, some, strict=True):
                    total[y : y + h, x : x + w] += tile * weights
                    weight[y : y + h, x : x + w] += weights
            yield z, total / weight

    def seen(self, enter: Enter, z: int) -> Grey:
        """See `View`."""
        if not self.context:
            return enter(z)
        return np.stack([enter(k) for k in around(z, 0, self.length - 1)], -1)


class WindowView:
    """Windows of several slices at once, for a model in 3D."""

    def __init__(self, segmenter: Segmenter, geo: Geometry, length: int) -> None:
        self.segmenter, self.geo = segmenter, geo
        self.depth = segmenter.depth
        self.step = max(1, int(self.depth * (1 - geo.overlap)))
        self.shown, self.before = continued(range(length), self.depth)

    def slices(self, z0: int, z1: int) -> Range:
        """See `View`."""
        first, end = _covered(self.starts(), self.depth, z0 + self.before, z1 + self.before)
        seen = self.shown[first:end]
        return int(seen.min()), int(seen.max()) + 1

    def rows(self, r0: int, r1: int) -> Range:
        """See `View`."""
        tops = window_starts(self.geo.padded[0], self.geo.tile[0], self.geo.overlap)
        return _covered(tops, self.geo.tile[0], r0, r1)

    def predict(
        self, enter: Enter, z0: int, z1: int, rows: Range
    ) -> Iterator[tuple[int, Probability]]:
        """See `View`."""
        first, end = z0 + self.before, z1 + self.before
        starts = [n for n in self.starts() if n < end and n + self.depth > first]

        def slab(start: int) -> Probability:
            shown = [enter(int(z)) for z in self.shown[start : start + self.depth]]
            return self.segmenter.slab(np.stack(shown), self.geo)

        found = along_z(slab, starts, self.depth)
        return ((at - self.before, p) for at, p in found if first <= at < end)

    def seen(self, enter: Enter, z: int) -> Grey:
        """See `View`."""
        return enter(z)

    def starts(self) -> list[int]:
        """First slices of the windows, counted from the first one that is shown."""
        return window_starts(len(self.shown), self.depth, self.geo.overlap)


def view_of(segmenter: Segmenter, geo: Geometry, length: int) -> View:
    """How a model looks at a volume of `length` slices."""
    kind = WindowView if segmenter.depth > 1 else TileView
    return kind(segmenter, geo, length)


def native_rows(view: View, geo: Geometry, y0: int, y1: int) -> Range:
    """Rows of a slice that must be read to segment rows [y0, y1)."""
    top, bottom = view.rows(*_resized_rows(geo, y0, y1))
    return _rows_below(geo.native[0], geo.resized[0], top, min(bottom, geo.resized[0]), 2)


def predict_rows(
    view: View, read: Read, geo: Geometry, z: Range, y: Range
) -> Iterator[tuple[int, Probability]]:
    """Foreground probability of a part of a volume.

    Args:
        view: of the model.
        read: gives the slices `view.slices(*z)` and the rows `native_rows(view, geo, *y)`.
        geo: of the whole slices.
        z: slices [first, end).
        y: rows [first, end), whole rows.

    Yields:
        The number of a slice and (rows, X) float32 in [0, 1].
    """
    (y0, y1), (first, end) = y, _resized_rows(geo, *y)
    rows = view.rows(first, end)
    scale = geo.resized[0] / geo.native[0]
    for number, found in view.predict(lambda k: entering(read, geo, k, *rows), *z, rows):
        merged = found[first - rows[0] : end - rows[0], : geo.resized[1]]
        place = y0 * scale - first, y1 * scale - first
        size = y1 - y0, geo.native[1]
        yield number, _resized(merged, size, place, Image.Resampling.BILINEAR)


def entering(read: Read, geo: Geometry, z: int, top: int, bottom: int) -> Grey:
    """Rows [top, bottom) of a slice as the model sees them: resized bicubically, then padded."""
    stop = min(bottom, geo.resized[0])
    n0, n1 = _rows_below(geo.native[0], geo.resized[0], top, stop, 2)
    scale = geo.native[0] / geo.resized[0]
    place = top * scale - n0, stop * scale - n0
    size = stop - top, geo.resized[1]
    rows = _resized(read(z, n0, n1), size, place, Image.Resampling.BICUBIC)
    missing = [(0, bottom - stop), (0, geo.padded[1] - geo.resized[1])]
    return np.pad(rows, missing, mode="symmetric") if missing != [(0, 0), (0, 0)] else rows


def _covered(starts: list[int], side: int, first: int, end: int) -> Range:
    """What the windows cover that reach into [first, end)."""
    inside = [start for start in starts if start < end and start + side > first]
    return inside[0], inside[-1] + side


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
    rows: npt.NDArray[Any],
    size: tuple[int, int],
    place: tuple[float, float],
    how: Image.Resampling,
) -> npt.NDArray[Any]:
    """Pillow's resize, of the rows between the two edges of `place`.

    First along x, then along y: Pillow chooses the order by the size of a part and rounds in
    between, which would leave seams.
    """
    height, width = size
    if rows.shape[1] != width:
        wide = Image.fromarray(np.ascontiguousarray(rows))
        rows = np.asarray(wide.resize((width, len(rows)), how))
    if place == (0, len(rows)) and height == len(rows):
        return rows
    image = Image.fromarray(np.ascontiguousarray(rows))
    return np.asarray(image.resize((width, height), how, (0, place[0], width, place[1])))
