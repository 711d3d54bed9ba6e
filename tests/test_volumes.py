"""Every format gives the same volume, and damage or doubt is an error that names the file."""

import gc
import gzip
import json
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
import zarr as typed_zarr
from nibabel.nifti1 import Nifti1Extension
from PIL import Image

from emadapt.errors import InputError
from emadapt.volumes import tiff as tiff_format
from emadapt.volumes.grey import to_uint8
from emadapt.volumes.opening import open_source

zarr: Any = typed_zarr  # its types are narrower than what it takes

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 60000, (5, 31, 44)).astype(np.uint16)
VOXEL = (30.0, 4.5, 5.0)
OME = {
    "axes": "ZYX",
    "PhysicalSizeZ": 0.03,
    "PhysicalSizeY": 0.0045,
    "PhysicalSizeX": 5,
    "PhysicalSizeXUnit": "nm",
}  # else µm


def tiff(path: Path, name: str = "s.tif", volume: Any = VOLUME, **how: Any) -> str:
    tifffile.imwrite(path / name, volume, **{"photometric": "minisblack", **how})
    return str(path / name)


def imagej(path: Path) -> str:
    stated = {"spacing": 0.03, "unit": "um", "axes": "ZYX"}
    return tiff(path, imagej=True, resolution=(1 / 0.005, 1 / 0.0045), metadata=stated)


def folder(path: Path, suffix: str) -> str:
    """Slices 8 to 12: the order of text is not that of numbers."""
    (path / "slices").mkdir()
    for z, image in enumerate(VOLUME):
        file = path / "slices" / f"s_{z + 8}{suffix}"
        Image.fromarray(image).save(file) if suffix == ".png" else tifffile.imwrite(file, image)
    return str(path / "slices")


def hdf5(path: Path, name: str = "v.h5", **attributes: Any) -> str:
    with h5py.File(path / name, "w") as file:
        how = {"chunks": (2, 16, 16), "compression": "gzip"}
        file.create_dataset("volumes/raw", data=VOLUME, **how).attrs.update(attributes)
        file.create_dataset("info", data=np.arange(3))
    return str(path / name)


def nifti(path: Path, name: str) -> str:
    header = nibabel.Nifti1Header()
    header.set_xyzt_units("micron")
    header.set_data_dtype(VOLUME.dtype)
    image = nibabel.Nifti1Image(VOLUME.T, np.diag([0.005, 0.0045, 0.03, 1]), header)  # x, y, z
    nibabel.save(image, path / name)
    return str(path / name)


def plain_zarr(path: Path, version: Any, **how: Any) -> str:
    array = zarr.create_array(
        path / "a.zarr", data=VOLUME, chunks=(2, 16, 16), zarr_format=version, **how
    )
    if version == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = ["z", "y", "x"]
    array.attrs["resolution"] = list(VOXEL)
    return str(path / "a.zarr")


def ome_zarr(path: Path, version: str, axes: str = "zyx") -> str:
    """Two scales, written by hand as the specifications say."""
    group = zarr.create_group(path / "i.ome.zarr", zarr_format=2 if version == "0.4" else 3)
    sizes = {"z": 0.03, "y": 0.0045, "x": 0.005}
    datasets = []
    for level, step in enumerate((1, 2)):
        data = VOLUME[:, ::step, ::step]
        data = data.reshape([1] * (len(axes) - 3) + list(data.shape))
        group.create_array(str(level), data=data, chunks=(*[1] * (len(axes) - 3), 2, 16, 16))
        scale = [sizes.get(a, 1.0) * (step if a in "yx" else 1) for a in axes]
        change = {"type": "scale", "scale": scale}
        datasets.append({"path": str(level), "coordinateTransformations": [change]})
    space = {"type": "space", "unit": "micrometer"}
    named = [{"name": a} | (space if a in sizes else {}) for a in axes]
    image = {"version": version, "datasets": datasets, "axes": named}
    own = {"multiscales": [image]}
    group.attrs.update(own if version == "0.4" else {"ome": {"version": version, **own}})
    return str(path / "i.ome.zarr")


