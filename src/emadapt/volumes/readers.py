"""Volumes that people have: TIFF stacks, folders of slices, HDF5, Zarr, NIfTI; read a few rows of a few slices at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.data.pairing import IMAGE_SUFFIXES, SliceRef, list_slices, natural
from emadapt.errors import InputError
from emadapt.volumes.slices import LARGE, Array, Stack, check_values, open_stack, read_slice

METRE_NM = 1e9
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
MOST = 2**20
"""Pixels of a side of HDF5 and Zarr; who says more is damaged or hostile."""
MAX_CHUNK = 2**29
"""Bytes of a chunk, which is unpacked whole."""
UNITS_NM = {
    "nm": 1.0,
    "nanometer": 1.0,
    "nanometre": 1.0,
    "a": 0.1,
    "å": 0.1,
    "angstrom": 0.1,
    "pm": 1e-3,
    "picometer": 1e-3,
    "um": 1e3,
    "µm": 1e3,
    "μm": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "micrometer": 1e3,
    "micrometre": 1e3,
    "mm": 1e6,
    "millimeter": 1e6,
    "millimetre": 1e6,
    "cm": 1e7,
    "centimeter": 1e7,
    "m": 1e9,
    "meter": 1e9,
    "metre": 1e9,
}

Voxel = tuple[float, float, float]


@dataclass(frozen=True)
class Source:
    """A volume that lies somewhere.

    Attributes:
        name: what to call it in an error.
        shape: (Z, Y, X).
        dtype: of its values: bool, integer or float.
        voxel_nm: (z, y, x) as the file says; None where it does not.
        depth: slices that lie together, so that reading one costs as much as reading all.
        cut: gives slices [z0, z1), rows [y0, y1) as (z, y, X).
        stamp: changes where the content may have changed.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    voxel_nm: Voxel | None
    depth: int
    cut: Callable[[int, int, int, int], Array]
    stamp: list[Any]

    def read(self, z0: int, z1: int, y0: int = 0, y1: int | None = None) -> Array:
        """Slices [z0, z1), rows [y0, y1) (to the last) as (z, y, X) in the source's own dtype.

        Raises:
            InputError: they cannot be decoded, or are not finite; says which they are.
        """
        y1 = self.shape[1] if y1 is None else y1
        what = f"{self.name}, slices {z0} to {z1 - 1}"
        try:
            array = np.asarray(self.cut(z0, z1, y0, y1))
        except InputError:
            raise
        except Exception as error:  # codecs raise RuntimeError, ValueError, zlib.error, lzma.LZMAError, OSError and more
            raise InputError(
                what,
                found=f"data that cannot be decoded ({type(error).__name__}: {error})",
                expected="a complete, undamaged file",
                do="Copy or export it again.",
            ) from error
        if array.shape != (z1 - z0, y1 - y0, self.shape[2]) or array.dtype != self.dtype:
            raise InputError(
                what,
                found=f"shape {array.shape} of {array.dtype}",
                expected=f"slices of {self.shape[1]} x {self.shape[2]} of {self.dtype}, as the first",
                do="Make all slices alike.",
            )
        return check_values(array, what)


def open_source(text: str, scale: int = 0) -> Source:
    """Open a volume; nothing of it is read but what describes it.

    Args:
        text: a TIFF (stack, OME-TIFF, BigTIFF), a PNG, a folder of TIFF or PNG slices, `file.h5` or `file.h5:/dataset`, a
            NIfTI file (.nii, .nii.gz), or a Zarr array, group or OME-Zarr image (`volume.zarr`, `volume.zarr/path/within`).
        scale: of an OME-Zarr image, 0 for the finest.

    Raises:
        InputError: it is not there, not one of these, or no stack of grey slices.
    """
    try:
        return _open_any(text, scale)
    except InputError:
        raise
    except Exception as error:  # whatever a library meets in what a file says of itself
        raise InputError(
            text,
            found=f"no volume that can be read ({type(error).__name__}: {str(error)[:300]})",
            expected="a complete, undamaged file",
            do="Copy or export it again.",
        ) from error


