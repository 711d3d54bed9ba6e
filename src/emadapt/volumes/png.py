"""PNG images, by Pillow: each is one slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.channels import single_channel
from emadapt.volumes.source import LARGE, Array, Choice, Source, only_one, stamp, unreadable


def open_png(path: Path, choice: Choice) -> Source:
    """A PNG as a volume of one slice."""
    only_one(path, choice)
    first = read_png(path)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return read_png(path)[None, y0:y1]

    return Source(str(path), (1, *first.shape), first.dtype, None, 1, cut, stamp(path), (path,))


def read_png(path: Path) -> Array:
    """The grey values, (Y, X): bool, uint8 or uint16."""
    try:
        array = _decoded(path)
    except InputError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, DecompressionBombError, ...
        raise unreadable(path, "no readable image", error) from error
    return single_channel(array, str(path))


def has_one_bit(path: Path) -> bool:
    """Whether a PNG has 1 bit a pixel, by its header."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.mode == "1"
    except Exception as error:
        raise unreadable(path, "no readable image", error) from error


def check_single(path: Path, image: Any) -> None:
    """Refuse a file of which Pillow would show the first of several images."""
    if (frames := getattr(image, "n_frames", 1)) > 1:
        do = "Export one file for each image."
        raise InputError(path, found=f"{frames} images", expected="one image", do=do)


def _decoded(path: Path) -> Array:
    from PIL import Image

    # PNG only, whatever the name: Pillow would hand PostScript to a program that runs it.
    with Image.open(path, formats=("PNG",)) as image:
        bytes_each = len(image.getbands()) * (2 if _is_wide(image) else 1)
        size = image.width * image.height * bytes_each
        if size > LARGE:
            found, do = f"{size} bytes of pixels", "Export large slices as TIFF, or in grey."
            raise InputError(path, found=found, expected=f"at most {LARGE}", do=do)
        check_single(path, image)
        if _is_wide(image):  # Pillow drops the low bytes of 16-bit colours
            import imagecodecs

            image.load()  # finds truncated files
            return np.asarray(imagecodecs.png_decode(path.read_bytes()))
        transparent = image.mode in ("L", "RGB") and "transparency" in image.info
        return np.asarray(image.convert("RGBA") if transparent or image.mode == "P" else image)


def _is_wide(image: Any) -> bool:
    """Whether it has colours or alpha of 16 bits."""
    return image.mode in ("LA", "RGB", "RGBA") and str(image.tile[0].args).endswith(";16B")
