"""A volume that can be read in parts, whatever file it is in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.volumes.voxel import Voxel, as_voxel

Array = npt.NDArray[Any]
LARGE = 2**28
"""Pixels of a slice up to which it is decoded whole, and bytes that a PNG may unpack to."""
HELD = 2**28
"""Bytes of slices that `Source.slices` keeps in memory where the file stores them together."""
MAX_SIDE = 2**20  # pixels of a side; a file that claims more is damaged or hostile
MAX_CHUNK = 2**29  # bytes of a chunk of HDF5 or Zarr, which is unpacked whole


@dataclass(frozen=True)
class Source:
    """A volume in a file or folder."""

    name: str  # for errors
    shape: tuple[int, int, int]  # (Z, Y, X)
    dtype: np.dtype[Any]  # bool, integer or float
    voxel_nm: Voxel | None  # as the file states it
    depth: int  # slices stored together: reading one costs as much as reading all
    cut: Callable[[int, int, int, int], Array]  # z0, z1, y0, y1 -> (z, y, X), from any thread
    stamp: list[Any]  # changes when the content may have changed
    files: tuple[Path, ...] = ()  # one a slice, of a folder of slices; else the one file
    close: Callable[[], None] = lambda: None

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
        if array.dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(array))):
            raise InputError(
                what,
                found=f"{bad} NaN or infinite values",
                expected="finite numbers",
                do="Fill or crop them first.",
            )
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

    def where(self, z: int) -> str:
        """What to call a slice in an error."""
        if len(self.files) == self.shape[0]:
            return str(self.files[z])
        return f"{self.name}, slice {z}"


def voxel_of(source: Source, stated: Voxel | None, expected: str = "three positive sizes") -> Voxel:
    """The voxel size (z, y, x) in nm as the user states it, else as the file does."""
    voxel = stated or source.voxel_nm
    if voxel is None or not all(math.isfinite(size) and size > 0 for size in voxel):
        raise InputError(
            source.name,
            found=f"voxels of {voxel} nm" if voxel else "no voxel size in the file",
            expected=expected,
            do="State it: --voxel-nm Z Y X, in nm.",
        )
    return as_voxel(voxel)


def array_source(array: Any, voxel_nm: Voxel | None, name: str = "array") -> Source:
    """An array, or what gives NumPy arrays for slices: (Z, Y, X), or one slice (Y, X)."""
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise no_grey_stack(name, f"shape {array.shape}")
    check_type(np.dtype(array.dtype), name)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return array[z0:z1, y0:y1]

    z, y, x = array.shape
    return Source(name, (z, y, x), array.dtype, voxel_nm, 1, cut, [])


def chunked_source(
    name: str,
    array: Any,
    axes: Sequence[str] | None,
    voxel: Voxel | None,
    path: Path,
    described: Sequence[Path],
) -> Source:
    """An array of HDF5 or Zarr at `path`; names of axes and voxel size (z, y, x) if known.

    `described` are files whose times change with the content.
    """
    dtype = np.dtype(array.dtype)
    check_type(dtype, name)
    kept = spatial_axes(array.shape, axes, name)
    check_extent(array.shape, array.chunks or (), dtype.itemsize, name)
    z, y, x = (1, 1, *(int(array.shape[axis]) for axis in kept))[-3:]
    stored = getattr(array, "shards", None) or array.chunks
    depth = int(stored[kept[0]]) if stored and len(kept) == 3 else 1

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return region(array, kept, z0, z1, y0, y1)

    return Source(name, (z, y, x), dtype, voxel, depth, cut, stamp(*described), (path,))


def spatial_axes(shape: Sequence[int], axes: Sequence[str] | None, what: str) -> list[int]:
    """Which axes of an array are (Z,) Y and X, by their names if known; others have one element."""
    if axes is not None:
        names = [axis.lower() for axis in axes]
        pairs = enumerate(zip(names, shape, strict=True))
        kept = [i for i, (name, n) in pairs if name in ("y", "x") or n > 1]
        good = [names[i] for i in kept] in (["z", "y", "x"], ["y", "x"])
        said = f"axes {' '.join(names)} of shape {tuple(shape)}"
    else:
        kept = [i for i, n in enumerate(shape) if n > 1 or i >= len(shape) - 2]
        good = len(kept) == 2 or (len(kept) == 3 and shape[-1] > 4)
        said = f"an array of shape {tuple(shape)}"
    if not good or 0 in shape:
        colours = " (colours?)" if len(shape) >= 3 and shape[-1] in (2, 3, 4) else ""
        raise no_grey_stack(what, said + colours)
    return kept


def region(array: Any, kept: list[int], z0: int, z1: int, y0: int, y1: int) -> Array:
    """Slices [z0, z1), rows [y0, y1) of an array whose axes `kept` are (Z,) Y and X."""
    index: list[int | slice] = [0] * len(array.shape)
    wanted = [slice(z0, z1), slice(y0, y1), slice(None)][-len(kept) :]
    for axis, part in zip(kept, wanted, strict=True):
        index[axis] = part
    cut = np.asarray(array[tuple(index)])
    return cut if len(kept) == 3 else cut[None]


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


def only_one(path: Path, inside: str, scale: int) -> None:
    """Refuse the choice of an image or a scale within a file that holds one."""
    if inside or scale:
        found = f"image {inside!r}, scale {scale}, of a file that has one resolution"
        expected = "an HDF5 file, or a Zarr for a scale"
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
