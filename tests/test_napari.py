"""The napari plugin without napari: its manifest, and what it does with stand-ins of a layer."""

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import npe2
import numpy as np
import pytest

from emadapt import api
from emadapt.errors import InputError
from emadapt.segment import napari as plugin
from emadapt.study.datasets import ONE_CLASS
from tiny import blobs, write_3d_model, write_model

ROOT = Path(__file__).resolve().parents[1]
IMAGE, _ = blobs((4, 90, 100), 1)
VOXEL = (30.0, 5.0, 5.0)


def layer(array: Any, **change: Any) -> SimpleNamespace:
    """The part of napari.layers.Image that the plugin uses, with a scale in um."""
    n = len(array.shape)
    scale = np.array((0.03, 0.005, 0.005)[-n:])
    corners = np.array([[0] * n, [s - 1 for s in array.shape]])
    facts = {"name": "em", "data": array, "rgb": False, "multiscale": False, "ndim": n}
    facts |= {"units": ("micrometer",) * n, "scale": scale}
    facts |= {"data_level": 0, "corner_pixels": corners}
    facts["world_to_data"] = lambda point: np.asarray(point) / scale
    facts["data_to_world"] = lambda point: np.asarray(point) * scale
    return SimpleNamespace(**facts | change)


def viewer(z: int = 0, **change: Any) -> SimpleNamespace:
    """A viewer at slice z of the layer, in 2D."""
    facts = {"ndisplay": 2, "ndim": 3, "displayed": (1, 2), "point": (z * 0.03, 0.1, 0.1)}
    return SimpleNamespace(dims=SimpleNamespace(**facts | change))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("napari") / "model"))


def test_the_manifest_is_valid_and_its_commands_can_be_imported():
    manifest = npe2.PluginManifest.from_file(ROOT / "src/emadapt/segment/napari.yaml")
    manifest.validate_imports()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    entries = settings["project"]["entry-points"]["napari.manifest"]
    assert entries == {manifest.name: "emadapt.segment:napari.yaml"}
    assert "napari.yaml" in settings["tool"]["setuptools"]["package-data"]["emadapt.segment"]


@pytest.mark.parametrize(
    ("part", "z", "rows", "columns"),
    [("slice", 2, (0, 90), (0, 100)), ("visible part", 1, (0, 60), (20, 80))],
)
def test_the_shown_part_is_segmented(model, part, z, rows, columns):
    image = layer(IMAGE, corner_pixels=np.array([[0, -3, 20], [3, 59, 79]]))
    box = plugin.box_of(viewer(z), image, part)
    *_, mask = plugin.segmented(IMAGE, box, model, plugin.voxel_of(image, (0.0, 0.0, 0.0)))
    cut = IMAGE[z, slice(*rows), slice(*columns)]
    np.testing.assert_array_equal(mask[0], api.segment(cut, api.load_model(model), VOXEL))
    assert 0 < mask.mean() < 1
    place = plugin.place_of(image, box)["translate"]
    np.testing.assert_allclose(place, [z * 0.03, rows[0] * 0.005, columns[0] * 0.005])


def test_a_volume_is_segmented_slice_by_slice(model):
    work = plugin.segmented(IMAGE, plugin.box_of(viewer(), layer(IMAGE), "volume"), model, VOXEL)
    assert not next(work)[1:].any()
    try:
        while True:
            next(work)
    except StopIteration as end:
        mask, classes = end.value
    assert classes == ONE_CLASS
    np.testing.assert_array_equal(mask, api.segment(IMAGE, api.load_model(model), VOXEL))


@pytest.mark.parametrize("change", [{"context": 1}, {"smooth_z_nm": 30.0}, None], ids=str)
def test_a_slice_is_segmented_as_in_the_volume(tmp_path, change):
    """Models that look at neighbouring slices get them, and 16 bits the volume's percentiles."""
    folder = write_3d_model(tmp_path) if change is None else write_model(tmp_path, **change)
    slopes = np.arange(1, 13, dtype=np.uint16)[:, None, None] * 20
    volume = np.tile(IMAGE, (3, 1, 1)) * slopes
    expected = api.segment(volume, api.load_model(folder), VOXEL, probabilities=True)
    clear = np.abs(expected - 0.5) > 1e-3
    for z in (0, 5, 11):
        box = plugin.box_of(viewer(z), layer(volume), "slice")
        *_, mask = plugin.segmented(volume, box, str(folder), VOXEL)
        np.testing.assert_array_equal(mask[0][clear[z]], (expected[z] > 0.5)[clear[z]])


def test_several_scales_and_single_slices(model):
    image = layer(
        IMAGE,
        data=[IMAGE, IMAGE[:, ::2, ::2]],
        multiscale=True,
        data_level=1,
        downsample_factors=np.array([[1, 1, 1], [1, 2, 2]]),
        corner_pixels=np.array([[0, 5, 10], [3, 29, 39]]),
    )
    seen = plugin.box_of(viewer(1), image, "visible part")
    assert seen == (slice(1, 2), slice(10, 59), slice(20, 79))
    oblong = layer(IMAGE[0], scale=np.array((0.004, 0.005)))
    assert plugin.voxel_of(oblong, (0.0, 0.0, 0.0))[1:] == (4.0, 5.0)
    flat = layer(IMAGE[0])
    box, voxel = plugin.box_of(viewer(), flat, "slice"), plugin.voxel_of(flat, (0.0, 0.0, 0.0))
    *_, mask = plugin.segmented(IMAGE[0], box, model, voxel)
    np.testing.assert_array_equal(mask, api.segment(IMAGE[0], api.load_model(model), VOXEL))


@pytest.mark.parametrize(
    ("image", "view", "said"),
    [
        (layer(IMAGE, units=("pixel",) * 3), {}, "State the voxel size"),
        (layer(IMAGE, rgb=True), {}, "colours"),
        (layer(IMAGE[None]), {}, "channels"),
        (layer(IMAGE), {"ndisplay": 3, "displayed": (0, 1, 2)}, "in 2D"),
        (layer(IMAGE), {"displayed": (0, 2)}, "across z"),
        (layer(IMAGE), {"point": (9.0, 0, 0)}, "Move the slider"),
        (layer(IMAGE, corner_pixels=np.array([[0, 90, 0], [3, 89, 99]])), {}, "nothing of it"),
    ],
)
def test_what_cannot_be_segmented_is_said(image, view, said):
    def ask():
        plugin.box_of(viewer(**view), image, "visible part")
        plugin.voxel_of(image, (0.0, 0.0, 0.0))

    with pytest.raises(InputError, match=said):
        ask()
