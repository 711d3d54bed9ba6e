"""From files to the volume that is trained on: what is written, and what is refused before."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emadapt.data.foreground import class_ids
from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.errors import InputError
from emadapt.study.study import Study
from tiny import blobs, make_study, settings

IMAGE, LABEL = blobs((10, 90, 100), 0)
IDS = {"mitochondria": [1], "er": [2], "cells": [1, 2, 3]}


def a_study(root: Path, **dataset: Any) -> Study:
    """Dataset `a` as `tiny` writes it, with other settings."""
    params = settings()
    params["datasets"]["a"] |= dataset
    return written(root, params)


def written(root: Path, params: dict[str, Any]) -> Study:
    shutil.rmtree(root / "data", ignore_errors=True)
    return make_study(root, params, ingested=False)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return a_study(tmp_path)


def run(study: Study, root: Path) -> Volume:
    ingest(study, "a", root / "data", root / "build")
    return open_volume("a", root / "build")


def write(folder: Path, suffix: str = ".tif", **stacks: np.ndarray) -> None:
    """image and label in a format, in the place of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in stacks.items():
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        path = folder / f"{name}{suffix}"
        if suffix == ".tif":
            tifffile.imwrite(path, array, photometric="minisblack")
        elif suffix == ".nii":
            nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)  # x, y, z
        else:
            with h5py.File(path, "w") as file:
                file["volume"] = array


def test_the_volume_is_what_was_written_and_the_manifest_says_so(
    study: Study, tmp_path: Path
) -> None:
    (tmp_path / "data/a/SOURCE.json").write_text('{"licence": "CC0"}')
    volume = run(study, tmp_path)
    np.testing.assert_array_equal(volume.image, IMAGE)
    np.testing.assert_array_equal(volume.label, LABEL)
    known = volume.manifest
    assert known["shape"] == [10, 90, 100]
    assert known["voxel_nm"] == [30, 5, 5]
    assert known["source_dtype"] == "uint8"
    assert known["pairs"][3] == ["image.tif#3", "label.tif#3"]
    assert known["source"] == {"licence": "CC0"}
    for part, slices in known["split"].items():
        fraction = known["foreground_fraction"][part]
        assert fraction == pytest.approx(LABEL[slices].mean(), abs=1e-6)
    before = (tmp_path / "build/a/manifest.json").read_bytes()
    run(study, tmp_path)
    assert (tmp_path / "build/a/manifest.json").read_bytes() == before


def test_the_md5_follows_what_models_see_and_nothing_else(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    seen = {run(study, tmp_path).md5}
    image, label = IMAGE.copy(), LABEL.copy()
    image[0, 0, 0] ^= 1
    write(tmp_path / "data/a", image=image)
    seen.add(run(study, tmp_path).md5)
    label[-1, 0, 0] ^= 1
    write(tmp_path / "data/a", label=label)
    seen.add(run(study, tmp_path).md5)
    assert len(seen) == 3
    write(tmp_path / "data/a", image=image, label=label)
    other = a_study(tmp_path, voxel_nm=[31, 5, 5], foreground=">0")
    assert run(other, tmp_path).md5 in seen
    thick = a_study(tmp_path, voxel_nm=[10, 5, 5])  # other slices are left out between parts
    assert run(thick, tmp_path).md5 not in seen


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_grey_values_are_scaled_by_percentiles_of_the_training_slices_alone(
    study: Study, tmp_path: Path, dtype: Any
) -> None:
    wide = IMAGE.astype(dtype) * 100
    wide[-2:] = 65535  # the test block must not move the window
    write(tmp_path / "data/a", image=wide)
    volume = run(study, tmp_path)
    low, high = (volume.manifest["intensity"][k] for k in ("low", "high"))
    train = wide[volume.split["train"]]
    assert (low, high) == pytest.approx(tuple(np.percentile(train, (0.5, 99.5))), rel=0.02)
    expected = np.clip(np.round((train.astype(float) - low) / (high - low) * 255), 0, 255)
    found = volume.image[volume.split["train"]].astype(float)
    assert np.abs(found - expected).max() <= 1


ZEROS, ONES = np.zeros((10, 90, 100), np.uint8), np.ones((10, 90, 100), np.uint8)


@pytest.mark.parametrize(
    ("image", "label", "words"),
    [
        (ZEROS, ZEROS[:9], "9 slices; expected 10"),
        (ZEROS, ONES[:, :, :99], r"label.tif, slice 0: found a label of shape \(90, 99\)"),
        (ZEROS, ZEROS, "no foreground in the training slices"),
        (ZEROS.astype(np.float32), ONES, "a constant image"),
        (ZEROS[:3], ONES[:3], "expected at least 5"),
    ],
)
def test_bad_volumes_stop_before_anything_is_written(
    study: Study, tmp_path: Path, image: np.ndarray, label: np.ndarray, words: str
) -> None:
    write(tmp_path / "data/a", image=image, label=label)
    with pytest.raises(InputError, match=words):
        run(study, tmp_path)
    assert not list(tmp_path.glob("build/*"))


def test_a_failed_ingest_leaves_the_old_volume(study: Study, tmp_path: Path) -> None:
    old = run(study, tmp_path).md5
    path = tmp_path / "data/a/label.tif"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"label\.tif.*(truncated|no readable TIFF)"):
        run(study, tmp_path)
    assert open_volume("a", tmp_path / "build").md5 == old
    with pytest.raises(InputError, match="emadapt ingest x"):
        open_volume("x", tmp_path)


