"""Write OME-TIFF stacks, by tifffile, slice by slice."""

from __future__ import annotations

import hashlib
import itertools
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
    """A compressed OME-TIFF of a group's array `0`, next to it; the same array, the same bytes.

    An axis before z, y, x is of channels, named after the `classes` of `about`.
    """
    import tifffile
    import zarr

    array = zarr.open_array(group / "0", mode="r")
    path = group.with_name(f"{group.name}.tif")
    tiled = array.shape[-2] * array.shape[-1] > TILED
    parts = _tiles(array) if tiled else _slices(array)
    description = json.dumps(about)
    digest = hashlib.md5(description.encode(), usedforsecurity=False)
    z, y, x = (round(size / 1e3, 9) for size in voxel_nm)  # um
    metadata: dict[str, Any] = {
        "axes": "CZYX"[-array.ndim :],
        "Name": name,
        "Description": description,
        "UUID": str(uuid.UUID(bytes=digest.digest())),
    }
    for axis, size in zip("ZYX", (z, y, x), strict=True):
        metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "µm"}
    if array.ndim > 3:
        metadata["Channel"] = {"Name": [own["name"] for own in about["classes"]]}
    size = int(np.prod(array.shape)) * array.dtype.itemsize
    with tifffile.TiffWriter(path, bigtiff=size > CLASSIC, ome=True) as tif:
        tif.write(
            parts,
            shape=array.shape,
            dtype=array.dtype,
            photometric="minisblack",
            tile=(CHUNK, CHUNK) if tiled else None,
            compression="zlib",
            metadata=metadata,
            software="emadapt",
            resolution=(1e4 / x, 1e4 / y),
            resolutionunit="CENTIMETER",
        )
    next(parts, None)  # ends its progress bar: tifffile asks for no more than it needs
    return path


def _slices(array: Any) -> Iterator[Array]:
    """(Y, X) slices; those of a chunk are read together, up to `HELD` bytes."""
    size = array.shape[-2] * array.shape[-1] * array.dtype.itemsize
    depth = max(1, min(array.chunks[-3], HELD // size))
    places = list(
        itertools.product(*map(range, array.shape[:-3]), range(0, array.shape[-3], depth))
    )
    for *channel, z in track(places, "segment: writing", len(places)):
        yield from np.asarray(array[(*channel, slice(z, z + depth))])


def _tiles(array: Any) -> Iterator[Array]:
    """Tiles of CHUNK x CHUNK, slice by slice."""
    places = list(np.ndindex(array.shape[:-2]))
    for place in track(places, "segment: writing", len(places)):
        for y in range(0, array.shape[-2], CHUNK):
            rows = np.asarray(array[(*place, slice(y, y + CHUNK))])
            for x in range(0, array.shape[-1], CHUNK):
                yield np.ascontiguousarray(rows[:, x : x + CHUNK])