FORMATS: dict[str, tuple[Callable[[Path], str], bool]] = {
    "tiff": (tiff, False),
    "deflated": (lambda p: tiff(p, compression="zlib"), False),
    "tiled": (lambda p: tiff(p, tile=(16, 16), compression="lzw"), False),
    "big-endian bigtiff": (lambda p: tiff(p, bigtiff=True, byteorder=">"), False),
    "ome": (lambda p: tiff(p, "s.ome.tif", metadata=OME), True),
    "imagej": (imagej, True),
    "png": (lambda p: folder(p, ".png"), False),
    "tif slices": (lambda p: folder(p, ".tif"), False),
    "hdf5": (lambda p: hdf5(p, element_size_um=[0.03, 0.0045, 0.005]), True),
    "hdf5 named": (lambda p: hdf5(p, resolution=VOXEL) + ":/volumes/raw", True),
    "nifti": (lambda p: nifti(p, "v.nii"), True),
    "nifti packed": (lambda p: nifti(p, "v.nii.gz"), True),
    "zarr v2": (lambda p: plain_zarr(p, 2), True),
    "zarr v3": (lambda p: plain_zarr(p, 3, dimension_names=["z", "y", "x"]), True),
    "sharded": (lambda p: plain_zarr(p, 3, shards=(4, 32, 32)), True),
    "ome-zarr 0.4": (lambda p: ome_zarr(p, "0.4"), True),
    "ome-zarr 0.5": (lambda p: ome_zarr(p, "0.5", "tczyx"), True),
    "within": (lambda p: ome_zarr(p, "0.4") + "/0", False),
}
DEPTHS = {"sharded": 4, **dict.fromkeys([n for n in FORMATS if "zarr" in n or "hdf5" in n], 2)}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("large", [False, True])
def test_every_format_gives_the_same_volume(
    tmp_path: Path, kind: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(tiff_format, "LARGE", 100)
    write, has_voxel = FORMATS[kind]
    text = write(tmp_path)
    source = open_source(text)
    assert (source.shape, source.dtype) == (VOLUME.shape, VOLUME.dtype)
    assert source.voxel_nm == (VOXEL if has_voxel else None)
    assert source.depth == DEPTHS.get(kind, 2 if kind == "within" else 1)
    assert source.stamp == open_source(text).stamp
    np.testing.assert_array_equal(source.read(0, 5), VOLUME)
    np.testing.assert_array_equal(source.read(2, 4, 7, 30), VOLUME[2:4, 7:30], strict=True)
    np.testing.assert_array_equal(list(source.slices([4, 0, 1, 3])), VOLUME[[4, 0, 1, 3]])
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(
            lambda z: (source.read(z, z + 1)[0] == VOLUME[z]).all(), [*range(5)] * 9
        )
        assert all(found)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, bool])
def test_types_of_values_stay(tmp_path: Path, dtype: Any) -> None:
    stack = (RNG.random((3, 20, 30)) * 200).astype(dtype)
    source = open_source(tiff(tmp_path, volume=stack))
    np.testing.assert_array_equal(source.read(0, 3), stack, strict=True)


def test_a_coarser_scale(tmp_path: Path) -> None:
    source = open_source(ome_zarr(tmp_path, "0.5"), scale=1)
    assert source.voxel_nm == (30.0, 9.0, 10.0)
    np.testing.assert_array_equal(source.read(1, 3), VOLUME[1:3, ::2, ::2])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti_is_read_as_nibabel_reads_it(tmp_path: Path, suffix: str, kind: Any) -> None:
    """Scaled values, the other byte order, an extension of the header; a part alone is scaled."""
    stored = np.random.default_rng(1).integers(-300, 300, (7, 6, 5)).astype(">i2")
    header = kind.header_class(endianness=">")
    header.set_data_dtype(np.int16)
    header.extensions.append(Nifti1Extension("comment", b"a note " * 30))
    image = kind(stored, np.eye(4), header)
    image.header.set_slope_inter(0.25, -3)
    nibabel.save(image, tmp_path / f"scaled{suffix}")
    loaded: Any = nibabel.load(tmp_path / f"scaled{suffix}")
    expected = np.asarray(loaded.dataobj)
    source = open_source(str(tmp_path / f"scaled{suffix}"))
    assert (source.shape, source.dtype, source.voxel_nm) == ((5, 6, 7), expected.dtype, None)
    np.testing.assert_array_equal(source.read(1, 4, 2, 5), expected.T[1:4, 2:5])


def png(path: Path, image: Any, **how: Any) -> str:
    """By imagecodecs, which writes 16-bit colours."""
    path.write_bytes(imagecodecs.png_encode(np.asarray(image), **how))
    return str(path)


def refused(text: str | Path, **how: Any) -> str:
    try:
        source = open_source(str(text), **how)
        source.read(0, source.shape[0])
    except InputError as error:
        return str(error)
    return "nothing was wrong"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 3, 4])  # grey and alpha, RGB, RGBA
