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
MAX_SIDE = 2**20
"""Pixels of a side; a file that claims more is damaged or hostile."""
MAX_CHUNK = 2**29
"""Bytes of a chunk of HDF5 or Zarr, which is unpacked whole."""


@dataclass(frozen=True)
class Source:
    """A volume in a file or folder.

    Attributes:
        name: what to call it in an error.
        shape: (Z, Y, X).
        dtype: bool, integer or float.
        voxel_nm: (z, y, x) as the file states it; None where it states none.
        depth: slices that are stored together, so that reading one costs as much as reading all.
        cut: gives slices [z0, z1), rows [y0, y1) as (z, y, X); several threads may call it.
        stamp: names, sizes and times of the files: changes when the content may have changed.
        files: one for each slice of a folder of slices, else the one file.
        close: of a file that stays open, closes it.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    voxel_nm: Voxel | None
    depth: int
    cut: Callable[[int, int, int, int], Array]
    stamp: list[Any]
    files: tuple[Path, ...] = ()
    close: Callable[[], None] = lambda: None

    def read(self, z0: int, z1: int, y0: int = 0, y1: int | None = None) -> Array:
        """Slices [z0, z1), rows [y0, y1) (to the last) as (z, y, X) in the source's own dtype.

        Raises:
            InputError: they cannot be decoded, or are not finite; names the slices.
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
            raise InputError(
                what,
                found=f"shape {array.shape} of {array.dtype}",
                expected=f"slices of {self.shape[1]} x {self.shape[2]} of {self.dtype}",
                do="Make all slices alike.",
            )
        return check_values(array, what)

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
    """The voxel size as the user states it, else as the file does.

    Raises:
        InputError: neither does, or a size is not positive; says what was `expected`.
    """
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
    """An array, or what gives NumPy arrays for slices: (Z, Y, X), or one slice (Y, X).

    Raises:
        InputError: it has another number of axes, or no values.
    """
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(
            name,
            found=f"shape {array.shape}",
            expected="(Z, Y, X) or (Y, X)",
            do="Pass a single channel.",
        )
    z, y, x = array.shape
    cut = lambda z0, z1, y0, y1: array[z0:z1, y0:y1]  # noqa: E731
    return Source(name, (z, y, x), array.dtype, voxel_nm, 1, cut, [])


def chunked_source(
    name: str,
    array: Any,
    axes: Sequence[str] | None,
    voxel: Voxel | None,
    path: Path,
    described: Sequence[Path],
) -> Source:
    """An array of HDF5 or Zarr.

    Args:
        name: what to call it in an error.
        array: with `shape`, `dtype`, `chunks` and, in Zarr, `shards`.
        axes: names of its axes, where they are known.
        voxel: its size (z, y, x) in nm, where it is known.
        path: where it is.
        described: files whose times tell that the content has changed.

    Raises:
        InputError: it is no stack of grey slices, or of a size that nobody can read.
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
    """Which axes of an array are (Z,) Y and X; all others have one element.

    Args:
        shape: of the array.
        axes: their names, where they are known.
        what: what to call the array in an error.

    Raises:
        InputError: it is no stack of slices.
    """
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
        raise InputError(
            what,
            found=said + colours,
            expected="one stack of grey slices (Z, Y, X)",
            do="Export a single channel and time point in this order.",
        )
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
    """Refuse a volume, or chunks of it, of a size that cannot be read.

    Raises:
        InputError: a side of more than `MAX_SIDE`, or a chunk of more than `MAX_CHUNK` bytes.
    """
    if max(shape) > MAX_SIDE or min(chunk, default=1) < 1:
        raise InputError(
            what,
            found=f"shape {tuple(shape)} in chunks of {tuple(chunk)}",
            expected=f"sides up to {MAX_SIDE}",
            do="Check what wrote it.",
        )
    size = math.prod(min(c, n) for c, n in zip(chunk, shape, strict=False)) * itemsize
    if size > MAX_CHUNK:
        raise InputError(
            what,
            found=f"chunks of {tuple(chunk)}, {size} bytes",
            expected=f"at most {MAX_CHUNK} bytes",
            do="Write it again in smaller chunks.",
        )


def check_type(dtype: np.dtype[Any], what: str) -> None:
    """Refuse values that are neither integers nor real numbers.

    Raises:
        InputError: they are not; `what` names them.
    """
    if dtype.kind not in "buif":
        raise InputError(
            what,
            found=f"values of type {dtype}",
            expected="integers or real numbers",
            do="Export a single grey channel as 8-bit, 16-bit or float.",
        )


def check_values(array: Array, what: str) -> Array:
    """The array, if it holds finite numbers.

    Raises:
        InputError: it holds something else; `what` names it.
    """
    check_type(array.dtype, what)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InputError(
            what,
            found=f"{bad} NaN or infinite values",
            expected="finite numbers",
            do="Fill or crop them first.",
        )
    return array


def only_one(path: Path, inside: str, scale: int) -> None:
    """Refuse the choice of an image within a file that holds one.

    Raises:
        InputError: `inside` or `scale` is given.
    """
    if inside or scale:
        raise InputError(
            path,
            found=f"image {inside!r}, scale {scale}, of a file that has one resolution",
            expected="an HDF5 file, or a Zarr for a scale",
            do="Leave out the choice.",
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
