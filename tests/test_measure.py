"""The table of objects against scipy and brute force, and what is written."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.ndimage import center_of_mass, find_objects, gaussian_filter
from scipy.ndimage import label as components
from scipy.spatial.distance import cdist

from emadapt.errors import InputError
from emadapt.segment import run
from emadapt.segment.measure import measure_volume
from emadapt.segment.objects import Asked, of_volume

VOXEL = (20.0, 5.0, 4.0)


@pytest.fixture(scope="module")
def labels():
    smooth = gaussian_filter(np.random.default_rng(0).standard_normal((14, 50, 60)), (1, 3, 3))
    return components(smooth > 1.5 * smooth.std())[0].astype(np.uint16)


def measured(folder: Path, labels: np.ndarray, suffix: str = ".csv", **more: Any) -> pd.DataFrame:
    tifffile.imwrite(folder / "objects.tif", labels)
    output = str(folder / f"table{suffix}")
    asked = Asked(str(folder / "objects.tif"), output, voxel_nm=VOXEL, overwrite=True, **more)
    return measure_volume(asked)


def test_the_table_against_scipy_and_brute_force(tmp_path, labels):
    grey = np.random.default_rng(1).integers(0, 255, labels.shape, dtype=np.uint8)
    second = np.zeros_like(labels, dtype=np.uint8)
    second[:, 20:24] = 255
    for name, volume in (("grey", grey), ("second", second)):
        tifffile.imwrite(tmp_path / f"{name}.tif", volume)
    named = {"image": str(tmp_path / "grey.tif"), "to": str(tmp_path / "second.tif")}
    named["probabilities"] = named["image"]
    table = measured(tmp_path, labels, **named).set_index("id")
    assert list(table.index) == list(range(1, labels.max() + 1))
    places = {k: np.argwhere(labels == k) * VOXEL for k in table.index}
    page = (tmp_path / "table.html").read_text()
    wrong = page.partition("Most likely wrong")[2].partition("</h2>")[2].partition("<h2>")[0]
    listed = [int(k) for k in re.findall(r"<figcaption>Object (\d+)", wrong)]
    sizeable = table[table["voxels"] >= 100].sort_values("uncertainty", ascending=False)
    assert listed == list(sizeable.index[:20])
    for k, box in enumerate(find_objects(labels), 1):
        row = table.loc[k]
        assert row["voxels"] == len(places[k])
        assert row["volume_nm3"] == len(places[k]) * np.prod(VOXEL)
        assert [row[f"{a}_min"] for a in "zyx"] == [s.start for s in box]
        assert [row[f"{a}_max"] for a in "zyx"] == [s.stop - 1 for s in box]
        assert tuple(row[["z", "y", "x"]]) == pytest.approx(center_of_mass(labels == k))
        assert row["intensity_mean"] == pytest.approx(grey[labels == k].mean())
        assert row["uncertainty"] == pytest.approx(1 - grey[labels == k].mean() / 255)
        away = {o: cdist(places[k], places[o]).min() for o in table.index if o != k}
        assert row["nearest_nm"] == pytest.approx(min(away.values()))
        assert away[row["nearest_id"]] == pytest.approx(row["nearest_nm"])
        to = cdist(places[k], np.argwhere(second) * VOXEL).min()
        assert row["to_nm"] == pytest.approx(to if to <= 300 else np.nan, nan_ok=True)
        ends = [(s.start == 0) or (s.stop == n) for s, n in zip(box, labels.shape, strict=True)]
        assert row["at_border"] == any(ends)


def test_a_large_object_is_measured_in_cells_and_stays_what_it_is(tmp_path, monkeypatch):
    z, y, x = (np.indices((22, 90, 110)).T - (10, 44, 54)).T * np.reshape(VOXEL, (3, 1, 1, 1))
    ball = (z**2 + y**2 + x**2 < 180**2).astype(np.uint8)
    labels = np.where((ball > 0) & (y > 60), 2, ball)  # two parts that touch
    second = (x > 195).astype(np.uint8)
    tifffile.imwrite(tmp_path / "second.tif", second)
    tifffile.imwrite(tmp_path / "grey.tif", (y / 5 + 100).astype(np.uint8))
    named = {"to": str(tmp_path / "second.tif"), "image": str(tmp_path / "grey.tif")}
    fine = measured(tmp_path, labels, **named)
    monkeypatch.setattr("emadapt.segment.objects.MOST", 20_000)
    coarse = measured(tmp_path, labels, **named)
    exact = ["id", "voxels", "volume_nm3", "z_min", "x_max", "nearest_id", "at_border", "z"]
    assert coarse[exact].equals(fine[exact])
    assert not coarse["surface_nm2"].equals(fine["surface_nm2"])
    for name, most in (("surface_nm2", 0.08), ("width_nm", 0.08), ("intensity_mean", 0.02)):
        assert coarse[name].tolist() == pytest.approx(fine[name].tolist(), rel=most), name
    assert coarse["touching_nm2"].tolist() == pytest.approx(fine["touching_nm2"].tolist(), rel=0.15)
    assert coarse["to_nm"].tolist() == pytest.approx(fine["to_nm"].tolist(), abs=12)


def test_what_is_written(tmp_path, labels):
    alone = measured(tmp_path, labels, min_voxels=20)
    assert alone["voxels"].min() >= 20
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "table.csv"), alone, rtol=1e-5, check_dtype=False
    )
    summary = json.loads((tmp_path / "table.json").read_text())
    assert summary["objects"] == len(alone)
    share = alone["voxels"].sum() / labels.size
    assert summary["share"]["value"] == pytest.approx(share)
    assert "objects in" in (tmp_path / "table.html").read_text()
    together = measured(tmp_path, labels, ".parquet", min_voxels=20, jobs=2)
    pd.testing.assert_frame_equal(together, alone)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), alone)


def test_objects_that_imagej_saved_as_floats(tmp_path, labels):
    expected = measured(tmp_path, labels)
    pd.testing.assert_frame_equal(measured(tmp_path, labels.astype(np.float32)), expected)


def test_the_components_of_a_mask_are_numbered(tmp_path, labels, monkeypatch):
    expected = measured(tmp_path, labels, min_voxels=20).drop(columns=["id", "nearest_id"])
    monkeypatch.setattr(run, "BLOCK", 2000)  # blocks of a part of a slice
    table = measured(tmp_path, (labels > 0) * np.uint8(255), min_voxels=20)
    numbers = table[["id", "voxels"]].to_numpy()
    pd.testing.assert_frame_equal(table.drop(columns=["id", "nearest_id"]), expected)
    counts = np.bincount(tifffile.imread(tmp_path / "table-instances.tif").ravel())
    assert numbers.tolist() == [[k, n] for k, n in enumerate(counts) if k]


def test_no_background_is_said(tmp_path, capsys):
    """As of ilastik's simple segmentation, which counts from 1."""
    filled = np.ones((5, 20, 20), np.uint8)
    filled[1:3, 4:9, 4:9] = 2
    measured(tmp_path, filled)
    assert "no voxel is 0" in capsys.readouterr().err


