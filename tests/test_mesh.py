"""Surfaces against analytic spheres, as closed manifolds, and their files read back by readers of the formats' own words."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from scipy.spatial import cKDTree

from emadapt.errors import InputError
from emadapt.segment import mesh as module
from emadapt.segment.mesh import mesh_volume, surface
from emadapt.segment.mesh_files import Mesh, area_nm2, volume_nm3, write_mesh
from emadapt.volumes.source import array_source

VOXEL = (10.0, 5.0, 4.0)


def ball(
    radius: float = 120.0,
    centre: tuple[float, float, float] = (150.0, 160.0, 170.0),
    label: int = 1,
) -> np.ndarray:
    """A ball (nm) in voxels of `VOXEL`, as uint16 labels."""
    shape = [round((c + radius) / v) + 4 for c, v in zip(centre, VOXEL, strict=True)]
    places = np.meshgrid(
        *(np.arange(n) * v - c for n, v, c in zip(shape, VOXEL, centre, strict=True)), indexing="ij"
    )
    return label * (sum(p**2 for p in places) <= radius**2).astype(np.uint16)


def assert_closed(mesh: Mesh) -> None:
    """Every edge belongs to two triangles, which run through it in opposite directions."""
    directed = Counter(
        tuple(f[[i, (i + 1) % 3]])
        for f in mesh.faces.tolist()
        for f in [np.asarray(f)]
        for i in range(3)
    )
    assert set(directed.values()) == {1}
    assert all((b, a) in directed for a, b in directed)
    assert len(np.unique(mesh.faces)) == len(mesh.vertices)


@pytest.mark.parametrize("step", [1, 2])
def test_a_sphere_has_its_area_volume_and_place(step: int) -> None:
    mesh = surface(array_source(ball(), VOXEL), VOXEL, step=step)
    assert area_nm2(mesh) == pytest.approx(4 * np.pi * 120**2, rel=0.03)
    assert volume_nm3(mesh) == pytest.approx(4 / 3 * np.pi * 120**3, rel=0.03)
    np.testing.assert_allclose(mesh.vertices.mean(0), [170, 160, 150], atol=2)  # x, y, z
    assert_closed(mesh)


def test_without_smoothing_the_volume_is_that_of_the_voxels_and_thin_things_stay() -> None:
    mask = np.zeros((5, 6, 7), np.uint8)
    mask[2, 3, 1:6] = 1
    mesh = surface(array_source(mask, VOXEL), VOXEL, smooth=0)
    assert_closed(mesh)
    assert mesh.vertices.min(0).tolist() == [
        2.0,
        12.5,
        15.0,
    ]  # x, y, z: half a voxel from the centres
    assert mesh.vertices.max(0).tolist() == [22.0, 17.5, 25.0]
    with pytest.raises(InputError, match="nothing that is left after smoothing"):
        surface(array_source(mask, VOXEL), VOXEL)


@pytest.mark.parametrize("smooth", [0.0, 0.8])
def test_slabs_leave_no_trace(smooth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    mask = (rng.random((11, 12, 13)) < 0.4).astype(
        np.uint8
    )  # every case of marching cubes, cut by all faces of the volume
    whole = surface(array_source(mask, VOXEL), VOXEL, smooth=smooth)
    monkeypatch.setattr(module, "SLAB", 1)
    cut = surface(array_source(mask, VOXEL), VOXEL, smooth=smooth)
    assert_closed(whole)
    assert_closed(cut)

    assert len(whole.faces) > 900
    assert cKDTree(whole.vertices).query(cut.vertices)[0].max() < 1e-3
    assert (len(whole.faces), len(whole.vertices)) == (len(cut.faces), len(cut.vertices))
    assert volume_nm3(whole) == pytest.approx(volume_nm3(cut), rel=1e-5)


def test_a_label_has_its_own_surface() -> None:
    labels = ball(60, (70, 70, 70), 7)
    labels[0, :3, :3] = 2
    mesh = surface(array_source(labels, VOXEL), VOXEL, label=7)
    assert volume_nm3(mesh) == pytest.approx(4 / 3 * np.pi * 60**3, rel=0.05)
    with pytest.raises(InputError, match="no voxel of label 3"):
        surface(array_source(labels, VOXEL), VOXEL, label=3)


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    head, body = path.read_bytes().split(b"end_header\n", 1)
    n, m = (
        int(line.split()[2]) for line in head.decode().splitlines() if line.startswith("element")
    )
    rows = np.frombuffer(body[12 * n :], np.dtype("u1, 3<i4"))
    assert len(rows) == m
    assert (rows["f0"] == 3).all()
    return np.frombuffer(body[: 12 * n], "<f4").reshape(n, 3), rows["f1"]


def read_obj(path: Path) -> tuple[np.ndarray, np.ndarray]:
    words = [line.split() for line in path.read_text().splitlines()]
    return (
        np.array([w[1:] for w in words if w[0] == "v"], np.float32),
        np.array([w[1:] for w in words if w[0] == "f"], int) - 1,
    )


def read_stl(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Normals and corners."""
    data = path.read_bytes()
    rows = np.frombuffer(data[84:], np.dtype("3<f4, (3,3)<f4, <u2"))
    assert int.from_bytes(data[80:84], "little") == len(rows)
    return rows["f0"], rows["f1"]


