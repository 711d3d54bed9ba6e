"""The surface of a mask, or of one label or instance in it: marching cubes, a slab of slices at a time.

Marching cubes (Lorensen & Cline 1987) is scikit-image's; its variant of Lewiner et al. lets four triangles meet at some edges of
masks that are not smoothed. Slabs share a plane; on it both find the same vertices, which become one, so that the surface does
not show how it was cut. The volume is taken to be empty outside: every surface is closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.segment.mesh_files import WRITERS, Mesh, area_nm2, volume_nm3, write_mesh
from emadapt.volumes.opening import bare_name, open_source
from emadapt.volumes.source import Source
from emadapt.volumes.voxel import Voxel, as_voxel

SLAB = 2**24
"""Grid points of a slab; smoothing takes about 20 bytes for each."""
PLANE = 2**27
"""Most grid points of the planes that one step of marching cubes with its smoothing needs."""
MOST_TRIANGLES = 2**26
"""Of a surface: 0.8 GB as PLY, three times as much memory."""
LEVEL, AWAY = 0.5, 1 / 128
"""Where the surface lies, and how far values stay from it: vertices near a grid point would coincide in 32 bits."""


@dataclass(frozen=True)
class Grid:
    """The points that marching cubes looks at: cells of `step` (z, y, x) voxels over the box from `low` to `high` (excluded)."""

    low: tuple[int, int, int]
    high: tuple[int, int, int]
    step: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Cells along each axis."""
        z, y, x = (
            math.ceil((b - a) / s) for a, b, s in zip(self.low, self.high, self.step, strict=True)
        )
        return z, y, x


def mesh_volume(
    input_: str,
    output: str,
    *,
    label: int = 0,
    smooth: float = 1.0,
    step: int = 1,
    scale: int = 0,
    voxel_nm: Voxel | None = None,
    overwrite: bool = False,
) -> Mesh:
    """Write the surface of a mask as PLY, OBJ or STL: vertices x, y, z in nm, the first voxel's centre at 0, 0, 0.

    Args:
        input_: the mask, see `emadapt.volumes.opening.open_source`.
        output: a name that ends in .ply, .obj or .stl; written whole or not at all.
        label: the value whose surface it is; 0: of all that is not 0.
        smooth: standard deviation in voxels of a Gaussian over the mask before its surface is taken; 0: none, which leaves the
            steps of voxels and about a tenth too much area.
        step: voxels of the shortest side that become one cell, longer sides fewer.
        scale: of an OME-Zarr image.
        voxel_nm: (z, y, x); None: what the file says.
        overwrite: replace the output.

    Raises:
        InputError: a name of another kind, no voxel size, nothing of the label in the mask, or a surface that is too large.
    """
    path = Path(output)
    if path.suffix.lower() not in WRITERS:
        raise InputError(
            output,
            found=f"a name with {path.suffix or 'no suffix'}",
            expected=f"one with {', '.join(WRITERS)}",
            do="Choose one of these.",
        )
    if path.exists() and not overwrite:
        raise InputError(
            output,
            found="a file of this name",
            expected="none",
            do="Use --overwrite to replace it.",
        )
    source = open_source(input_, scale)
    if source.dtype.kind == "f":
        raise InputError(
            source.name,
            found=f"values of type {source.dtype}",
            expected="a mask, labels or instances",
            do="Threshold the probabilities first.",
        )
    voxel = voxel_nm or source.voxel_nm
    if voxel is None or not all(math.isfinite(v) and v > 0 for v in voxel):
        raise InputError(
            source.name,
            found=f"voxels of {voxel} nm" if voxel else "no voxel size in the file",
            expected="three positive sizes",
            do="State it: --voxel-nm Z Y X, in nm.",
        )
    mesh = surface(source, as_voxel(voxel), label, smooth, step)
    about = f"{bare_name(source.name)}, {f'label {label}' if label else 'all labels'}"
    write_mesh(path, mesh, about)
    area, volume = area_nm2(mesh) / 1e6, volume_nm3(mesh) / 1e9
    print(
        f"mesh {output}: {len(mesh.faces):,} triangles, area {area:.6g} um2, volume {volume:.6g} um3"
    )
    return mesh


