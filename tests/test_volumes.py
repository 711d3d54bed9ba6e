"""Every format gives the same volume, and damage or doubt is an error that names the file."""

import gc
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
from nibabel.nifti1 import Nifti1Extension
from PIL import Image
from zarr.codecs import BloscCodec, Crc32cCodec

from emadapt.errors import InputError
from emadapt.volumes import tiff as tiff_format
from emadapt.volumes.opening import open_source
from volume_files import (
    UM,
    VOXEL,
    WIDE,
    array,
    hdf5,
    image,
    imagej,
    nifti,
    ome,
    refused,
    slices,
    tiff,
    zarr,
)

RNG = np.random.default_rng(0)
PARTS = {"chunks": (2, 16, 16)}
NAMED = {**PARTS, "dimension_names": list("zyx")}
CHECKED = {**NAMED, "compressors": [BloscCodec(), Crc32cCodec()]}
SHARDED = {**NAMED, "shards": (4, 32, 32)}
COARSE = UM[0], 2 * UM[1], 2 * UM[2]


def scales(path: Path, version: str = "0.4") -> str:
    return image(path, (UM, COARSE), version=version, volume=WIDE)


STATED: dict[str, Callable[[Path], str]] = {
    "ome": lambda p: ome(p, WIDE),
    "imagej": lambda p: imagej(p, WIDE, spacing=UM[0], unit="um"),
    "hdf5": lambda p: hdf5(p, WIDE, element_size_um=UM),
    "hdf5 named": lambda p: hdf5(p, WIDE, "volumes/raw", resolution=VOXEL) + ":/volumes/raw",
    "nifti": lambda p: nifti(p, WIDE),
    "nifti packed": lambda p: nifti(p, WIDE, name="v.nii.gz"),
    "zarr v2": lambda p: array(p, WIDE, 2, PARTS, resolution=VOXEL, _ARRAY_DIMENSIONS=list("zyx")),
    "zarr v3": lambda p: array(p, WIDE, 3, NAMED, resolution=VOXEL),
    "zarr with checksums": lambda p: array(p, WIDE, 3, CHECKED, resolution=VOXEL),
    "sharded": lambda p: array(p, WIDE, 3, SHARDED, resolution=VOXEL),
    "ome-zarr 0.4": scales,
    "array of an ome-zarr": lambda p: scales(p) + "/0",
    "ome-zarr 0.5": lambda p: image(
        p, [(1, 1, *UM)], version="0.5", axes="tczyx", volume=WIDE[None, None]
    ),
}
"""Files of `WIDE` that state `VOXEL`."""
UNSTATED: dict[str, Callable[[Path], str]] = {
    "tiff": lambda p: tiff(p, WIDE),
    "deflated": lambda p: tiff(p, WIDE, compression="zlib"),
    "tiled": lambda p: tiff(p, WIDE, tile=(16, 16), compression="lzw"),
    "big": lambda p: tiff(p, WIDE, file={"bigtiff": True, "byteorder": ">"}),
    "png": lambda p: slices(p, [f"s_{z}.png" for z in range(8, 13)], WIDE),
    "tif slices": lambda p: slices(p, [f"s_{z}.tif" for z in range(8, 13)], WIDE),
}
"""Files of `WIDE` that state no voxel size."""
FORMATS = STATED | UNSTATED
DEPTHS = {"sharded": 4, **dict.fromkeys([n for n in FORMATS if "zarr" in n or "hdf5" in n], 2)}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("large", [False, True])
def test_every_format_gives_the_same_volume(
    tmp_path: Path, kind: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(tiff_format, "LARGE", 100)
    text = FORMATS[kind](tmp_path)
    source = open_source(text)
    assert (source.shape, source.dtype) == (WIDE.shape, WIDE.dtype)
    assert source.voxel_nm == (VOXEL if kind in STATED else None)
    assert source.depth == DEPTHS.get(kind, 2 if kind == "within" else 1)
    assert source.stamp == open_source(text).stamp
    np.testing.assert_array_equal(source.read(0, 5), WIDE)
    np.testing.assert_array_equal(source.read(2, 4, 7, 30), WIDE[2:4, 7:30], strict=True)
    np.testing.assert_array_equal(list(source.slices([4, 0, 1, 3])), WIDE[[4, 0, 1, 3]])
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda z: (source.read(z, z + 1)[0] == WIDE[z]).all(), [*range(5)] * 9)
        assert all(found)


