"""Connected components of a mask of any size, and a table of them.

Voxels that share a face belong together. cc3d labels each block by itself. Labels that meet at the
border of two blocks are then made one, and components are numbered by their first voxel in the
order of the volume. The result does not depend on the blocks, and memory does not grow with the
volume but only with the number of components.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emadapt.files import whole_file
from emadapt.segment.partial import Partial, within
from emadapt.volumes.voxel import Voxel

COLUMNS = "id,voxels,volume_nm3,z_min,y_min,x_min,z_max,y_max,x_max,z,y,x"
"""Of the table: `z_min` to `x_max` is the box in voxels, its last voxel included; `z`, `y`, `x` is
the centroid in voxels. Both count from 0."""

FAR = np.iinfo(np.int64).max
Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """What is known of n components.

    Attributes:
        voxels: (n,) number of voxels of each.
        first: (n,) position of its first voxel in the order of the volume.
        sums: (n, 3) sums of its voxels' coordinates (z, y, x).
        boxes: (n, 2, 3) its lowest and highest coordinates.
    """

    voxels: Int
    first: Int
    sums: Int
    boxes: Int

    def rows(self, voxel_nm: Voxel) -> Iterator[tuple[float, ...]]:
        """Rows of the table, see `COLUMNS`."""
        size = voxel_nm[0] * voxel_nm[1] * voxel_nm[2]
        columns = zip(self.voxels.tolist(), self.boxes.tolist(), self.sums.tolist(), strict=True)
        for number, (n, box, sums) in enumerate(columns, 1):
            yield (number, n, n * size, *box[0], *box[1], *(total / n for total in sums))

    def take(self, order: Int) -> Measured:
        """The same components in another order."""
        return Measured(*(values[order] for values in vars(self).values()))


def components(
    mask: npt.NDArray[np.bool_], voxel_nm: Voxel
) -> tuple[npt.NDArray[np.uint32], list[dict[str, float]]]:
    """Label a mask that fits in memory.

    Args:
        mask: (Z, Y, X).
        voxel_nm: (z, y, x).

    Returns:
        (Z, Y, X) with 0 in the background, and a dict per component with the columns `COLUMNS`.
    """
    labels, n = _labelled(mask)
    found = measure(labels, n, (0, 0), labels.shape[1])
    names = COLUMNS.split(",")
    return labels, [dict(zip(names, row, strict=True)) for row in found.rows(voxel_nm)]


def measure(
    labels: npt.NDArray[np.uint32], n: int, origin: tuple[int, int], height: int
) -> Measured:
    """Measure the components of a block.

    Args:
        labels: (z, y, X), whole rows; 1 to n, numbered by their first voxels, as cc3d does.
        n: number of components.
        origin: (z, y) of the block's first voxel.
        height: rows of a slice of the volume.
    """
    import cc3d

    if not n:
        return Measured(*(np.zeros(shape, np.int64) for shape in (0, 0, (0, 3), (0, 2, 3))))
    facts = cc3d.statistics(labels, no_slice_conversion=True)
    shift = np.array([*origin, 0])
    voxels = facts["voxel_counts"][1:].astype(np.int64)
    sums = np.rint(facts["centroids"][1:] * voxels[:, None]).astype(np.int64)
    boxes = facts["bounding_boxes"][1:].astype(np.int64).reshape(-1, 3, 2).transpose(0, 2, 1)
    first = np.zeros(n, np.int64)
    seen = 0
    for z, plane in enumerate(labels, origin[0]):
        highest = np.maximum.accumulate(np.append(np.uint32(seen), plane))
        new = np.flatnonzero(np.diff(highest))
        first[seen : seen + len(new)] = (z * height + origin[1]) * labels.shape[2] + new
        seen += len(new)
    return Measured(voxels, first, sums + voxels[:, None] * shift, boxes + shift)


def label_block(partial: Partial, number: int) -> None:
    """Phase `components`: label a block, and keep its measures and the labels at its faces."""
    block = partial.blocks[number]
    labels, n = _labelled(np.asarray(partial.array("mask")[within(block)]) > 0)
    found = measure(labels, n, (block.z0, block.y0), partial.job.shape[1])
    faces = {"z0": labels[0], "z1": labels[-1], "y0": labels[:, 0], "y1": labels[:, -1]}
    with whole_file(_part(partial, number)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **vars(found), **faces)
    partial.mark("components", number, {"components": n})


def join(partial: Partial, table: Path) -> int:
    """Number the components of the whole volume, once all blocks are labelled.

    Args:
        partial: the run; the numbers are kept there for `number_block`.
        table: CSV file to write.

    Returns:
        The number of components.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    counts = [facts["components"] for facts in partial.facts("components")]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(offsets[-1])
    pairs = np.concatenate([np.empty((0, 2), np.int64), *_meetings(partial, offsets)])
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(total, total))
    n, group = connected_components(graph, directed=False) if total else (0, np.zeros(0, np.int64))
    whole = _added_up(partial, offsets, group, n)
    order = np.argsort(whole.first)
    ids = np.empty(n, np.uint32)
    ids[order] = np.arange(1, n + 1)
    np.save(partial.part("offsets.npy"), offsets)
    np.save(partial.part("ids.npy"), ids[group])
    with table.open("w") as file:
        file.write(COLUMNS + "\n")
        for row in whole.take(order).rows(partial.job.voxel_nm):
            file.write(",".join(f"{value:.12g}" for value in row) + "\n")
    return int(n)


