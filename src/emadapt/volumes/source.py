"""A volume that can be read in parts, whatever file it is in."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.volumes.voxel import (
    LARGEST,
    SMALLEST,
    Voxel,
    agree,
    as_voxel,
    plausible,
    said,
    settled,
)

Array = npt.NDArray[Any]
LARGE = 2**28
"""Pixels of a slice up to which it is decoded whole, and bytes that a PNG may unpack to."""
HELD = 2**28
"""Bytes of slices that `Source.slices` keeps in memory where the file stores them together."""
MAX_SIDE = 2**20  # pixels of a side; a file that claims more is damaged or hostile
MAX_CHUNK = 2**29  # bytes of a chunk of HDF5 or Zarr, which is unpacked whole


@dataclass(frozen=True)
class Choice:
    """Which of the images in a file is meant.

    Attributes:
        inside: name or number of the image; empty: the only one.
        scale: of an OME-Zarr image, 0 for the finest.
        at: places along axes other than z, y, x, by the axes' names: `{"c": "1"}` is channel 1.
            `{"c": "z"}` says that this axis is z.
    """

    inside: str = ""
    scale: int = 0
    at: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A volume in a file or folder."""

    name: str  # for errors
    shape: tuple[int, int, int]  # (Z, Y, X)
    dtype: np.dtype[Any]  # bool, integer or float, in the machine's order of bytes
    voxel_nm: Voxel | None  # as the file states it
    depth: int  # slices stored together: reading one costs as much as reading all
    cut: Callable[[int, int, int, int], Array]  # z0, z1, y0, y1 -> (z, y, X), from any thread
    stamp: list[Any]  # changes when the content may have changed
    files: tuple[Path, ...] = ()  # one a slice, of a folder of slices; else the one file
    close: Callable[[], None] = lambda: None
    doubt: str = ""  # what is wrong with the voxel size in the file, if `voxel_nm` is None
    notes: tuple[str, ...] = ()  # what a user should know of how the file is read

    def read(self, z0: int, z1: int, y0: int = 0, y1: int | None = None) -> Array:
        """Slices [z0, z1), rows [y0, y1) (to the last) as (z, y, X) in the source's own dtype.

        Raises:
            InputError: they cannot be decoded, or are not finite.
        """
        y1 = self.shape[1] if y1 is None else y1
        what = self.where(z0) if z1 - z0 == 1 else f"{self.name}, slices {z0} to {z1 - 1}"
        try:
            array = np.asarray(self.cut(z0, z1, y0, y1))
        except InputError:
            raise
        except Exception as error:  # each codec raises errors of its own
            raise unreadable(what, "data that cannot be decoded", error) from error
        if array.shape != (z1 - z0, y1 - y0, self.shape[2]) or array.dtype != self.dtype:
            raise unlike(what, array.shape, array.dtype, f"{self.shape[1:]}, {self.dtype}")
        check_finite(array, what)
        return array

    def slices(self, numbers: Iterable[int]) -> Iterator[Array]:
        """The slices of these numbers, (Y, X) each; those stored together are decoded once."""
        size = self.shape[1] * self.shape[2] * self.dtype.itemsize
        depth = max(1, min(self.depth, HELD // size))
        first, held = 0, np.empty((0, 0, 0))
        for z in numbers:
            if not first <= z < first + len(held):
                first = z // depth * depth
                held = self.read(first, min(first + depth, self.shape[0]))
            yield held[z - first]

    def parts(self, voxels: int) -> tuple[int, int]:
        """Slices and rows of parts of about so many voxels, that can be read one by one."""
        z, y, x = self.shape
        depth = min(z, max(self.depth, voxels // (y * x)))
        return depth, min(y, max(1, voxels // (depth * x)))

    def where(self, z: int) -> str:
        """What to call a slice in an error."""
        if len(self.files) == self.shape[0]:
            return str(self.files[z])
        return f"{self.name}, slice {z}"


def voxel_of(source: Source, stated: Voxel | None, beside: str = "") -> Voxel:
    """The voxel size (z, y, x) in nm as the user states it, else as the file does.

    An error says `beside` what is expected.

    Raises:
        InputError: there is none, or none that a volume can have.
    """
    voxel, found = stated or source.voxel_nm, source.doubt or "no voxel size in the file"
    if voxel is None or not plausible(voxel, LARGEST):
        raise InputError(
            source.name,
            found=f"voxels of {said(voxel)} nm" if voxel else found,
            expected=f"three sizes of {SMALLEST:g} to {LARGEST:g} nm{beside}",
            do="State it: --voxel-nm Z Y X, in nm.",
        )
    if source.voxel_nm and not agree(voxel, source.voxel_nm):
        other = said(source.voxel_nm)
        tell(source.name, [f"voxels of {said(voxel)} nm, where the file says {other}"])
    return as_voxel(voxel)


def tell(name: str, notes: Iterable[str]) -> None:
    """Say what a user should know of a volume."""
    for note in notes:
        print(f"{name}: {note}", file=sys.stderr)


def as_image(source: Source) -> Source:
    """The same, with unsigned values that are stored as signed read as what they mean.

    BigDataViewer and other Java programs store unsigned integers in signed types. Grey values
    above the middle are then negative, and neighbours on both sides of the middle far apart: values
    are taken as unsigned if that brings neighbouring pixels nearer together.
    """
    if source.dtype.kind != "i":
        return source
    unsigned = np.dtype(source.dtype.name.replace("int", "uint"))
    signed_steps = unsigned_steps = 0.0
    depth, height, width = source.shape
    for z in range(0, depth, max(1, depth // 8)):
        rows = source.read(z, z + 1, 0, min(height, max(1, 2**22 // width)))[0]
        signed_steps += np.abs(np.diff(rows.astype(float))).sum()
        unsigned_steps += np.abs(np.diff(rows.view(unsigned).astype(float))).sum()
    if unsigned_steps >= signed_steps:
        return source

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return np.ascontiguousarray(source.read(z0, z1, y0, y1)).view(unsigned)

    note = f"unsigned values stored as {source.dtype} are read as {unsigned}"
    return dataclasses.replace(source, dtype=unsigned, cut=cut, notes=(*source.notes, note))


def as_ids(source: Source) -> Source:
    """The same, with whole numbers that are stored as floats read as integers.

    ImageJ has no integers of 32 bits: it saves objects with larger numbers than 65535 so.
    Reading fractions, such as probabilities, raises InputError.
    """
    if source.dtype.kind != "f":
        return source

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        values = source.read(z0, z1, y0, y1)
        whole = values.astype(np.int32)
        if (whole != values).any():
            found, expected = "values with fractions", "whole numbers: a mask, labels or objects"
            do = "Threshold probabilities first."
            raise InputError(source.name, found=found, expected=expected, do=do)
        return whole

    return dataclasses.replace(source, dtype=np.dtype(np.int32), cut=cut)


def array_source(array: Any, voxel_nm: Voxel | None) -> Source:
    """An array, or what gives NumPy arrays for slices: (Z, Y, X), or one slice (Y, X)."""
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise no_grey_stack("array", f"shape {array.shape}")
    check_type(np.dtype(array.dtype), "array")

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return array[z0:z1, y0:y1]

    z, y, x = array.shape
    return Source("array", (z, y, x), array.dtype, voxel_nm, 1, cut, [])


def chunked_source(
    name: str,
    array: Any,
    axes: Sequence[str] | None,
    sizes: Mapping[str, Sequence[float]],
    path: Path,
    described: Sequence[Path],
    at: Mapping[str, str],
) -> Source:
    """An array of HDF5 or Zarr at `path`; names of its axes if known, what states voxel sizes.

    `described` are files whose times change with the content.
    """
    dtype = np.dtype(array.dtype).newbyteorder("=")
    check_type(dtype, name)
    places = places_of(array.shape, axes, name, at)
    check_extent(array.shape, array.chunks or (), dtype.itemsize, name)
    extent = dict(zip(places, array.shape, strict=True))
    stored = getattr(array, "shards", None) or array.chunks
    depth = int(stored[places.index("z")]) if stored and "z" in places else 1
    z, y, x = (int(extent.get(axis, 1)) for axis in "zyx")
    voxel, doubt = settled(sizes)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return region(array, places, z0, z1, y0, y1).astype(dtype, copy=False)

    return Source(
        name, (z, y, x), dtype, voxel, depth, cut, stamp(*described), (path,), doubt=doubt
    )


Places = list[str | int]
"""What each axis of an array is: "z", "y", "x", or the place at which another one is cut."""


def places_of(
    shape: Sequence[int], axes: Sequence[str] | None, what: str, at: Mapping[str, str]
) -> Places:
    """What each axis of an array is, by its name if known; see `Choice.at`.

    Raises:
        InputError: others than z, y, x have several places, or their order is another one.
    """
    own = [axis.lower() for axis in axes] if axes else _guessed(shape, at)
    names = ["z" if at.get(name) == "z" else name for name in own]
    described = f"axes {' '.join(own)}" if axes else "an array"
    described += f" of shape {tuple(shape)}"
    places: Places = []
    for name, n in zip(names, shape, strict=True):
        place = at.get(name, "0" if n == 1 else "")
        if name in ("y", "x") or (name == "z" and n > 1):
            places.append(name)
        elif place.isdigit() and int(place) < n:
            places.append(int(place))
        else:
            raise _several(what, described, name, n, stackable="z" not in names)
    order = [place for place in places if isinstance(place, str)]
    if order not in (["z", "y", "x"], ["y", "x"]) or 0 in shape or not at.keys() <= set(own):
        chosen = f", of which {', '.join(at)} is to be chosen" if at else ""
        raise no_grey_stack(what, described + chosen)
    return places


def _guessed(shape: Sequence[int], at: Mapping[str, str]) -> list[str]:
    """Names of axes that have none: the last are z, y, x, the others are called by their numbers.

    A last axis of one place, or of few as colours have, is none of the three.
    """
    names = [str(i) for i in range(len(shape))]
    free = [i for i, n in enumerate(shape) if n > 1 and names[i] not in at]
    if len(free) >= 3 and shape[free[-1]] <= 4:
        free.pop()
    if len(free) < 2:  # slices of one row or column
        free = list(range(len(shape)))
    for i, name in zip(free[-3:], "zyx"[-len(free) :], strict=True):
        names[i] = name
    return names


def _several(what: str, described: str, axis: str, n: int, stackable: bool) -> InputError:
    """An error for an array with several channels, time points or colours."""
    meaning = {"c": "channels", "t": "time points"}.get(axis, f"places along axis {axis}")
    colours = " (colours?)" if described.endswith(f" {n})") and n <= 4 else ""
    text = f"{what}{',' if ':/' in what else ':/'}{axis}"
    slices = f", or say that they are slices: {text}=z" if stackable else ""
    return InputError(
        what,
        found=f"{n} {meaning}{colours}: {described}",
        expected="one stack of grey slices (Z, Y, X)",
        do=f"Choose one, the first is {text}=0{slices}.",
    )


def region(array: Any, places: Places, z0: int, z1: int, y0: int, y1: int) -> Array:
    """Slices [z0, z1), rows [y0, y1) of an array whose axes are these; all of an axis "s"."""
    wanted = {"z": slice(z0, z1), "y": slice(y0, y1), "x": slice(None), "s": slice(None)}
    index = tuple(wanted[p] if isinstance(p, str) else p for p in places)
    cut = np.asarray(array[index])
    return cut if "z" in places else cut[None]


def chunk_grid(shape: Sequence[int], chunk: Sequence[int]) -> list[int]:
    """Number of chunks along each axis."""
    return [-(-n // size) for n, size in zip(shape, chunk, strict=True)]


def missing(share: float, fill: Any) -> tuple[str, ...]:
    """A note on chunks that are not there, which a library reads as the array's fill value."""
    return (f"{share:.1%} of its chunks are not there and read as {fill or 0}",) if share else ()


def check_extent(shape: Sequence[int], chunk: Sequence[int], itemsize: int, what: str) -> None:
    """Refuse sides above `MAX_SIDE`, and chunks above `MAX_CHUNK` bytes."""
    size = math.prod(min(c, n) for c, n in zip(chunk, shape, strict=False)) * itemsize
    if max(shape) > MAX_SIDE or min(chunk, default=1) < 1 or size > MAX_CHUNK:
        raise InputError(
            what,
            found=f"shape {tuple(shape)} in chunks of {tuple(chunk)}",
            expected=f"sides up to {MAX_SIDE}, chunks up to {MAX_CHUNK} bytes",
            do="Write it again in smaller chunks.",
        )


def check_type(dtype: np.dtype[Any], what: str) -> None:
    """Refuse values that are neither integers nor real numbers."""
    if dtype.kind not in "buif":
        raise InputError(
            what,
            found=f"values of type {dtype}",
            expected="integers or real numbers",
            do="Export a single grey channel as 8-bit, 16-bit or float.",
        )


def check_finite(array: Array, what: str) -> None:
    """Refuse NaN and infinite values."""
    if array.dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(array))):
        found, do = f"{bad} NaN or infinite values", "Fill or crop them first."
        raise InputError(what, found=found, expected="finite numbers", do=do)


def only_one(path: Path, choice: Choice) -> None:
    """Refuse the choice of an image, a scale or a channel within a file that holds one."""
    if choice != Choice():
        chosen = [choice.inside, *(f"{axis}={place}" for axis, place in choice.at.items())]
        found = f"image {','.join(filter(None, chosen))!r}, scale {choice.scale}"
        found += ", of a file that has one resolution"
        expected = "a file of several images, or a Zarr for a scale"
        raise InputError(path, found=found, expected=expected, do="Leave out the choice.")


def no_grey_stack(what: str | Path, found: str, axes: str = "(Z, Y, X)") -> InputError:
    """An error for an array that is no volume."""
    return InputError(
        what,
        found=found,
        expected=f"one stack of grey slices {axes}",
        do="Export a single channel and time point in this order.",
    )


def not_one_of(what: str | Path, found: str, names: Sequence[str], example: str) -> InputError:
    """An error for a file of several arrays of which none is chosen, or one that is not there."""
    expected = f"one of {', '.join(names) or 'none: it is empty'}"
    return InputError(what, found=found, expected=expected, do=f"Name the array: {example}.")


def unlike(what: str | Path, shape: Sequence[int], dtype: Any, expected: str) -> InputError:
    """An error for slices of another shape or type than others of the volume."""
    return InputError(
        what,
        found=f"slices of shape {tuple(shape)}, {dtype}",
        expected=expected,
        do="Crop or pad all slices of a dataset to one shape, or make it two datasets.",
    )


def unreadable(what: str | Path, found: str, error: Exception) -> InputError:
    """An error that a library raised while it read a file, in words that help."""
    if isinstance(error, PermissionError):
        expected, do = "a file that can be read", "Ask its owner."
        return InputError(what, found="no permission to read", expected=expected, do=do)
    said = " ".join(str(error).split())[:300]
    return damaged(what, f"{found} ({type(error).__name__}: {said})")


def damaged(
    what: str | Path, found: str, expected: str = "a complete, undamaged file"
) -> InputError:
    """An error for a file that only its owner can replace."""
    return InputError(what, found=found, expected=expected, do="Copy or export it again.")


def stamp(*paths: Path) -> list[Any]:
    """Names, sizes and times of files."""
    stats = [(path.name, path.stat()) for path in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
