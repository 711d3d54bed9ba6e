import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from emadapt.data.ingest import ingest, open_volume
from emadapt.errors import InputError
from emadapt.study.study import Study
from tiny import blobs, make_study, settings


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path, ingested=False)


def run(study: Study, root: Path, name: str = "a"):
    ingest(study, name, root / "data", root / "build")
    return open_volume(name, root / "build")


def test_the_volume_is_what_was_written_and_the_manifest_says_so(
    study: Study, tmp_path: Path
) -> None:
    image, label = blobs((10, 90, 100), 0)
    volume = run(study, tmp_path)
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.label, label)
    m = volume.manifest
    assert m["shape"] == [10, 90, 100]
    assert m["voxel_nm"] == [30, 5, 5]
    assert m["source_dtype"] == "uint8"
    assert m["pairs"][3] == ["image.tif#3", "label.tif#3"]
    for part, slices in m["split"].items():
        assert m["foreground_fraction"][part] == pytest.approx(label[slices].mean(), abs=1e-6)
    before = (tmp_path / "build/a/manifest.json").read_bytes()
    assert (run(study, tmp_path).md5, (tmp_path / "build/a/manifest.json").read_bytes()) == (
        volume.md5,
        before,
    )


def test_slices_without_foreground_are_named(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = blobs((10, 90, 100), 0)[1]
    run(study, tmp_path)
    assert "without foreground" not in capsys.readouterr().err
    label[[2, 7]] = 0
    tifffile.imwrite(tmp_path / "data/a/label.tif", label)
    run(study, tmp_path)
    assert "ingest a: 2 of 10 slices without foreground: 2, 7\n" in capsys.readouterr().err


def test_the_md5_follows_every_ingredient(study: Study, tmp_path: Path) -> None:
    seen = {run(study, tmp_path).md5}
    image, label = blobs((10, 90, 100), 0)
    image[0, 0, 0] ^= 1
    tifffile.imwrite(tmp_path / "data/a/image.tif", image, photometric="minisblack")
    seen.add(run(study, tmp_path).md5)
    label[-1, 0, 0] ^= 1
    tifffile.imwrite(tmp_path / "data/a/label.tif", label, photometric="minisblack")
    seen.add(run(study, tmp_path).md5)
    seen.add(
        run(
            dataclasses.replace(study, split=dataclasses.replace(study.split, val=0.3)), tmp_path
        ).md5
    )
    assert len(seen) == 4


def test_16_bit_and_float_are_scaled_by_percentiles_of_the_training_slices_alone(
    study: Study, tmp_path: Path
) -> None:
    image, _ = blobs((10, 90, 100), 0)
    wide = image.astype(np.uint16) * 100
    wide[-2:] = 65535  # the test block must not move the window
    tifffile.imwrite(tmp_path / "data/a/image.tif", wide, photometric="minisblack")
    volume = run(study, tmp_path)
    low, high = (volume.manifest["intensity"][k] for k in ("low", "high"))
    train = wide[volume.split["train"]]
    assert (low, high) == pytest.approx(tuple(np.percentile(train, (0.5, 99.5))), rel=0.02)
    expected = np.clip(np.round((train.astype(float) - low) / (high - low) * 255), 0, 255)
    assert np.abs(volume.image[volume.split["train"]].astype(float) - expected).max() <= 1
    tifffile.imwrite(
        tmp_path / "data/a/image.tif", wide.astype(np.float32) / 7, photometric="minisblack"
    )
    assert np.abs(run(study, tmp_path).image[:6].astype(int) - volume.image[:6]).max() <= 1


@pytest.mark.parametrize(
    ("image", "label", "words"),
    [
        (
            np.zeros((10, 90, 100), np.uint8),
            np.zeros((9, 90, 100), np.uint8),
            "9 slices; expected 10",
        ),
        (np.zeros((10, 90, 100), np.uint8), np.ones((10, 90, 99), np.uint8), r"shape \(90, 99\)"),
        (
            np.zeros((10, 90, 100), np.uint8),
            np.zeros((10, 90, 100), np.uint8),
            "no foreground in the training slices",
        ),
        (np.zeros((10, 90, 100), np.float32), np.ones((10, 90, 100), np.uint8), "a constant image"),
        (np.zeros((3, 90, 100), np.uint8), np.ones((3, 90, 100), np.uint8), "expected at least 5"),
    ],
)
def test_bad_volumes_stop_before_anything_is_written(
    study: Study, tmp_path: Path, image, label, words: str
) -> None:
    tifffile.imwrite(tmp_path / "data/a/image.tif", image, photometric="minisblack")
    tifffile.imwrite(tmp_path / "data/a/label.tif", label, photometric="minisblack")
    with pytest.raises(InputError, match=words):
        run(study, tmp_path)
    assert not list(tmp_path.glob("build/*"))


def test_slices_of_two_shapes_are_refused(tmp_path: Path) -> None:
    params = settings()
    params["datasets"]["a"]["layout"] = "folders"
    study = make_study(tmp_path, params, ingested=False)
    for kind in ("images", "labels"):
        (tmp_path / f"data/a/{kind}").mkdir()
        for z in range(8):
            tifffile.imwrite(
                tmp_path / f"data/a/{kind}/{z}.tif", np.ones((20 + (z == 5), 30), np.uint8)
            )
    with pytest.raises(InputError, match=r"5.tif.*crop|5.tif: found a slice of shape"):
        run(study, tmp_path)


def test_a_failed_ingest_leaves_the_old_volume(study: Study, tmp_path: Path) -> None:
    old = run(study, tmp_path).md5
    data = (tmp_path / "data/a/image.tif").read_bytes()
    (tmp_path / "data/a/image.tif").write_bytes(data[:-100])
    with pytest.raises(InputError, match=r"truncated|decoded|no readable TIFF"):
        run(study, tmp_path)
    assert json.loads((tmp_path / "build/a/manifest.json").read_text())["md5"] == old


def test_nothing_ingested_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="emadapt ingest x"):
        open_volume("x", tmp_path)
