"""Write TIFF stacks, by tifffile, slice by slice: those of ImageJ for Fiji, and OME-TIFF."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.progress import track
from emadapt.volumes.source import HELD, Array
from emadapt.volumes.voxel import Voxel
from emadapt.volumes.write_zarr import CHUNK

CLASSIC = 2**32 - 2**25  # Bytes, before compression, above which a TIFF is a BigTIFF
TILED = 2**28
"""Pixels of a slice above which a TIFF is tiled; ImageJ does not read tiles, Bio-Formats does."""


def write_tiff(group: Path, name: str, voxel_nm: Voxel, about: Mapping[str, Any]) -> Path:
    """A compressed TIFF of a group's array `0`, next to it; the same array, the same bytes.

    An axis before z, y, x is of channels. Names and colours of channels, or of the ids in a mask,
    are those of the `classes` of `about`. Fiji shows them, and the voxel size, when it opens the
    file. ImageJ's TIFFs are neither large nor tiled: such an array becomes an OME-TIFF.
    """
    import tifffile

    array = _opened(group)
    if _size(array) > CLASSIC or _is_tiled(array):
        return write_ome_tiff(group, name, voxel_nm, about)
    z, y, x = _micrometres(voxel_nm)
    colours = [bytes.fromhex(own["colour"][1:]) for own in about.get("classes", ())]
    told: dict[str, Any] = {"Info": json.dumps(about)}
    form: dict[str, Any] = {"photometric": "minisblack"}
    channels = array.ndim > 3
    if channels:
        ramps = [np.outer(colour, np.arange(256)) // 255 for colour in map(list, colours)]
        told["LUTs"] = [ramp.astype(np.uint8) for ramp in ramps]
        told["Ranges"] = (0.0, 255.0) * len(colours)
        told["Labels"] = [own["name"] for own in about["classes"]] * array.shape[-3]
    elif colours:
        colormap = np.zeros((3, 256), np.uint16)
        for number, colour in enumerate(colours, 1):
            colormap[:, number] = [257 * part for part in colour]  # 255 becomes 65535
        form = {"photometric": "palette", "colormap": colormap}
    described = tifffile.imagej_description(
        _shape(array),
        "ZCYX" if channels else "ZYX",
        colormapped="colormap" in form,
        mode="composite" if channels else None,
        spacing=z,
        unit="um",
    )
    form |= {"description": described, "extratags": tifffile.imagej_metadata_tag(told, "<")}
    form |= {"resolution": (1 / x, 1 / y), "resolutionunit": "NONE"}
    return _write(array, group, byteorder="<", metadata=None, **form)


def write_ome_tiff(group: Path, name: str, voxel_nm: Voxel, about: Mapping[str, Any]) -> Path:
    """The same as OME-TIFF, of any size. It has the names of channels, and no colours."""
    array = _opened(group)
    description = json.dumps(about)
    digest = hashlib.md5(description.encode(), usedforsecurity=False)
    z, y, x = _micrometres(voxel_nm)
    channels = array.ndim > 3
    metadata: dict[str, Any] = {
        "axes": "ZCYX" if channels else "ZYX",
        "Name": name,
        "Description": description,
        "UUID": str(uuid.UUID(bytes=digest.digest())),
    }
    for axis, size in zip("ZYX", (z, y, x), strict=True):
        metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "µm"}
    if channels:
        metadata["Channel"] = {"Name": [own["name"] for own in about["classes"]]}
    return _write(
        array,
        group,
        ome=True,
        bigtiff=_size(array) > CLASSIC,
        photometric="minisblack",
        tile=(CHUNK, CHUNK) if _is_tiled(array) else None,
        metadata=metadata,
        resolution=(1e4 / x, 1e4 / y),
        resolutionunit="CENTIMETER",
    )


def _opened(group: Path) -> Any:
    import zarr

    return zarr.open_array(group / "0", mode="r")


def _write(array: Any, group: Path, **form: Any) -> Path:
    """Write the pages of an array."""
    import tifffile

    path = group.with_name(f"{group.name}.tif")
    pages = _tiles(array) if form.get("tile") else _slices(array)
    about = {"shape": _shape(array), "dtype": array.dtype}
    tifffile.imwrite(path, pages, **about, compression="zlib", software="emadapt", **form)
    next(pages, None)  # ends its progress bar: tifffile asks for no more than it needs
    return path


def _shape(array: Any) -> tuple[int, ...]:
    """Of the pages: slices, their channels if there are any, rows, columns."""
    *channels, z, y, x = array.shape
    return (z, *channels, y, x)


def _size(array: Any) -> int:
    """Bytes, before compression."""
    return int(np.prod(array.shape)) * int(array.dtype.itemsize)


def _is_tiled(array: Any) -> bool:
    return bool(array.shape[-2] * array.shape[-1] > TILED)


def _micrometres(voxel_nm: Voxel) -> list[float]:
    return [round(size / 1e3, 9) for size in voxel_nm]


def _slices(array: Any) -> Iterator[Array]:
    """(Y, X) pages; those of a chunk are read together, up to `HELD` bytes."""
    slices = array.shape[-3]
    depth = max(1, min(array.chunks[-3], HELD // (_size(array) // slices)))
    starts = range(0, slices, depth)
    for z in track(starts, "segment: writing", len(starts)):
        part = np.asarray(array[..., z : z + depth, :, :])
        yield from np.moveaxis(part, -3, 0).reshape(-1, *part.shape[-2:])


def _tiles(array: Any) -> Iterator[Array]:
    """Tiles of CHUNK x CHUNK, page by page."""
    places = list(np.ndindex(_shape(array)[:-2]))
    for z, *channel in track(places, "segment: writing", len(places)):
        for y in range(0, array.shape[-2], CHUNK):
            rows = np.asarray(array[(*channel, z, slice(y, y + CHUNK))])
            for x in range(0, array.shape[-1], CHUNK):
                yield np.ascontiguousarray(rows[:, x : x + CHUNK])
