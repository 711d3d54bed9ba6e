"""NIfTI files, by nibabel. Slices are as they are stored; labels are turned onto images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.source import (
    Array,
    Choice,
    Source,
    check_extent,
    check_type,
    damaged,
    no_grey_stack,
    only_one,
    stamp,
    unreadable,
)
from emadapt.volumes.voxel import in_nm, settled

PACKED = 2**29
"""Bytes up to which a packed file is unpacked into memory: it cannot be read from the middle."""
UNITS = {"mm": "mm", "micron": "um", "meter": "m"}
"""nibabel's names for units of length, and ours; others are unknown."""


def open_nifti(path: Path, choice: Choice) -> Source:
    """The volume in a .nii or .nii.gz file, whose array is (X, Y, Z)."""
    only_one(path, choice)
    return _open(path)


def open_nifti_label(path: Path, image: Path) -> Source:
    """A label, turned and mirrored so that its voxels lie on those of its image.

    Raises:
        InputError: they do not lie on each other, by what the two affines say.
    """
    label, on = _read_header(path), _read_header(image)
    if 0 in (label["sform_code"] + label["qform_code"], on["sform_code"] + on["qform_code"]):
        return _open(path)  # one says nothing of where it lies
    from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform

    own, wanted = label.get_best_affine(), on.get_best_affine()
    turn = ornt_transform(io_orientation(own), io_orientation(wanted))
    shape = label.get_data_shape()[:3]
    turned = own @ inv_ornt_aff(turn, shape)
    corners = np.array([[0, 0, 0, 1], [*(n - 1 for n in on.get_data_shape()[:3]), 1]]).T
    off = np.abs((turned - wanted) @ corners).max()
    if off > 0.5 * min(on.get_zooms()[:3]):
        raise InputError(
            path,
            found=f"an affine {_rows(own)}",
            expected=f"the voxels of its image, {image.name}, whose affine is {_rows(wanted)}",
            do="Save the label with the affine of the image, once they lie on each other.",
        )
    return _open(path, turn)


def _rows(affine: Array) -> str:
    return str(np.round(affine[:3], 6).tolist())


def _read_header(path: Path) -> Any:
    try:
        header = _header(path)
        header.get_best_affine()
    except Exception as error:  # ImageFileError, HeaderDataError, EOFError, zlib.error and more
        raise unreadable(path, "no readable NIfTI file", error) from error
    return header


def _open(path: Path, turn: Array | None = None) -> Source:
    """A file, its axes turned and mirrored as `turn` says, an orientation of nibabel's."""
    from nibabel.orientations import apply_orientation
    from nibabel.volumeutils import apply_read_scaling

    header = _read_header(path)
    shape = header.get_data_shape()
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        raise no_grey_stack(path, f"an array of shape {shape}", "(X, Y, Z)")
    try:
        stored, scaling = header.get_data_dtype(), header.get_slope_inter()
        voxel, doubt = settled(_sizes(header))
        offset = max(int(header.get_data_offset()), int(header.single_vox_offset))
    except Exception as error:
        raise unreadable(path, "no readable NIfTI file", error) from error
    check_type(stored, str(path))
    check_extent(shape[:3], (), stored.itemsize, str(path))
    volume = _values(path, shape[:3], stored, offset)
    if turn is not None:
        volume = apply_orientation(volume.T, turn).T  # a view

    def scaled(values: Array) -> Array:
        found = np.asarray(apply_read_scaling(np.ascontiguousarray(values), *scaling))
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        return scaled(volume[z0:z1, y0:y1])

    dtype = scaled(np.zeros(1, stored)).dtype
    return Source(str(path), volume.shape, dtype, voxel, 1, cut, stamp(path), (path,), doubt=doubt)


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


def _sizes(header: Any) -> dict[str, list[float]]:
    """What the header states, (z, y, x) in nm; 0 where it has no unit."""
    unit = UNITS.get(header.get_xyzt_units()[0], "")
    stated = {"pixdim": header.get_zooms()[2::-1]}
    if header["sform_code"]:
        stated["affine"] = np.linalg.norm(header.get_sform()[:3, :3], axis=0)[::-1]
    return {name: [in_nm(float(size), unit) for size in sizes] for name, sizes in stated.items()}
