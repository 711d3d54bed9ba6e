"""Measures of objects against shapes whose values are known."""

import numpy as np
import pytest
from scipy.ndimage import find_objects

from emadapt.metrics.shapes import centreline, depth_nm, sphericity, surface_nm2, touching_nm2

VOXELS = [(8.0, 8.0, 8.0), (24.0, 6.0, 6.0)]


def grid(size_nm: float, voxel: tuple[float, float, float]) -> list[np.ndarray]:
    """Coordinates in nm of a box of this side around 0."""
    sides = [np.arange(-size_nm / 2, size_nm / 2 + v, v) for v in voxel]
    return list(np.meshgrid(*sides, indexing="ij", sparse=True))


def tube(points: list[np.ndarray], a: list[float], b: list[float], radius: float) -> np.ndarray:
    """Voxels nearer than `radius` to the line from a to b."""
    along = np.subtract(b, a)
    share = sum((p - c) * d for p, c, d in zip(points, a, along, strict=True)) / np.dot(
        along, along
    )
    share = np.clip(share, 0, 1)
    off = [p - c - share * d for p, c, d in zip(points, a, along, strict=True)]
    return np.asarray(sum(o**2 for o in off) < radius**2)


def cropped(mask: np.ndarray) -> np.ndarray:
    """The box around an object."""
    (box,) = find_objects(mask.astype(int))
    return mask[box]


@pytest.mark.parametrize("voxel", VOXELS)
def test_a_ball(voxel):
    z, y, x = grid(500, voxel)
    ball = cropped(z**2 + y**2 + x**2 < 200**2)
    area = surface_nm2(ball, voxel)
    assert area == pytest.approx(4 * np.pi * 200**2, rel=0.03)
    assert sphericity(ball.sum() * np.prod(voxel), area) == pytest.approx(1, abs=0.03)
    assert depth_nm(ball, voxel).max() == pytest.approx(200, abs=max(voxel))
    assert centreline(ball, voxel).length_nm == pytest.approx(400, rel=0.08)
    assert centreline(ball, voxel).branches == 0


@pytest.mark.parametrize("voxel", VOXELS)
@pytest.mark.parametrize("end", [[0, 0, 300], [250, 100, 200], [-150, 200, 200]])
def test_a_rod_in_any_direction(voxel, end):
    rod = cropped(tube(grid(800, voxel), [-e for e in end], [float(e) for e in end], 60))
    long, radius = 2 * np.linalg.norm(end), 60
    expected = 2 * np.pi * radius * long + 4 * np.pi * radius**2
    assert surface_nm2(rod, voxel) == pytest.approx(expected, rel=0.06)
    found = centreline(rod, voxel)
    assert found.length_nm == pytest.approx(long + 2 * radius, rel=0.08)
    assert found.branches == 0
    assert 2 * depth_nm(rod, voxel).max() == pytest.approx(2 * radius, abs=2 * max(voxel))


def test_branches_are_counted_and_do_not_depend_on_the_size():
    voxel = (12.0, 12.0, 12.0)
    points = grid(900, voxel)
    cross = tube(points, [0, 0, -400], [0, 0, 400], 40)
    assert centreline(cross, voxel).branches == 0
    cross |= tube(points, [0, 0, 100], [0, 300, 100], 40)
    assert centreline(cross, voxel).branches == 1
    cross |= tube(points, [0, 0, -150], [0, -300, -150], 40)
    found = centreline(cross, voxel)
    assert found.branches == 2
    larger = centreline(cross, (36.0, 36.0, 36.0))
    assert larger == (pytest.approx(3 * found.length_nm), 2)


def test_faces_that_two_objects_share():
    labels = np.zeros((4, 6, 8), int)
    labels[1:3, 1:5, 1:4], labels[1:3, 2:5, 4:6] = 7, 9
    assert touching_nm2(labels, 7, (30.0, 5.0, 4.0)) == 2 * 3 * 30 * 5
    assert touching_nm2(labels, 9, (30.0, 5.0, 4.0)) == 2 * 3 * 30 * 5
    assert touching_nm2(np.where(labels == 9, 0, labels), 7, (30.0, 5.0, 4.0)) == 0
