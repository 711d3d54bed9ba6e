"""NIfTI files, by nibabel. The affine is ignored: images and labels must be stored alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.source import (
    Array,
    Source,
    check_extent,
    check_type,
    damaged,
    no_grey_stack,
    only_one,
    stamp,
    unreadable,
)
from emadapt.volumes.voxel import Voxel, in_nm, known_voxel

PACKED = 2**29
"""Bytes up to which a packed file is unpacked into memory: it cannot be read from the middle."""
UNITS = {"mm": "mm", "micron": "um", "meter": "m"}
"""nibabel's names for units of length, and ours; others are unknown."""


def open_nifti(path: Path, inside: str = "", scale: int = 0) -> Source:
    """The volume in a .nii or .nii.gz file, whose array is (X, Y, Z)."""
    from nibabel.volumeutils import apply_read_scaling

    only_one(path, inside, scale)
    try:
        header = _header(path)
        shape, stored = header.get_data_shape(), header.get_data_dtype()
        scaling, voxel = header.get_slope_inter(), _voxel(header)
        offset = max(int(header.get_data_offset()), int(header.single_vox_offset))
    except Exception as error:  # ImageFileError, HeaderDataError, EOFError, zlib.error and more
        raise unreadable(path, "no readable NIfTI file", error) from error
    check_type(stored, str(path))
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        raise no_grey_stack(path, f"an array of shape {shape}", "(X, Y, Z)")
    check_extent(shape[:3], (), stored.itemsize, str(path))
    volume = _values(path, shape[:3], stored, offset)

    def scaled(values: Array) -> Array:
        return np.asarray(apply_read_scaling(np.ascontiguousarray(values), *scaling))

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return scaled(volume[z0:z1, y0:y1])

    dtype = scaled(np.zeros(1, stored)).dtype
    x, y, z = shape[:3]
    return Source(str(path), (z, y, x), dtype, voxel, 1, cut, stamp(path), (path,))


def _header(path: Path) -> Any:
    """The header alone: nibabel.load also reads extensions, however long they claim to be."""
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

    needed = offset + math.prod(shape) * dtype.itemsize
    packed = path.suffix.lower() == ".gz"
    if packed and needed > PACKED:
        raise InputError(
            path,
            found=f"{needed / 1e9:.1f} GB, packed",
            expected=f"at most {PACKED / 1e9:.1f} GB in a packed file",
            do="Unpack it (gunzip) and use the .nii file.",
        )
    if not packed and (size := path.stat().st_size) < needed:
        raise damaged(path, f"a truncated NIfTI file ({size} bytes of {needed})")
    try:
        values = ArrayProxy(str(path), (shape, dtype, offset), mmap="r").get_unscaled()
    except Exception as error:
        raise unreadable(path, "no readable NIfTI file", error) from error
    return np.asanyarray(values).T  # in the file x runs fastest


def _voxel(header: Any) -> Voxel | None:
    """Voxel size where the header has a unit."""
    unit = UNITS.get(header.get_xyzt_units()[0], "")
    return known_voxel([in_nm(float(size), unit) for size in header.get_zooms()[2::-1]])
