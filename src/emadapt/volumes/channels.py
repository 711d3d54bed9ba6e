"""Grey values of slices that are stored with colour or alpha channels."""

from __future__ import annotations

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.source import Array


def single_channel(array: Array, what: str) -> Array:
    """The grey values of a slice: (Y, X), or (Y, X, channels) with grey and alpha, RGB or RGBA."""
    if array.ndim == 2 and min(array.shape) > 1:
        return array
    if array.ndim != 3 or array.shape[-1] not in (2, 3, 4):
        raise InputError(
            what,
            found=f"an array of shape {array.shape}",
            expected="a grey slice (Y, X)",
            do="Check the dataset's `layout`: one file a slice, or one stack.",
        )
    colours, alpha = array[..., : 1 if array.shape[-1] == 2 else 3], array[..., -1]
    if (colours != colours[..., :1]).any():
        found, do = "a colour image whose channels differ", "Export it in grey, or a label as ids."
        do += " (tifffile writes 3 or 4 slices so without photometric='minisblack'.)"
        raise InputError(what, found=found, expected="grey values", do=do)
    if array.shape[-1] != 3 and (alpha != alpha.flat[0]).any():
        raise InputError(
            what,
            found=f"transparent pixels (alpha from {alpha.min()} to {alpha.max()})",
            expected="an image that is opaque everywhere",
            do="Export it without an alpha channel.",
        )
    return np.ascontiguousarray(colours[..., 0])
