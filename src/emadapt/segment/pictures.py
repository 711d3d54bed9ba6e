"""Pictures for the pages of `preview` and `measure`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from emadapt.report.html import data_address
from emadapt.volumes.source import Array

GREEN = np.array([0x00, 0x9E, 0x73], np.float32)
"""Colour of foreground, also for colour-blind eyes (Okabe and Ito 2008)."""


def overlay(image: Array, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """(h, w, 3): the image with the mask tinted and its outline drawn."""
    from scipy.ndimage import binary_erosion

    out = np.repeat(image[..., None], 3, 2).astype(np.float32)
    out[mask] = 0.65 * out[mask] + 0.35 * GREEN
    out[mask & ~binary_erosion(mask, iterations=2, border_value=1)] = GREEN
    return out.astype(np.uint8)


def picture(array: npt.NDArray[Any]) -> str:
    """A PNG as a data address."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", optimize=True)
    return data_address(file.getvalue())
