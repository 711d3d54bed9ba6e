"""The surface of a mask, or of one label in it, as PLY, OBJ or STL.

scikit-image's marching cubes (Lorensen and Cline 1987) looks at one slab of slices at a time;
trimesh joins the slabs and writes the file. Memory grows with the surface and not with the volume.
Outside of the volume the mask counts as empty, so every surface is closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.files import check_new_file, whole_file
from emadapt.volumes.opening import check_apart, open_source
from emadapt.volumes.source import Source, as_ids, tell, voxel_of
from emadapt.volumes.voxel import Voxel

if TYPE_CHECKING:
    from trimesh import Trimesh

SUFFIXES = (".ply", ".obj", ".stl")
SLAB = 2**24
"""Grid points of a slab; smoothing takes about 20 bytes for each."""
PLANE = 2**27
"""Most grid points in the planes that a slab of one plane needs with its smoothing."""
MOST_TRIANGLES = 2**25
"""Of a surface: 0.4 GB as PLY, and about 4 GB of memory."""
LEVEL, AWAY = 0.5, 1 / 128
"""Level of the surface, and how far values keep from it, so that vertices do not coincide."""

Float = npt.NDArray[np.float32]
Triple = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Cells of `step` voxels over the box from `low` to before `high`; all (z, y, x)."""

    low: Triple
    high: Triple
    step: Triple

    @property
    def shape(self) -> Triple:
        """Cells along each axis."""
        sides = zip(self.low, self.high, self.step, strict=True)
        return tuple(math.ceil((high - low) / step) for low, high, step in sides)


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
) -> Trimesh:
    """Write the surface of a mask; vertices are x, y, z in nm, from the first voxel's centre.

    Args:
        input_: the mask, see `emadapt.volumes.opening.open_source`.
        output: name ending in .ply, .obj or .stl.
        label: value whose surface it is; 0: of everything that is not 0.
        smooth: standard deviation, in voxels, of a Gaussian over the mask. 0 keeps the steps of
            voxels, and about a tenth too much area.
        step: voxels of the shortest side that become one cell.
        scale: of an OME-Zarr image.
        voxel_nm: (z, y, x); None: what the file says.
        overwrite: replace the output.

    Raises:
        InputError: the output exists; the mask has no voxel size, or no surface or a too large one.
    """
    path = Path(output)
    check_new_file(path, SUFFIXES, overwrite)
    check_apart(path, input_)
    source = as_ids(open_source(input_, scale))
    tell(source.name, source.notes)
    mesh = surface(source, voxel_of(source, voxel_nm), label, smooth, step)
    with whole_file(path) as temporary:
        mesh.export(temporary, file_type=path.suffix.lower()[1:])
    area, volume = mesh.area / 1e6, mesh.volume / 1e9
    print(f"mesh {output}: {len(mesh.faces):,} triangles, {area:.6g} um2, {volume:.6g} um3")
    return mesh


