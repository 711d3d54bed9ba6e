"""Read slices of EM volumes and labels, and refuse what cannot be trusted: truncated, coloured, NaN, wrongly shaped."""

from __future__ import annotations

import functools
import math
import re
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from emadapt.data.pairing import SliceRef
from emadapt.errors import InputError
from emadapt.volumes import stacks

Array = npt.NDArray[Any]
PERCENTILES = (0.5, 99.5)
SAMPLE_PER_SLICE = 65_536  # voxels that stand for a slice when percentiles are taken
MAX_SIDE = 65_536  # pixels; a header that asks for more is damaged or hostile
LARGE = 2**28
"""Pixels; slices of TIFFs up to this size are decoded whole, and bytes that a PNG may have."""
MAX_RATIO = 250
"""Unpacked to packed bytes; what unpacks to more than `LARGE` bytes and exceeds it is taken for a bomb."""


def count_slices(path: Path) -> int:
    """Number of z-slices in a TIFF stack, or a volume in NIfTI, HDF5 or Zarr.

    Raises:
        InputError: not a readable stack of axes Z, Y, X (singletons aside).
    """
    return (stacks.open_stack if stacks.is_stack(path) else open_stack)(path).n_slices


def read_slice(ref: SliceRef) -> Array:
    """One grey slice.

    Returns:
        (Y, X) array in the file's own dtype: bool, integer or float.

    Raises:
        InputError: unreadable or truncated file, colour channels that differ, an alpha channel that varies, NaN or infinite
            values.
    """
    if stacks.is_stack(ref.path):
        return stacks.open_stack(ref.path).read(ref.page)
    array = _read_tiff(ref) if ref.path.suffix.lower() in (".tif", ".tiff") else _read_png(ref.path)
    array = _to_grey(array, ref)
    return check_values(array, _name(ref))


