"""Zarr v2 and v3 arrays, and OME-Zarr images (0.4 and 0.5) at one of their scales, by zarr."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.source import (
    Array,
    Choice,
    Places,
    Source,
    chunk_grid,
    chunked_source,
    damaged,
    missing,
    not_one_of,
    places_of,
    unreadable,
)
from emadapt.volumes.voxel import in_nm, stated_sizes

FILES = 10_000
"""Most files of chunks that are looked for when a Zarr is opened."""


def open_zarr(path: Path, choice: Choice) -> Source:
    """The volume in a Zarr array, in a group with one volume, or in an OME-Zarr image."""
    import zarr

    path = path / choice.inside if choice.inside else path
    node = _node(path)
    if isinstance(node, zarr.Group) and "bioformats2raw.layout" in _ome(node):
        names = sorted(name for name, _ in node.groups() if name.isdigit())
        if names != ["0"]:
            raise not_one_of(path, f"{len(names)} images", names, f"{path}/0")
        node = _node(path / "0")
    if isinstance(node, zarr.Group) and (images := _ome(node).get("multiscales")):
        return _image(path, node, images, choice)
    if choice.scale:
        found = f"scale {choice.scale} of a volume that has one resolution"
        raise InputError(path, found=found, expected="an OME-Zarr image", do="Leave out the scale.")
    if isinstance(node, zarr.Array) and (described := _described(path)):
        return _source(str(path), path, node, *_axes(path, *described), choice)
    attributes = node.attrs.asdict()
    if isinstance(node, zarr.Group):
        node = _only_volume(path, node)
        attributes |= node.attrs.asdict()
    names = getattr(node.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    axes = [str(name) for name in names] if names and all(names) else None
    return _source(str(path), path, node, axes, stated_sizes(attributes, axes), choice)


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


def _image(path: Path, group: Any, images: list[dict[str, Any]], choice: Choice) -> Source:
    """One scale of the image that `multiscales` describes."""
    if len(images) != 1:
        names = [str(image.get("name", i)) for i, image in enumerate(images)]
        found = f"{len(images)} images: {', '.join(names)}"
        do = f"Name the array: {path}/ARRAY."
        raise InputError(path, found=found, expected="one", do=do)
    image, scale = images[0], choice.scale
    paths = _paths(path, image)
    if not 0 <= scale < len(paths):
        expected, do = f"0 to {len(paths) - 1}", "Choose one that is there."
        raise InputError(path, found=f"scale {scale}", expected=expected, do=do)
    if lost := [name for name in paths if name not in group]:
        raise damaged(path, f"no array {', '.join(lost)}", "what its metadata say")
    shapes = [group[name].shape for name in paths]
    if shapes != sorted(shapes, key=math.prod, reverse=True):
        found = f"scales of shape {', '.join(map(str, shapes))}"
        do = f"Name the array: {path}/{paths[0]}."
        raise InputError(path, found=found, expected="the finest first", do=do)
    names, sizes = _axes(path, image, scale)
    return _source(f"{path} (scale {scale})", path, group[paths[scale]], names, sizes, choice)


def _described(path: Path) -> tuple[dict[str, Any], int] | None:
    """The image of an OME-Zarr of which this array is one scale, and which; None: of none."""
    if not any((path.parent / mark).is_file() for mark in (".zgroup", "zarr.json")):
        return None
    for image in _ome(_node(path.parent)).get("multiscales", ()):
        if path.name in (paths := _paths(path.parent, image)):
            return image, paths.index(path.name)
    return None


def _paths(path: Path, image: dict[str, Any]) -> list[str]:
    """The arrays of an image, the finest first."""
    with _metadata(path):
        return [str(level["path"]) for level in image["datasets"]]


def _axes(path: Path, image: dict[str, Any], scale: int) -> tuple[list[str], dict[str, Any]]:
    """Names of the axes of an image, and what states the voxel size of one of its scales."""
    with _metadata(path):
        # Version 0.3 has plain names of axes.
        axes = [{"name": a} if isinstance(a, str) else a for a in image["axes"]]
        changes = [
            *image["datasets"][scale].get("coordinateTransformations", ()),
            *image.get("coordinateTransformations", ()),
        ]
        names = [axis["name"] for axis in axes]
    return names, {"coordinateTransformations": _sizes(axes, changes)}


@contextlib.contextmanager
def _metadata(path: Path) -> Iterator[None]:
    """Within, what OME-Zarr metadata lack is an InputError."""
    try:
        yield
    except (KeyError, TypeError) as error:
        found = f"OME-Zarr metadata without {error}"
        raise damaged(path, found, "multiscales of version 0.4 or 0.5") from error


def _sizes(axes: list[dict[str, Any]], changes: Sequence[dict[str, Any]]) -> list[float]:
    """Voxel size (z, y, x) in nm; 0 for what has no scale or no unit."""
    scales = [c["scale"] for c in changes if len(c.get("scale", ())) == len(axes)]
    if not scales:
        return [0.0] * 3
    sizes = np.prod(np.asarray(scales, float), axis=0)
    known = {
        axis["name"]: in_nm(float(size), str(axis.get("unit", "")))
        for axis, size in zip(axes, sizes, strict=True)
    }
    return [known.get(axis, 0.0) for axis in "zyx"]


def _source(
    name: str,
    path: Path,
    array: Any,
    axes: list[str] | None,
    sizes: Mapping[str, Sequence[float]],
    choice: Choice,
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
    places = places_of(array.shape, axes, str(path), choice.at)
    source = chunked_source(name, array, axes, sizes, path, described, choice.at)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        for file in _files(array, places, (z0, z1), (y0, y1)):
            _check_file(file, name, _is_blosc(array))
        return source.cut(z0, z1, y0, y1)

    return dataclasses.replace(source, cut=cut, notes=_missing(name, array))


def _is_blosc(array: Any) -> bool:
    """Whether each file is one chunk of Blosc, which no other codec packs again."""
    last = [type(codec).__name__ for codec in array.compressors[-1:]]
    return not getattr(array, "shards", None) and any("Blosc" in name for name in last)


def _missing(name: str, array: Any) -> tuple[str, ...]:
    """A note on the share of files of chunks that are not there, of a sample of them.

    Raises:
        InputError: none is there.
    """
    grid = chunk_grid(array.shape, getattr(array, "shards", None) or array.chunks)
    numbers = np.linspace(0, math.prod(grid) - 1, min(math.prod(grid), FILES)).astype(np.int64)
    places = list(zip(*np.unravel_index(numbers, grid), strict=True))
    folder = Path(array.store.root, array.path)
    share = np.mean([not os.path.lexists(folder / _key(array, place)) for place in places])
    if share < 1:
        return missing(float(share), array.fill_value)
    parts = [str(n) for n in places[0]]
    others = ["/".join(parts), ".".join(parts), "/".join(["c", *parts]), ".".join(["c", *parts])]
    found = f"none of its chunks, which are called like {_key(array, places[0])}"
    if there := [other for other in others if (folder / other).is_file()]:
        separator = "/" if "/" in there[0] else "."
        found += f"; they are there as {there[0]}"
        do = f'State it in .zarray: "dimension_separator": "{separator}".'
    else:
        do = "Copy or export it again."
    raise InputError(name, found=found, expected="the chunks that its metadata name", do=do)


def _key(array: Any, place: Sequence[int]) -> str:
    """The name of a chunk's file in the folder of its array."""
    return str(array.metadata.encode_chunk_key(tuple(int(n) for n in place)))


def _files(
    array: Any, places: Places, slices: tuple[int, int], rows: tuple[int, int]
) -> Iterator[Path]:
    """Files of the chunks or shards that hold a region."""
    stored = getattr(array, "shards", None) or array.chunks
    ranges = []
    for place, size, n in zip(places, stored, array.shape, strict=True):
        start, end = (
            (place, place + 1)
            if isinstance(place, int)
            else {"z": slices, "y": rows, "x": (0, n)}[place]
        )
        ranges.append(range(start // size, -(-end // size)))
    for chunk in itertools.product(*ranges):
        yield Path(array.store.root, array.path, _key(array, chunk))


def _check_file(file: Path, name: str, blosc: bool) -> None:
    """Refuse pipes and dead links, and Blosc chunks that are short: numcodecs reads past them."""
    if os.path.lexists(file) != file.is_file():
        raise damaged(name, f"no plain file at {file.name}", "files")
    if blosc and file.is_file():
        with file.open("rb") as stream:
            said = int.from_bytes(stream.read(16)[12:], "little")
        if said != file.stat().st_size:
            raise ValueError(f"{file.name} has {file.stat().st_size} bytes of {said}")
