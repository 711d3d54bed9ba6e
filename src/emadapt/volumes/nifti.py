"""NIfTI volumes as sources. Their arrays are (X, Y, Z); the affine is ignored: images and labels must be stored alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.readers import Source, Voxel, as_voxel, check_extent, stamp
from emadapt.volumes.slices import Array

UNITS_NM = {"mm": 1e6, "micron": 1e3, "meter": 1e9}
PACKED = 2**29
"""Bytes up to which a packed file is unpacked into memory: one cannot begin to read it in the middle."""


def open_nifti(path: Path) -> Source:
    """The volume in a .nii or .nii.gz file; of a file that is not packed only what is read comes into memory.

    Raises:
        InputError: not a readable one, truncated, or no single stack of grey slices.
    """
    from nibabel.volumeutils import apply_read_scaling

    if not path.is_file():
        raise InputError(path, found="no such file", expected="a NIfTI file", do="Check the path.")
    try:
        header = _header(path)
        shape, dtype, scaling, voxel = (
            header.get_data_shape(),
            header.get_data_dtype(),
            header.get_slope_inter(),
            _voxel(header),
        )
        offset = max(int(header.get_data_offset()), int(header.single_vox_offset))
        scaled = (
            dtype
            if dtype.kind not in "iuf"
            else apply_read_scaling(np.zeros(1, dtype), *scaling).dtype
        )
    except Exception as error:  # nibabel raises ImageFileError, HeaderDataError, OSError, EOFError, zlib.error and more
        raise _unreadable(path, error) from error
    if scaled.kind not in "iuf":
        raise InputError(
            path,
            found=f"values of type {dtype}",
            expected="integers or real numbers",
            do="Export a single grey channel.",
        )
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        raise InputError(
            path,
            found=f"an array of shape {shape}",
            expected="one grey volume (X, Y, Z)",
            do="Export a single channel and time point.",
        )
    check_extent(shape[:3], (), dtype.itemsize, str(path))
    volume = _values(path, shape[:3], dtype, offset)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return np.asarray(apply_read_scaling(np.ascontiguousarray(volume[z0:z1, y0:y1]), *scaling))

    return Source(str(path), (shape[2], shape[1], shape[0]), scaled, voxel, 1, cut, stamp(path))


def _header(path: Path) -> Any:
    """The header alone: nibabel.load also reads extensions, as long as they say that they are."""
    import nibabel
    from nibabel.openers import ImageOpener

    with ImageOpener(str(path)) as file:
        raw = file.read(540)
    for size, kind in ((348, nibabel.Nifti1Header), (540, nibabel.Nifti2Header)):
        if size in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")):
            header = kind(raw[:size])
            if header["magic"].item() != kind.single_magic:
                raise ValueError("the header of a pair of files, .hdr and .img")
            return header
    raise ValueError("it does not begin with a NIfTI header")


def _values(path: Path, shape: tuple[int, int, int], dtype: np.dtype[Any], offset: int) -> Array:
    """The array as (Z, Y, X), mapped where the file is not packed."""
    from nibabel.arrayproxy import ArrayProxy

    packed, needed = path.suffix.lower() == ".gz", offset + math.prod(shape) * dtype.itemsize
    if packed and needed > PACKED:
        raise InputError(
            path,
            found=f"{needed / 1e9:.1f} GB, packed",
            expected=f"at most {PACKED / 1e9:.1f} GB in a packed file",
            do="Unpack it (gunzip) and use the .nii file.",
        )
    if not packed and path.stat().st_size < needed:
        raise InputError(
            path,
            found=f"a truncated NIfTI file ({path.stat().st_size} bytes of {needed})",
            expected="a complete file",
            do="Copy or export it again.",
        )
    try:
        values = ArrayProxy(str(path), (shape, dtype, offset), mmap="r").get_unscaled()
    except Exception as error:
        raise _unreadable(path, error) from error
    return np.asanyarray(values).T  # in the file x runs fastest


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        path,
        found=f"no readable NIfTI file ({type(error).__name__}: {' '.join(str(error).split())[:120]})",
        expected="a complete NIfTI file",
        do="Copy or export it again.",
    )


def _voxel(header: Any) -> Voxel | None:
    """Voxel size where the header has a unit."""
    factor, zooms = UNITS_NM.get(header.get_xyzt_units()[0]), header.get_zooms()[:3]
    return (
        as_voxel([float(v) * factor for v in zooms[::-1]])
        if factor and len(zooms) == 3 and min(zooms) > 0
        else None
    )
