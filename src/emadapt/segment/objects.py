"""The objects of a volume: where they are, their measures, and what they say of the volume.

The volume is read once to find the boxes of the objects, then one box at a time. Memory grows with
the largest object and the number of objects, not with the volume.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.metrics.shapes import (
    Mask,
    cell,
    centreline,
    depth_nm,
    sphericity,
    surface_nm2,
    touching_nm2,
)
from emadapt.progress import track
from emadapt.segment.instances import MERGED, measure, numbered
from emadapt.volumes.opening import open_onto, open_source
from emadapt.volumes.source import Array, Source, as_ids, as_image, voxel_of
from emadapt.volumes.voxel import Voxel, as_voxel

if TYPE_CHECKING:
    import pandas as pd

SLAB = 2**24
"""Voxels that are read at once to find the objects."""
MOST = 2**24
"""Voxels of the box of an object. In a larger box a cell of several voxels counts as one."""
POINTS = 2000
"""Most places of an object's surface from which distances to other objects are measured."""
SURE = 255
"""Value of a file of probabilities that is 1."""
REACH_NM = 300.0
"""How far around an object a second class is looked for."""
BLOCKS, BLOCK_NM = 4, 1000.0
"""Blocks along each axis of the volume for intervals: at most so many, of at least this side."""

Box = dict[str, int]
"""Of an object: its `id`, `voxels`, and `z_min` to `x_max` in voxels, the last one included."""
Step = tuple[int, int, int]
"""Voxels (z, y, x) of a cell."""
Places = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """What to measure; see `emadapt measure --help`."""

    objects: str
    output: str
    image: str = ""
    to: str = ""
    probabilities: str = ""
    voxel_nm: Voxel | None = None
    min_voxels: int = 1
    jobs: int = 1
    overwrite: bool = False


def opened(asked: Asked) -> Measurer:
    """The volumes, checked."""
    objects = as_ids(open_source(asked.objects))
    names = asked.image, asked.to, asked.probabilities
    image, to, sure = (open_onto(name, objects) if name else None for name in names)
    image = as_image(image) if image else None
    for other in filter(None, (image, to, sure)):
        if other.shape != objects.shape:
            found, expected = f"shape {other.shape}", f"{objects.shape}, as of {asked.objects}"
            raise InputError(
                other.name, found=found, expected=expected, do="Choose another volume."
            )
    if sure and sure.dtype != np.uint8:
        found, expected = f"values of type {sure.dtype}", f"8 bits, of which {SURE} is 1"
        do = "Write them with `emadapt segment --probabilities`."
        raise InputError(sure.name, found=found, expected=expected, do=do)
    return Measurer(objects, voxel_of(objects, asked.voxel_nm), image, to, sure)


def survey(source: Source) -> pd.DataFrame:
    """Size, box, centroid and `at_border` of each object, from one reading of the volume."""
    import pandas as pd

    (depth, rows), (length, height) = source.parts(SLAB), source.shape[:2]
    parts = []
    for z0, y0 in itertools.product(range(0, length, depth), range(0, height, rows)):
        own = source.read(z0, min(z0 + depth, length), y0, min(y0 + rows, height))
        labels, ids = numbered(own)
        measured = measure(labels, len(ids), (z0, y0), height)
        parts.append(measured.assign(id=ids.astype(np.int64)))
    found = pd.concat(parts).groupby("id").agg(MERGED).reset_index()
    centroid = {axis: found.pop(f"{axis}_sum") / found["voxels"] for axis in "zyx"}
    del found["first"]
    sides = zip("zyx", source.shape, strict=True)
    cut = [(found[f"{a}_min"] == 0) | (found[f"{a}_max"] == n - 1) for a, n in sides]
    return found.assign(at_border=np.any(cut, axis=0), **centroid)


