"""Connected components of a mask of any size, right across the borders of blocks, and a table of them.

Voxels that share a face belong together. Each block is labelled by itself; labels that meet at a border are one component;
components are numbered by their first voxel in the order of the volume, so that blocks leave no trace.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emadapt.segment.partial import Partial, within
from emadapt.volumes.voxel import Voxel

COLUMNS = "id,voxels,volume_nm3,z_min,y_min,x_min,z_max,y_max,x_max,z,y,x"
"""Of the table: z_min to x_max the box in voxels, its ends included; z, y, x the centroid in voxels, from 0."""

FAR = np.iinfo(np.int64).max
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Measured:
    """What is known of n components.

    Attributes:
        voxels: (n,) how many each has.
        first: (n,) place of its first voxel in the order of the volume.
        sums: (n, 3) sums of its voxels' coordinates (z, y, x).
        boxes: (n, 2, 3) its lowest and highest coordinates.
    """

    voxels: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    sums: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.int64]

    def rows(self, voxel_nm: Voxel) -> Iterator[tuple[float, ...]]:
        """Rows of the table, components in their order."""
        size = voxel_nm[0] * voxel_nm[1] * voxel_nm[2]
        for k, (n, box, total) in enumerate(
            zip(self.voxels.tolist(), self.boxes.tolist(), self.sums.tolist(), strict=True), 1
        ):
            yield (k, n, n * size, *box[0], *box[1], *(v / n for v in total))


def components(
    mask: npt.NDArray[np.bool_], voxel_nm: Voxel
) -> tuple[npt.NDArray[np.uint32], list[dict[str, float]]]:
    """Components (Z, Y, X) of a mask in memory, numbered as in a volume of blocks, and the rows of their table."""
    from scipy.ndimage import label

    labels, n = label(mask)
    found = measure(labels, n, (0, 0), labels.shape[1])
    found, ids = _ordered(found)
    rows = [dict(zip(COLUMNS.split(","), row, strict=True)) for row in found.rows(voxel_nm)]
    return np.concatenate([np.zeros(1, np.uint32), ids])[labels], rows


def measure(labels: Labels, n: int, origin: tuple[int, int], height: int) -> Measured:
    """Measure the components of a part of a volume.

    Args:
        labels: (z, y, X) from 1 to n, whole rows.
        n: how many.
        origin: (z, y) of its first voxel.
        height: rows of a slice of the volume.
    """
    from scipy.ndimage import find_objects

    (z0, y0), width = origin, labels.shape[2]
    voxels, first, sums = (
        np.zeros(n + 1, np.int64),
        np.full(n + 1, -1, np.int64),
        np.zeros((n + 1, 3), np.int64),
    )
    for z, plane in enumerate(
        labels, z0
    ):  # a plane at a time: coordinates take more memory than labels
        flat = plane.ravel()
        place = np.flatnonzero(flat)
        found = flat[place]
        here = np.full(n + 1, -1, np.int64)
        here[found[::-1]] = place[::-1] + (z * height + y0) * width  # the first of each stays
        first = np.where(first < 0, here, first)
        count = np.bincount(found, minlength=n + 1)
        voxels += count
        sums[:, 0] += count * z
        sums[:, 1] += np.bincount(found, place // width + y0, n + 1).astype(np.int64)
        sums[:, 2] += np.bincount(found, place % width, n + 1).astype(np.int64)
    boxes = np.array(
        [[[s.start for s in box], [s.stop - 1 for s in box]] for box in find_objects(labels)],
        np.int64,
    )
    return Measured(
        voxels[1:], first[1:], sums[1:], boxes.reshape(-1, 2, 3) + np.array([z0, y0, 0])
    )


def label_block(partial: Partial, number: int) -> None:
    """Phase `components`: label a block by itself; keep what must be known of its components and their labels at its faces."""
    block = partial.blocks[number]
    labels, n = _labelled(partial, number)
    found = measure(labels, n, (block.z0, block.y0), partial.job.shape[1])
    path = partial.part(f"components-{number:06d}.npz")
    temporary = path.with_name(f".{path.name}")
    np.savez_compressed(
        temporary, **vars(found), z0=labels[0], z1=labels[-1], y0=labels[:, 0], y1=labels[:, -1]
    )
    temporary.replace(path)
    partial.mark("components", number, {"components": n})


def join(partial: Partial, table: Path) -> int:
    """Between the phases: what is one component over borders gets one number; write the table and the numbers.

    Args:
        partial: with all blocks labelled.
        table: the CSV to write, whole or not at all.

    Returns:
        How many components there are.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    counts = [facts["components"] for facts in partial.facts("components")]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(offsets[-1])
    pairs = np.concatenate([np.empty((0, 2), np.int64), *_meetings(partial, offsets)])
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(total, total))
    n, group = connected_components(graph, directed=False) if total else (0, np.empty(0, np.int32))
    whole = Measured(
        np.zeros(n, np.int64), np.full(n, FAR), np.zeros((n, 3), np.int64), np.full((n, 2, 3), FAR)
    )
    whole.boxes[:, 1] = -1
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        with np.load(partial.part(f"components-{number:06d}.npz")) as found:
            own = group[start:stop]
            np.add.at(whole.voxels, own, found["voxels"])
            np.add.at(whole.sums, own, found["sums"])
            np.minimum.at(whole.first, own, found["first"])
            np.minimum.at(whole.boxes[:, 0], own, found["boxes"][:, 0])
            np.maximum.at(whole.boxes[:, 1], own, found["boxes"][:, 1])
    whole, ids = _ordered(whole)
    np.save(partial.part("offsets.npy"), offsets)
    np.save(partial.part("ids.npy"), ids[group])
    temporary = table.with_name(f".{table.name}.part")
    with temporary.open("w") as file:
        file.write(COLUMNS + "\n")
        file.writelines(
            ",".join(f"{v:.12g}" for v in row) + "\n" for row in whole.rows(partial.job.voxel_nm)
        )
    temporary.replace(table)
    return int(n)


