"""HDF5 files, by h5py."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.volumes.source import (
    Choice,
    Source,
    chunk_grid,
    chunked_source,
    damaged,
    missing,
    not_one_of,
    only_one,
    unreadable,
)
from emadapt.volumes.voxel import stated_sizes


def open_hdf5(path: Path, choice: Choice) -> Source:
    """The chosen dataset of an HDF5 file, or the only volume that the file holds."""
    import h5py

    only_one(path, dataclasses.replace(choice, inside="", at={}))
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise unreadable(path, "no readable HDF5 file", error) from error
    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 2:
            found[name] = item

    file.visititems(note)  # follows no link to another file
    stacks = [name for name, item in found.items() if sum(n > 1 for n in item.shape) >= 3]
    name = choice.inside.strip("/") or (stacks[0] if len(stacks) == 1 else "")
    if name not in found:
        said = f"no dataset {name}" if name else f"{len(stacks)} volumes"
        raise not_one_of(path, said, [f":/{other}" for other in found], f"{path}:/DATASET")
    data, what = found[name], f"{path}:/{name}"
    _check_stored(data, what)
    axes = _axes(data)
    sizes = stated_sizes(data.attrs, axes)
    source = chunked_source(what, data, axes, sizes, path, [path], choice.at)
    if data.chunks and not data.is_virtual:
        there = data.id.get_num_chunks() / math.prod(chunk_grid(data.shape, data.chunks))
        source = dataclasses.replace(source, notes=missing(1 - there, data.fillvalue))
    return source


def _check_stored(data: Any, what: str) -> None:
    """Refuse values in other files, which the sender could not see, and values never written."""
    outside = data.is_virtual and any(
        Path(source.file_name).name != source.file_name for source in data.virtual_sources()
    )
    if data.external or outside:
        raise InputError(
            what,
            found="a dataset whose values are in files elsewhere",
            expected="values in this file",
            do="Copy it with h5repack, which puts them there.",
        )
    if not data.is_virtual and data.id.get_storage_size() == 0:
        raise damaged(what, "a dataset that was never written", "values")


def _axes(data: Any) -> list[str] | None:
    """Names of axes, from ilastik's `axistags` or HDF5's dimension labels."""
    if "axistags" in data.attrs:
        try:
            return [axis["key"] for axis in json.loads(data.attrs["axistags"])["axes"]]
        except (ValueError, KeyError, TypeError):
            return None
    labels = [dimension.label for dimension in data.dims]
    return labels if all(labels) else None
