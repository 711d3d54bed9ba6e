"""Measures of one object: surface, width, length, branches. All in nm.

An object is a box of voxels (Z, Y, X) that are inside or not, with a voxel size (z, y, x) in nm.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Voxel = tuple[float, float, float]
Floats = npt.NDArray[np.float64]

OFFSETS = [o for o in itertools.product((-1, 0, 1), repeat=3) if o > (0, 0, 0)]
"""The 13 directions to a neighbour, without their opposites."""
MOST_NODES = 20_000
"""Voxels of the graph that length and branches are measured on; larger objects are coarsened."""
MOST_BRANCHES = 50
CENTRED = 30.0
"""How much dearer a path along the surface is than one along the middle."""


def surface_nm2(mask: Mask, voxel_nm: Voxel) -> float:
    """Area of the surface by Crofton's formula in 13 directions.

    Parallel lines through the voxels cross the surface n times in a direction with the distance d
    between voxels. With V the volume of a voxel and c the share of all directions nearest to this
    one, the area is 2 V times the sum of c n / d (Ohser and Mücklich 2000, section 5.3).
    """
    padded = np.pad(mask, 1)
    total = 0.0
    for offset, share in zip(OFFSETS, _shares(voxel_nm), strict=True):
        here, there = _neighbours(padded, offset)
        total += share * np.count_nonzero(here != there) / _distance(offset, voxel_nm)
    return 2 * math.prod(voxel_nm) * total


def sphericity(volume_nm3: float, surface: float) -> float:
    """Area of a ball of this volume divided by the surface in nm2; 1 for a ball (Wadell 1935)."""
    return float(np.pi ** (1 / 3) * (6 * volume_nm3) ** (2 / 3) / surface)


def depth_nm(mask: Mask, voxel_nm: Voxel) -> Floats:
    """Distance of each voxel from the surface, 0 outside. Its maximum is half the width.

    A voxel's centre is half a voxel nearer to the surface than to the next voxel outside, so half
    of the shortest side is taken off.
    """
    from scipy.ndimage import distance_transform_edt

    found = distance_transform_edt(np.pad(mask, 1), sampling=voxel_nm)[1:-1, 1:-1, 1:-1]
    return np.where(mask, found - min(voxel_nm) / 2, 0.0)


class Centreline(NamedTuple):
    """Length in nm from one end to the other, and number of branches that leave this line."""

    length_nm: float
    branches: int


def centreline(mask: Mask, voxel_nm: Voxel) -> Centreline:
    """Length and branches of an object, after TEASAR (Sato et al. 2000).

    The line is the path through the middle between the two voxels that are farthest apart inside
    the object. A part whose farthest voxel is more than two radii from the line is a branch. It is
    added to the line, and so on.
    """
    from scipy.ndimage import uniform_filter1d
    from scipy.sparse.csgraph import dijkstra

    mask, voxel_nm = _coarser(mask, voxel_nm)
    depth = depth_nm(mask, voxel_nm)[mask]
    places = np.argwhere(mask) * np.asarray(voxel_nm)
    plain, centred = _graphs(mask, voxel_nm, depth)
    start = _farthest(dijkstra(plain, directed=False, indices=0))
    end = _farthest(dijkstra(plain, directed=False, indices=start))
    _, before = dijkstra(centred, directed=False, indices=start, return_predecessors=True)
    line = list(_path(before, end))
    window = 1 + 2 * max(1, round(float(np.median(depth[line])) / min(voxel_nm)))
    smooth = uniform_filter1d(places[line], min(window, len(line)), axis=0, mode="nearest")
    smooth[[0, -1]] = places[line][[0, -1]]
    length = float(np.linalg.norm(np.diff(smooth, axis=0), axis=1).sum()) + min(voxel_nm)
    branches = 0
    while branches < MOST_BRANCHES:
        away, _, nearest = dijkstra(
            plain, directed=False, indices=line, return_predecessors=True, min_only=True
        )
        tip = _farthest(away)
        if away[tip] <= 2 * depth[nearest[tip]] + 2 * max(voxel_nm):
            break
        line += _path(before, tip)
        branches += 1
    return Centreline(length, branches)


def cell(factor: int, voxel_nm: Voxel) -> tuple[int, int, int]:
    """Voxels (z, y, x) of a cell whose sides are about `factor` times the shortest of a voxel."""
    z, y, x = (max(1, round(factor * min(voxel_nm) / side)) for side in voxel_nm)
    return z, y, x


def touching_nm2(labels: npt.NDArray[Any], label: int, voxel_nm: Voxel) -> float:
    """Area of the voxel faces that an object shares with other objects (values above 0)."""
    area = 0.0
    for axis in range(3):
        first, second = (labels.swapaxes(0, axis)[part] for part in (slice(-1), slice(1, None)))
        own = (first == label) != (second == label)
        faces = np.count_nonzero(own & (first > 0) & (second > 0))
        area += faces * math.prod(voxel_nm) / voxel_nm[axis]
    return area


@functools.lru_cache(maxsize=8)
def _shares(voxel_nm: Voxel) -> tuple[float, ...]:
    """For each of OFFSETS, the share of all directions that are nearest to it or its opposite."""
    from scipy.spatial import SphericalVoronoi

    vectors = np.asarray(OFFSETS) * np.asarray(voxel_nm)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    areas = SphericalVoronoi(np.concatenate([unit, -unit])).calculate_areas()
    return tuple((areas[: len(unit)] + areas[len(unit) :]) / areas.sum())


def _distance(offset: tuple[int, ...], voxel_nm: Voxel) -> float:
    return math.hypot(*(o * side for o, side in zip(offset, voxel_nm, strict=True)))


def _neighbours(array: npt.NDArray[Any], offset: tuple[int, ...]) -> list[npt.NDArray[Any]]:
    """Two views of an array: voxels, and their neighbours in a direction."""
    here = tuple(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, array.shape, strict=True))
    there = tuple(slice(max(0, o), n + min(0, o)) for o, n in zip(offset, array.shape, strict=True))
    return [array[here], array[there]]


def _graphs(mask: Mask, voxel_nm: Voxel, depth: Floats) -> tuple[Any, Any]:
    """Sparse graphs of the voxels: edges as long as they are, and longer near the surface."""
    from scipy.sparse import coo_array

    number = np.full(mask.shape, -1)
    number[mask] = np.arange(len(depth))
    dear = 1 + CENTRED * (1 - depth / depth.max()) ** 4
    pairs, lengths = [], []
    for offset in OFFSETS:
        here, there = (view.ravel() for view in _neighbours(number, offset))
        both = (here >= 0) & (there >= 0)
        pairs.append(np.stack([here[both], there[both]]))
        lengths.append(np.full(int(both.sum()), _distance(offset, voxel_nm)))
    rows, columns = np.concatenate(pairs, axis=1)
    length, shape = np.concatenate(lengths), (len(depth), len(depth))
    dearer = length * (dear[rows] + dear[columns]) / 2
    plain, centred = (coo_array((v, (rows, columns)), shape).tocsr() for v in (length, dearer))
    return plain, centred


def _farthest(distances: Floats) -> int:
    """The farthest voxel that can be reached."""
    return int(np.argmax(np.where(np.isfinite(distances), distances, -1.0)))


def _path(before: npt.NDArray[np.integer[Any]], end: int) -> Iterator[int]:
    """From a voxel back to where the search began."""
    while end >= 0:
        yield end
        end = int(before[end])


def _coarser(mask: Mask, voxel_nm: Voxel) -> tuple[Mask, Voxel]:
    """The object in cells of several voxels, so that at most MOST_NODES are inside."""
    from skimage.measure import block_reduce

    cells, factor = mask, 1
    sides = voxel_nm
    while np.count_nonzero(cells) > MOST_NODES:
        factor += 1
        step = cell(factor, voxel_nm)
        cells = block_reduce(mask, step, np.any)
        sides = (step[0] * voxel_nm[0], step[1] * voxel_nm[1], step[2] * voxel_nm[2])
    return cells, sides
