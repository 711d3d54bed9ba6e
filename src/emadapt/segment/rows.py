"""A slice as a stream of rows: what `emadapt.models.predict.predict_slice` gives, without ever holding the slice.

The grid of tiles belongs to the whole slice, its batches are numbered over the whole slice, and tiles are added up in the
order of that grid. A part of a slice therefore has the same bytes, however the slice is cut into parts. Resizing is
Pillow's, as in training; along y it is done here, with weights that belong to the whole slice, for some rows at a time.
(Pillow resizes y first where that is less work, and rounds in between: then a grey value may differ from its by one.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from emadapt.data.crops import as_input
from emadapt.data.tiles import Geometry, Grey, window
from emadapt.models.predict import BATCH_TILES, Probability, over_flips
from emadapt.models.segmenter import Segmenter

Read = Callable[[int, int], Grey]
"""Rows [y0, y1) of a slice as (y1 - y0, X) uint8, at its own resolution, aligned; with its neighbours (y1 - y0, X, 3)."""

FETCH = 2**22
"""Pixels of a slice that are read and resized at once, where a batch of tiles does not need more."""
_BITS = 22  # of Pillow's fixed point numbers for 8-bit images


@dataclass(frozen=True)
class Taps:
    """How an axis is resampled, for all of its n output pixels.

    Attributes:
        first: (n,) the first input pixel that counts.
        stop: (n,) the first one after it that does not count any more.
        weights: (n, k) float64, zeros where there are fewer than k.
    """

    first: npt.NDArray[np.int64]
    stop: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]


def taps(n_in: int, n_out: int, how: Image.Resampling) -> Taps:
    """Weights of Pillow's resize along an axis, BILINEAR or BICUBIC (libImaging/Resample.c, precompute_coeffs)."""
    bicubic = how == Image.Resampling.BICUBIC
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * stretch
    centre = (np.arange(n_out) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + support + 0.5).astype(np.int64), n_in)
    place = first[:, None] + np.arange(int((stop - first).max()))
    x = np.abs((place - centre[:, None] + 0.5) * (1.0 / stretch))
    near, far = (
        ((1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
        if bicubic
        else (1 - x, np.zeros_like(x))
    )
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[place >= stop[:, None]] = 0
    total = np.zeros(n_out)
    for column in weights.T:  # one after the other, as Pillow adds them up
        total += column
    return Taps(first, stop, weights / total[:, None])


def grey_rows(rows: Grey, start: int, t: Taps, y0: int, y1: int) -> Grey:
    """Resampled rows [y0, y1) of an 8-bit slice, of which `rows` (n, X) are those from `start` on."""
    fixed = np.trunc(t.weights[y0:y1] * (1 << _BITS) + np.copysign(0.5, t.weights[y0:y1])).astype(
        np.int32
    )
    total = np.full((y1 - y0, rows.shape[1]), 1 << (_BITS - 1), np.int32)
    for k in range(fixed.shape[1]):
        total += fixed[:, k, None] * rows[np.minimum(t.first[y0:y1] + k - start, len(rows) - 1)]
    return np.clip(total >> _BITS, 0, 255).astype(np.uint8)


def real_rows(rows: Probability, start: int, t: Taps, y0: int, y1: int) -> Probability:
    """The same of a slice of float32."""
    total = np.zeros((y1 - y0, rows.shape[1]))
    for k in range(t.weights.shape[1]):
        total += (
            t.weights[y0:y1, k, None] * rows[np.minimum(t.first[y0:y1] + k - start, len(rows) - 1)]
        )
    return total.astype(np.float32)


def predict_rows(
    segmenter: Segmenter, read: Read, geo: Geometry, y0: int, y1: int, flips: bool = False
) -> Iterator[Probability]:
    """Foreground probability of rows [y0, y1) of a slice, a few of them at a time.

    Memory grows with the width of the slice and the height of a tile, not with the number of rows.

    Args:
        segmenter: in eval mode, adapters merged.
        read: gives rows of the slice; they are asked for from the top down, some of them twice.
        geo: of the whole slice.
        y0: the first row.
        y1: the row after the last.
        flips: mean over each tile and its mirror images in y, in x and in both.

    Yields:
        (n, X) float32 in [0, 1], consecutive rows at the slice's own resolution.
    """
    back = (
        taps(geo.resized[0], geo.native[0], Image.Resampling.BILINEAR)
        if geo.resized[0] != geo.native[0]
        else None
    )
    a, b = (int(back.first[y0]), int(back.stop[y1 - 1])) if back else (y0, y1)
    merged = (
        (start, resized_along_x(rows, geo.native[1], Image.Resampling.BILINEAR))
        for start, rows in _merged(segmenter, Input(read, geo), geo, a, b, flips)
    )
    if back is None:
        yield from (rows for _, rows in merged)
        return
    held, start = np.empty((0, geo.native[1]), np.float32), a
    for _, rows in merged:
        held = np.concatenate([held, rows])
        stop = min(y1, int(np.searchsorted(back.stop, start + len(held), side="right")))
        if stop > y0:
            yield real_rows(held, start, back, y0, stop)
            y0 = stop
            if y0 < y1:
                held, start = held[back.first[y0] - start :], int(back.first[y0])


def _merged(
    segmenter: Segmenter, image: Input, geo: Geometry, a: int, b: int, flips: bool
) -> Iterator[tuple[int, Probability]]:
    """Blended rows of the resized slice from row `a` to `b`, each with the number of its first row."""
    (h, w), corners, hann = geo.tile, geo.corners(), window(geo.tile)
    batches = [corners[i : i + BATCH_TILES] for i in range(0, len(corners), BATCH_TILES)]
    batches = [batch for batch in batches if any(y < b and y + h > a for y, _ in batch)]
    base, height = batches[0][0][0], max(batch[-1][0] + h - batch[0][0] for batch in batches)
    total, weight = np.zeros((2, height, geo.padded[1]), np.float32)
    for number, batch in enumerate(batches):
        tiles = over_flips(segmenter, image.tiles(batch), geo.tile, flips)
        for tile, (y, x) in zip(tiles, batch, strict=True):
            total[y - base : y - base + h, x : x + w] += tile * hann
            weight[y - base : y - base + h, x : x + w] += hann
        after = batches[number + 1][0][0] if number + 1 < len(batches) else b
        first, stop = (
            max(base, a),
            min(after, b),
        )  # no tile that is still to come covers rows above `after`
        if stop > first:
            yield (
                first,
                (total[first - base : stop - base] / weight[first - base : stop - base])[
                    :, : geo.resized[1]
                ],
            )
        if number + 1 < len(batches):
            for array in (total, weight):
                kept = array[after - base :].copy()
                array[: len(kept)], array[len(kept) :] = kept, 0
            base = after


class Input:
    """Rows of a slice as the backbone sees them: resized bicubically and padded by reflection, as `to_input` does."""

    def __init__(self, read: Read, geo: Geometry) -> None:
        self.read, self.geo = read, geo
        same = geo.resized[0] == geo.native[0]
        self.taps = None if same else taps(geo.native[0], geo.resized[0], Image.Resampling.BICUBIC)
        self.source = _reflected(
            *geo.resized, geo.padded, 0
        )  # which resized row each padded row is
        self.columns = _reflected(*geo.resized, geo.padded, 1)
        self.start, self.held = 0, np.empty((0, geo.padded[1]), np.uint8)

    def tiles(self, corners: list[tuple[int, int]]) -> torch.Tensor:
        """Tiles at these corners of the padded slice, (n, 1 or 3, h, w) in [0, 1]."""
        h, w = self.geo.tile
        top, bottom = corners[0][0], corners[-1][0] + h
        if top < self.start or bottom > self.start + len(self.held):
            more = max(bottom, min(self.geo.padded[0], top + FETCH // self.geo.padded[1]))
            self.start, self.held = top, self.rows(top, more)
        y0 = self.start
        return torch.stack(
            [as_input(self.held[y - y0 : y - y0 + h, x : x + w]) for y, x in corners]
        )

    def native(self, top: int, bottom: int) -> tuple[int, int]:
        """Rows of the slice itself that rows [top, bottom) of the padded slice are made of."""
        r0, r1 = self._resized_rows(top, bottom)
        return (
            (r0, r1)
            if self.taps is None
            else (int(self.taps.first[r0]), int(self.taps.stop[r1 - 1]))
        )

    def rows(self, top: int, bottom: int) -> Grey:
        """Rows [top, bottom) of the padded slice."""
        wanted = self.source[top:bottom]
        r0, r1 = self._resized_rows(top, bottom)
        n0, n1 = self.native(top, bottom)
        shown = self.read(n0, n1)
        if shown.ndim == 2:
            rows = self._resampled(shown, n0, r0, r1)
        else:
            rows = np.stack(
                [self._resampled(shown[..., k], n0, r0, r1) for k in range(shown.shape[-1])], -1
            )
        return np.ascontiguousarray(rows[wanted - r0][:, self.columns])

    def _resized_rows(self, top: int, bottom: int) -> tuple[int, int]:
        wanted = self.source[top:bottom]
        return int(wanted.min()), int(wanted.max()) + 1

    def _resampled(self, shown: Grey, start: int, r0: int, r1: int) -> Grey:
        """Rows [r0, r1) of the resized slice, of which `shown` are the native rows from `start` on."""
        wide = resized_along_x(shown, self.geo.resized[1], Image.Resampling.BICUBIC)
        return wide if self.taps is None else grey_rows(wide, start, self.taps, r0, r1)


def _reflected(
    height: int, width: int, padded: tuple[int, int], axis: int
) -> npt.NDArray[np.int64]:
    """For each padded row (axis 0) or column (1) the one of the resized slice that it repeats."""
    n = (height, width)[axis]
    return np.pad(np.arange(n), (0, padded[axis] - n), mode="symmetric")


def resized_along_x(rows: npt.NDArray[Any], width: int, how: Image.Resampling) -> npt.NDArray[Any]:
    """Rows (n, X) resized along x alone."""
    if rows.shape[1] == width:
        return rows
    return np.asarray(Image.fromarray(np.ascontiguousarray(rows)).resize((width, len(rows)), how))