def test_a_coarser_scale(tmp_path: Path) -> None:
    source = open_source(scales(tmp_path, "0.5"), scale=1)
    assert source.voxel_nm == (10.0, 8.0, 10.0)
    np.testing.assert_array_equal(source.read(1, 3), WIDE[1:3, ::2, ::2])


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
            data,
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


@pytest.mark.parametrize("first", ["0.png", "1.png"])
def test_slices_of_one_bit_among_those_of_eight_are_0_and_255(tmp_path: Path, first: str) -> None:
    mask = WIDE[:2] > 30000
    other = "1.png" if first == "0.png" else "0.png"
    Image.fromarray(mask[0]).save(tmp_path / first)  # mode 1
    Image.fromarray(mask[1].astype(np.uint8) * 255).save(tmp_path / other)
    expected = mask if first == "0.png" else mask[::-1]
    found = open_source(str(tmp_path)).read(0, 2)
    np.testing.assert_array_equal(found, expected * np.uint8(255), strict=True)
    (tmp_path / other).unlink()
    assert open_source(str(tmp_path)).dtype == bool


def test_a_scale_that_is_not_there(tmp_path: Path) -> None:
    assert "0 to 1" in refused(scales(tmp_path), scale=2)
    assert "one resolution" in refused(tiff(tmp_path), scale=1)
    assert "one resolution" in refused(array(tmp_path, version=3), scale=1)


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6])
@pytest.mark.parametrize(
    "kind", ["tiff", "deflated", "ome", "imagej", "hdf5", "nifti", "nifti packed", "png"]
)
def test_truncated_files_are_named(tmp_path: Path, kind: str, keep: float) -> None:
    text = FORMATS[kind](tmp_path)
    path = min(Path(text).iterdir()) if Path(text).is_dir() else Path(text)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert path.name in refused(text)


@pytest.mark.parametrize("codec", ["blosc", "gzip"])
def test_a_damaged_chunk_spoils_its_slices_alone(tmp_path: Path, codec: str) -> None:
    from numcodecs import Blosc, GZip

    how = {"compressors": Blosc() if codec == "blosc" else GZip()}
    path = tmp_path / "b.zarr"
    zarr.create_array(path, data=WIDE, chunks=(2, 31, 44), zarr_format=2, **how)
    (path / "1.0.0").write_bytes((path / "1.0.0").read_bytes()[:40])
    assert "cannot be decoded" in refused(path)
    np.testing.assert_array_equal(open_source(str(path)).read(0, 2), WIDE[:2])


def test_a_folder_of_many_slices_keeps_no_files_open(tmp_path: Path) -> None:
    for z in range(200):
        packed = "zlib" if z % 2 else None
        tifffile.imwrite(tmp_path / f"{z}.tif", WIDE[z % 5], compression=packed)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    gc.disable()  # files are closed, not forgotten
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 50, limits[1]))
    try:
        found = open_source(str(tmp_path)).read(0, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        gc.enable()
    np.testing.assert_array_equal(found, WIDE[np.arange(200) % 5])


@pytest.mark.parametrize("name", ["v.tif", "v.png", "v.h5", "v.nii"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    for opener in (
        "tifffile.TiffFile",
        "PIL.Image.open",
        "h5py.File",
        "nibabel.openers.ImageOpener",
    ):
        monkeypatch.setattr(opener, refuse)  # root may read everything
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="no permission to read"):
        open_source(str(tmp_path / name))