class Measurer:
    """The volumes, open, and the measures of one object at a time."""

    def __init__(
        self,
        objects: Source,
        voxel_nm: Voxel,
        image: Source | None,
        to: Source | None,
        probabilities: Source | None,
    ) -> None:
        self.objects, self.voxel_nm, self.image, self.to = objects, voxel_nm, image, to
        self.probabilities = probabilities
        self.sources = objects, image, to, probabilities

    def measures(self, box: Box) -> dict[str, Any]:
        """The measures of an object, and `points`: places (n, 3) in nm of its surface."""
        from scipy.ndimage import binary_erosion, distance_transform_edt

        label, step, voxel = box["id"], self.step(box), self.cell_nm(box)

        def own_or_other(part: Array) -> Array:
            return np.where(any_in(part == label, step), label, first_in(part, step))

        labels, first = self.cut(self.objects, box, 1, own_or_other)
        mask = labels == label
        own = mask[self._inside(box, first)]
        volume, surface = box["voxels"] * math.prod(self.voxel_nm), surface_nm2(own, voxel)
        line = centreline(own, voxel)
        shell = np.argwhere(mask & ~binary_erosion(mask)) * step + first
        found = {
            "id": label,
            "volume_nm3": volume,
            "surface_nm2": surface,
            "length_nm": line.length_nm,
            "width_nm": 2 * float(depth_nm(own, voxel).max()),
            "sphericity": sphericity(volume, surface),
            "branches": line.branches,
            "touching_nm2": touching_nm2(labels, label, voxel),
            "points": (shell * np.asarray(self.voxel_nm))[:: math.ceil(len(shell) / POINTS)],
        }
        if self.image:
            grey = self.cut(self.image, box, 0)[0][own]
            found |= {"intensity_mean": float(grey.mean()), "intensity_std": float(grey.std())}
        if self.probabilities:
            sure = self.cut(self.probabilities, box, 0)[0][own]
            found["uncertainty"] = 1 - float(sure.mean()) / SURE
        if self.to:
            near, first = self.cut(self.to, box, REACH_NM, lambda part: any_in(part != 0, step))
            away = distance_transform_edt(~near, sampling=voxel)
            least = float(away[self._inside(box, first)][own].min()) if near.any() else math.inf
            found["to_nm"] = least if least <= REACH_NM else math.nan
        return found

    def step(self, box: Box) -> Step:
        """Voxels (z, y, x) of a cell: one, or as many as leave a box at most `MOST` cells."""
        sides = np.array([box[f"{axis}_max"] - box[f"{axis}_min"] + 1 for axis in "zyx"])
        steps = (cell(factor, self.voxel_nm) for factor in itertools.count(1))
        return next(step for step in steps if np.prod(-(-sides // step)) <= MOST)

    def cell_nm(self, box: Box) -> Voxel:
        """The sides of a cell."""
        return as_voxel(np.multiply(self.step(box), self.voxel_nm).tolist())

    def mask(self, box: Box, margin_nm: float) -> tuple[Mask, npt.NDArray[np.intp]]:
        """Cells (Z, Y, X) that the object reaches, and the voxel where they begin, see `cut`."""
        step = self.step(box)
        return self.cut(self.objects, box, margin_nm, lambda part: any_in(part == box["id"], step))

    def cut(
        self,
        source: Source,
        box: Box,
        margin_nm: float,
        cells: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, npt.NDArray[np.intp]]:
        """The cells (Z, Y, X) of an object's box in a volume, and the voxel where they begin.

        There is a margin of at least a cell, or none (0). The volume's border ends it. `cells`
        makes cells of voxels (z, y, x); without it a cell has the value of its first voxel.
        """
        step, low, high = self.step(box), [], []
        for axis, n, side, k in zip("zyx", source.shape, self.voxel_nm, step, strict=True):
            more = math.ceil(margin_nm / side / k)
            low.append(box[f"{axis}_min"] - min(more, box[f"{axis}_min"] // k) * k)
            high.append(min(n, box[f"{axis}_max"] + 1 + more * k))
        at_once = max(1, SLAB // ((high[1] - low[1]) * source.shape[2]) // step[0]) * step[0]
        parts = []
        for z in range(low[0], high[0], at_once):
            part = source.read(z, min(z + at_once, high[0]), low[1], high[1])
            part = part[..., low[2] : high[2]]
            parts.append(cells(part) if cells else first_in(part, step))
        return np.concatenate(parts), np.array(low)

    def _inside(self, box: Box, first: npt.NDArray[np.intp]) -> tuple[slice, ...]:
        """The box as an index of cells that were cut around it."""
        ends = zip("zyx", first.tolist(), self.step(box), strict=True)
        return tuple(
            slice((box[f"{a}_min"] - low) // k, -(-(box[f"{a}_max"] + 1 - low) // k))
            for a, low, k in ends
        )


def first_in(voxels: Array, step: Step) -> Array:
    """The first voxel of each cell; voxels and cells are (Z, Y, X)."""
    z, y, x = step
    return voxels[::z, ::y, ::x]


def any_in(voxels: Mask, step: Step) -> Mask:
    """Whether any voxel of each cell is true; voxels and cells are (Z, Y, X)."""
    from skimage.measure import block_reduce

    return voxels if step == (1, 1, 1) else block_reduce(voxels, step, np.any)


def measured(asked: Asked, boxes: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Measures of every object, with progress."""
    rows = boxes.drop(columns=[*"zyx"]).to_dict("records")
    _kept.cache_clear()  # a file of that name may have changed since
    with ExitStack() as stack:
        each: Callable[..., Iterable[dict[str, Any]]] = map
        if asked.jobs > 1:
            pool = stack.enter_context(ProcessPoolExecutor(asked.jobs))
            each = functools.partial(pool.map, chunksize=4)
        done = each(functools.partial(_one, asked), rows)
        yield from track(done, "measure: objects", len(rows))


def _one(asked: Asked, box: Box) -> dict[str, Any]:
    """An object, in whatever process this is."""
    return _kept(asked).measures(box)


_kept = functools.lru_cache(maxsize=1)(opened)


def with_nearest(table: pd.DataFrame) -> pd.DataFrame:
    """The table without `points`, with the nearest other object and its distance in nm."""
    from scipy.spatial import cKDTree

    points: list[Places] = table["points"].tolist()
    trees = [cKDTree(own) for own in points]
    low, high = (np.array([end(own, axis=0) for own in points]) for end in (np.min, np.max))
    nearest, names = np.full(len(points), np.nan), np.full(len(points), 0)
    for k, own in enumerate(points):
        gaps = np.maximum(0, np.maximum(low[k] - high, low - high[k]))
        at_least = np.linalg.norm(gaps, axis=1)  # between the two boxes
        at_least[k], best = np.inf, np.inf
        for other in np.argsort(at_least):
            if at_least[other] >= best:
                break
            away = float(trees[other].query(own, distance_upper_bound=best)[0].min())
            if away < best:
                best, nearest[k], names[k] = away, away, int(table["id"].iloc[other])
    return table.drop(columns="points").assign(nearest_nm=nearest, nearest_id=names)


def of_volume(table: pd.DataFrame, shape: tuple[int, int, int], voxel_nm: Voxel) -> dict[str, Any]:
    """Number, density and share of the objects, with 95 % intervals over blocks of the volume.

    An object counts in the block that has its centroid, with all of its volume. The intervals are
    Student's t of the mean over blocks; they hold as far as the blocks are independent and alike.
    Fewer than four blocks give none.

    Returns:
        `objects`; `at_border`; `volume_um3`; `per_um3` and `share`, each with `value` and `ci95`;
        `blocks`.
    """
    from scipy.stats import t

    sides = [n * v for n, v in zip(shape, voxel_nm, strict=True)]
    parts = [min(BLOCKS, max(1, int(side // BLOCK_NM))) for side in sides]
    number = np.zeros(len(table), int)
    for axis, n, count in zip("zyx", shape, parts, strict=True):
        number = number * count + np.minimum(table[axis] * count // n, count - 1).astype(int)
    blocks, volume = math.prod(parts), math.prod(sides) / 1e9
    found: dict[str, Any] = {
        "objects": len(table),
        "at_border": int(table["at_border"].sum()),
        "volume_um3": volume,
        "blocks": blocks,
    }
    for name, weight in (("per_um3", None), ("share", table["volume_nm3"] / 1e9)):
        values = np.bincount(number, weight, blocks) / (volume / blocks)
        found[name] = {"value": float(values.mean()), "ci95": None}
        if blocks >= 4:
            half = t.ppf(0.975, blocks - 1) * values.std(ddof=1) / blocks**0.5
            found[name]["ci95"] = [max(0.0, values.mean() - half), values.mean() + half]
    return found
