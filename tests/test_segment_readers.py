import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import zarr as typed_zarr
from numcodecs import Blosc
from PIL import Image

from emadapt.errors import InputError
from emadapt.volumes import tiff as tiff_format
from emadapt.volumes.opening import open_source
from emadapt.volumes.source import Source

zarr: Any = typed_zarr  # its types are narrower than what it takes

VOLUME = np.random.default_rng(0).integers(0, 60000, (5, 31, 44)).astype(np.uint16)
VOXEL = (30.0, 4.5, 5.0)
OME = {
    "axes": "ZYX",
    "PhysicalSizeZ": 0.03,
    "PhysicalSizeY": 0.0045,
    "PhysicalSizeX": 5,
    "PhysicalSizeXUnit": "nm",
}  # else µm


def ome_zarr(path: Path, version: str, axes: str = "zyx", volume: Any = VOLUME) -> Path:
    """Two scales, written by hand as the specifications say."""
    group = zarr.create_group(path, zarr_format=2 if version == "0.4" else 3)
    for level, step in enumerate((1, 2)):
        data = volume[:, ::step, ::step].reshape(
            [1] * (len(axes) - 3) + list(volume[:, ::step, ::step].shape)
        )
        group.create_array(str(level), data=data, chunks=(*[1] * (len(axes) - 3), 2, 16, 16))
    sizes = {"z": 0.03, "y": 0.0045, "x": 0.005}
    scales = [[sizes.get(a, 1.0) * (step if a in "yx" else 1) for a in axes] for step in (1, 2)]
    datasets = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        for level, scale in enumerate(scales)
    ]
    named = [
        {"name": a, "type": "space", "unit": "micrometer"} if a in sizes else {"name": a}
        for a in axes
    ]
    image: Any = {"version": version, "datasets": datasets, "axes": named}
    group.attrs.update(
        {"multiscales": [image]}
        if version == "0.4"
        else {"ome": {"version": version, "multiscales": [image]}}
    )
    return path


def imagej(path: Path) -> str:
    meta = {"spacing": 0.03, "unit": "um", "axes": "ZYX"}
    tifffile.imwrite(
        path / "j.tif", VOLUME, imagej=True, resolution=(1 / 0.005, 1 / 0.0045), metadata=meta
    )
    return str(path / "j.tif")


def hdf5(path: Path, **attributes: Any) -> str:
    with h5py.File(path / "v.h5", "w") as file:
        data = file.create_dataset(
            "volumes/raw", data=VOLUME, chunks=(2, 16, 16), compression="gzip"
        )
        data.attrs.update(attributes)
        file.create_dataset("info", data=np.arange(3))
    return str(path / "v.h5")


def tiff(path: Path, name: str = "s.tif", volume: np.ndarray = VOLUME, **how: Any) -> str:
    tifffile.imwrite(path / name, volume, **{"photometric": "minisblack", **how})
    return str(path / name)


def folder(path: Path, suffix: str) -> str:
    """Slices 8 to 12: the order of text is not that of numbers."""
    (path / "slices").mkdir()
    for z, image in enumerate(VOLUME):
        file = path / "slices" / f"s_{z + 8}{suffix}"
        Image.fromarray(image).save(file) if suffix == ".png" else tifffile.imwrite(file, image)
    return str(path / "slices")


def plain_zarr(path: Path, version: Any, **how: Any) -> str:
    array = zarr.create_array(
        path / "a.zarr", data=VOLUME, chunks=(2, 16, 16), zarr_format=version, **how
    )
    if version == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = ["z", "y", "x"]
    array.attrs["resolution"] = list(VOXEL)
    return str(path / "a.zarr")


