"""TIFF stacks, OME-TIFF, ImageJ hyperstacks and BigTIFF, by tifffile.

tifffile only logs that a file is damaged; here that is an error.
"""

from __future__ import annotations

import dataclasses
import functools
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
    Choice,
    Source,
    check_type,
    damaged,
    not_one_of,
    only_one,
    places_of,
    region,
    stamp,
    unreadable,
)
from emadapt.volumes.voxel import in_nm, plausible, settled

MAX_SIDE = 65_536  # pixels or slices; a header that asks for more is damaged or hostile
MAX_RATIO = 250  # unpacked to packed bytes, above `LARGE` bytes: more is taken for a bomb
DAMAGE = re.compile(r"TiffPages|series|Strip|Tile(Offset|Byte)|segments|reshape|circular")
"""What tifffile's log calls damage to the pixels; unreadable private tags are none."""
PER_UNIT = {2: "inch", 3: "cm"}
"""Values of the tag ResolutionUnit."""


def open_tiff(path: Path, choice: Choice) -> Source:
    """The volume in a TIFF; `choice.inside` is the number or the name of an image."""
    import tifffile

    only_one(path, dataclasses.replace(choice, inside="", at={}))
    try:
        with _damage_is_an_error():
            # An OME-TIFF may name other files, anywhere on the disk.
            tif = tifffile.TiffFile(path, _multifile=False)
            parts = [_Part(path, series, choice) for series in _image(tif, path, choice.inside)]
            _check_complete(tif, path)
            for part in parts:
                _check_form(tif, part.series.keyframe, path)
            voxel, doubt = settled(_sizes(tif, parts[0].series))
    except InputError:
        raise
    except Exception as error:  # tifffile raises struct.error, KeyError and more
        raise unreadable(path, "no readable TIFF", error) from error
    ends = np.cumsum([0, *(part.shape[0] for part in parts)])
    lock = threading.Lock()  # reading moves the position in the file, which is one

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        with lock:
            return np.concatenate(
                [
                    part.rows(max(z0 - start, 0), min(z1, end) - start, y0, y1)
                    for part, start, end in zip(parts, ends, ends[1:], strict=False)
                    if start < z1 and z0 < end
                ]
            )

    first, depth = parts[0], int(ends[-1])
    several = f"{len(parts)} images of one shape are read as one stack of {depth} slices"
    notes = (*first.notes, several) if len(parts) > 1 else tuple(first.notes)
    shape, files = (depth, *first.shape[1:]), (path,)
    return Source(
        str(path), shape, first.dtype, voxel, 1, cut, stamp(path), files, tif.close, doubt, notes
    )


class _Part:
    """A series: mapped if not compressed, huge slices read by tiles, others whole."""

    def __init__(self, path: Path, series: Any, choice: Choice) -> None:
        self.path, self.series = path, series
        check_type(series.dtype, str(path))
        if max(series.shape) > MAX_SIDE or 0 in series.shape:
            raise damaged(path, f"shape {series.shape}", f"sides of 1 to {MAX_SIDE}")
        shown, by_imagej = series.keyframe.photometric.name, series.parent.is_imagej
        self.palette = shown == "PALETTE" and not by_imagej
        self.dtype = np.dtype("u1") if self.palette else series.dtype.newbyteorder("=")
        axes = list(zip(series.axes.lower(), series.shape, strict=True))
        free = [axis for axis, n in axes if axis in "zitq" and n > 1]  # i, q: of unknown meaning
        names = ["z" if axis in free and len(free) == 1 else axis for axis, _ in axes]
        samples = [i for i, (axis, n) in enumerate(axes) if axis == "s" and n > 1]
        spatial = [i for i in range(len(axes)) if i not in samples]
        self.notes = ["time points are read as slices"] if free == ["t"] else []
        if by_imagej and shown in ("MINISWHITE", "PALETTE"):
            self.notes.append("values are as stored, before ImageJ's lookup table")
        self.places = places_of(
            [axes[i][1] for i in spatial], [names[i] for i in spatial], str(path), choice.at
        )
        sizes = dict(zip(self.places, (axes[i][1] for i in spatial), strict=True))
        self.shape = sizes.get("z", 1), sizes["y"], sizes["x"]
        self.planes = [axes[i][1] for i in spatial][: self.places.index("y")]
        for i in samples:
            self.places.insert(i, "s")

    def rows(self, z0: int, z1: int, y0: int, y1: int) -> Array:
        """Rows of slices, (z, y, X)."""
        series, planar = self.series, "s" in self.places and self.places[-1] != "s"
        paged = len(series.pages) == math.prod(self.planes) and series.keyframe.size <= LARGE

        def channels_last(array: Array) -> Array:
            return np.moveaxis(array, -3, -1) if planar else array

        if series.dataoffset is None and (paged or "s" in self.places):
            pages = [self._page(z).asarray() for z in range(z0, z1)]
            stack = np.stack([channels_last(page)[y0:y1] for page in pages])
        else:
            stack = channels_last(region(self._array, self.places, z0, z1, y0, y1))
        if self.palette:
            maps = [self._page(z).aspage().colormap for z in range(z0, z1)]
            maps = [m >> 8 if m.max() > 255 else m for m in maps]  # 16 bits; some write 8
            stack = np.stack(
                [np.moveaxis(m[:, s], 0, -1) for m, s in zip(maps, stack, strict=True)]
            )
        if stack.ndim == 4:
            what = [f"{self.path}, slice {z}" for z in range(z0, z1)]
            stack = np.stack([single_channel(s, w) for s, w in zip(stack, what, strict=True)])
        return stack.astype(self.dtype, copy=False)

    def _page(self, z: int) -> Any:
        """The page of a slice."""
        place = [p if isinstance(p, int) else z for p in self.places if p != "s"]
        number = np.ravel_multi_index(place[: len(self.planes)], self.planes) if self.planes else 0
        return self.series.pages[int(number)]

    @functools.cached_property
    def _array(self) -> Any:
        """The series as an array of which parts can be read."""
        if self.series.dataoffset is None:
            import zarr

            return zarr.open_array(self.series.aszarr(), mode="r")
        form = self.series.parent.byteorder + self.series.dtype.char
        return np.memmap(self.path, form, "r", self.series.dataoffset, self.series.shape)


