"""Hostile and damaged NIfTI files: headers by nibabel, changed where it would not write them so."""

import gzip
import struct
from typing import Any

import nibabel
import numpy as np
from files import GREY, Write, noise, written, zeros


def raw(version: int = 1, data: bytes = GREY.tobytes(), **fields: Any) -> bytes:
    """A file; `fields` of the header are written as they are, unchecked."""
    header = (nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header)()
    header.set_data_shape((32, 24, 3))  # (X, Y, Z) of GREY
    header.set_data_dtype(np.uint8)
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock.ljust(header.single_vox_offset, b"\0") + data)


def nii(content: bytes) -> Write:
    return written("a.nii", content)


def packed(content: bytes, share: float = 1.0) -> Write:
    """The gzip of `content`, or a part of it."""
    whole = gzip.compress(content)
    return written("a.nii.gz", whole[: int(len(whole) * share)])


def dims(*sizes: int) -> list[int]:
    """The header's field `dim`: how many, then each."""
    return [len(sizes), *sizes, *[1] * (7 - len(sizes))]


def bomb(head: bytes) -> Write:
    """`head`, then 3 GiB of zeros, in one gzip stream of some megabytes."""
    stored = b"\0" + struct.pack("<HH", len(head), 0xFFFF - len(head)) + head  # not packed
    stream = b"\x1f\x8b\x08" + bytes(7) + stored + zeros(3 * 1024)[2:-4] + bytes(8)
    return written("a.nii.gz", stream)


def floats(value: float) -> bytes:
    data = GREY.astype(np.float32)
    data[0, 5, 6] = value
    return raw(data=data.tobytes(), datatype=16, bitpix=32)


def extension(size: int) -> bytes:
    """An extension that says it has `size` bytes."""
    content = bytearray(raw(vox_offset=4000))
    content[348:360] = struct.pack("<4B2i", 1, 0, 0, 0, size, 6)
    return bytes(content)


BIG = dims(1100, 1000, 1000)
NIFTIS: dict[str, Write] = {
    "nifti-empty": nii(b""),
    "nifti-gz-not-packed": written("a.nii.gz", raw()),
    "nifti-noise": nii(noise(4000)),
    "nifti-header-cut": nii(raw()[:200]),
    "nifti-truncated": nii(raw()[:-700]),
    "nifti-gz-truncated": packed(raw(), 0.5),
    "nifti-gz-ends-early": packed(raw()[:-700]),
    "nifti-wrong-magic": nii(raw(magic=b"abc")),
    "nifti-magic-of-a-pair": nii(raw(magic=b"ni1")),
    "nifti-negative-sides": nii(raw(dim=dims(-32, 24, 3))),
    "nifti-gz-negative-sides": packed(raw(dim=dims(-32, 24, 3))),
    "nifti-sides-of-freesurfer": nii(raw(dim=dims(-1, 1, 1), glmin=2**31 - 1)),
    "nifti-no-slices": nii(raw(dim=dims(32, 24, 0))),
    "nifti-200-axes": nii(raw(dim=[200, 32, 24, 3, 1, 1, 1, 1])),
    "nifti-a-billion-voxels": nii(raw(dim=BIG)),
    "nifti-gz-a-billion-voxels": packed(raw(dim=BIG)),
    "nifti-gz-sides-that-fit-and-no-data": packed(raw(dim=dims(400, 400, 400))),
    "nifti-2-product-of-sides-overflows": packed(raw(2, dim=dims(2**32, 2**32, 1))),
    "nifti-complex": nii(raw(data=bytes(8 * GREY.size), datatype=32, bitpix=64)),
    "nifti-colours": nii(raw(data=bytes(3 * GREY.size), datatype=128, bitpix=24)),
    "nifti-unknown-type": nii(raw(datatype=77)),
    "nifti-nan": nii(floats(np.nan)),
    "nifti-data-beyond-the-file": nii(raw(vox_offset=2.0**40)),
    "nifti-data-at-nan": nii(raw(vox_offset=np.nan)),
    "nifti-gz-data-beyond-the-file": packed(raw(vox_offset=2.0**20)),
    "nifti-scaled-to-infinity": nii(raw(scl_slope=3e38, scl_inter=np.inf)),
    "nifti-infinite-voxels": nii(raw(pixdim=[1.0, np.inf, 1, 1, 1, 1, 1, 1], xyzt_units=2)),
    "nifti-gz-bomb": bomb(raw(dim=BIG)),
    "nifti-gz-bomb-before-the-data": bomb(raw(vox_offset=2.0**31)),
}
EXTENDED: dict[str, Write] = {
    "extension-bomb": bomb(extension(2**31 - 16)),
    "extension-of-negative-size-bomb": bomb(extension(-2)),
}
"""Sound volumes behind an extension of the header that would fill the memory if it were read."""