@pytest.mark.parametrize("kind", ["png", "contig", "separate"])
def test_colours_and_alpha_that_say_nothing_are_dropped_and_others_refused(
    tmp_path: Path, dtype: Any, channels: int, kind: str
) -> None:
    def write(stack: np.ndarray) -> str:
        if kind == "png":
            return png(tmp_path / "a.png", stack[0])
        data = np.moveaxis(stack, -1, 1) if kind == "separate" else stack
        return tiff(
            tmp_path,
            volume=data,
            photometric="minisblack" if channels == 2 else "rgb",
            planarconfig=kind,
            extrasamples=[] if channels == 3 else ["unassalpha"],
        )

    top = np.iinfo(dtype).max
    grey = RNG.integers(0, top, (1 if kind == "png" else 3, 8, 9)).astype(dtype)
    stack = np.stack([grey] * channels, -1)
    if channels != 3:
        stack[..., -1] = top
    found = open_source(write(stack)).read(0, len(grey))
    np.testing.assert_array_equal(found, grey, strict=True)
    if channels != 3:
        stack[:, 3, 4, -1] = 7  # one transparent pixel
        assert "transparent pixels (alpha from 7" in refused(write(stack))
        stack[..., -1] = top
    if channels != 2:
        stack[:, 3, 4, 1] ^= 1
        assert "channels differ" in refused(write(stack))


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_transparent_value_is_an_alpha_channel(tmp_path: Path, mode: str) -> None:
    grey = np.arange(72, dtype=np.uint8).reshape(8, 9)
    image = Image.fromarray(grey)
    if mode == "P":
        image.putpalette([v for v in range(256) for _ in "rgb"])  # makes it one
    elif mode == "RGB":
        image = image.convert("RGB")
    path = tmp_path / "a.png"
    image.save(path, transparency=(5, 5, 5) if mode == "RGB" else 5)
    assert "transparent pixels" in refused(path)
    image.save(path, transparency=(200, 200, 200) if mode == "RGB" else 200)  # not in it
    np.testing.assert_array_equal(open_source(str(path)).read(0, 1)[0], grey)


@pytest.mark.parametrize("first", ["0.png", "1.png"])
def test_slices_of_one_bit_among_those_of_eight_are_0_and_255(tmp_path: Path, first: str) -> None:
    mask = VOLUME[:2] > 30000
    other = "1.png" if first == "0.png" else "0.png"
    Image.fromarray(mask[0]).save(tmp_path / first)  # mode 1
    Image.fromarray(mask[1].astype(np.uint8) * 255).save(tmp_path / other)
    expected = mask if first == "0.png" else mask[::-1]
    found = open_source(str(tmp_path)).read(0, 2)
    np.testing.assert_array_equal(found, expected * np.uint8(255), strict=True)
    (tmp_path / other).unlink()
    assert open_source(str(tmp_path)).dtype == bool


def axes_of(path: Path, axes: str, volume: Any = VOLUME) -> str:
    group = zarr.create_group(path / "x.zarr", zarr_format=2)
    group.create_array("0", data=volume)
    image = {"axes": [{"name": a} for a in axes], "datasets": [{"path": "0"}]}
    group.attrs["multiscales"] = [{"version": "0.4", **image}]
    return str(path / "x.zarr")


def saved(path: Path, volume: Any) -> str:
    zarr.save_array(str(path / "s.zarr"), volume)
    return str(path / "s.zarr")


def group(path: Path, *names: str) -> str:
    made = zarr.create_group(path / "g.zarr")
    for name in names:
        made.create_array(name, data=VOLUME)
    return str(path / "g.zarr")


def mixed(path: Path) -> str:
    (path / "mixed").mkdir()
    tiff(path / "mixed", "1.tif", VOLUME[0])
    tiff(path / "mixed", "2.tif", VOLUME[0, :20])
    return str(path / "mixed")


def nan(path: Path, write: Callable[[Path, Any], str]) -> str:
    volume = VOLUME.astype(np.float32)
    volume[3, 4, 5:7] = np.nan, np.inf
    return write(path, volume)


