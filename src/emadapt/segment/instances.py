"""Connected components of a mask of any size, right across the borders of blocks, and a table of them.

Voxels that share a face belong together. Each block is labelled by itself; labels that meet at a border are one component;
components are numbered by their first voxel in the order of the volume, so that blocks leave no trace.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.segment.partial import Partial, within

COLUMNS = "id,voxels,volume_nm3,z_min,y_min,x_min,z_max,y_max,x_max,z,y,x"
"""Of the table: z_min to x_max the box in voxels, its ends included; z, y, x the centroid in voxels, from 0."""

Labels = npt.NDArray[np.int32]


def label_block(partial: Partial, number: int) -> None:
    """Phase `components`: label a block by itself; keep what must be known of its components and their labels at its faces."""
    block, (_, height, width) = partial.blocks[number], partial.job.shape
    labels, n = labelled(partial, number)
    voxels, first, sums = np.zeros(n + 1, np.int64), np.full(n + 1, -1, np.int64), np.zeros((n + 1, 3), np.int64)
    for z, plane in enumerate(labels, block.z0):  # a plane at a time: coordinates take more memory than labels
        flat = plane.ravel()
        place = np.flatnonzero(flat)
        found = flat[place]
        new = first < 0
        here = np.full(n + 1, -1, np.int64)
        here[found[::-1]] = place[::-1] + (z * height + block.y0) * width  # the first of each stays
        first[new] = here[new]
        count = np.bincount(found, minlength=n + 1)
        voxels += count
        sums[:, 0] += count * z
        sums[:, 1] += np.bincount(found, place // width + block.y0, n + 1).astype(np.int64)
        sums[:, 2] += np.bincount(found, place % width, n + 1).astype(np.int64)
    from scipy.ndimage import find_objects

    offset = np.array([block.z0, block.y0, 0])
    boxes = np.array([[[s.start for s in box], [s.stop - 1 for s in box]] for box in find_objects(labels)]).reshape(-1, 2, 3)
    path = partial.part(f"components-{number:06d}.npz")
    temporary = path.with_name(f".{path.name}")
    np.savez_compressed(
        temporary, voxels=voxels[1:], first=first[1:], sums=sums[1:], boxes=boxes + offset,
        z0=labels[0], z1=labels[-1], y0=labels[:, 0], y1=labels[:, -1],
    )  # fmt: skip
    temporary.replace(path)
    partial.mark("components", number, {"components": n})


def labelled(partial: Partial, number: int) -> tuple[Labels, int]:
    """A block's own components, (z, y, X) from 1 on, and how many they are."""
    from scipy.ndimage import label

    mask = np.asarray(partial.array("mask")[within(partial.blocks[number])])
    labels = np.empty(mask.shape, np.int32)
    return labels, int(label(mask, output=labels))


def join(partial: Partial, table: Path) -> int:
    """Between the phases: what is one component over borders gets one number; write the table and the numbers.

    Args:
        partial: with all blocks labelled.
        table: the CSV to write.

    Returns:
        How many components there are.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    counts = [facts["components"] for facts in partial.facts("components")]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    pairs = np.concatenate([np.empty((0, 2), np.int64), *_meetings(partial, offsets)])
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(offsets[-1], offsets[-1]))
    n, group = connected_components(graph, directed=False) if offsets[-1] else (0, np.empty(0, np.int32))
    voxels, first, sums = np.zeros(n, np.int64), np.full(n, np.iinfo(np.int64).max), np.zeros((n, 3), np.int64)
    low, high = np.full((n, 3), np.iinfo(np.int64).max), np.full((n, 3), -1, np.int64)
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        with np.load(partial.part(f"components-{number:06d}.npz")) as found:
            own = group[start:stop]
            np.add.at(voxels, own, found["voxels"])
            np.add.at(sums, own, found["sums"])
            np.minimum.at(first, own, found["first"])
            np.minimum.at(low, own, found["boxes"][:, 0])
            np.maximum.at(high, own, found["boxes"][:, 1])
    order = np.argsort(first)
    ids = np.empty(n, np.uint32)
    ids[order] = np.arange(1, n + 1)
    np.save(partial.part("offsets.npy"), offsets)
    np.save(partial.part("ids.npy"), ids[group])
    _write_table(table, partial.job.voxel_nm, voxels[order], low[order], high[order], sums[order])
    return int(n)


def number_block(partial: Partial, number: int) -> None:
    """Phase `instances`: the block again, with the numbers of the whole volume."""
    labels, n = labelled(partial, number)
    start = int(np.load(partial.part("offsets.npy"), mmap_mode="r")[number])
    ids = np.load(partial.part("ids.npy"), mmap_mode="r")[start : start + n]
    partial.array("instances")[within(partial.blocks[number])] = np.concatenate([np.zeros(1, np.uint32), ids])[labels]
    partial.mark("instances", number, {})


def _meetings(partial: Partial, offsets: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """(n, 2) components that touch at a border, for each border of two blocks."""
    where = {(b.z0, b.y0): k for k, b in enumerate(partial.blocks)}
    for k, block in enumerate(partial.blocks):
        for own, other, beside in (("z1", "z0", (block.z1, block.y0)), ("y1", "y0", (block.z0, block.y1))):
            if beside in where:
                a, b = _face(partial, k, own), _face(partial, where[beside], other)
                both = (a > 0) & (b > 0)
                yield np.unique(np.stack([a[both] - 1 + offsets[k], b[both] - 1 + offsets[where[beside]]], 1), axis=0)


def _face(partial: Partial, number: int, name: str) -> npt.NDArray[np.int64]:
    with np.load(partial.part(f"components-{number:06d}.npz")) as found:
        return np.asarray(found[name], np.int64)


def _write_table(path: Path, voxel_nm: tuple[float, float, float], voxels: Any, low: Any, high: Any, sums: Any) -> None:
    """The CSV, a line a component, whole or not at all."""
    size = voxel_nm[0] * voxel_nm[1] * voxel_nm[2]
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w") as file:
        file.write(COLUMNS + "\n")
        for k, (n, a, b, s) in enumerate(zip(voxels, low, high, sums, strict=True), 1):
            centre = ",".join(f"{v / n:.3f}" for v in s)
            file.write(f"{k},{n},{n * size:.12g},{','.join(map(str, (*a, *b)))},{centre}\n")
    temporary.replace(path)
