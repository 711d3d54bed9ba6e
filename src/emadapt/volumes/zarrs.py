"""Zarr v2 and v3 arrays, and OME-Zarr images (0.4 and 0.5) at one of their scales, by zarr."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.source import (
    Array,
    Source,
    chunked_source,
    damaged,
    not_one_of,
    spatial_axes,
    unreadable,
)
from emadapt.volumes.voxel import Voxel, in_nm, known_voxel, stated_voxel


def open_zarr(path: Path, inside: str = "", scale: int = 0) -> Source:
    """The volume in a Zarr array, in a group with one volume, or in an OME-Zarr image."""
    import zarr

    path = path / inside if inside else path
    node = _node(path)
    if isinstance(node, zarr.Group) and "bioformats2raw.layout" in _ome(node):
        node = _node(path / "0")  # what that converter calls the first image
    if isinstance(node, zarr.Group) and (images := _ome(node).get("multiscales")):
        return _image(path, node, images[0], scale)
    if scale:
        found = f"scale {scale} of a volume that has one resolution"
        raise InputError(path, found=found, expected="an OME-Zarr image", do="Leave out the scale.")
    attributes = node.attrs.asdict()
    if isinstance(node, zarr.Group):
        node = _only_volume(path, node)
        attributes |= node.attrs.asdict()
    names = getattr(node.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    axes = [str(name) for name in names] if names and all(names) else None
    return _source(str(path), path, node, axes, stated_voxel(attributes))


def is_zarr(path: Path) -> bool:
    """Whether a folder is, or is in, a Zarr."""
    marks = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
    named = any(part.suffix.lower() == ".zarr" for part in (path, *path.parents))
    return path.is_dir() and (named or any((path / mark).is_file() for mark in marks))


def _node(path: Path) -> Any:
    import zarr

    try:
        return zarr.open(path, mode="r")
    except Exception as error:  # FileNotFoundError, ValueError, KeyError and more
        raise unreadable(path, "no readable Zarr", error) from error


def _ome(group: Any) -> dict[str, Any]:
    """OME-Zarr's metadata: 0.5 has them under `ome`, 0.4 at the top."""
    attributes = group.attrs.asdict()
    own = attributes.get("ome", attributes)
    return own if isinstance(own, dict) else {}


def _only_volume(path: Path, group: Any) -> Any:
    import zarr

    members = group.members(max_depth=4)
    arrays = {name: item for name, item in members if isinstance(item, zarr.Array)}
    volumes = [name for name, item in arrays.items() if sum(n > 1 for n in item.shape) >= 3]
    if len(volumes) != 1:
        raise not_one_of(path, f"{len(volumes)} volumes", list(arrays), f"{path}/ARRAY")
    return arrays[volumes[0]]


def _image(path: Path, group: Any, image: dict[str, Any], scale: int) -> Source:
    """One scale of an image that `multiscales` describes."""
    try:
        # Version 0.3 has plain names of axes.
        axes = [{"name": a} if isinstance(a, str) else a for a in image["axes"]]
        names = [axis["name"] for axis in axes]
        levels = image["datasets"]
        paths = [str(level["path"]) for level in levels]
    except (KeyError, TypeError) as error:
        found = f"OME-Zarr metadata without {error}"
        raise damaged(path, found, "multiscales of version 0.4 or 0.5") from error
    if not 0 <= scale < len(paths):
        expected, do = f"0 to {len(paths) - 1}", "Choose one that is there."
        raise InputError(path, found=f"scale {scale}", expected=expected, do=do)
    if paths[scale] not in group:
        raise damaged(path, f"no array {paths[scale]!r}", "what its metadata say")
    changes = [
        *levels[scale].get("coordinateTransformations", ()),
        *image.get("coordinateTransformations", ()),
    ]
    voxel = _voxel(axes, changes)
    return _source(f"{path} (scale {scale})", path, group[paths[scale]], names, voxel)


def _voxel(axes: list[dict[str, Any]], changes: Sequence[dict[str, Any]]) -> Voxel | None:
    sizes = np.ones(len(axes))
    for change in changes:
        if change.get("type") == "scale" and len(change.get("scale", ())) == len(axes):
            sizes *= np.asarray(change["scale"], float)
    known = {
        axis["name"]: in_nm(float(size), str(axis.get("unit", "")))
        for axis, size in zip(axes, sizes, strict=True)
    }
    return known_voxel([known.get(axis, 0.0) for axis in "zyx"])


def _source(
    name: str, path: Path, array: Any, axes: list[str] | None, voxel: Voxel | None
) -> Source:
    if not hasattr(array, "chunks"):
        raise InputError(name, found="a group", expected="an array", do="Check the path.")
    if "pickle" in [getattr(f, "codec_id", "") for f in getattr(array, "filters", ())]:
        raise InputError(
            name,
            found="values kept as pickles, which may run programs",
            expected="plain values",
            do="Do not open it; ask for another copy.",
        )
    folder = Path(array.store.root, array.path)
    described = [folder / mark for mark in ("zarr.json", ".zarray") if (folder / mark).is_file()]
    source = chunked_source(name, array, axes, voxel, path, described)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        for file in _files(array, axes, (z0, z1), (y0, y1)):
            _check_file(file, name, _is_blosc(array))
        return source.cut(z0, z1, y0, y1)

    return dataclasses.replace(source, cut=cut)


def _is_blosc(array: Any) -> bool:
    """Whether each file is one chunk of Blosc."""
    sharded = getattr(array, "shards", None)
    return not sharded and any("Blosc" in type(codec).__name__ for codec in array.compressors)


def _files(
    array: Any, axes: list[str] | None, slices: tuple[int, int], rows: tuple[int, int]
) -> Iterator[Path]:
    """Files of the chunks or shards that hold a region."""
    stored = getattr(array, "shards", None) or array.chunks
    kept = spatial_axes(array.shape, axes, array.path)
    wanted = [slices, rows, (0, array.shape[kept[-1]])][-len(kept) :]
    ranges = [range(1)] * len(stored)
    for axis, (start, end) in zip(kept, wanted, strict=True):
        ranges[axis] = range(start // stored[axis], -(-end // stored[axis]))
    for place in itertools.product(*ranges):
        yield Path(array.store.root, array.path, array.metadata.encode_chunk_key(place))


def _check_file(file: Path, name: str, blosc: bool) -> None:
    """Refuse pipes and dead links, and Blosc chunks that are short: numcodecs reads past them."""
    if os.path.lexists(file) != file.is_file():
        raise damaged(name, f"no plain file at {file.name}", "files")
    if blosc and file.is_file():
        with file.open("rb") as stream:
            said = int.from_bytes(stream.read(16)[12:], "little")
        if said != file.stat().st_size:
            raise ValueError(f"{file.name} has {file.stat().st_size} bytes of {said}")
