"""The napari plugin without napari: its manifest, and what its button does with a layer and a viewer that are stand-ins."""

import importlib.util
import inspect
import subprocess
import sys
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
from tiny import blobs, write_model

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ROOT / "src/emadapt/napari.yaml"
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


class Layer(SimpleNamespace):
    """The part of napari.layers.Image that the plugin uses: scale in µm, and nothing turned."""

    def __init__(self, array: Any, **change: Any) -> None:
        n = len(array.shape)
        super().__init__(
            **{
                "name": "em",
                "data": array,
                "rgb": False,
                "multiscale": False,
                "ndim": n,
                "units": ("micrometer",) * n,
                "scale": np.array((0.03, 0.005, 0.005)[-n:]),
                "translate": np.zeros(n),
                "data_level": 0,
                "corner_pixels": np.array([[0] * n, [s - 1 for s in array.shape]]),
            }
            | change
        )

    def world_to_data(self, point: Any) -> np.ndarray:
        return (np.asarray(point) - self.translate) / self.scale

    def data_to_world(self, point: Any) -> np.ndarray:
        return np.asarray(point) * self.scale + self.translate


class Viewer:
    """The part of a viewer: at slice z of the layer, in 2D."""

    def __init__(self, z: int = 0, n: int = 3, **change: Any) -> None:
        facts: dict[str, Any] = {
            "ndisplay": 2,
            "ndim": n,
            "displayed": (n - 2, n - 1),
            "point": (z * 0.03, 0.1, 0.1)[-n:],
        }
        self.dims, self.added = (
            SimpleNamespace(**facts | change),
            list[tuple[np.ndarray, dict[str, Any]]](),
        )

    def add_labels(self, mask: np.ndarray, **about: Any) -> None:
        self.added.append((mask, about))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("napari") / "model"))


def test_the_manifest_is_valid_and_its_commands_can_be_imported() -> None:
    manifest = npe2.PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["entry-points"]["napari.manifest"] == {
        manifest.name: f"emadapt:{MANIFEST.name}"
    }
    assert MANIFEST.name in settings["tool"]["setuptools"]["package-data"]["emadapt"]
    commands = {command.id for command in manifest.contributions.commands or []}
    assert {widget.command for widget in manifest.contributions.widgets or []} == commands


def test_the_widget_knows_how_to_ask_for_everything() -> None:
    """Without Qt no widget can be made; that magicgui finds a kind for each argument can be seen all the same."""
    from magicgui.type_map import get_widget_class

    asked = inspect.signature(plugin.segment_in_thread).parameters
    assert plugin.ASKED.keys() <= asked.keys()
    assert [asked[name].annotation for name in ("viewer", "image")] == [
        "napari.viewer.Viewer",
        "napari.layers.Image",
    ]
    kinds = {
        name: get_widget_class(
            value=p.default, annotation=p.annotation, options=dict(plugin.ASKED[name])
        )[0].__name__
        for name, p in asked.items()
        if name not in ("viewer", "image")
    }
    assert kinds == {"model": "FileEdit", "part": "ComboBox", "voxel_nm": "TupleEdit"}


def test_the_shown_slice_is_segmented_and_nothing_else_is_read(model: str) -> None:
    layer, viewer = Layer(Recorder(IMAGE), translate=np.array([0.3, 0.0, 1.0])), Viewer()
    viewer.dims.point = (0.3 + 2 * 0.03, 0, 0)
    plugin.segment_layer(viewer, layer, model, "slice")
    ((mask, about),) = viewer.added
    np.testing.assert_array_equal(mask[0], api.segment(IMAGE[2], api.load_model(model), VOXEL))
    assert mask.shape == (1, 90, 100)
    assert 0 < mask.mean() < 1
    assert layer.data.asked == [(slice(2, 3), slice(0, 90), slice(0, 100))]
    np.testing.assert_allclose(about["translate"], [0.36, 0, 1])
    np.testing.assert_array_equal(about["scale"], layer.scale)


def test_the_visible_part_is_a_cut_of_it(model: str) -> None:
    layer = Layer(Recorder(IMAGE), corner_pixels=np.array([[0, -3, 20], [3, 59, 79]]))
    viewer = Viewer(z=1)
    plugin.segment_layer(viewer, layer, model, "visible part")
    ((mask, about),) = viewer.added
    np.testing.assert_array_equal(
        mask[0], api.segment(IMAGE[1, :60, 20:80], api.load_model(model), VOXEL)
    )
    assert layer.data.asked == [(slice(1, 2), slice(0, 60), slice(20, 80))]
    np.testing.assert_allclose(about["translate"], [0.03, 0, 0.1])


def test_a_volume_is_read_slice_by_slice(model: str) -> None:
    array, opened = Recorder(IMAGE), api.load_model(model)
    work = plugin.segmented(array, tuple(slice(0, n) for n in IMAGE.shape), model, VOXEL)
    before = len(array.asked), next(work)[1:].sum()
    assert before[1] == 0
    *_, mask = work
    np.testing.assert_array_equal(mask, api.segment(IMAGE, opened, VOXEL))
    assert all(z.stop - z.start == 1 for z, *_ in array.asked)


def test_several_scales_and_single_slices(model: str) -> None:
    coarse = [IMAGE, IMAGE[:, ::2, ::2]]
    layer = Layer(
        IMAGE,
        data=coarse,
        multiscale=True,
        data_level=1,
        downsample_factors=np.array([[1, 1, 1], [1, 2, 2]]),
        corner_pixels=np.array([[0, 5, 10], [3, 29, 39]]),
    )
    assert plugin.box_of(Viewer(z=1), layer, "visible part") == (
        slice(1, 2),
        slice(10, 59),
        slice(20, 79),
    )
    viewer = Viewer(n=3)  # a flat layer in a viewer that has a slider for another one
    plugin.segment_layer(viewer, Layer(IMAGE[0]), model, "slice")
    np.testing.assert_array_equal(
        viewer.added[0][0], api.segment(IMAGE[0], api.load_model(model), VOXEL)
    )
    assert plugin.voxel_of(Layer(IMAGE), (50.0, 4.0, 4.0)) == (50.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("layer", "view", "said"),
    [
        (Layer(IMAGE, units=("pixel",) * 3), {}, "State the voxel size"),
        (Layer(IMAGE, rgb=True), {}, "colours"),
        (Layer(IMAGE[None]), {}, "channels"),
        (Layer(IMAGE), {"ndisplay": 3, "displayed": (0, 1, 2)}, "in 2D"),
        (Layer(IMAGE), {"displayed": (0, 2)}, "across z"),
        (Layer(IMAGE), {"point": (9.0, 0, 0)}, "Move the slider"),
        (
            Layer(IMAGE, corner_pixels=np.array([[0, 90, 0], [3, 89, 99]])),
            {},
            "nothing of it in view",
        ),
        (Layer(IMAGE.astype(np.float32) * np.nan), {}, "NaN"),
    ],
)
def test_what_cannot_be_segmented_is_said(
    model: str, layer: Layer, view: dict[str, Any], said: str
) -> None:
    viewer = Viewer(**view)
    with pytest.raises(InputError, match=said):
        plugin.segment_layer(viewer, layer, model, "visible part")
    assert not viewer.added


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
