"""Zarr v2 and v3 arrays, and OME-Zarr images (0.4 and 0.5) at one of their scales, as sources."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.readers import (
    UNITS_NM,
    Source,
    Voxel,
    as_voxel,
    check_extent,
    region,
    spatial,
    stamp,
    stated_voxel,
)
from emadapt.volumes.slices import Array


def open_zarr(path: Path, scale: int) -> Source:
    """The volume in a Zarr array, in a group with one volume, or in an OME-Zarr image.

    Args:
        path: of the array or group.
        scale: of an OME-Zarr image, 0 for the finest.

    Raises:
        InputError: there is no volume, or there are several.
    """
    import zarr

    node = _open(path)
    if isinstance(node, zarr.Group) and "bioformats2raw.layout" in _ome(node.attrs.asdict()):
        node = _open(path / "0")  # what that converter calls the first image
    attributes = node.attrs.asdict()
    if isinstance(node, zarr.Group) and (images := _ome(attributes).get("multiscales")):
        return _image(path, node, images[0], scale)
    if scale:
        raise InputError(
            path,
            found=f"scale {scale} of a volume that has one resolution",
            expected="an OME-Zarr image",
            do="Leave out the scale.",
        )
    if isinstance(node, zarr.Group):
        node = _only_volume(path, node)
        attributes |= node.attrs.asdict()
    names = getattr(node.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    return _source(
        str(path),
        path,
        node,
        [str(n) for n in names] if names and all(names) else None,
        stated_voxel(attributes),
    )


def _open(path: Path) -> Any:
    import zarr

    try:
        return zarr.open(path, mode="r")
    except (
        Exception
    ) as error:  # zarr raises FileNotFoundError, ValueError, KeyError and more on what is no Zarr
        raise InputError(
            path,
            found=f"no readable Zarr ({type(error).__name__}: {error})",
            expected="a Zarr array, a group or an OME-Zarr image",
            do="Check the path.",
        ) from error


def _ome(attributes: dict[str, Any]) -> dict[str, Any]:
    """Where OME-Zarr keeps what it says: 0.5 under `ome`, 0.4 at the top."""
    own = attributes.get("ome", attributes)
    return own if isinstance(own, dict) else {}


def _only_volume(path: Path, group: Any) -> Any:
    import zarr

    arrays = {
        name: item for name, item in group.members(max_depth=4) if isinstance(item, zarr.Array)
    }
    volumes = [name for name, item in arrays.items() if sum(n > 1 for n in item.shape) >= 3]
    if len(volumes) != 1:
        raise InputError(
            path,
            found=f"{len(volumes)} volumes",
            expected=f"one of {', '.join(arrays) or 'none: it is empty'}",
            do=f"Name the array: {path}/ARRAY.",
        )
    return arrays[volumes[0]]


def _image(path: Path, group: Any, image: dict[str, Any], scale: int) -> Source:
    try:
        levels = image["datasets"]
        axes = [
            a if isinstance(a, str) else a["name"] for a in image["axes"]
        ]  # 0.3 has plain names
        units = ["" if isinstance(a, str) else str(a.get("unit", "")) for a in image["axes"]]
        names = [str(level["path"]) for level in levels]
    except (KeyError, TypeError) as error:
        raise InputError(
            path,
            found=f"OME-Zarr metadata without {error}",
            expected="multiscales of version 0.4 or 0.5",
            do="Export it again.",
        ) from error
    if not 0 <= scale < len(names):
        raise InputError(
            path,
            found=f"scale {scale}",
            expected=f"0 to {len(names) - 1}",
            do="Choose one that is there.",
        )
    if names[scale] not in group:
        raise InputError(
            path,
            found=f"no array {names[scale]!r}",
            expected="what its metadata say",
            do="Export it again.",
        )
    array = group[names[scale]]
    sizes = np.ones(len(axes))
    for change in (
        *levels[scale].get("coordinateTransformations", ()),
        *image.get("coordinateTransformations", ()),
    ):
        if change.get("type") == "scale" and len(change.get("scale", ())) == len(axes):
            sizes *= np.asarray(change["scale"], float)
    return _source(
        f"{path} (scale {scale})", path, array, axes, _voxel(axes, units, sizes.tolist())
    )


def _voxel(axes: list[str], units: list[str], sizes: list[float]) -> Voxel | None:
    found = {
        a: size * UNITS_NM.get(unit.lower(), 0.0)
        for a, unit, size in zip(axes, units, sizes, strict=True)
    }
    return as_voxel([found[a] for a in "zyx"]) if all(found.get(a, 0) > 0 for a in "zyx") else None


def _source(
    name: str, path: Path, array: Any, axes: list[str] | None, voxel: Voxel | None
) -> Source:
    if not hasattr(array, "chunks"):
        raise InputError(name, found="a group", expected="an array", do="Check the path.")
    if np.dtype(array.dtype).kind not in "buif":
        raise InputError(
            name,
            found=f"values of type {array.dtype}",
            expected="integers or real numbers",
            do="Export it as 8-bit, 16-bit or float.",
        )
    filters = [str(getattr(f, "codec_id", "")) for f in getattr(array, "filters", ())]
    if "pickle" in filters:
        raise InputError(
            name,
            found="values kept as pickles, which may run programs",
            expected="plain values",
            do="Do not open it; ask for another copy.",
        )
    kept = spatial(array.shape, axes, name)
    check_extent(
        array.shape, array.chunks, np.dtype(array.dtype).itemsize, name
    )  # of a shard, those within
    z, y, x = (1, 1, *(int(array.shape[i]) for i in kept))[-3:]
    chunk = getattr(array, "shards", None) or array.chunks
    depth = int(chunk[kept[0]]) if len(kept) == 3 else 1
    marks = [
        p
        for p in (Path(array.store.root, array.path, m) for m in ("zarr.json", ".zarray"))
        if p.is_file()
    ]

    blosc = any("Blosc" in type(codec).__name__ for codec in array.compressors) and not getattr(
        array, "shards", None
    )

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        parts = dict(zip(kept[-3:], [(z0, z1), (y0, y1), (0, x)][-len(kept) :], strict=True))
        for file in _files(array, chunk, parts):
            _check_file(file, name, blosc)
        return region(array, kept, z0, z1, y0, y1)

    return Source(name, (z, y, x), np.dtype(array.dtype), voxel, depth, cut, stamp(*marks))


def _files(array: Any, chunk: Any, parts: dict[int, tuple[int, int]]) -> Iterator[Path]:
    """Files that hold a region: of chunks, or of shards."""
    ranges = [
        range(parts[i][0] // c, -(-parts[i][1] // c)) if i in parts else range(1)
        for i, c in enumerate(chunk)
    ]
    for place in itertools.product(*ranges):
        yield Path(array.store.root, array.path, array.metadata.encode_chunk_key(place))


def _check_file(file: Path, name: str, blosc: bool) -> None:
    """A file is one; a chunk of blosc is as long as it says, for numcodecs reads past the end of others."""
    if (
        os.path.lexists(file) != file.is_file()
    ):  # a pipe would be waited for, a link to nothing be read as zeros
        raise InputError(
            name, found=f"no plain file at {file.name}", expected="files", do="Copy it again."
        )
    if blosc and file.is_file():
        with file.open("rb") as stream:
            said = int.from_bytes(stream.read(16)[12:], "little")
        if said != file.stat().st_size:
            raise ValueError(f"{file.name} has {file.stat().st_size} bytes of {said}")