def number_block(partial: Partial, number: int) -> None:
    """Phase `instances`: the block again, with the numbers of the whole volume."""
    labels, n = _labelled(partial, number)
    start = int(np.load(partial.part("offsets.npy"), mmap_mode="r")[number])
    ids = np.load(partial.part("ids.npy"), mmap_mode="r")[start : start + n]
    table, out = (
        np.concatenate([np.zeros(1, np.uint32), ids]),
        labels.view(np.uint32),
    )  # in the same memory
    for z, plane in enumerate(labels):
        out[z] = table[plane]
    partial.array("instances")[within(partial.blocks[number])] = out
    partial.mark("instances", number, {})


def _labelled(partial: Partial, number: int) -> tuple[Labels, int]:
    """A block's own components, (z, y, X) from 1 on, and how many they are."""
    from scipy.ndimage import label

    mask = np.asarray(partial.array("mask")[within(partial.blocks[number])])
    labels = np.empty(mask.shape, np.int32)
    return labels, int(label(mask, output=labels))


def _ordered(found: Measured) -> tuple[Measured, npt.NDArray[np.uint32]]:
    """Components in the order of their first voxels, and the number from 1 on that each of them has there."""
    order = np.argsort(found.first)
    ids = np.empty(len(order), np.uint32)
    ids[order] = np.arange(1, len(order) + 1)
    return Measured(
        found.voxels[order], found.first[order], found.sums[order], found.boxes[order]
    ), ids


def _meetings(partial: Partial, offsets: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """(n, 2) components that touch at a border, for each border of two blocks."""
    where = {(b.z0, b.y0): k for k, b in enumerate(partial.blocks)}
    for k, block in enumerate(partial.blocks):
        for own, other, beside in (
            ("z1", "z0", (block.z1, block.y0)),
            ("y1", "y0", (block.z0, block.y1)),
        ):
            if beside in where:
                a, b = _face(partial, k, own), _face(partial, where[beside], other)
                both = (a > 0) & (b > 0)
                yield np.unique(
                    np.stack([a[both] - 1 + offsets[k], b[both] - 1 + offsets[where[beside]]], 1),
                    axis=0,
                )


def _face(partial: Partial, number: int, name: str) -> npt.NDArray[np.int64]:
    with np.load(partial.part(f"components-{number:06d}.npz")) as found:
        return np.asarray(found[name], np.int64)
