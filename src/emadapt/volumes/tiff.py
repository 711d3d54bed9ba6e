"""TIFF stacks, OME-TIFF, ImageJ hyperstacks and BigTIFF, by tifffile.

tifffile only logs that a file is damaged; here that is an error.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.channels import single_channel
from emadapt.volumes.source import (
    LARGE,
    Array,
    Source,
    check_type,
    damaged,
    no_grey_stack,
    only_one,
    region,
    spatial_axes,
    stamp,
    unreadable,
)
from emadapt.volumes.voxel import Voxel, in_nm, known_voxel

MAX_SIDE = 65_536  # pixels or slices; a header that asks for more is damaged or hostile
MAX_RATIO = 250  # unpacked to packed bytes, above `LARGE` bytes: more is taken for a bomb
DAMAGE = re.compile(r"TiffPages|series|Strip|Tile(Offset|Byte)|segments|reshape|circular")
"""What tifffile's log calls damage to the pixels; unreadable private tags are none."""


def open_tiff(path: Path, inside: str = "", scale: int = 0) -> Source:
    """The volume in a TIFF."""
    import tifffile

    only_one(path, inside, scale)
    try:
        with _damage_is_an_error():
            # An OME-TIFF may name other files, anywhere on the disk.
            tif = tifffile.TiffFile(path, _multifile=False)
            series = _volume_of(tif, path)
            _check_complete(tif, path)
            voxel = _voxel(tif)
    except InputError:
        raise
    except Exception as error:  # tifffile raises struct.error, KeyError and more
        raise unreadable(path, "no readable TIFF", error) from error
    *depth, height, width = _stack_shape(series, path)
    shape = (depth[0] if depth else 1, height, width)
    cut, dtype = _Reader(path, tif, series, shape).cut, series.dtype.newbyteorder("=")
    return Source(str(path), shape, dtype, voxel, 1, cut, stamp(path), (path,), tif.close)


class _Reader:
    """Reads parts of a series: mapped if not compressed, huge slices by tiles, others whole."""

    def __init__(self, path: Path, tif: Any, series: Any, shape: tuple[int, int, int]) -> None:
        self.path, self.tif, self.series, self.shape = path, tif, series, shape
        self.lock = threading.Lock()  # reading moves the position in the file, which is one
        self.array: Any = None
        paged = len(series.pages) == shape[0] and math.prod(shape[1:]) <= LARGE
        if series.dataoffset is not None:
            import tifffile

            self.array = tifffile.memmap(path, series=0, mode="r")
        elif not paged and "S" not in series.axes:
            import zarr

            self.array = zarr.open_array(series.aszarr(), mode="r")

    def cut(self, z0: int, z1: int, y0: int, y1: int) -> Array:
        if self.array is not None and "S" not in self.series.axes:
            names = ["z" if a not in "YX" and n > 1 else a for a, n in _axes(self.series)]
            with self.lock:
                kept = spatial_axes(self.series.shape, names, str(self.path))
                rows = region(self.array, kept, z0, z1, y0, y1)
            return rows.astype(self.series.dtype.newbyteorder("="), copy=False)
        return np.stack([self._slice(z)[y0:y1] for z in range(z0, z1)])

    def _slice(self, z: int) -> Array:
        with self.lock:
            if self.array is not None:
                kept = [n for axis, n in _axes(self.series) if axis in "YXS"]
                array = np.asarray(self.array).reshape(self.shape[0], *kept)[z]
            else:
                array = np.squeeze(np.asarray(self.series.pages[z].asarray()))
        axes = self.series.axes
        if array.ndim == 3 and axes.index("S") < axes.index("Y"):  # one plane a channel
            array = np.moveaxis(array, 0, -1)
        return single_channel(array, f"{self.path}, slice {z}")


def _axes(series: Any) -> list[tuple[str, int]]:
    return list(zip(series.axes, series.shape, strict=True))


def _volume_of(tif: Any, path: Path) -> Any:
    """The series that is the volume: the first."""
    import tifffile

    series = tif.series[0]
    check_type(series.dtype, str(path))
    if max(series.shape) > MAX_SIDE or 0 in series.shape:
        raise damaged(path, f"shape {series.shape}", f"sides of 1 to {MAX_SIDE}")
    if series.keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        raise InputError(
            path,
            found="values that are shown inverted (WhiteIsZero)",
            expected="0 for black",
            do="Save it without an inverting lookup table (Fiji: Image > Lookup Tables).",
        )
    stated, slices = _stated_planes(tif), math.prod(_stack_shape(series, path)[:-2])
    if stated is not None and stated not in (slices, slices * series.sizes.get("sample", 1)):
        found = f"{slices} slices where its description says {stated} planes"
        raise damaged(path, found, "all planes in one file")
    return series