def surface(
    source: Source, voxel_nm: Voxel, label: int = 0, smooth: float = 1.0, step: int = 1
) -> Trimesh:
    """The closed surface of a label, with outward normals; as of `mesh_volume`."""
    from trimesh import Trimesh
    from trimesh.util import concatenate

    z, y, x = (max(1, round(step * min(voxel_nm) / side)) for side in voxel_nm)
    grid, faces = _survey(source, label, (z, y, x))
    reach = int(4 * smooth / z + 0.5)
    plane = (grid.shape[1] + 2) * (grid.shape[2] + 2)
    triangles = int(2 * faces / min(z * y, y * x, z * x))
    largest = PLANE // (2 * reach + 2)
    if triangles > MOST_TRIANGLES or plane > largest:
        raise InputError(
            source.name,
            found=f"a surface of about {triangles:,} triangles in {source.shape} voxels",
            expected=f"at most {MOST_TRIANGLES:,}, in planes of at most {largest:,} points",
            do="Use --step 2 or more, or --label for one object.",
        )
    depth = max(1, SLAB // plane)
    parts = list(_slabs(source, grid, label, smooth, reach, depth))
    if not parts:
        found, expected = "nothing after smoothing", "an object thicker than two voxels"
        do = "Use --smooth 0, or a smaller --step."
        raise InputError(source.name, found=found, expected=expected, do=do)
    joined: Any = concatenate([Trimesh(*part, process=False) for part in parts])
    joined.merge_vertices(digits_vertex=4)  # slabs find the same vertices on the plane they share
    first = np.add(grid.low, (np.asarray(grid.step) - 1) / 2)
    nm = (joined.vertices * grid.step + first) * voxel_nm
    return Trimesh(nm[:, ::-1], joined.faces, process=False)  # (z, y, x) to (x, y, z)


def _survey(source: Source, label: int, step: Triple) -> tuple[Grid, int]:
    """The label's box, and how many faces of its voxels look outwards; reads the mask once."""
    seen = [np.zeros(n, bool) for n in source.shape]
    faces, before = 0, np.zeros(source.shape[1:], bool)
    depth = _depth(source)
    for z0 in range(0, source.shape[0], depth):
        for z, labels in enumerate(source.read(z0, min(z0 + depth, source.shape[0])), z0):
            mask = _is(labels, label)
            seen[0][z] = mask.any()
            seen[1] |= mask.any(1)
            seen[2] |= mask.any(0)
            edged = np.pad(mask, 1)
            changes = [np.diff(edged, axis=0), np.diff(edged), mask ^ before]
            faces += sum(int(np.count_nonzero(change)) for change in changes)
            before = mask
    faces += int(np.count_nonzero(before))
    if not seen[0].any():
        found = f"no voxel of label {label}" if label else "an empty mask"
        do = "Check --label, or the mask."
        raise InputError(source.name, found=found, expected="an object", do=do)
    low = tuple(int(np.argmax(s)) for s in seen)
    high = tuple(len(s) - int(np.argmax(s[::-1])) for s in seen)
    return Grid(low, high, step), faces


def _depth(source: Source) -> int:
    """Slices to read at once: whole chunks of the file, if they are not too large."""
    most = max(1, SLAB // (source.shape[1] * source.shape[2]))
    return most // source.depth * source.depth or most


def _is(labels: npt.NDArray[Any], label: int) -> npt.NDArray[np.bool_]:
    return np.asarray(labels == label if label else labels != 0)


def _cells(source: Source, grid: Grid, label: int, k0: int, k1: int) -> Float:
    """Planes [k0, k1) of the grid with a cell around it: the share of each cell in the label."""
    out = np.zeros((k1 - k0, grid.shape[1] + 2, grid.shape[2] + 2), np.float32)
    deep, (_, y0, x0), (_, y1, x1) = grid.step[0], grid.low, grid.high
    first, last = max(k0, 0), min(k1, grid.shape[0])
    together = max(1, _depth(source) // deep)
    for k in range(first, last, together):
        stop = min(k + together, last)
        z0, z1 = grid.low[0] + k * deep, min(grid.low[0] + stop * deep, grid.high[0])
        share = _is(source.read(z0, z1, y0, y1)[..., x0:x1], label).astype(np.float32)
        for axis, step in enumerate(grid.step):
            if step > 1:
                share = np.add.reduceat(share, np.arange(0, share.shape[axis], step), axis)
        out[k - k0 : stop - k0, 1:-1, 1:-1] = share / math.prod(grid.step)
    return out


def _slabs(
    source: Source, grid: Grid, label: int, smooth: float, reach: int, depth: int
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """Vertices (z, y, x), in cells of the grid, and triangles of each slab."""
    from scipy.ndimage import gaussian_filter
    from skimage.measure import marching_cubes

    last = grid.shape[0]
    sigma = [smooth / step for step in grid.step]
    for k0 in range(-1, last, depth):  # planes -1 and `last` are around the box
        k1 = min(k0 + depth, last)
        field = _cells(source, grid, label, k0 - reach, k1 + 1 + reach)
        if smooth:
            field = gaussian_filter(field, sigma, mode="constant")[reach : len(field) - reach]
        inside = field > LEVEL
        if not inside.any() or inside.all():
            continue
        field = np.where(inside, np.maximum(field, LEVEL + AWAY), np.minimum(field, LEVEL - AWAY))
        # The method of Lewiner lets four triangles meet at an edge.
        vertices, triangles, _, _ = marching_cubes(field, LEVEL, method="lorensen")
        yield vertices + np.array([k0, -1.0, -1.0]), triangles