KINDS: dict[str, tuple[Callable[[Path], str], bool]] = {
    "tiff": (tiff, False),
    "tiled": (lambda p: tiff(p, tile=(16, 16), compression="zlib"), False),
    "bigtiff": (lambda p: tiff(p, bigtiff=True), False),
    "ome": (lambda p: tiff(p, "s.ome.tif", metadata=OME), True),
    "imagej": (imagej, True),
    "png": (lambda p: folder(p, ".png"), False),
    "tif slices": (lambda p: folder(p, ".tif"), False),
    "hdf5": (lambda p: hdf5(p, element_size_um=[0.03, 0.0045, 0.005]), True),
    "hdf5 named": (lambda p: hdf5(p, resolution=VOXEL) + ":/volumes/raw", True),
    "zarr v2": (lambda p: plain_zarr(p, 2), True),
    "zarr v3": (lambda p: plain_zarr(p, 3, dimension_names=["z", "y", "x"]), True),
    "sharded": (lambda p: plain_zarr(p, 3, shards=(4, 32, 32)), True),
    "ome-zarr 0.4": (lambda p: str(ome_zarr(p / "i.zarr", "0.4")), True),
    "ome-zarr 0.5": (lambda p: str(ome_zarr(p / "i.ome.zarr", "0.5", "tczyx")), True),
    "within": (lambda p: str(ome_zarr(p / "i.zarr", "0.4") / "0"), False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
def test_every_kind_gives_the_same_volume(
    tmp_path: Path, kind: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(tiff_format, "LARGE", 100)
    write, has_voxel = KINDS[kind]
    source = open_source(write(tmp_path))
    assert (source.shape, source.dtype) == (VOLUME.shape, VOLUME.dtype)
    assert source.voxel_nm == (VOXEL if has_voxel else None)
    np.testing.assert_array_equal(source.read(0, 5), VOLUME)
    np.testing.assert_array_equal(source.read(2, 4, 7, 30), VOLUME[2:4, 7:30])


def test_a_coarser_scale(tmp_path: Path) -> None:
    for version in ("0.4", "0.5"):
        source = open_source(str(ome_zarr(tmp_path / f"{version}.zarr", version)), scale=1)
        assert source.voxel_nm == (30.0, 9.0, 10.0)
        np.testing.assert_array_equal(source.read(1, 3), VOLUME[1:3, ::2, ::2])


def test_depth_is_what_lies_together(tmp_path: Path) -> None:
    assert open_source(plain_zarr(tmp_path, 3, shards=(4, 32, 32))).depth == 4
    assert open_source(hdf5(tmp_path)).depth == 2
    assert open_source(tiff(tmp_path)).depth == 1


@pytest.mark.parametrize("large", [False, True])
def test_threads_may_read_the_same_file(
    tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(tiff_format, "LARGE", 100)
    source = open_source(tiff(tmp_path, volume=np.tile(VOLUME, (40, 1, 1)), compression="zlib"))

    def read(z: int) -> bool:
        return bool((source.read(z, z + 3) == VOLUME[np.arange(z, z + 3) % 5]).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, list(range(0, 190)) * 2))


def test_the_stamp_changes_with_the_file(tmp_path: Path) -> None:
    first = open_source(tiff(tmp_path)).stamp
    assert open_source(str(tmp_path / "s.tif")).stamp == first
    assert open_source(tiff(tmp_path, volume=VOLUME + 1, compression="zlib")).stamp != first


def refused(path: str | Path, **how: Any) -> str:
    try:
        source = open_source(str(path), **how)
        source.read(0, source.shape[0])
    except InputError as error:
        return str(error)
    return "nothing was wrong"


def test_colours_and_unknown_axes(tmp_path: Path) -> None:
    rgb: Any = np.random.default_rng(0).integers(0, 255, (4, 20, 30, 3), dtype=np.uint8)
    assert "colour" in refused(tiff(tmp_path, "c.tif", rgb, photometric="rgb"))
    assert "channels differ" in refused(write_png(tmp_path / "c.png", rgb[0]))
    grey = np.repeat(rgb[..., :1], 3, -1)  # colours in name only
    np.testing.assert_array_equal(
        open_source(tiff(tmp_path, "g.tif", grey, photometric="rgb")).read(0, 4), grey[..., 0]
    )
    zarr.save_array(str(tmp_path / "c.zarr"), rgb)
    assert "(4, 20, 30, 3) (colours?)" in refused(tmp_path / "c.zarr")
    zarr.save_array(str(tmp_path / "c3.zarr"), rgb[0])
    assert "colours?" in refused(tmp_path / "c3.zarr")
    assert "axes t z y x" in refused(
        ome_zarr_of(tmp_path / "t.zarr", "tzyx", VOLUME[None].repeat(2, 0))
    )
    assert "axes x y z" in refused(ome_zarr_of(tmp_path / "x.zarr", "xyz", VOLUME))
    assert "axes" in refused(
        tiff(tmp_path, "t.ome.tif", VOLUME[None].repeat(2, 0), metadata={"axes": "TZYX"})
    )
    tags = json.dumps({"axes": [{"key": k} for k in "xyz"]})
    assert "axes x y z" in refused(hdf5(tmp_path, axistags=tags))


def write_png(path: Path, image: np.ndarray) -> Path:
    Image.fromarray(image).save(path)
    return path


def ome_zarr_of(path: Path, axes: str, volume: np.ndarray) -> Path:
    group = zarr.create_group(path, zarr_format=2)
    group.create_array("0", data=volume)
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": [{"name": a} for a in axes], "datasets": [{"path": "0"}]}
    ]
    return path


def test_damage_is_named(tmp_path: Path) -> None:
    whole = Path(tiff(tmp_path))
    (tmp_path / "cut.tif").write_bytes(whole.read_bytes()[:-2000])
    assert "cut.tif" in refused(tmp_path / "cut.tif")
    path = tmp_path / "b.zarr"
    zarr.create_array(path, data=VOLUME, chunks=(2, 31, 44), zarr_format=2, compressors=Blosc())
    chunk = path / "1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:40])
    message = refused(path)
    assert "b.zarr" in message
    assert "cannot be decoded" in message
    np.testing.assert_array_equal(
        open_source(str(path)).read(0, 2), VOLUME[:2]
    )  # the rest can be read
    shutil.copy(hdf5(tmp_path), tmp_path / "cut.h5")
    with (tmp_path / "cut.h5").open("r+b") as file:
        file.truncate(600)
    assert "HDF5" in refused(tmp_path / "cut.h5")
    volume: Any = VOLUME.astype(np.float32)
    volume[3, 4, 5] = np.nan
    message = refused(tiff(tmp_path, "n.tif", volume))
    assert "1 NaN" in message
    zarr.save_array(str(tmp_path / "n.zarr"), volume)
    assert "slices 0 to 4: found 1 NaN" in refused(tmp_path / "n.zarr")


def test_what_is_not_there_or_not_clear(tmp_path: Path) -> None:
    assert "no such volume" in refused(tmp_path / "nothing.tif")
    (tmp_path / "notes.txt").write_text("x")
    assert "another kind" in refused(tmp_path / "notes.txt")
    assert "no such volume" in refused(tmp_path / "nothing.h5")
    assert "one of :/volumes/raw" in refused(hdf5(tmp_path) + ":/missing")  # a table is no volume
    with h5py.File(tmp_path / "v.h5", "a") as file:
        file["second"] = VOLUME
    assert "2 volumes" in refused(tmp_path / "v.h5")
    group = zarr.create_group(tmp_path / "g.zarr")
    for name in ("one", "two"):
        group.create_array(name, data=VOLUME)
    assert "2 volumes" in refused(tmp_path / "g.zarr")
    np.testing.assert_array_equal(open_source(str(tmp_path / "g.zarr/two")).read(0, 5), VOLUME)
    assert "no such volume" in refused(tmp_path / "g.zarr/three")
    assert "0 to 1" in refused(ome_zarr(tmp_path / "s.zarr", "0.4"), scale=2)
    assert "one resolution" in refused(tiff(tmp_path), scale=1)
    tifffile.imwrite(tmp_path / "mixed_1.tif", VOLUME[0])
    (tmp_path / "mixed").mkdir()
    tifffile.imwrite(tmp_path / "mixed/1.tif", VOLUME[0])
    tifffile.imwrite(tmp_path / "mixed/2.tif", VOLUME[0, :20])
    assert "2.tif: found a slice of shape (20, 44)" in refused(tmp_path / "mixed")


def test_a_single_slice_is_a_volume(tmp_path: Path) -> None:
    source: Source = open_source(tiff(tmp_path, "one.tif", VOLUME[0]))
    assert source.shape == (1, 31, 44)
    assert open_source(str(write_png(tmp_path / "one.png", VOLUME[0]))).shape == (1, 31, 44)


def test_rows_of_huge_slices_in_the_other_order_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiff_format, "LARGE", 100)
    source = open_source(tiff(tmp_path, byteorder=">"))
    np.testing.assert_array_equal(source.read(2, 4, 7, 30), VOLUME[2:4, 7:30], strict=True)


@pytest.mark.parametrize("first", ["0.png", "1.png"])
def test_slices_of_one_bit_beside_those_of_eight(tmp_path: Path, first: str) -> None:
    mask = VOLUME[:2] > 30000
    Image.fromarray(mask[0]).save(tmp_path / first)  # mode 1
    Image.fromarray(mask[1].astype(np.uint8) * 255).save(
        tmp_path / ("1.png" if first == "0.png" else "0.png")
    )
    source = open_source(str(tmp_path))
    expected = mask if first == "0.png" else mask[::-1]
    np.testing.assert_array_equal(source.read(0, 2), expected * np.uint8(255), strict=True)
