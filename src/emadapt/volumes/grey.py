"""Grey values as 8 bits: which of them become black and white, and where there are none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.volumes.source import Array

PERCENTILES = (0.5, 99.5)
SLICES = 64
"""Slices that percentiles are taken of, evenly spaced."""
SAMPLE_PER_SLICE = 65_536
"""Voxels of a slice that percentiles are taken of, at random places."""
FAINT = 96
"""Values of 8 bits whose percentiles span fewer are stretched; others stay as they are. Those of
the EPFL hippocampus (Lucchi et al. 2012) and of the VNC (Gerhard et al. 2013) span 177 and 218."""
ENOUGH = 2**12
"""Voxels of 8 bits that can tell that a volume is faint."""
FLAT = 9
"""Side, in pixels, of a square of one value that is no image: noise makes neighbours differ."""
REACH = 3 * (FLAT // 2)
"""Pixels to each side on which `constant` depends."""
MIDDLE = np.uint8(128)
"""What models see of such areas: next to black or white, tissue looks like something else."""

Mask = npt.NDArray[np.bool_]


class Window(NamedTuple):
    """The grey values that become 0 and 255, and the share of the sample that was left out."""

    low: float
    high: float
    left_out: float

    def words(self) -> str:
        """In a sentence."""
        left_out = f"; {self.left_out:.1%} of the voxels are constant areas and do not count"
        mapped = f"grey values {self.low:g} to {self.high:g} become 0 to 255"
        return mapped + (left_out if self.is_padded else "")

    @property
    def is_padded(self) -> bool:
        """Whether enough was left out to be worth a word."""
        return self.left_out >= 1e-3


def grey_window(slices: Iterable[Array], what: str | Path) -> Window:
    """`PERCENTILES` of slices (Y, X) of one dtype, without `constant` areas and clipped values.

    Values of 8 bits stay as they are (0, 255) unless they are `FAINT`.

    Raises:
        InputError: all have one value, which is not of 8 bits.
    """
    rng, sample, seen, dtype = np.random.default_rng(0), [], 0, np.dtype(np.uint8)
    for image in slices:
        flat, dtype = image.ravel(), image.dtype
        some: slice | npt.NDArray[np.int64] = slice(None)
        if flat.size > SAMPLE_PER_SLICE:
            some = rng.integers(flat.size, size=SAMPLE_PER_SLICE)
        values = flat[some]
        seen += values.size
        sample.append(values[~constant(image).ravel()[some]].astype(np.float64))
    values = np.concatenate(sample)
    left_out = 1 - values.size / seen
    values = _without_clipped(values)
    low, high = np.percentile(values, PERCENTILES).tolist() if values.size else (0.0, 0.0)
    if dtype == np.uint8 and (values.size < ENOUGH or not 0 < high - low < FAINT):
        return Window(0.0, 255.0, left_out)
    if not high > low:
        found = "a constant image" + (f" (all {low:g})" if values.size else "")
        raise InputError(
            what, found=found, expected="grey values that differ", do="Check the export."
        )
    return Window(low, high, left_out)


def constant(image: Array) -> Mask:
    """Where a slice (Y, X) shows nothing: padding, the canvas around it, an empty slice.

    Squares of `FLAT` pixels of one value, which may reach beyond the slice up to their last two
    rows or columns, and pixels of that value around them.
    """
    import cv2

    known = image.dtype in (np.uint8, np.uint16, np.float32)
    beyond, square = FLAT // 2 - 1, np.ones((FLAT, FLAT), np.uint8)
    values = np.pad(image if known else image.astype(np.float64), beyond, mode="edge")
    middles = cv2.erode(values, square) == cv2.dilate(values, square)
    if not middles.any():
        return np.zeros(image.shape, bool)
    area = cv2.dilate(middles.astype(np.uint8), square) > 0
    own = cv2.dilate(np.where(area, values, values.min()), square)  # of the area around a pixel
    around = (cv2.dilate(area.astype(np.uint8), square) > 0) & (values == own)
    return np.asarray((area | around)[beyond:-beyond, beyond:-beyond])


def _without_clipped(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Without the lowest and the highest value where more have it than the five next to it.

    Such values are dead and hot pixels, or what a detector or an export cut off.
    """
    found, counts = np.unique(values, return_counts=True)
    if len(found) < 16:  # hardly grey values
        return values
    if counts[0] > counts[1:6].sum():
        values = values[values > found[0]]
    if counts[-1] > counts[-6:-1].sum():
        values = values[values < found[-1]]
    return values


def to_uint8(image: Array, low: float, high: float) -> npt.NDArray[np.uint8]:
    """Map [low, high] linearly to [0, 255], clipped; 8 bits with 0 and 255 stay as they are."""
    if image.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return np.asarray(image, dtype=np.uint8)
    exact = np.result_type(image, np.float32)  # 32 bits of integers and 64 of floats need 64
    scaled = np.subtract(image, low, dtype=exact) * (255.0 / max(high - low, 1e-12))
    return np.asarray(np.clip(np.round(scaled), 0, 255), dtype=np.uint8)
