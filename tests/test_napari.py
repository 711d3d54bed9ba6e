"""The napari plugin without napari: its manifest, and what it does with stand-ins of a layer."""

import importlib.util
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import npe2
import numpy as np
import pytest

from emadapt import api
from emadapt.errors import InputError
from emadapt.segment import napari as plugin
from emadapt.segment.model import find_model
from emadapt.study.datasets import ONE_CLASS
from tiny import blobs, write_3d_model, write_model

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ROOT / "src/emadapt/segment/napari.yaml"
IMAGE, _ = blobs((4, 90, 100), 1)
VOXEL = (30.0, 5.0, 5.0)


class Recorder:
    """An array that notes which slices and rows were asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.asked = array, list[tuple[Any, ...]]()
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        self.asked.append(index)
        return self.array[index]


def layer(array: Any, **change: Any) -> SimpleNamespace:
    """The part of napari.layers.Image that the plugin uses, with a scale in um."""
    n = len(array.shape)
    scale = np.array((0.03, 0.005, 0.005)[-n:])
    facts = {
        "name": "em",
        "data": array,
        "rgb": False,
        "multiscale": False,
        "ndim": n,
        "units": ("micrometer",) * n,
        "scale": scale,
        "data_level": 0,
        "corner_pixels": np.array([[0] * n, [s - 1 for s in array.shape]]),
        "world_to_data": lambda point: np.asarray(point) / scale,
        "data_to_world": lambda point: np.asarray(point) * scale,
    }
    return SimpleNamespace(**facts | change)


def viewer(z: int = 0, **change: Any) -> SimpleNamespace:
    """A viewer at slice z of the layer, in 2D."""
    facts = {"ndisplay": 2, "ndim": 3, "displayed": (1, 2), "point": (z * 0.03, 0.1, 0.1)}
    return SimpleNamespace(dims=SimpleNamespace(**facts | change))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("napari") / "model"))


def test_the_manifest_is_valid_and_its_commands_can_be_imported() -> None:
    manifest = npe2.PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["entry-points"]["napari.manifest"] == {
        manifest.name: f"emadapt.segment:{MANIFEST.name}"
    }
    assert MANIFEST.name in settings["tool"]["setuptools"]["package-data"]["emadapt.segment"]


@pytest.mark.parametrize(
    ("part", "z", "rows", "columns"),
    [("slice", 2, (0, 90), (0, 100)), ("visible part", 1, (0, 60), (20, 80))],
)
def test_the_shown_part_is_segmented(
    model: str, part: str, z: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    array = Recorder(IMAGE)  # as a lazy array is read
    image = layer(array, corner_pixels=np.array([[0, -3, 20], [3, 59, 79]]))
    box = plugin.box_of(viewer(z), image, part)
    *_, mask = plugin.segmented(array, box, model, plugin.voxel_of(image, (0.0, 0.0, 0.0)))
    assert array.asked[-1] == (slice(z, z + 1), slice(*rows))
    cut = IMAGE[z, slice(*rows), slice(*columns)]
    np.testing.assert_array_equal(mask[0], api.segment(cut, api.load_model(model), VOXEL))
    assert 0 < mask.mean() < 1
    place = plugin.place_of(image, box)["translate"]
    np.testing.assert_allclose(place, [z * 0.03, rows[0] * 0.005, columns[0] * 0.005])


def test_it_begins_with_a_model_that_is_there() -> None:
    folder = inspect.signature(plugin.segment_layer).parameters["model"].default
    assert find_model(str(folder)) == folder


def test_a_volume_is_segmented_slice_by_slice(model: str) -> None:
    box = plugin.box_of(viewer(), layer(IMAGE), "volume")
    work = plugin.segmented(IMAGE, box, model, VOXEL)
    assert not next(work)[1:].any()
    ended: list[Any] = []

    def to_the_end() -> Generator[Any]:
        ended.append((yield from work))

    *_, last = to_the_end()
    [(mask, classes)] = ended
    assert mask is last
    assert classes == ONE_CLASS
    np.testing.assert_array_equal(mask, api.segment(IMAGE, api.load_model(model), VOXEL))


@pytest.mark.parametrize("kind", ["neighbours", "smoothed", "blocks"])
def test_a_slice_is_segmented_as_in_the_volume(tmp_path: Path, kind: str) -> None:
    """Models that look at neighbouring slices get them, and 16 bits the volume's percentiles."""
    folder = tmp_path / "m"
    if kind == "blocks":
        write_3d_model(folder)
    else:
        change: dict[str, Any] = {"context": 1} if kind == "neighbours" else {"smooth_z_nm": 30.0}
        write_model(folder, **change)
    slopes = np.arange(1, 13, dtype=np.uint16)[:, None, None] * 20
    volume = np.tile(IMAGE, (3, 1, 1)) * slopes
    loaded = api.load_model(folder)
    expected = api.segment(volume, loaded, VOXEL, probabilities=True)
    clear = np.abs(expected - 0.5) > 1e-3
    for z in (0, 5, 11):
        box = plugin.box_of(viewer(z), layer(volume), "slice")
        *_, mask = plugin.segmented(volume, box, str(folder), VOXEL)
        np.testing.assert_array_equal(mask[0][clear[z]], (expected[z] > 0.5)[clear[z]])


def test_several_scales_and_single_slices(model: str) -> None:
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
    flat = layer(IMAGE[0])
    box, voxel = plugin.box_of(viewer(), flat, "slice"), plugin.voxel_of(flat, (0.0, 0.0, 0.0))
    *_, mask = plugin.segmented(IMAGE[0], box, model, voxel)
    np.testing.assert_array_equal(mask, api.segment(IMAGE[0], api.load_model(model), VOXEL))
    assert plugin.voxel_of(layer(IMAGE), (50.0, 4.0, 4.0)) == (50.0, 4.0, 4.0)


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
def test_what_cannot_be_segmented_is_said(
    image: SimpleNamespace, view: dict[str, Any], said: str
) -> None:
    def ask() -> None:
        plugin.box_of(viewer(**view), image, "visible part")
        plugin.voxel_of(image, (0.0, 0.0, 0.0))

    with pytest.raises(InputError, match=said):
        ask()


@pytest.mark.skipif(
    sys.platform != "linux" or not importlib.util.find_spec("triton"),
    reason="torch came without triton",
)
def test_triton_is_loaded_before_torch_and_apart() -> None:
    code = """
import sys
from emadapt.segment import napari
flags = sys.getdlopenflags()
napari._load_triton()
assert "triton._C.libtriton" in sys.modules and "torch" not in sys.modules
assert sys.getdlopenflags() == flags
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