# ---------------------------------------------------------------- labels


@given(arrays(np.uint8, (4, 5)), st.integers(0, 254), st.sets(st.integers(0, 255), min_size=1))
def test_foreground_rules_against_python(label: np.ndarray, threshold: int, ids: set[int]) -> None:
    label[0, :3] = 255, 254, 0
    above, chosen = class_ids(label, [f">{threshold}"]), class_ids(label, [tuple(ids)])
    for y, x in np.ndindex(label.shape):
        assert above[y, x] == (int(label[y, x]) > threshold)
        assert chosen[y, x] == (int(label[y, x]) in ids)


def organelles(root: Path, organelle: str, ids: list[int], **more: Any) -> tuple[Study, np.ndarray]:
    """A study of one organelle, with labels of these ids."""
    params = settings()
    del params["datasets"]["a"]["foreground"]
    params["datasets"]["a"] |= {"classes": IDS | more, "organelle": organelle}
    study = written(root, params)
    label = LABEL * np.random.default_rng(0).choice(ids, LABEL.shape).astype(np.uint8)
    write(root / "data/a", label=label)
    return study, label


@pytest.mark.parametrize("organelle", IDS)
def test_the_volume_has_the_organelle_that_was_chosen(tmp_path: Path, organelle: str) -> None:
    study, label = organelles(tmp_path, organelle, [1, 2, 3])
    volume = run(study, tmp_path)
    np.testing.assert_array_equal(volume.label > 0, np.isin(label, IDS[organelle]))
    assert volume.manifest["organelle"] == organelle
    assert volume.manifest["foreground"] == IDS[organelle]
    more, _ = organelles(tmp_path, organelle, [1, 2, 3], vesicles=[9])
    assert run(more, tmp_path).md5 == volume.md5, "ids of others are not part of the task"


def test_an_id_that_no_slice_has_is_an_error_that_names_it(tmp_path: Path) -> None:
    for organelle, said in (("cells", r"\[1, 2, 3\], cells"), ("er", r"\[2\], er")):
        study, _ = organelles(tmp_path, organelle, [1, 3])
        with pytest.raises(InputError, match=f"none with id 2 in any slice.*{said}"):
            run(study, tmp_path)
    assert not list(tmp_path.glob("build/*"))


def test_without_labels_every_slice_is_a_training_slice(tmp_path: Path) -> None:
    params = settings()
    params["datasets"]["c"] = {"layout": "stack", "voxel_nm": [40, 5, 5], "labelled": False}
    params["study"]["datasets"] = ["a", "b", "c"]
    study = make_study(tmp_path, params, ingested=False)
    write(tmp_path / "data/c", image=IMAGE, label=ONES)  # a label that is not looked at
    ingest(study, "c", tmp_path / "data", tmp_path / "build")
    volume = open_volume("c", tmp_path / "build")
    assert volume.split == {"train": list(range(10)), "val": [], "test": []}
    assert not volume.labelled
    np.testing.assert_array_equal(volume.image, IMAGE)
    assert volume.manifest["pairs"][3] == ["image.tif#3"]
    assert not volume.label.any()
    assert json.loads((tmp_path / "build/c/manifest.json").read_text())["md5"] == volume.md5
