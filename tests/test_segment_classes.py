"""`emadapt segment` and `export` with a model of several classes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from ome_types import validate_xml
from scipy.ndimage import label

from emadapt import api
from emadapt.data.foreground import most_probable
from emadapt.errors import InputError
from emadapt.segment import job
from emadapt.segment.job import Order
from emadapt.segment.run import segment_volume
from tiny import blobs, predicted, write_model

CLASSES = ("disc", "bar", "dot")
IMAGE, _ = blobs((5, 90, 60), 2)


@pytest.fixture
def order(tmp_path):
    tifffile.imwrite(tmp_path / "in.tif", IMAGE, photometric="minisblack")
    model = write_model(tmp_path / "m", classes=CLASSES)
    output = str(tmp_path / "out.tif")
    return Order(str(tmp_path / "in.tif"), output, str(model), voxel_nm=(30.0, 5.0, 5.0))


def ids_of(order: Order) -> np.ndarray:
    """As evaluation computes them; (Z, Y, X)."""
    return np.stack([most_probable(found) for found in predicted(Path(order.model), IMAGE)])


def test_a_mask_has_class_ids_and_says_their_names(order, monkeypatch, tmp_path):
    expected = ids_of(order)
    assert set(np.unique(expected)) == {0, 1, 2, 3}, "else the test says little"
    monkeypatch.setattr(job, "BLOCK", 2 * 90 * 60)
    segment_volume(dataclasses.replace(order, instances=True))
    with tifffile.TiffFile(order.output) as tif:
        mask, said = tif.asarray(), json.loads((tif.imagej_metadata or {})["Info"])
        shown = np.asarray(tif.pages.first.colormap)[:, :5].T >> 8  # what Fiji shows for 0 to 4
    assert np.mean(mask != expected) < 1e-3  # blocks may round another way
    assert [own["name"] for own in said["classes"]] == list(CLASSES)
    colours = ["#" + bytes(colour.tolist()).hex() for colour in shown]
    assert colours[1:4] == [own["colour"].lower() for own in said["classes"]]
    assert colours[0] == colours[4] == "#000000"
    table = pd.read_csv(tmp_path / "out-instances.csv")
    counts = [label(mask == number)[1] for number in (1, 2, 3)]
    assert [sum(table["class"] == number) for number in (1, 2, 3)] == counts
    segment_volume(dataclasses.replace(order, output=str(tmp_path / "out.zarr")))
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    np.testing.assert_array_equal(np.asarray(group["0"]), mask)
    shown = json.loads((tmp_path / "out.zarr/.zattrs").read_text())["image-label"]
    assert shown["properties"] == [{"label-value": n, "class": c} for n, c in enumerate(CLASSES, 1)]
    assert len({tuple(own["rgba"]) for own in shown["colors"]}) == 3


@pytest.mark.parametrize("suffix", ["tif", "ome.tif", "zarr"])
@pytest.mark.parametrize("sigma_nm", [0.0, 30.0])
def test_probabilities_have_a_channel_for_each_class(
    order, tmp_path, monkeypatch, suffix, sigma_nm
):
    monkeypatch.setattr(job, "BLOCK", 2 * 90 * 60)
    model = write_model(tmp_path / "m", classes=CLASSES, smooth_z_nm=sigma_nm)
    output = str(tmp_path / f"p.{suffix}")
    segment_volume(dataclasses.replace(order, output=output, probabilities=True))
    path = str(tmp_path / f"p-probabilities.{suffix}")
    read = [api.read_volume(f"{path}:/c={number}")[0] for number in range(3)]
    found = api.segment(IMAGE, api.load_model(model), (30.0, 5.0, 5.0), probabilities=True)
    np.testing.assert_allclose(np.stack(read, 1), 255 * found, atol=1)
    assert api.read_volume(f"{path}:/c=2")[1] == (30.0, 5.0, 5.0)
    if suffix == "zarr":
        shown = json.loads((Path(path) / ".zattrs").read_text())["omero"]["channels"]
        assert [own["label"] for own in shown] == list(CLASSES)
        return
    with tifffile.TiffFile(path) as tif:
        assert tif.series[0].axes == "ZCYX"
        if suffix == "tif":
            shown = tif.imagej_metadata or {}
            assert shown["mode"] == "composite"
            assert shown["Labels"][: len(CLASSES)] == list(CLASSES)
            assert len({tuple(lut[:, 255]) for lut in shown["LUTs"]}) == len(CLASSES)
            return
        assert tif.ome_metadata is not None
        validate_xml(tif.ome_metadata)
        pixels = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
    assert [own["Name"] for own in pixels["Channel"]] == list(CLASSES)


def test_a_threshold_is_refused(order: Order) -> None:
    with pytest.raises(InputError, match=r"a model of disc, bar, dot; expected .* one class"):
        segment_volume(dataclasses.replace(order, threshold=0.3))


def test_an_array_is_segmented_into_classes(order):
    model = api.load_model(order.model)
    mask = api.segment(IMAGE, model, (30.0, 5.0, 5.0))
    assert mask.dtype == np.uint8
    assert np.mean(mask != ids_of(order)) < 1e-3
    found = api.segment(IMAGE, model, (30.0, 5.0, 5.0), probabilities=True)
    assert found.shape == (5, 3, 90, 60)
    np.testing.assert_array_equal(np.stack([most_probable(one) for one in found]), mask)
