"""A small volume in files of every format, as their own libraries write it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import tifffile
import zarr as typed_zarr
from PIL import Image

from emadapt.errors import InputError
from emadapt.volumes.opening import open_image

zarr: Any = typed_zarr  # its types are narrower than what it takes

RAMP = np.add.outer(np.arange(31) * 4, np.arange(44) * 2).astype(np.uint8)  # smooth
VOLUME = np.stack([RAMP + 9 * z for z in range(5)]).astype(np.uint8)
WIDE = VOLUME.astype(np.uint16) * 257  # its upper half is negative as int16
VOXEL = (10.0, 4.0, 5.0)
UM = (0.01, 0.004, 0.005)


def tiff(path: Path, *images: Any, **how: Any) -> str:
    """Images one after the other, each with its own `how` if it is a pair."""
    with tifffile.TiffWriter(path / "a.tif", **how.pop("file", {})) as tif:
        for image in images or (VOLUME,):
            data, own = image if isinstance(image, tuple) else (image, {})
            tif.write(data, **{"photometric": "minisblack", **how, **own})
    return str(path / "a.tif")


def imagej(path: Path, volume: Any = VOLUME, resolution: Any = (200, 250), **stated: Any) -> str:
    how = {"imagej": True, "resolution": resolution, "metadata": {"axes": "ZYX", **stated}}
    tifffile.imwrite(path / "a.tif", volume, **how)
    return str(path / "a.tif")


def ome(path: Path, *images: Any) -> str:
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", (*UM[:2], 5), strict=True)}
    metadata = {"axes": "ZYX", "PhysicalSizeXUnit": "nm", **sizes}  # the others: µm
    return tiff(path, *images, file={"ome": True}, metadata=metadata)


def slices(path: Path, names: Sequence[str], volume: Any = VOLUME) -> str:
    """A folder of slices in the order of these names."""
    for name, own in zip(names, volume, strict=True):
        Image.fromarray(own).save(path / name, "TIFF" if name.endswith("tif") else "PNG")
    return str(path)


def hdf5(path: Path, data: Any = VOLUME, name: str = "raw", **attributes: Any) -> str:
    chunks = np.minimum(data.shape, (*data.shape[:-3], 2, 16, 16)).tolist()
    with h5py.File(path / "a.h5", "w") as file:
        made = file.create_dataset(name, data=data, chunks=tuple(chunks), compression="gzip")
        made.attrs.update(attributes)
        file.create_dataset("info", data=np.arange(3))
    return str(path / "a.h5")


def nifti(
    path: Path, volume: Any = VOLUME, unit: str = "micron", name: str = "a.nii", **fields: Any
) -> str:
    """`fields` of the header are written as they are, unchecked."""
    made = nibabel.Nifti1Image(volume.T, np.diag([*UM[::-1], 1]))  # x, y, z
    made.header.set_xyzt_units(unit)
    nibabel.save(made, path / name)
    if fields:
        content = (path / name).read_bytes()
        header = nibabel.Nifti1Header(content[:348])
        for field, value in fields.items():
            header[field] = value
        (path / name).write_bytes(header.binaryblock + content[348:])
    return str(path / name)


def array(path: Path, data: Any = VOLUME, version: int = 2, how: Any = None, **stated: Any) -> str:
    """A Zarr array; `how` as zarr's create_array takes it, `stated` are attributes."""
    how = {"chunks": (1, 16, *data.shape[2:]), **(how or {})}
    made = zarr.create_array(path / "a.zarr", data=data, zarr_format=version, **how)
    made.attrs.update(stated)
    return str(path / "a.zarr")


def image(
    path: Path,
    scales: Any = (UM,),
    unit: str = "micrometer",
    version: str = "0.4",
    axes: str = "zyx",
    volume: Any = VOLUME,
) -> str:
    """OME-Zarr with a level for each scale, written by hand as the specifications say.

    A level has no scale where it is None.
    """
    group = zarr.create_group(path / "i.zarr", zarr_format=2 if version == "0.4" else 3)
    datasets: list[dict[str, Any]] = []
    for level, scale in enumerate(scales):
        data = volume[..., :: 2**level, :: 2**level]
        group.create_array(str(level), data=data, chunks=(*[1] * (data.ndim - 3), 2, 16, 16))
        changes = [{"type": "scale", "scale": list(scale)}] if scale else []
        datasets.append({"path": str(level), "coordinateTransformations": changes})
    space = {"type": "space", "unit": unit}
    named = [{"name": a} | (space if a in "zyx" else {}) for a in axes]
    own = {"multiscales": [{"version": version, "axes": named, "datasets": datasets}]}
    group.attrs.update(own if version == "0.4" else {"ome": {"version": version, **own}})
    return str(path / "i.zarr")


def refused(text: str | Path, **how: Any) -> str:
    """Why a volume cannot be read."""
    try:
        source = open_image(str(text), **how)
        source.read(0, source.shape[0])
    except InputError as error:
        return str(error)
    return "nothing was wrong"