def _image(tif: Any, path: Path, chosen: str) -> list[Any]:
    """The series of the image that is the volume; more than one where these are its slices.

    Raises:
        InputError: there are several images, or pages that belong to none.
    """
    series = [s for i, s in enumerate(tif.series) if chosen in ("", str(i), s.name)]
    forms = {(s.keyframe.shape, s.dtype) for s in series}
    place = {page.offset: number for number, page in enumerate(tif.pages)}
    places = [place[page.offset] for s in series for page in s.pages if page is not None]
    in_order = places == sorted(places)  # not: pages stored in another way are among others
    one_stack = len(forms) == 1 and in_order and not tif.is_ome and not chosen
    taken = {p.offset for s in series for level in s.levels for p in level.pages if p is not None}
    left = 0 if chosen else sum(page.offset not in taken for page in tif.pages)
    if left or not (one_stack or len(series) == 1):
        names = [f":/{i} {s.name} {s.axes} {s.shape} {s.dtype}" for i, s in enumerate(tif.series)]
        names += [f"{left} pages that belong to none"] if left else []
        found = f"no image {chosen!r}" if chosen else f"{len(names)} images"
        raise not_one_of(path, found, names, f"{path}:/0")
    stated = _stated_planes(tif, series[0])
    planes = sum(math.prod(s.shape) // math.prod(s.keyframe.shape) for s in series)
    if stated is not None and stated not in (planes, planes * series[0].sizes.get("sample", 1)):
        found = f"{planes} slices where its description says {stated} planes"
        raise damaged(path, found, "all planes in one file")
    return series


def _check_form(tif: Any, page: Any, path: Path) -> None:
    """Refuse values that are no grey values.

    Under WhiteIsZero ImageJ stores values as they are, and tifffile bool as 0 and 1.
    """
    photometric, bits = page.photometric.name, page.bitspersample
    if photometric == "MINISWHITE" and not (tif.is_imagej or (tif.is_shaped and bits == 1)):
        raise InputError(
            path,
            found="values that are shown inverted (WhiteIsZero)",
            expected="0 for black",
            do="Save it without an inverting lookup table.",
        )
    known = ("MINISBLACK", "MINISWHITE", "RGB", "YCBCR", "PALETTE")
    if photometric not in known or 1 < bits < 8:
        found, expected = f"{photometric} of {bits} bits", "grey values of 1, 8 or more bits"
        raise InputError(path, found=found, expected=expected, do="Export it in grey, 8 bits.")


def _stated_planes(tif: Any, series: Any) -> int | None:
    """Planes that ImageJ's tags or OME-XML claim: tifffile takes those that are there."""
    if tif.is_ome and (pixels := _ome_pixels(tif, series)):
        return math.prod(int(pixels.get(f"Size{axis}", 1)) for axis in "ZCT")
    if tif.is_imagej and "images" in (tif.imagej_metadata or {}):
        return int(tif.imagej_metadata["images"])
    return None


def _ome_pixels(tif: Any, series: Any) -> dict[str, Any]:
    """`Pixels` of the image of a series in OME-XML."""
    from tifffile import xml2dict

    images = xml2dict(tif.ome_metadata)["OME"]["Image"]
    listed = images if isinstance(images, list | tuple) else [images]
    return dict(listed[tif.series.index(series)]["Pixels"])


def _sizes(tif: Any, series: Any) -> dict[str, list[float]]:
    """What OME-XML, ImageJ's tags and the resolution of a TIFF state, (z, y, x) in nm."""
    tags, found = series.keyframe.tags, {}
    lengths = [0.0, 0.0]  # units a pixel
    for i, name in enumerate(("YResolution", "XResolution")):  # pixels a unit, as a fraction
        pixels_n, units_n = tags[name].value if name in tags else (0, 1)
        lengths[i] = units_n / pixels_n if pixels_n else 0.0
    if tif.is_ome:
        pixels = _ome_pixels(tif, series)
        keys = [f"PhysicalSize{axis}" for axis in "ZYX"]
        sizes = [in_nm(float(pixels.get(k, 0)), pixels.get(f"{k}Unit", "µm")) for k in keys]
        found["OME-XML"] = sizes
    elif tif.is_imagej:
        stated = tif.imagej_metadata or {}
        units = [str(stated.get(key, stated.get("unit", ""))) for key in ("zunit", "yunit", "unit")]
        sizes = [abs(float(stated.get("spacing", 0))), *lengths]
        pairs = zip(sizes, units, strict=True)
        found["ImageJ"] = [in_nm(size, unit.replace("\\u00B5", "µ")) for size, unit in pairs]
    unit = PER_UNIT.get(int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else 0, "")
    if plausible(own := [in_nm(length, unit) for length in lengths]):  # else that of a printer
        found["ResolutionUnit"] = [0.0, *own]
    return found


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
