"""NIfTI volumes as sources. Their arrays are (X, Y, Z); the affine is ignored: images and labels must be stored alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from emadapt.data.volume import Array
from emadapt.errors import InputError
from emadapt.segment.readers import Source, Voxel, as_voxel, stamp

UNITS_NM = {"mm": 1e6, "micron": 1e3, "meter": 1e9}
PACKED = 2**31
"""Bytes up to which a packed file is unpacked into memory: one cannot begin to read it in the middle."""


def open_nifti(path: Path) -> Source:
    """The volume in a .nii or .nii.gz file.

    Raises:
        InputError: not a readable one, truncated, or no single stack of grey slices.
    """
    import nibabel

    if not path.is_file():
        raise InputError(path, found="no such file", expected="a NIfTI file", do="Check the path.")
    try:
        image: Any = nibabel.load(path)
        shape, voxel = image.shape, _voxel(image.header)
    except Exception as error:  # nibabel raises ImageFileError, HeaderDataError, OSError, EOFError, zlib.error and more
        raise _unreadable(path, error) from error
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or 0 in shape:
        raise InputError(path, found=f"an array of shape {shape}", expected="one grey volume (X, Y, Z)",
                         do="Export a single channel and time point.")  # fmt: skip
    values = _values(path, image, int(np.prod(shape)) * image.get_data_dtype().itemsize)
    volume = np.reshape(values, shape[:3], order="A").T  # in the file x runs fastest

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return np.ascontiguousarray(volume[z0:z1, y0:y1])

    return Source(str(path), (shape[2], shape[1], shape[0]), volume.dtype, voxel, 1, cut, stamp(path))


def _values(path: Path, image: Any, size: int) -> Array:
    """The array, mapped where the file is not packed."""
    packed = path.suffix.lower() == ".gz"
    if packed and size > PACKED:
        raise InputError(path, found=f"{size / 1e9:.1f} GB, packed", expected=f"at most {PACKED / 1e9:.1f} GB in a packed file",
                         do="Unpack it (gunzip) and use the .nii file.")  # fmt: skip
    needed = int(image.dataobj.offset) + size
    if not packed and path.stat().st_size < needed:
        raise InputError(path, found=f"a truncated NIfTI file ({path.stat().st_size} bytes of {needed})",
                         expected="a complete file", do="Copy or export it again.")  # fmt: skip
    try:
        return np.asanyarray(image.dataobj)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(path, found=f"no readable NIfTI file ({type(error).__name__}: {' '.join(str(error).split())[:120]})",
                      expected="a complete NIfTI file", do="Copy or export it again.")  # fmt: skip


def _voxel(header: Any) -> Voxel | None:
    """Voxel size where the header has a unit."""
    factor, zooms = UNITS_NM.get(header.get_xyzt_units()[0]), header.get_zooms()[:3]
    return as_voxel([float(v) * factor for v in zooms[::-1]]) if factor and len(zooms) == 3 and min(zooms) > 0 else None