def surface(
    source: Source, voxel_nm: Voxel, label: int = 0, smooth: float = 1.0, step: int = 1
) -> Mesh:
    """The closed surface of a label, outward normals; arguments as `mesh_volume` has them.

    Raises:
        InputError: nothing of the label is there, or nothing is left of it after smoothing, or it is too large.
    """
    steps = [max(1, round(step * min(voxel_nm) / v)) for v in voxel_nm]
    grid, faces = _survey(source, label, (steps[0], steps[1], steps[2]))
    reach = int(4 * smooth / steps[0] + 0.5)
    plane = (grid.shape[1] + 2) * (grid.shape[2] + 2)
    triangles = int(2 * faces / min(steps[0] * steps[1], steps[1] * steps[2], steps[0] * steps[2]))
    if triangles > MOST_TRIANGLES or plane * (2 * reach + 2) > PLANE:
        raise InputError(
            source.name,
            found=f"a surface of about {triangles:,} triangles in {source.shape} voxels",
            expected=f"at most {MOST_TRIANGLES:,}, in planes of at most {PLANE // (2 * reach + 2):,} points",
            do="Use --step 2 or more, or --label for one object.",
        )
    parts = list(_slabs(source, grid, label, smooth, reach, max(1, SLAB // plane)))
    vertices, triangles_ = _joined(parts)
    if not len(triangles_):
        raise InputError(
            source.name,
            found="nothing that is left after smoothing",
            expected="an object thicker than two voxels",
            do="Use --smooth 0, or a smaller --step.",
        )
    first = np.add(grid.low, (np.asarray(grid.step) - 1) / 2)
    nm = (vertices * grid.step + first) * voxel_nm
    return Mesh(np.ascontiguousarray(nm[:, ::-1], np.float32), triangles_.astype(np.int32))


def _survey(source: Source, label: int, step: tuple[int, int, int]) -> tuple[Grid, int]:
    """The box of the label, and how many faces of its voxels look outwards; reads the mask once."""
    seen = [np.zeros(n, bool) for n in source.shape]
    faces, before = 0, np.zeros(source.shape[1:], bool)
    depth = _depth(source)
    for z0 in range(0, source.shape[0], depth):
        for z, labels in enumerate(source.read(z0, min(z0 + depth, source.shape[0])), z0):
            mask = _is(labels, label)
            seen[0][z] = mask.any()
            seen[1] |= mask.any(1)
            seen[2] |= mask.any(0)
            faces += int(
                (mask ^ before).sum()
                + (mask[1:] ^ mask[:-1]).sum()
                + (mask[:, 1:] ^ mask[:, :-1]).sum()
            )
            faces += int(sum(edge.sum() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])))
            before = mask
    faces += int(before.sum())
    if not seen[0].any():
        raise InputError(
            source.name,
            found="an empty mask" if not label else f"no voxel of label {label}",
            expected="something to take the surface of",
            do="Check --label, or the mask.",
        )
    places = [np.flatnonzero(s) for s in seen]
    low, high = [int(p[0]) for p in places], [int(p[-1]) + 1 for p in places]
    return Grid((low[0], low[1], low[2]), (high[0], high[1], high[2]), step), faces


def _depth(source: Source) -> int:
    """Slices to read at once: those that lie together, if they are not too many."""
    most = max(1, SLAB // (source.shape[1] * source.shape[2]))
    return most // source.depth * source.depth if source.depth <= most else most


def _is(labels: npt.NDArray[Any], label: int) -> npt.NDArray[np.bool_]:
    return np.asarray(labels == label if label else labels != 0)


def _cells(source: Source, grid: Grid, label: int, k0: int, k1: int) -> npt.NDArray[np.float32]:
    """Planes [k0, k1) of the grid with a cell around it: the share of each cell that has the label; zeros outside of the box."""
    height, width = grid.shape[1:]
    out = np.zeros((k1 - k0, height + 2, width + 2), np.float32)
    sz, (_, y0, x0), (_, y1, x1) = grid.step[0], grid.low, grid.high
    inside, together = range(max(k0, 0), min(k1, grid.shape[0])), max(1, _depth(source) // sz)
    for first in inside[::together]:
        planes = range(first, min(first + together, inside.stop))
        z0, z1 = grid.low[0] + planes.start * sz, min(grid.low[0] + planes.stop * sz, grid.high[0])
        share = _is(source.read(z0, z1, y0, y1)[..., x0:x1], label).astype(np.float32)
        for axis, step in enumerate(grid.step):
            if step > 1:
                share = np.add.reduceat(share, np.arange(0, share.shape[axis], step), axis)
        out[planes.start - k0 : planes.stop - k0, 1:-1, 1:-1] = share / math.prod(grid.step)
    return out


def _slabs(
    source: Source, grid: Grid, label: int, smooth: float, reach: int, depth: int
) -> Iterator[tuple[int, int, npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Of each slab its first and last plane, its vertices (z, y, x) in cells, z from its first plane, and its triangles."""
    from scipy.ndimage import gaussian_filter
    from skimage.measure import marching_cubes

    last = grid.shape[0]
    for k0 in range(-1, last, depth):  # planes -1 and `last` lie around the box
        k1 = min(k0 + depth, last)
        field = _cells(source, grid, label, k0 - reach, k1 + 1 + reach)
        if smooth:
            field = gaussian_filter(field, [smooth / s for s in grid.step], mode="constant")[
                reach : len(field) - reach
            ]
        inside = field > LEVEL
        field = np.where(inside, np.maximum(field, LEVEL + AWAY), np.minimum(field, LEVEL - AWAY))
        if not inside.any() or inside.all():
            continue
        vertices, faces, _, _ = marching_cubes(field, LEVEL, method="lorensen")
        yield k0, k1, vertices, faces


def _joined(
    parts: list[tuple[int, int, npt.NDArray[np.float32], npt.NDArray[np.int64]]],
) -> tuple[Any, Any]:
    """One surface (vertices in cells of the box, float64; triangles) from slabs, the vertices of shared planes made one."""
    vertices, triangles, kept = [np.empty((0, 3))], [np.empty((0, 3), np.int64)], 0
    numbers: list[Any] = []
    for (k0, _, own, faces), before in zip(parts, [None, *parts], strict=False):
        number = np.full(len(own), -1, np.int64)
        if before is not None and before[1] == k0:
            (above,), (here,) = (
                np.nonzero(before[2][:, 0] == before[1] - before[0]),
                np.nonzero(own[:, 0] == 0),
            )
            above, here = _sorted(before[2], above), _sorted(own, here)
            number[here] = numbers[-1][above]
        new = np.flatnonzero(number < 0)
        number[new] = kept + np.arange(len(new))
        kept += len(new)
        vertices.append(
            own[new] + np.array([k0, -1.0, -1.0])
        )  # the first row and column lie around the box
        triangles.append(number[faces])
        numbers.append(number)
    return np.concatenate(vertices), np.concatenate(triangles)


def _sorted(
    vertices: npt.NDArray[np.float32], chosen: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Some vertices in the order of their places in the plane."""
    return chosen[np.lexsort((vertices[chosen, 2], vertices[chosen, 1]))]