def number_block(partial: Partial, number: int) -> None:
    """Phase `instances`: write a block with the numbers of the whole volume."""
    block = partial.blocks[number]
    labels, n = _labelled(np.asarray(partial.array("mask")[within(block)]) > 0)
    start = int(np.load(partial.part("offsets.npy"), mmap_mode="r")[number])
    ids = np.load(partial.part("ids.npy"), mmap_mode="r")[start : start + n]
    numbers = np.concatenate([np.zeros(1, np.uint32), ids])
    partial.array("instances")[within(block)] = numbers[labels]
    partial.mark("instances", number, {})


def _labelled(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.uint32], int]:
    """A mask's components, numbered from 1 by their first voxels, and how many there are."""
    import cc3d

    labels, n = cc3d.connected_components(mask, connectivity=6, return_N=True, binary_image=True)
    return labels.astype(np.uint32, copy=False), int(n)


def _added_up(partial: Partial, offsets: Int, group: Int, n: int) -> Measured:
    """The measures of all blocks, added up by component of the volume."""
    whole = Measured(
        voxels=np.zeros(n, np.int64),
        first=np.full(n, FAR),
        sums=np.zeros((n, 3), np.int64),
        boxes=np.stack([np.full((n, 3), FAR), np.full((n, 3), -1)], 1),
    )
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        own = group[start:stop]
        with np.load(_part(partial, number)) as found:
            np.add.at(whole.voxels, own, found["voxels"])
            np.add.at(whole.sums, own, found["sums"])
            np.minimum.at(whole.first, own, found["first"])
            np.minimum.at(whole.boxes[:, 0], own, found["boxes"][:, 0])
            np.maximum.at(whole.boxes[:, 1], own, found["boxes"][:, 1])
    return whole


def _meetings(partial: Partial, offsets: Int) -> Iterator[Int]:
    """(n, 2) labels that touch, for each border between two blocks."""
    numbers = {(block.z0, block.y0): k for k, block in enumerate(partial.blocks)}
    for number, block in enumerate(partial.blocks):
        neighbours = [("z1", "z0", (block.z1, block.y0)), ("y1", "y0", (block.z0, block.y1))]
        for own, other, place in neighbours:
            if place not in numbers:
                continue
            a = _face(partial, number, own)
            b = _face(partial, numbers[place], other)
            both = (a > 0) & (b > 0)
            ids = a[both] - 1 + offsets[number], b[both] - 1 + offsets[numbers[place]]
            yield np.unique(np.stack(ids, 1), axis=0)


def _face(partial: Partial, number: int, name: str) -> Int:
    with np.load(_part(partial, number)) as found:
        return found[name].astype(np.int64)


def _part(partial: Partial, number: int) -> Path:
    return partial.part(f"components-{number:06d}.npz")
