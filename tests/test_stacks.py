"""Volumes in NIfTI, HDF5 and Zarr: read as the TIFF of the same values, and refused where they are damaged."""

import gzip
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from nibabel.nifti1 import Nifti1Extension

from emadapt.data.ingest import ingest, open_volume
from emadapt.errors import InputError
from emadapt.study.study import ConfigError, Study
from emadapt.volumes.opening import open_source
from tiny import blobs, make_study, settings

FORMATS = [".tif", ".nii", ".nii.gz", ".h5", ".zarr"]


def write(folder: Path, suffix: str, **arrays: np.ndarray) -> None:
    """image and label in a format, with the axes that it has, in the place of the TIFFs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        path = folder / f"{name}{suffix}"
        if suffix == ".tif":
            tifffile.imwrite(path, array, photometric="minisblack")
        elif suffix.startswith(".nii"):
            header = nibabel.Nifti1Header()
            header.set_xyzt_units("micron")
            header.set_data_dtype(array.dtype)
            image = nibabel.Nifti1Image(
                array.T, np.diag([0.005, 0.005, 0.03, 1]), header
            )  # x, y, z
            nibabel.save(image, path)
        elif suffix == ".h5":
            with h5py.File(path, "w") as file:
                file.create_dataset("volume", data=array, chunks=(4, 30, 50), compression="gzip")
        else:
            stored = zarr.create_array(
                store=path, shape=array.shape, dtype=array.dtype, chunks=(4, 45, 50)
            )
            stored[:] = array


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path, ingested=False)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_format_gives_the_same_volume(
    study: Study, tmp_path: Path, suffix: str, dtype: type
) -> None:
    image, label = blobs((10, 90, 100), 0)
    write(
        tmp_path / "data/a",
        suffix,
        image=image.astype(dtype) * (1 if dtype is np.uint8 else 100),
        label=label.astype(dtype),
    )
    ingest(study, "a", tmp_path / "data", tmp_path / "build")
    volume = open_volume("a", tmp_path / "build")
    np.testing.assert_array_equal(volume.label, label)
    if dtype is np.uint8:
        np.testing.assert_array_equal(volume.image, image)
    else:
        assert np.corrcoef(volume.image.ravel(), image.ravel())[0, 1] > 0.99
    assert volume.manifest["source_dtype"] == np.dtype(dtype).name
    assert volume.manifest["pairs"][3] == [f"image{suffix}#3", f"label{suffix}#3"]


def test_nifti_says_its_voxel_size_where_it_has_a_unit(tmp_path: Path) -> None:
    image, _ = blobs((10, 90, 100), 0)
    write(tmp_path, ".nii.gz", image=image)
    source = open_source(str(tmp_path / "image.nii.gz"))
    assert (source.shape, source.voxel_nm, source.dtype) == (
        (10, 90, 100),
        (30.0, 5.0, 5.0),
        np.uint8,
    )
    np.testing.assert_array_equal(source.read(2, 5, 10, 20), image[2:5, 10:20])
    plain = nibabel.Nifti1Image(image.T, np.eye(4))
    plain.header.set_xyzt_units("unknown")
    nibabel.save(plain, tmp_path / "plain.nii")
    assert open_source(str(tmp_path / "plain.nii")).voxel_nm is None
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((4, 5, 6, 2), np.uint8), np.eye(4)), tmp_path / "four.nii"
    )
    with pytest.raises(InputError, match="one grey volume"):
        open_source(str(tmp_path / "four.nii"))


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
    assert expected.dtype == np.float64
    source = open_source(str(tmp_path / f"scaled{suffix}"))
    assert (source.shape, source.dtype) == ((5, 6, 7), expected.dtype)
    np.testing.assert_array_equal(source.read(1, 4, 2, 5), expected.T[1:4, 2:5])


def damage(path: Path) -> None:
    """Half of a file; of a Zarr, half of a chunk."""
    if path.is_dir():
        path = next(p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "zarr.json")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("which", ["image", "label"])
def test_truncated_files_are_named_and_nothing_is_written(
    study: Study, tmp_path: Path, suffix: str, which: str
) -> None:
    image, label = blobs((10, 90, 100), 0)
    rng = np.random.default_rng(0)
    write(
        tmp_path / "data/a",
        suffix,
        image=image,
        label=label * rng.integers(1, 200, label.shape, dtype=np.uint8),
    )
    damage(tmp_path / f"data/a/{which}{suffix}")
    with pytest.raises(
        InputError,
        match=rf"{which}{suffix}.*(truncated|readable|decoded).*(Copy or export|Check the path)",
    ):
        ingest(study, "a", tmp_path / "data", tmp_path / "build")
    assert not list(tmp_path.glob("build/*"))


def test_mixed_dtypes_shapes_and_formats_are_refused(study: Study, tmp_path: Path) -> None:
    image, label = blobs((10, 90, 100), 0)
    write(tmp_path / "data/a/train", ".nii", image=image, label=label)
    write(tmp_path / "data/a/test", ".h5", image=image.astype(np.uint16), label=label)
    with pytest.raises(
        InputError,
        match=r"test/image.h5:/volume: found slices of shape \(90, 100\), uint16; expected .* uint8",
    ):
        ingest(study, "a", tmp_path / "data", tmp_path / "build")
    write(tmp_path / "data/a/test", ".nii", image=image, label=label[:, :80])
    (tmp_path / "data/a/test/image.h5").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"label.nii, slice 0: found a label of shape \(80, 100\)"):
        ingest(study, "a", tmp_path / "data", tmp_path / "build")
    write(tmp_path / "data/a/test", ".nii", image=image, label=label)
    tifffile.imwrite(tmp_path / "data/a/test/image.tif", image, photometric="minisblack")
    with pytest.raises(InputError, match=r"2 volumes called image"):
        ingest(study, "a", tmp_path / "data", tmp_path / "build")


def test_what_is_no_volume_at_all(study: Study, tmp_path: Path) -> None:
    for suffix, content in ((".nii", b"no"), (".nii.gz", gzip.compress(b"no")), (".h5", b"no")):
        write(tmp_path / "data/a", ".tif", image=blobs((10, 90, 100), 0)[0])
        (tmp_path / "data/a/image.tif").unlink()
        (tmp_path / f"data/a/image{suffix}").write_bytes(content)
        with pytest.raises(InputError, match=r"readable"):
            ingest(study, "a", tmp_path / "data", tmp_path / "build")
        (tmp_path / f"data/a/image{suffix}").unlink()


def test_a_dataset_without_voxel_size_is_a_problem_of_the_settings(tmp_path: Path) -> None:
    params = settings()
    del params["datasets"]["a"]["voxel_nm"]
    with pytest.raises(ConfigError, match="'voxel_nm' is missing"):
        make_study(tmp_path, params, ingested=False)
