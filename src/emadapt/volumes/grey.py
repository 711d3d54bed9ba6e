"""Grey values of 16 bits or floats as 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.volumes.source import Array

PERCENTILES = (0.5, 99.5)
SAMPLE_PER_SLICE = 65_536  # voxels of a slice that percentiles are taken of


def grey_window(slices: Iterable[Array], what: str | Path) -> tuple[float, float]:
    """The grey values that become 0 and 255: `PERCENTILES` of slices (Y, X) of one dtype.

    Slices of 8 bits stay as they are.

    Raises:
        InputError: all have one value.
    """
    sample = []
    for image in slices:
        if image.dtype == np.uint8:
            return 0.0, 255.0
        flat = image.ravel()
        step = max(1, flat.size // SAMPLE_PER_SLICE)
        sample.append(flat[::step][:SAMPLE_PER_SLICE].astype(np.float32))
    low, high = (float(v) for v in np.percentile(np.concatenate(sample), PERCENTILES))
    if not high > low:
        found = f"a constant image (all {low:g})"
        raise InputError(
            what, found=found, expected="grey values that differ", do="Check the export."
        )
    return low, high


def to_uint8(image: Array, low: float, high: float) -> npt.NDArray[np.uint8]:
    """Map [low, high] linearly to [0, 255], clipped; 8 bits with 0 and 255 stay as they are."""
    if image.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return np.asarray(image, dtype=np.uint8)
    scaled = (image.astype(np.float32) - low) * (255.0 / max(high - low, 1e-12))
    return np.asarray(np.clip(np.round(scaled), 0, 255), dtype=np.uint8)