RGB = RNG.integers(0, 255, (4, 20, 30, 3), dtype=np.uint8)
XYZ = json.dumps({"axes": [{"key": k} for k in "xyz"]})
DOUBTFUL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "colours": (lambda p: tiff(p, volume=RGB, photometric="rgb"), "channels differ"),
    "colours in zarr": (lambda p: saved(p, RGB), "3 places along axis 3 (colours?)"),
    "one slice of colours": (lambda p: saved(p, RGB[0]), "(colours?)"),
    "times": (lambda p: axes_of(p, "tzyx", VOLUME[None].repeat(2, 0)), "axes t z y x"),
    "turned axes": (lambda p: axes_of(p, "xyz"), "axes x y z"),
    "turned hdf5": (lambda p: hdf5(p, axistags=XYZ), "axes x y z"),
    "NaN": (lambda p: nan(p, lambda p, v: tiff(p, volume=v)), "2 NaN or infinite"),
    "NaN in zarr": (lambda p: nan(p, saved), "slices 0 to 4: found 2 NaN"),
    "nothing": (lambda p: p / "nothing.tif", "no such volume"),
    "no file": (lambda p: p / "nothing.h5", "no such volume"),
    "no array": (lambda p: group(p, "one") + "/three", "no such volume"),
    "another kind": (lambda p: Path(__file__), "another kind"),
    "no dataset": (lambda p: hdf5(p) + ":/missing", "one of :/volumes/raw"),
    "two arrays": (lambda p: group(p, "one", "two"), "2 volumes"),
    "slices of two sizes": (mixed, "2.tif: found slices of shape (20, 44)"),
    "text": (lambda p: Path(p / "b.tif").write_text("no") and p / "b.tif", "no readable TIFF"),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_doubt_is_an_error_that_says_why(case: str, tmp_path: Path) -> None:
    write, said = DOUBTFUL[case]
    assert said in refused(write(tmp_path))


def test_a_scale_that_is_not_there(tmp_path: Path) -> None:
    assert "0 to 1" in refused(ome_zarr(tmp_path, "0.4"), scale=2)
    assert "one resolution" in refused(tiff(tmp_path), scale=1)
    assert "one resolution" in refused(plain_zarr(tmp_path, 3), scale=1)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
@pytest.mark.parametrize(
    "kind", ["tiff", "deflated", "ome", "imagej", "hdf5", "nifti", "nifti packed", "png"]
)
def test_truncated_files_are_named(tmp_path: Path, kind: str, keep: float) -> None:
    text = FORMATS[kind][0](tmp_path)
    path = min(Path(text).iterdir()) if Path(text).is_dir() else Path(text)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert path.name in refused(text)


@pytest.mark.parametrize("codec", ["blosc", "gzip"])
def test_a_damaged_chunk_spoils_its_slices_alone(tmp_path: Path, codec: str) -> None:
    from numcodecs import Blosc, GZip

    how = {"compressors": Blosc() if codec == "blosc" else GZip()}
    path = tmp_path / "b.zarr"
    zarr.create_array(path, data=VOLUME, chunks=(2, 31, 44), zarr_format=2, **how)
    (path / "1.0.0").write_bytes((path / "1.0.0").read_bytes()[:40])
    assert "cannot be decoded" in refused(path)
    np.testing.assert_array_equal(open_source(str(path)).read(0, 2), VOLUME[:2])


def test_packed_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"no"))
    assert "no readable NIfTI" in refused(tmp_path / "a.nii.gz")
    four = nibabel.Nifti1Image(np.zeros((4, 5, 6, 2), np.uint8), np.eye(4))
    nibabel.save(four, tmp_path / "four.nii")
    assert "grey slices (X, Y, Z)" in refused(tmp_path / "four.nii")


def test_a_single_slice_is_a_volume(tmp_path: Path) -> None:
    for text in (tiff(tmp_path, volume=VOLUME[0]), png(tmp_path / "a.png", VOLUME[0])):
        np.testing.assert_array_equal(open_source(text).read(0, 1)[0], VOLUME[0], strict=True)


def test_8_bit_stays_and_16_bit_is_mapped_linearly() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(to_uint8(image, 0.0, 255.0), image)
    wide = np.array([[0, 1000, 2000, 3000, 65535]], np.uint16)
    assert to_uint8(wide, 1000, 3000).tolist() == [[0, 0, 128, 255, 255]]


def test_a_folder_of_many_slices_keeps_no_files_open(tmp_path: Path) -> None:
    for z in range(200):
        tiff(tmp_path, f"{z}.tif", VOLUME[z % 5], compression="zlib" if z % 2 else None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    gc.disable()  # files are closed, not forgotten
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 50, limits[1]))
    try:
        found = open_source(str(tmp_path)).read(0, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        gc.enable()
    np.testing.assert_array_equal(found, VOLUME[np.arange(200) % 5])