def check_values(array: Array, what: str) -> Array:
    """The array, if it holds finite numbers.

    Raises:
        InputError: it holds something else; `what` names it.
    """
    if array.dtype.kind not in "buif":
        raise InputError(
            what,
            found=f"values of type {array.dtype}",
            expected="integers or real numbers",
            do="Export it as 8-bit, 16-bit or float.",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InputError(
            what,
            found=f"{bad} NaN or infinite values",
            expected="finite numbers",
            do="Fill or crop them first.",
        )
    return array


def foreground_mask(
    label: Array, rule: str | tuple[int, ...], what: str = "label"
) -> npt.NDArray[np.uint8]:
    """Turn label values into 0 (background) and 1 (foreground).

    Args:
        label: (Y, X) values of any numeric dtype, or bool from a file of 1 bit a pixel.
        rule: ">N" (greater than N) or ids, e.g. (1, 7).
        what: what to call the label in an error.

    Returns:
        (Y, X) uint8 of 0 and 1. Under ">N" the white of a file of 1 bit a pixel is foreground, whatever N: image stacks mix
        such files with 8-bit ones (three of VNC's twenty labels), where white is 255.

    Raises:
        InputError: ids asked of a label with fractions; a label of one value beside 0 that ">N" leaves out.
    """
    if isinstance(rule, str):
        if label.dtype == bool:
            return label.astype(np.uint8)
        mask = label > float(rule[1:])
        if not mask.any() and label.any() and len(values := np.unique(label)) <= 2:
            raise InputError(
                what,
                found=f"a label of the values {', '.join(f'{v:g}' for v in values)}",
                expected=f"some foreground where there are labels, and {rule} leaves none",
                do="Save it with the values that the other labels have, or change `foreground`.",
            )
        return mask.astype(np.uint8)
    if label.dtype.kind == "f" and (label != np.round(label)).any():
        raise InputError(
            what,
            found="label values with fractions",
            expected=f"whole ids, as foreground is {list(rule)}",
            do="Use a threshold such as '>0.5' as `foreground`.",
        )
    if len(rule) > 16:
        return np.isin(label, rule).astype(np.uint8)
    mask = np.zeros(label.shape, bool)  # a comparison an id is faster than `isin` by ten times
    for value in rule:
        mask |= label == value
    return mask.astype(np.uint8)


def grey_window(slices: Iterable[Array], what: str | Path) -> tuple[float, float]:
    """The grey values that become 0 and 255: for 8 bits these themselves, otherwise `PERCENTILES` of the slices.

    Args:
        slices: (Y, X) each, of one dtype; none is kept.
        what: what to call them in an error.

    Raises:
        InputError: all have one value.
    """
    sample = []
    for image in slices:
        if image.dtype == np.uint8:
            return 0.0, 255.0
        flat = image.ravel()
        sample.append(
            flat[:: max(1, flat.size // SAMPLE_PER_SLICE)][:SAMPLE_PER_SLICE].astype(np.float32)
        )
    low, high = (float(v) for v in np.percentile(np.concatenate(sample), PERCENTILES))
    if not high > low:
        raise InputError(
            what,
            found=f"a constant image (all {low:g})",
            expected="grey values that differ",
            do="Check the export.",
        )
    return low, high


def to_uint8(image: Array, low: float, high: float) -> npt.NDArray[np.uint8]:
    """Map [low, high] linearly to [0, 255], clipped; 8-bit data with low=0, high=255 stays as it is."""
    if image.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return np.asarray(image, dtype=np.uint8)
    scaled = (image.astype(np.float32) - low) * (255.0 / max(high - low, 1e-12))
    return np.asarray(np.clip(np.round(scaled), 0, 255), dtype=np.uint8)


class Stack:
    """A TIFF's first series, read slice by slice without loading the rest."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = (
            path,
            threading.Lock(),
        )  # one position in the file, which reading moves
        self.tif = tifffile.TiffFile(
            path, _multifile=False
        )  # an OME-TIFF may name other files, wherever they lie
        series = self.tif.series[0]
        axes, shape = series.axes, series.shape
        kept = [(a, n) for a, n in zip(axes, shape, strict=True) if a in "YXS" or n > 1]
        depth = [(a, n) for a, n in kept if a not in "YXS"]
        if len(depth) > 1 or [a for a, _ in kept if a in "YX"] != ["Y", "X"]:
            raise InputError(
                path,
                found=f"axes {axes} of shape {shape}",
                expected="one stack of slices (Z, Y, X)",
                do="Export a single channel and time point.",
            )
        self.n_slices = depth[0][1] if depth else 1
        self.planar = "S" in axes and axes.index("S") < axes.index("Y")  # one plane a channel
        if max(series.sizes.values() if hasattr(series, "sizes") else shape) > MAX_SIDE:
            raise InputError(
                path,
                found=f"shape {shape}",
                expected=f"sides up to {MAX_SIDE}",
                do="Check the file's header.",
            )
        if series.keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            raise InputError(
                path,
                found="values that are shown inverted (WhiteIsZero)",
                expected="0 for black",
                do="Save it without an inverting lookup table (Fiji: Image > Lookup Tables > Invert LUT, then save;"
                " Edit > Invert first, if what you see is what counts).",
            )
        self._check_complete()
        self._check_size()
        self._check_description()
        self.lazy = None
        if (
            len(series.pages) != self.n_slices
        ):  # ImageJ stores big stacks as one page and a contiguous block
            offset = series.dataoffset
            self.lazy = (
                tifffile.memmap(path, series=0, mode="r")
                if offset is not None
                else series.asarray()
            )
            self.lazy = self.lazy.reshape((self.n_slices, *[n for a, n in kept if a in "YXS"]))

    def _check_complete(self) -> None:
        size = self.path.stat().st_size
        for number, page in enumerate(self.tif.pages):
            self._check_strips(number, page)
            ends = [o + c for o, c in zip(page.dataoffsets, page.databytecounts, strict=False)]
            if max(ends, default=0) > size:
                raise InputError(
                    self.path,
                    found=f"a truncated TIFF ({size} bytes, data up to byte {max(ends)})",
                    expected="a complete file",
                    do="Copy or export it again.",
                )

        kind, file = (
            self.tif.tiff,
            self.tif.filehandle,
        )  # the last page is followed by none, or the reader gave up on the next
        file.seek(page.offset)
        (entries,) = struct.unpack(kind.tagnoformat, file.read(kind.tagnosize))
        file.seek(page.offset + kind.tagnosize + entries * kind.tagsize)
        (following,) = struct.unpack(kind.offsetformat, file.read(kind.offsetsize))
        if following >= size:
            raise InputError(
                self.path,
                found=f"a truncated TIFF ({size} bytes, another page at byte {following})",
                expected="a complete file",
                do="Copy or export it again.",
            )
        if following:
            raise InputError(
                self.path,
                found=f"{number + 1} pages, the last of which is followed by byte {following} again",
                expected="a list of pages that ends",
                do="Export it again.",
            )

    def _check_strips(self, number: int, page: Any) -> None:
        """A page has as many strips or tiles, and without compression as many bytes, as its size takes."""
        keyframe, counts = page.keyframe, page.databytecounts
        said = f"{len(page.dataoffsets)} offsets and {len(counts)} lengths of strips"
        needed = keyframe.imagelength * (
            -(-keyframe.imagewidth * keyframe.samplesperpixel * keyframe.bitspersample // 8)
        )
        wanted = math.prod(keyframe.chunked)
        if keyframe.compression == 1:
            good, expected = sum(counts) >= needed, f"{needed} bytes of data"
            said += f", {sum(counts)} bytes"
        else:
            good, expected = len(counts) == wanted, f"{wanted} of each"
        if not good or len(counts) != len(page.dataoffsets):
            raise InputError(
                self.path,
                found=f"a page {number} with {said}",
                expected=expected,
                do="Export it again.",
            )

    def _check_description(self) -> None:
        """ImageJ and OME-XML say how many planes there are; with fewer, tifffile takes those that are there without a word."""
        said, samples = self.n_slices, self.tif.series[0].sizes.get("sample", 1)
        if self.tif.is_imagej:
            said = int((self.tif.imagej_metadata or {}).get("images", said))
        if self.tif.is_ome:
            text = self.tif.ome_metadata or ""
            if "<!DOCTYPE" in text or "<!ENTITY" in text:
                raise InputError(
                    self.path,
                    found="OME-XML with entities of its own",
                    expected="plain OME-XML",
                    do="Export it again.",
                )
            pixels = (re.search(r"<(?:\w+:)?Pixels\b[^>]*>", text) or [""])[0]
            sizes = [re.search(rf'\bSize{axis}="(-?\d{{1,18}})"', pixels) for axis in "ZCT"]
            said = math.prod(int(found[1]) for found in sizes if found) if all(sizes) else said
        if said not in (self.n_slices, self.n_slices * samples):
            raise InputError(
                self.path,
                found=f"{self.n_slices} slices where its description says {said} planes",
                expected="as many",
                do="Export it again, all planes in one file.",
            )

    def _check_size(self) -> None:
        """The first page is no bomb, and no strip or tile of it."""
        page: Any = self.tif.series[0].keyframe
        chunk, packed = (
            math.prod(page.chunks) * page.dtype.itemsize,
            max(page.databytecounts, default=0),
        )
        whole = page.size * page.dtype.itemsize
        for found, stored in ((chunk, packed), (whole, sum(page.databytecounts))):
            if found > LARGE and page.compression != 1 and found > MAX_RATIO * stored:
                raise InputError(
                    self.path,
                    found=f"{found} bytes packed into {stored}",
                    expected=f"at most {MAX_RATIO} to 1",
                    do="If it is no mistake, export it without compression.",
                )

    def read(self, page: int) -> Array:
        """One slice, (Y, X) or (Y, X, channels); several threads may ask at once."""
        if self.lazy is not None:
            array = np.asarray(self.lazy[page])
        else:
            with self.lock:
                array = np.squeeze(np.asarray(self.tif.series[0].pages[page].asarray()))  # type: ignore[union-attr]
        return np.moveaxis(array, 0, -1) if self.planar and array.ndim == 3 else array


@functools.lru_cache(maxsize=4)
def _open(path: Path, _stamp: tuple[int, int]) -> Stack:
    return Stack(path)


def open_stack(path: Path) -> Stack:
    """A TIFF stack, open and checked; errors as `count_slices` says."""
    try:
        stat = path.stat()
        return _open(
            path, (stat.st_mtime_ns, stat.st_size)
        )  # the stamp: never an older file of the same name
    except InputError:
        raise
    except (
        Exception
    ) as error:  # tifffile raises struct.error, ValueError, KeyError and more on damaged headers
        raise InputError(
            path,
            found=f"no readable TIFF ({type(error).__name__}: {error})",
            expected="a complete TIFF",
            do="Copy or export it again.",
        ) from error


def _read_tiff(ref: SliceRef) -> Array:
    stack = open_stack(ref.path)
    try:
        return stack.read(ref.page)
    except Exception as error:
        raise InputError(
            _name(ref),
            found=f"a slice that cannot be decoded ({type(error).__name__}: {error})",
            expected="a complete TIFF",
            do="Copy or export it again.",
        ) from error


def _read_png(path: Path) -> Array:
    try:
        with Image.open(
            path, formats=("PNG",)
        ) as image:  # whatever its name: Pillow would run PostScript
            if (
                size := image.width
                * image.height
                * len(image.getbands())
                * (2 if _is_wide(image) else 1)
            ) > LARGE:
                raise InputError(
                    path,
                    found=f"{size} bytes of pixels",
                    expected=f"at most {LARGE}",
                    do="Export large slices as TIFF, or in grey.",
                )
            if _is_wide(image):
                image.load()  # Pillow would leave out the low bytes of these; it still says what is truncated
                return np.asarray(imagecodecs.png_decode(path.read_bytes()))
            if image.mode == "P" or (image.mode in ("L", "RGB") and "transparency" in image.info):
                return np.asarray(image.convert("RGBA"))
            return np.asarray(image)
    except InputError:
        raise
    except (
        Exception
    ) as error:  # PIL raises OSError, SyntaxError, DecompressionBombError, ... on damaged files
        raise InputError(
            path,
            found=f"no readable image ({type(error).__name__}: {error})",
            expected="a complete PNG",
            do="Copy or export it again.",
        ) from error


def _is_wide(image: Any) -> bool:
    """Whether it has colours or alpha of 16 bits."""
    return image.mode in ("LA", "RGB", "RGBA") and str(image.tile[0].args).endswith(";16B")


def _to_grey(array: Array, ref: SliceRef) -> Array:
    if array.ndim == 2 and min(array.shape) > 1:
        return array
    if array.ndim == 3 and array.shape[-1] in (2, 3, 4):  # grey + alpha, RGB, RGBA
        colours, alpha = array[..., : 1 if array.shape[-1] == 2 else 3], array[..., -1]
        if (colours != colours[..., :1]).any():
            raise InputError(
                _name(ref),
                found="a colour image whose channels differ",
                expected="grey values",
                do="Export it in grey, or a label as ids.",
            )
        if (
            array.shape[-1] != 3 and (alpha != alpha.flat[0]).any()
        ):  # what lies under a transparent pixel is anybody's guess
            raise InputError(
                _name(ref),
                found=f"transparent pixels (alpha from {alpha.min()} to {alpha.max()})",
                expected="an image that is opaque everywhere",
                do="Export it without an alpha channel.",
            )
        return np.ascontiguousarray(colours[..., 0])
    raise InputError(
        _name(ref),
        found=f"an array of shape {array.shape}",
        expected="a grey slice (Y, X)",
        do="Check the dataset's `layout`: one file a slice, or one stack.",
    )


def _name(ref: SliceRef) -> str:
    return f"{ref.path} (page {ref.page})" if ref.page else str(ref.path)