def test_intervals_of_the_density_cover_the_truth_as_often_as_they_say():
    rng, shape, voxel = np.random.default_rng(2), (40, 500, 500), (50.0, 8.0, 8.0)
    covered = []
    for _ in range(300):
        places = rng.random((rng.poisson(128), 3)) * shape
        table = pd.DataFrame(places, columns=[*"zyx"]).assign(volume_nm3=1e6, at_border=False)
        summary = of_volume(table, shape, voxel)
        low, high = summary["per_um3"]["ci95"]
        covered.append(low <= 128 / summary["volume_um3"] <= high)
    assert summary["blocks"] == 2 * 4 * 4
    assert np.mean(covered) == pytest.approx(0.95, abs=0.035)
    assert of_volume(table, shape, (50.0, 3.0, 3.0))["per_um3"]["ci95"] is None  # too small


def test_volumes_that_cannot_be_measured(tmp_path, labels):
    tifffile.imwrite(tmp_path / "small.tif", np.zeros((3, 4, 5), np.uint8))
    tifffile.imwrite(tmp_path / "share.tif", labels / np.float32(labels.max()))
    for volume, more, said in (
        (np.zeros_like(labels), {}, "none of 1 voxels"),
        ((labels > 0).astype(np.uint8), {"min_voxels": 9999}, "no connected component of 9999"),
        (labels / np.float32(2), {}, "values with fractions"),
        (-labels.clip(0, 3).astype(np.int16), {}, "the number -3"),
        (labels, {"image": str(tmp_path / "small.tif")}, "shape"),
        (labels, {"probabilities": str(tmp_path / "share.tif")}, "float32; expected 8 bits"),
    ):
        with pytest.raises(InputError, match=said):
            measured(tmp_path, volume, **more)
