"""Write OME-Zarr 0.4 images with their scales; memory does not grow with the volume.

Zarr v2, which Fiji, napari and neuroglancer open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.progress import track
from emadapt.volumes.source import Array
from emadapt.volumes.voxel import Voxel

CHUNK = 512  # side of a chunk, and of a tile of a TIFF
SMALLEST = 256  # scales end where a slice is no larger


def create_array(group: Path, level: int, shape: tuple[int, ...], dtype: str, depth: int) -> Any:
    """An empty array of an OME-Zarr group, in chunks of `depth` slices."""
    import zarr
    from numcodecs import Blosc

    if not (group / ".zgroup").is_file():
        zarr.create_group(group, zarr_format=2)
    z, y, x = shape[-3:]
    chunks = (*[1] * (len(shape) - 3), min(depth, z), min(CHUNK, y), min(CHUNK, x))
    return zarr.create_array(
        group / str(level),
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        zarr_format=2,
        fill_value=0,
        overwrite=True,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        compressors=Blosc(cname="zstd", clevel=5, shuffle=Blosc.NOSHUFFLE),
    )


def write_zarr(group: Path, name: str, voxel_nm: Voxel, about: Mapping[str, Any]) -> Path:
    """Add coarser scales and the metadata of OME-Zarr to a group whose array `0` is finished.

    Coarser scales of `probabilities` are means; of labels, the first voxel of each cell. `classes`
    of `about` (id, name, colour) become the `image-label` of OME-Zarr, or name its channels, an
    axis before z, y, x.
    """
    import zarr

    finest = zarr.open_array(group / "0", mode="r")
    channels, size = finest.shape[:-3], finest.shape[-3:]
    factors = scale_factors(size, voxel_nm)
    averaged = name == "probabilities"
    for level, factor in enumerate(factors[1:], 1):
        finer = zarr.open_array(group / str(level - 1), mode="r")
        step = [b // a for a, b in zip(factors[level - 1], factor, strict=True)]
        size = tuple(math.ceil(n / s) for n, s in zip(size, step, strict=True))
        shape = (*channels, *size)
        coarse = create_array(group, level, shape, str(finest.dtype), finer.chunks[-3])
        for channel in np.ndindex(channels):
            _shrink(finer, coarse, channel, step, mean=averaged)
    described = _multiscale(name, voxel_nm, factors, len(channels), mean=averaged)
    root = zarr.open_group(group, mode="r+")
    root.attrs.update({"multiscales": [described], "emadapt": dict(about)})
    classes = about.get("classes", [])
    if channels:
        window = {"min": 0, "max": 255, "start": 0, "end": 255}
        root.attrs["omero"] = {
            "channels": [
                {"label": own["name"], "color": own["colour"][1:], "window": window, "active": True}
                for own in classes
            ]
        }
    elif classes:
        root.attrs["image-label"] = {
            "version": "0.4",
            "colors": [
                {"label-value": own["id"], "rgba": [*bytes.fromhex(own["colour"][1:]), 255]}
                for own in classes
            ],
            "properties": [{"label-value": own["id"], "class": own["name"]} for own in classes],
        }
    return group


def scale_factors(shape: tuple[int, ...], voxel_nm: Voxel) -> list[list[int]]:
    """Factors (z, y, x) of each scale: a step halves the axes of the shortest voxels."""
    factors = [[1, 1, 1]]
    while max(n // f for n, f in zip(shape[1:], factors[-1][1:], strict=True)) > SMALLEST:
        now = factors[-1]
        sizes = [
            size * f if n // f > 1 else math.inf  # one voxel cannot be halved
            for size, f, n in zip(voxel_nm, now, shape, strict=True)
        ]
        halved = [2 if size <= 1.5 * min(sizes) else 1 for size in sizes]
        factors.append([f * h for f, h in zip(now, halved, strict=True)])
    return factors


def _shrink(finer: Any, coarse: Any, channel: tuple[int, ...], step: list[int], mean: bool) -> None:
    """Fill a channel of an array from a finer one, a row of chunks at a time."""
    depth, rows, _ = coarse.chunks[-3:]
    starts = range(0, coarse.shape[-3], depth)
    for z in track(starts, "segment: a coarser scale", len(starts)):
        slices = slice(z * step[0], (z + depth) * step[0])
        for y in range(0, coarse.shape[-2], rows):
            part = np.asarray(finer[(*channel, slices, slice(y * step[1], (y + rows) * step[1]))])
            small = _means(part, step) if mean else part[tuple(slice(None, None, s) for s in step)]
            coarse[(*channel, slice(z, z + depth), slice(y, y + rows))] = small


def _means(part: Array, step: list[int]) -> Array:
    """Means of cells, rounded; cells at the far ends may be smaller."""
    total, count = part.astype(np.uint32), np.ones((1, 1, 1), np.uint32)
    for axis, (n, s) in enumerate(zip(part.shape, step, strict=True)):
        edges = np.arange(0, n, s)
        total = np.add.reduceat(total, edges, axis)
        sizes = np.minimum(s, n - edges).astype(np.uint32)
        count = count * sizes.reshape([-1 if k == axis else 1 for k in range(3)])
    return ((total + count // 2) // count).astype(part.dtype)


def _multiscale(
    name: str, voxel_nm: Voxel, factors: list[list[int]], channels: int, mean: bool
) -> dict[str, Any]:
    """`multiscales` of OME-Zarr 0.4, with 0 or 1 axes of channels.

    A mean is in the middle of its cell, hence the translation.
    """
    axes = [{"name": "c", "type": "channel"}] * channels
    axes += [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    datasets = []
    for level, factor in enumerate(factors):
        scale = [1.0] * channels + [size * f for size, f in zip(voxel_nm, factor, strict=True)]
        changes: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if mean:
            middle = [size * (f - 1) / 2 for size, f in zip(voxel_nm, factor, strict=True)]
            changes.append({"type": "translation", "translation": [0.0] * channels + middle})
        datasets.append({"path": str(level), "coordinateTransformations": changes})
    return {
        "version": "0.4",
        "name": name,
        "axes": axes,
        "datasets": datasets,
        "type": "mean" if mean else "nearest",
    }
