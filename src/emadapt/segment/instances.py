"""Connected components of a mask of any size, and a table of them.

Voxels of one class that share a face belong together. cc3d labels each block by itself. Labels of
a class that meet at the border of two blocks are then made one, and components are numbered by
their first voxel in the order of the volume. Of a model that tells the interior of objects from
their boundary, the components of the interior are cores, and other foreground goes to the nearest
core, so that objects which touch come apart. The result does not depend on the blocks, and memory
does not grow with the volume but only with the number of components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from emadapt.files import whole_file
from emadapt.metrics.instances import REACH_NM, grown
from emadapt.volumes.voxel import Voxel

if TYPE_CHECKING:
    import pandas as pd

    from emadapt.segment.job import Block
    from emadapt.segment.partial import Partial

BOX = [f"{axis}_{end}" for end in ("min", "max") for axis in "zyx"]
COLUMNS = ["id", "voxels", "volume_nm3", *BOX, *"zyx"]
"""Of the table: `z_min` to `x_max` is the box in voxels, its last voxel included; `z`, `y`, `x` is
the centroid in voxels. Both count from 0. Of several classes the column `class` is added, an id."""
MERGED = {
    "voxels": "sum",
    "first": "min",
    **{f"{axis}_sum": "sum" for axis in "zyx"},
    **{name: name.partition("_")[2] for name in BOX},
}
"""What `measure` gives of a component, and how the measures of its parts become its own. `first` is
the position of its first voxel in the order of the volume, `z_sum` the sum of its coordinates."""
AGGREGATED = {**MERGED, "class": "first"}
"""The same of components of several classes."""

Int = npt.NDArray[np.int64]


def components(
    mask: npt.NDArray[np.bool_], voxel_nm: Voxel
) -> tuple[npt.NDArray[np.uint32], pd.DataFrame]:
    """Label a mask (Z, Y, X) that fits in memory; the table has the columns `COLUMNS`."""
    labels, n = _labelled(mask.astype(np.uint8))
    found = measure(labels, n, (0, 0), labels.shape[1]).assign(**{"class": 1})
    return labels, table_of(found, voxel_nm, classes=1)


def measure(
    labels: npt.NDArray[np.uint32], n: int, origin: tuple[int, int], height: int
) -> pd.DataFrame:
    """A row for each component of a block, with the columns `MERGED`.

    `labels`, (z, y, X), are 1 to n by their first voxels, as cc3d numbers them. The block starts at
    `origin` (z, y) of a volume whose slices have `height` rows.
    """
    import cc3d
    import pandas as pd

    if not n:
        return pd.DataFrame({name: np.zeros(0, np.int64) for name in MERGED})
    facts = cc3d.statistics(labels, no_slice_conversion=True)
    voxels = facts["voxel_counts"][1:].astype(np.int64)
    found = {"voxels": voxels, "first": _firsts(labels, n, origin, height)}
    boxes = facts["bounding_boxes"][1:].astype(np.int64)
    for axis, (name, shift) in enumerate(zip("zyx", (*origin, 0), strict=True)):
        total = np.rint(facts["centroids"][1:, axis] * voxels).astype(np.int64)
        found[f"{name}_sum"] = total + voxels * shift
        found[f"{name}_min"] = boxes[:, 2 * axis] + shift
        found[f"{name}_max"] = boxes[:, 2 * axis + 1] + shift
    return pd.DataFrame(found)


def table_of(found: pd.DataFrame, voxel_nm: Voxel, classes: int) -> pd.DataFrame:
    """The table of components that are in the order of their first voxels."""
    columns = COLUMNS if classes == 1 else ["class", *COLUMNS]
    facts = {
        "id": np.arange(1, len(found) + 1),
        "volume_nm3": found["voxels"] * (voxel_nm[0] * voxel_nm[1] * voxel_nm[2]),
        **{axis: found[f"{axis}_sum"] / found["voxels"] for axis in "zyx"},
    }
    return found.assign(**facts)[columns].reset_index(drop=True)


def label_block(partial: Partial, number: int) -> None:
    """Phase `components`: label a block, and keep its measures and the labels at its faces."""
    block = partial.blocks[number]
    ids = _cores(partial, block)
    labels, n = _labelled(ids)
    kinds = np.zeros(n + 1, np.uint8)
    kinds[labels] = ids
    found = measure(labels, n, (block.z0, block.y0), partial.job.shape[1])
    faces = {"z0": labels[0], "z1": labels[-1], "y0": labels[:, 0], "y1": labels[:, -1]}
    _keep(partial, "components", number, found.assign(**{"class": kinds[1:]}), **faces)
    partial.mark("components", number, {"components": n})


def join(partial: Partial) -> pd.DataFrame:
    """Number the components of the whole volume, once all blocks are labelled.

    Those below the job's `min_voxels` become background. The run keeps the numbers for
    `number_block`. Gives a row for each component, with the columns of `AGGREGATED`.
    """
    blocks = range(len(partial.blocks))
    parts = np.concatenate([_kept(partial, "components", n, "measured") for n in blocks])
    counts = [facts["components"] for facts in partial.facts("components")]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    group = _groups(partial, offsets, parts[:, list(AGGREGATED).index("class")])
    found = _summed(parts, group)
    total = len(found)
    found = found[found["voxels"] >= partial.job.min_voxels].sort_values("first")
    ids = np.zeros(total, np.uint32)
    ids[found.index] = np.arange(1, len(found) + 1)
    np.save(partial.part("offsets.npy"), offsets)
    np.save(partial.part("ids.npy"), ids[group])
    return found


def number_block(partial: Partial, number: int) -> None:
    """Write a block with the numbers of the whole volume: phase `instances`, of cores `cores`."""
    block, kind = partial.blocks[number], "cores" if partial.job.cored else "instances"
    labels, n = _labelled(_cores(partial, block))
    start = int(np.load(partial.part("offsets.npy"), mmap_mode="r")[number])
    ids = np.load(partial.part("ids.npy"), mmap_mode="r")[start : start + n]
    numbers = np.concatenate([np.zeros(1, np.uint32), ids])
    partial.array(kind)[block.place] = numbers[labels]
    partial.mark(kind, number, {})


def grow_block(partial: Partial, number: int) -> None:
    """Phase `grown`: grow the cores of a block to instances, and keep the measures of these."""
    block, job = partial.blocks[number], partial.job
    margin = [math.ceil(REACH_NM / side) for side in job.voxel_nm[:2]]
    z0, y0 = max(0, block.z0 - margin[0]), max(0, block.y0 - margin[1])
    near = slice(z0, block.z1 + margin[0]), slice(y0, block.y1 + margin[1])
    whole = np.asarray(partial.array("mask")[near]) > 0
    found = grown(np.asarray(partial.array("cores")[near]), whole, job.voxel_nm)
    own = found[block.z0 - z0 :, block.y0 - y0 :][: len(block), : block.y1 - block.y0]
    partial.array("instances")[block.place] = own
    labels, ids = numbered(own)
    found = measure(labels, len(ids), (block.z0, block.y0), job.shape[1])
    _keep(partial, "grown", number, found.assign(**{"class": 1}), ids=ids)
    partial.mark("grown", number, {})


def join_grown(partial: Partial) -> pd.DataFrame:
    """As `join`, of the instances that `grow_block` grew; they keep the numbers of their cores."""
    blocks = range(len(partial.blocks))
    parts, ids = (
        np.concatenate([_kept(partial, "grown", number, name) for number in blocks])
        for name in ("measured", "ids")
    )
    return _summed(parts, ids)


def numbered(objects: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[Any]]:
    """Objects with numbers, not 0, as labels for `measure`, and the number of each label."""
    import pandas as pd

    codes, ids = pd.factorize(objects.ravel())  # in the order of their first voxels
    labels = np.where(ids != 0, np.cumsum(ids != 0), 0).astype(np.uint32)
    return labels[codes].reshape(objects.shape), ids[ids != 0]


def _labelled(ids: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint32], int]:
    """Components of voxels of the same id, not 0, and how many there are.

    They are numbered from 1 by their first voxels.
    """
    import cc3d

    labels, n = cc3d.connected_components(ids, connectivity=6, return_N=True)
    return labels.astype(np.uint32, copy=False), int(n)


def _firsts(labels: npt.NDArray[np.uint32], n: int, origin: tuple[int, int], height: int) -> Int:
    """Position in the volume of the first voxel of each component, see `measure`."""
    first, seen = np.zeros(n, np.int64), 0
    for z, plane in enumerate(labels, origin[0]):
        highest = np.maximum.accumulate(np.append(np.uint32(seen), plane))
        new = np.flatnonzero(np.diff(highest))  # the highest label so far rises by one at each
        first[seen : seen + len(new)] = (z * height + origin[1]) * labels.shape[2] + new
        seen += len(new)
    return first


def _groups(partial: Partial, offsets: Int, kinds: Int) -> npt.NDArray[np.int32]:
    """For each label of each block the component of the volume, from 0, that it belongs to.

    `kinds` are the classes of the labels.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    total = int(offsets[-1])
    if not total:
        return np.zeros(0, np.int32)
    pairs = np.concatenate([np.empty((0, 2), np.int64), *_meetings(partial, offsets)])
    pairs = pairs[kinds[pairs[:, 0]] == kinds[pairs[:, 1]]]
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(total, total))
    return np.asarray(connected_components(graph, directed=False)[1])