def _open_any(text: str, scale: int) -> Source:
    file, _, inside = text.partition(":/")
    path = Path(text)
    if Path(file).suffix.lower() in HDF5_SUFFIXES:
        source = _hdf5(Path(file), inside)
    elif path.name.lower().endswith(NIFTI_SUFFIXES):
        from emadapt.volumes.nifti import open_nifti

        source = open_nifti(path)
    elif _in_zarr(path):
        from emadapt.volumes.zarrs import open_zarr

        return open_zarr(path, scale)
    elif path.is_dir():
        source = _folder(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        source = _slices(path, [path]) if path.suffix.lower() == ".png" else _tiff(path)
    else:
        raise InputError(
            text,
            found="no such volume" if not path.exists() else "a file of another kind",
            expected=f"{', '.join((*IMAGE_SUFFIXES, *HDF5_SUFFIXES, *NIFTI_SUFFIXES))}, a folder of slices, or Zarr",
            do="Check the path.",
        )
    if scale:
        raise InputError(
            text,
            found=f"scale {scale} of a volume that has one resolution",
            expected="an OME-Zarr image",
            do="Leave out the scale.",
        )
    return source


def array_source(array: Any, voxel_nm: Voxel | None, name: str = "array") -> Source:
    """An array, (Z, Y, X) or one slice (Y, X): of NumPy, or one that gives those for slices."""
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(
            name,
            found=f"shape {array.shape}",
            expected="(Z, Y, X) or (Y, X)",
            do="Pass a single channel.",
        )
    shape = (array.shape[0], array.shape[1], array.shape[2])
    return Source(
        name, shape, array.dtype, voxel_nm, 1, lambda z0, z1, y0, y1: array[z0:z1, y0:y1], []
    )


def spatial(shape: Sequence[int], axes: Sequence[str] | None, what: str) -> list[int]:
    """Which axes of an array are Z, Y and X; the others have one element. Z may be missing.

    Args:
        shape: of the array.
        axes: their names, where they are known.
        what: what to call the array in an error.

    Raises:
        InputError: it is no stack of slices.
    """
    names = [a.lower() for a in axes] if axes is not None else None
    if names is not None:
        kept = [
            i for i, (a, n) in enumerate(zip(names, shape, strict=True)) if a in ("y", "x") or n > 1
        ]
        good = [names[i] for i in kept] in (["z", "y", "x"], ["y", "x"])
    else:
        kept = [i for i, n in enumerate(shape) if n > 1 or i >= len(shape) - 2]
        good = len(shape) >= 2 and (len(kept) == 2 or (len(kept) == 3 and shape[-1] > 4))
    if not good or 0 in shape:
        said = (
            f"axes {' '.join(names)} of shape {tuple(shape)}"
            if names is not None
            else f"an array of shape {tuple(shape)}"
        )
        colours = " (colours?)" if len(shape) >= 3 and shape[-1] in (2, 3, 4) else ""
        raise InputError(
            what,
            found=said + colours,
            expected="one stack of grey slices (Z, Y, X)",
            do="Export a single channel and time point in this order.",
        )
    return kept


def check_extent(shape: Sequence[int], chunk: Sequence[int], itemsize: int, what: str) -> None:
    """A volume and its chunks (or shards' inner ones) are of a size that can be read.

    Raises:
        InputError: they are not.
    """
    if max(shape) > MOST or min(chunk, default=1) < 1:
        raise InputError(
            what,
            found=f"shape {tuple(shape)} in chunks of {tuple(chunk)}",
            expected=f"sides up to {MOST}",
            do="Check what wrote it.",
        )
    if (
        size := math.prod(min(c, n) for c, n in zip(chunk, shape, strict=False)) * itemsize
    ) > MAX_CHUNK:
        raise InputError(
            what,
            found=f"chunks of {tuple(chunk)}, {size} bytes",
            expected=f"at most {MAX_CHUNK} bytes",
            do="Write it again in smaller chunks.",
        )


def region(array: Any, kept: list[int], z0: int, z1: int, y0: int, y1: int) -> Array:
    """Slices [z0, z1), rows [y0, y1) of an array whose axes `kept` are Z (if it has it), Y and X."""
    index: list[int | slice] = [0] * len(array.shape)
    wanted = [slice(z0, z1), slice(y0, y1), slice(None)][-len(kept) :]
    for axis, part in zip(kept, wanted, strict=True):
        index[axis] = part
    cut = np.asarray(array[tuple(index)])
    return cut if len(kept) == 3 else cut[None]


def stated_voxel(attributes: dict[str, Any]) -> Voxel | None:
    """Voxel size in nm from attributes of HDF5 and Zarr: `element_size_um` (ilastik, Fiji), `resolution` in nm (CREMI, N5)."""
    for key, factor in (("element_size_um", 1e3), ("resolution", 1.0)):
        values = np.asarray(attributes.get(key, ())).ravel()
        if len(values) == 3 and values.dtype.kind in "iuf" and (values > 0).all():
            return as_voxel([float(v) * factor for v in values])
    return None


def as_voxel(values: Sequence[float]) -> Voxel:
    """Three sizes in nm with the digits that files mean: 0.005 um is 5 nm.

    Raises:
        ValueError: one is not finite, or as large as a metre: a header that is damaged.
    """
    z, y, x = (float(f"{v:.6g}") for v in values)
    if not all(abs(v) < METRE_NM for v in (z, y, x)):  # NaN is not
        raise ValueError(f"voxels of {z:g} x {y:g} x {x:g} nm")
    return z, y, x


def bare_name(text: str) -> str:
    """What a volume is called without the folder that it lies in: `em.tif`, `em.h5:/raw`, `em.zarr/0`."""
    file, colon, inside = text.partition(":/")
    path = Path(file)
    first = next((p for p in (path, *path.parents) if p.suffix.lower() == ".zarr"), path)
    return f"{path.relative_to(first.parent)}{colon}{inside}"


def stamp(*paths: Path) -> list[Any]:
    """Sizes and times of files."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths]


def _in_zarr(path: Path) -> bool:
    marks = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
    named = any(p.suffix.lower() == ".zarr" for p in (path, *path.parents))
    return path.is_dir() and (named or any((path / mark).is_file() for mark in marks))


def _tiff(path: Path) -> Source:
    stack = open_stack(path)
    first = (
        read_slice(SliceRef(path))
        if not _is_large(stack)
        else np.zeros((), stack.tif.series[0].dtype)
    )
    height, width = (
        int(n)
        for a, n in zip(stack.tif.series[0].axes, stack.tif.series[0].shape, strict=True)
        if a in "YX"
    )

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        if _is_large(stack):
            return _rows_of_large(stack, z0, z1, y0, y1)
        return np.stack([read_slice(SliceRef(path, z))[y0:y1] for z in range(z0, z1)])

    return Source(
        str(path),
        (stack.n_slices, height, width),
        first.dtype,
        _tiff_voxel(stack.tif),
        1,
        cut,
        stamp(path),
    )


def _is_large(stack: Stack) -> bool:
    series = stack.tif.series[0]
    return (
        int(np.prod([n for a, n in zip(series.axes, series.shape, strict=True) if a in "YX"]))
        > LARGE
    )


def _rows_of_large(stack: Stack, z0: int, z1: int, y0: int, y1: int) -> Array:
    """Some rows of huge slices: mapped where they are not compressed, else tile by tile."""
    import tifffile
    import zarr

    series = stack.tif.series[0]
    array: Any = (
        tifffile.memmap(stack.path, series=0, mode="r")
        if series.dataoffset is not None
        else zarr.open_array(series.aszarr(), mode="r")
    )
    named = [
        a if a in "YXS" or n == 1 else "Z" for a, n in zip(series.axes, series.shape, strict=True)
    ]  # I, Q, T: a stack
    with stack.lock:
        rows = region(array, spatial(series.shape, named, str(stack.path)), z0, z1, y0, y1)
    return rows.astype(series.dtype, copy=False)  # in the machine's order of bytes


def _tiff_voxel(tif: Any) -> Voxel | None:
    """From OME-XML or ImageJ's tags. A plain TIFF's resolution is that of a printer."""
    from tifffile import xml2dict

    if tif.is_ome:
        image = xml2dict(tif.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list | tuple) else image)["Pixels"]
        sizes = [
            _nm(float(pixels.get(f"PhysicalSize{a}", 0)), pixels.get(f"PhysicalSize{a}Unit", "µm"))
            for a in "ZYX"
        ]
    elif tif.is_imagej:
        meta, tags = tif.imagej_metadata or {}, tif.pages[0].tags
        unit = str(meta.get("unit", "")).replace("\\u00B5", "µ")
        in_plane = [
            tags[name].value if name in tags else (0, 1) for name in ("YResolution", "XResolution")
        ]
        sizes = [
            _nm(float(meta.get("spacing", 0)), unit),
            *(_nm(b / a if a else 0, unit) for a, b in in_plane),
        ]
    else:
        return None
    return as_voxel(sizes) if all(sizes) else None


def _nm(size: float, unit: str) -> float:
    """Size in nm; 0 where the unit is none of length."""
    return max(0.0, size) * UNITS_NM.get(unit.strip().lower(), 0.0)


def _folder(path: Path) -> Source:
    """Slices in the order of the last number of their names, as `ingest` takes them; of their names where some have none."""
    files = sorted(list_slices(path), key=lambda f: natural(f.stem))
    numbers = [int(found[-1]) for f in files if (found := re.findall(r"\d+", f.stem))]
    if len(set(numbers)) == len(files):
        files = [f for _, f in sorted(zip(numbers, files, strict=True))]
    return _slices(path, files)


def _slices(path: Path, files: list[Path]) -> Source:
    first = _grey(files[0])
    for file in files:
        if file.suffix.lower() != ".png" and (n := open_stack(file).n_slices) > 1:
            raise InputError(
                file,
                found=f"a stack of {n} slices in a folder of slices",
                expected="one slice a file",
                do="Pass the stack itself.",
            )

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return np.stack([_alike(_grey(f), first, f)[y0:y1] for f in files[z0:z1]])

    return Source(str(path), (len(files), *first.shape), first.dtype, None, 1, cut, stamp(*files))


def _grey(file: Path) -> Array:
    """A slice; of 1 bit a pixel as 0 and 255, for stacks mix such files with 8-bit ones (three of VNC's twenty labels)."""
    array = read_slice(SliceRef(file))
    return array.astype(np.uint8) * 255 if array.dtype == bool else array


def _alike(array: Array, first: Array, file: Path) -> Array:
    if (array.shape, array.dtype) != (first.shape, first.dtype):
        raise InputError(
            file,
            found=f"a slice of shape {array.shape}, {array.dtype}",
            expected=f"{first.shape}, {first.dtype}, as the first",
            do="Make all slices alike.",
        )
    return array


def _hdf5(path: Path, inside: str) -> Source:
    import h5py

    if not path.is_file():
        raise InputError(path, found="no such file", expected="an HDF5 file", do="Check the path.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            path,
            found=f"no readable HDF5 file ({error})",
            expected="a complete HDF5 file",
            do="Copy or export it again.",
        ) from error
    found: dict[str, Any] = {}
    file.visititems(
        lambda name, item: (
            found.update({name: item})
            if isinstance(item, h5py.Dataset) and item.ndim >= 2
            else None
        )
    )
    stacks = [name for name, item in found.items() if sum(n > 1 for n in item.shape) >= 3]
    name = inside.strip("/") or (stacks[0] if len(stacks) == 1 else "")
    if name not in found:
        raise InputError(
            f"{path}:/{name}",
            found="no such dataset" if name else f"{len(stacks)} volumes",
            expected=f"one of {', '.join(':/' + n for n in found) or 'none: there are no volumes in it'}",
            do=f"Name the dataset: {path}:/DATASET.",
        )
    data = found[name]
    what = f"{path}:/{name}"
    if data.external or (
        data.is_virtual
        and any(
            Path(source.file_name).name != source.file_name for source in data.virtual_sources()
        )
    ):
        raise InputError(
            what,
            found="a dataset whose values lie in files elsewhere",
            expected="values in this file",
            do="Copy it with h5repack, which puts them there.",
        )
    if not data.is_virtual and data.id.get_storage_size() == 0:
        raise InputError(
            what, found="a dataset that was never written", expected="values", do="Export it again."
        )
    kept = spatial(data.shape, _hdf5_axes(data), what)
    check_extent(data.shape, data.chunks or (), data.dtype.itemsize, what)
    shape = (1, 1, *(data.shape[i] for i in kept))[-3:]
    depth = data.chunks[kept[0]] if data.chunks and len(kept) == 3 else 1
    return Source(
        what,
        shape,
        data.dtype,
        stated_voxel(dict(data.attrs)),
        depth,
        lambda z0, z1, y0, y1: region(data, kept, z0, z1, y0, y1),
        stamp(path),
    )


def _hdf5_axes(data: Any) -> list[str] | None:
    """Names of axes, from ilastik's `axistags` or HDF5's dimension labels."""
    if "axistags" in data.attrs:
        try:
            return [axis["key"] for axis in json.loads(data.attrs["axistags"])["axes"]]
        except (ValueError, KeyError, TypeError):
            return None
    labels = [dimension.label for dimension in data.dims]
    return labels if all(labels) else None