def test_files_read_back(tmp_path: Path) -> None:
    mesh = surface(array_source(ball(40, (50, 50, 50)), VOXEL), VOXEL)
    for suffix in (".ply", ".obj", ".stl"):
        write_mesh(tmp_path / f"m{suffix}", mesh, "two\nlines")
    for vertices, faces in (read_ply(tmp_path / "m.ply"), read_obj(tmp_path / "m.obj")):
        np.testing.assert_array_equal(vertices, mesh.vertices)
        np.testing.assert_array_equal(faces, mesh.faces)
    normals, corners = read_stl(tmp_path / "m.stl")
    np.testing.assert_array_equal(corners, mesh.vertices[mesh.faces])
    outward = corners.mean(1) - 50
    assert (np.einsum("ij,ij->i", normals, outward) > 0).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.obj", "m.ply", "m.stl"]


def test_the_command_and_its_errors(tmp_path: Path) -> None:
    from emadapt.cli import main

    mask = tmp_path / "mask.ome.tif"
    tifffile.imwrite(
        mask,
        ball(40, (50, 50, 50)),
        metadata={
            "axes": "ZYX",
            "PhysicalSizeZ": 0.01,
            "PhysicalSizeY": 0.005,
            "PhysicalSizeX": 0.004,
        },
    )
    done = CliRunner().invoke(
        main, ["mesh", str(mask), str(tmp_path / "out.ply")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "triangles" in done.output
    assert_closed(Mesh(*read_ply(tmp_path / "out.ply")))
    head = (tmp_path / "out.ply").read_bytes().split(b"end_header\n")[0].decode()
    assert "mask.ome.tif" in head
    assert str(tmp_path) not in head
    tifffile.imwrite(tmp_path / "empty.tif", np.zeros((3, 9, 9), np.uint8))
    options: Any
    for file, out, options, problem in (
        ("mask.ome.tif", "out.ply", {}, "a file of this name"),
        ("mask.ome.tif", "out.vtk", {}, r"\.ply, \.obj, \.stl"),
        ("empty.tif", "e.ply", {}, "no voxel size"),
        ("empty.tif", "e.ply", {"voxel_nm": VOXEL}, "an empty mask"),
        ("none.tif", "e.ply", {}, "no such volume"),
    ):
        with pytest.raises(InputError, match=problem):
            mesh_volume(str(tmp_path / file), str(tmp_path / out), **options)
    assert not (tmp_path / "e.ply").exists()


def test_a_surface_that_is_too_large_is_refused_before_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_TRIANGLES", 1000)
    with pytest.raises(InputError, match=r"about [\d,]+ triangles.*--step 2"):
        surface(array_source(ball(), VOXEL), VOXEL)