def _meetings(partial: Partial, offsets: Int) -> Iterator[Int]:
    """(n, 2) labels that touch, for each border between two blocks."""
    numbers = {(block.z0, block.y0): k for k, block in enumerate(partial.blocks)}
    for number, block in enumerate(partial.blocks):
        neighbours = [("z1", "z0", (block.z1, block.y0)), ("y1", "y0", (block.z0, block.y1))]
        for own, other, place in neighbours:
            if place not in numbers:
                continue
            a = _kept(partial, "components", number, own)
            b = _kept(partial, "components", numbers[place], other)
            both = (a > 0) & (b > 0)
            met = np.unique(a[both].astype(np.int64) << 32 | b[both])  # faster than of pairs
            own_first, other_first = offsets[number], offsets[numbers[place]]
            yield np.stack([(met >> 32) + own_first, (met % 2**32) + other_first], 1) - 1


def _summed(parts: Int, group: npt.NDArray[np.integer[Any]]) -> pd.DataFrame:
    """Measures of components from those of their parts, by group."""
    import pandas as pd

    return pd.DataFrame(parts, columns=list(AGGREGATED)).groupby(group).agg(AGGREGATED)


def _cores(partial: Partial, block: Block) -> npt.NDArray[np.uint8]:
    """Ids of what is labelled: of classes, or 1 in the interior of objects."""
    ids = np.asarray(partial.array("mask")[block.place])
    return np.where(ids == 1, ids, np.uint8(0)) if partial.job.cored else ids


def _keep(partial: Partial, phase: str, number: int, found: pd.DataFrame, **arrays: Any) -> None:
    """Keep the measures of a block's parts, and arrays."""
    with whole_file(_part(partial, phase, number)) as temporary, temporary.open("wb") as file:
        measured = found[list(AGGREGATED)].to_numpy(np.int64)
        np.savez_compressed(file, measured=measured, **arrays)


def _kept(partial: Partial, phase: str, number: int, name: str) -> npt.NDArray[Any]:
    """What a phase kept of a block."""
    with np.load(_part(partial, phase, number)) as found:
        return np.asarray(found[name])


def _part(partial: Partial, phase: str, number: int) -> Path:
    return partial.part(f"{phase}-{number:06d}.npz")