def _stack_shape(series: Any, path: Path) -> list[int]:
    """([Z,] Y, X) of a series."""
    axes = _axes(series)
    kept = [(axis, n) for axis, n in axes if axis in "YX" or (n > 1 and axis != "S")]
    if len(kept) > 3 or [axis for axis, _ in kept][-2:] != ["Y", "X"]:
        raise no_grey_stack(path, f"axes {series.axes} of shape {series.shape}")
    return [n for _, n in kept]


def _stated_planes(tif: Any) -> int | None:
    """Planes that ImageJ's tags or OME-XML claim: tifffile takes those that are there."""
    if tif.is_ome and (pixels := _ome_pixels(tif)):
        return math.prod(int(pixels.get(f"Size{axis}", 1)) for axis in "ZCT")
    if tif.is_imagej and "images" in (tif.imagej_metadata or {}):
        return int(tif.imagej_metadata["images"])
    return None


def _ome_pixels(tif: Any) -> dict[str, Any]:
    """`Pixels` of the first image of OME-XML."""
    from tifffile import xml2dict

    image = xml2dict(tif.ome_metadata)["OME"]["Image"]
    pixels: dict[str, Any] = (image[0] if isinstance(image, list | tuple) else image)["Pixels"]
    return pixels


def _voxel(tif: Any) -> Voxel | None:
    """From OME-XML or ImageJ's tags. A plain TIFF's resolution is that of a printer."""
    if tif.is_ome:
        pixels = _ome_pixels(tif)
        keys = [f"PhysicalSize{axis}" for axis in "ZYX"]
        sizes = [in_nm(float(pixels.get(k, 0)), pixels.get(f"{k}Unit", "µm")) for k in keys]
    elif tif.is_imagej:
        stated, tags = tif.imagej_metadata or {}, tif.pages[0].tags
        unit = str(stated.get("unit", "")).replace("\\u00B5", "µ")
        sizes = [in_nm(float(stated.get("spacing", 0)), unit)]
        for name in ("YResolution", "XResolution"):  # pixels per unit, as a fraction
            pixels_n, units_n = tags[name].value if name in tags else (0, 1)
            sizes.append(in_nm(units_n / pixels_n if pixels_n else 0, unit))
    else:
        return None
    return known_voxel(sizes)


def _check_complete(tif: Any, path: Path) -> None:
    """Refuse pages whose data are not all there, and data that unpack to far too much."""
    size = path.stat().st_size
    for number, page in enumerate(tif.pages):
        form, counts = page.keyframe, page.databytecounts
        ends = [0, *(o + n for o, n in zip(page.dataoffsets, counts, strict=True))]
        needed = 1
        if form.compression == 1:
            bits = form.imagewidth * form.samplesperpixel * form.bitspersample
            needed = form.imagelength * math.ceil(bits / 8)
        if sum(counts) < needed or max(ends) > size:
            found = f"page {number} has {sum(counts)} bytes of data, up to byte {max(ends)}"
            raise damaged(path, f"a truncated TIFF ({size} bytes; {found}, and needs {needed})")
    form = tif.series[0].keyframe
    chunk, packed = math.prod(form.chunks) * form.dtype.itemsize, form.databytecounts
    whole = form.size * form.dtype.itemsize
    for unpacked, stored in ((chunk, max(packed)), (whole, sum(packed))):
        if unpacked > LARGE and form.compression != 1 and unpacked > MAX_RATIO * stored:
            raise InputError(
                path,
                found=f"{unpacked} bytes packed into {stored}",
                expected=f"at most {MAX_RATIO} to 1",
                do="If it is no mistake, export it without compression.",
            )


@contextmanager
def _damage_is_an_error() -> Iterator[None]:
    """Collect what tifffile logs of damage in this thread, and raise the first of it."""
    damage: list[str] = []
    thread = threading.get_ident()

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said = record.getMessage()
            if record.thread == thread and DAMAGE.search(said):
                damage.append(said)

    log, handler = logging.getLogger("tifffile"), Collect(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    if damage:
        raise ValueError(f"truncated or damaged: {damage[0]}")
