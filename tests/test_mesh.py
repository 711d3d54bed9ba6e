"""Surfaces against analytic spheres and as closed manifolds; their files read back by trimesh."""

from typing import Any

import numpy as np
import pytest
import tifffile
import trimesh
from click.testing import CliRunner
from scipy.spatial import cKDTree

from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.segment import mesh as module
from emadapt.segment.mesh import mesh_volume, surface
from emadapt.volumes.source import array_source

VOXEL = (10.0, 5.0, 4.0)


def ball(
    radius: float = 120.0,
    centre: tuple[float, float, float] = (150.0, 160.0, 170.0),
    label: int = 1,
) -> np.ndarray:
    """A ball (nm) in voxels of `VOXEL`, as uint16 labels."""
    shape = [round((c + radius) / v) + 4 for c, v in zip(centre, VOXEL, strict=True)]
    axes = [np.arange(n) * v - c for n, v, c in zip(shape, VOXEL, centre, strict=True)]
    squares = [places**2 for places in np.meshgrid(*axes, indexing="ij")]
    return label * (sum(squares) <= radius**2).astype(np.uint16)


def made(mask: np.ndarray, **how: Any) -> trimesh.Trimesh:
    return surface(array_source(mask, VOXEL), VOXEL, **how)


def assert_closed(mesh: trimesh.Trimesh) -> None:
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0  # normals look outwards
    assert len(np.unique(mesh.faces)) == len(mesh.vertices)


@pytest.mark.parametrize("step", [1, 2])
def test_a_sphere_has_its_area_volume_and_place(step):
    mesh = made(ball(), step=step)
    assert mesh.area == pytest.approx(4 * np.pi * 120**2, rel=0.03)
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 120**3, rel=0.03)
    np.testing.assert_allclose(mesh.vertices.mean(0), [170, 160, 150], atol=2)  # x, y, z
    assert_closed(mesh)


def test_without_smoothing_thin_things_stay():
    mask = np.zeros((5, 6, 7), np.uint8)
    mask[2, 3, 1:6] = 1
    mesh = made(mask, smooth=0)
    assert_closed(mesh)
    # x, y, z: half a voxel from the centres
    assert mesh.bounds.tolist() == [[2.0, 12.5, 15.0], [22.0, 17.5, 25.0]]
    with pytest.raises(InputError, match="nothing after smoothing"):
        made(mask)


@pytest.mark.parametrize("smooth", [0.0, 0.8])
def test_slabs_leave_no_trace(smooth, monkeypatch):
    """Random voxels show every case of marching cubes, also at the faces of the volume."""
    mask = (np.random.default_rng(0).random((11, 12, 13)) < 0.4).astype(np.uint8)
    whole = made(mask, smooth=smooth)
    monkeypatch.setattr(module, "SLAB", 1)
    cut = made(mask, smooth=smooth)
    assert_closed(whole)
    assert_closed(cut)
    assert len(whole.faces) > 900
    assert (len(whole.faces), len(whole.vertices)) == (len(cut.faces), len(cut.vertices))
    assert cKDTree(whole.vertices).query(cut.vertices)[0].max() < 1e-3
    assert whole.volume == pytest.approx(cut.volume, rel=1e-5)


def test_a_label_has_its_own_surface():
    labels = ball(60, (70, 70, 70), 7)
    labels[0, :3, :3] = 2
    assert made(labels, label=7).volume == pytest.approx(4 / 3 * np.pi * 60**3, rel=0.05)
    with pytest.raises(InputError, match="no voxel of label 3"):
        made(labels, label=3)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".stl"])
def test_the_command_writes_files_that_read_back(tmp_path, suffix):
    sizes = {f"PhysicalSize{a}": v / 1e3 for a, v in zip("ZYX", VOXEL, strict=True)}
    mask = tmp_path / "mask.ome.tif"
    tifffile.imwrite(mask, ball(40, (50, 50, 50)), metadata={"axes": "ZYX", **sizes})
    out = tmp_path / f"out{suffix}"
    done = CliRunner().invoke(main, ["mesh", str(mask), str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "triangles" in done.output
    found, expected = trimesh.load_mesh(out), made(ball(40, (50, 50, 50)))
    assert_closed(found)
    assert found.volume == pytest.approx(expected.volume, rel=1e-5)
    np.testing.assert_allclose(found.bounds, expected.bounds, rtol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mask.name, out.name])
    with pytest.raises(InputError, match="a file of that name"):
        mesh_volume(str(mask), str(out))
