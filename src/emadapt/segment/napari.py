"""A plugin for napari: segment an open volume, one slice of it, or the part in view.

napari finds it by napari.yaml in this folder. magicgui makes the widget of the annotations, so they
are evaluated here; those of napari's own types are strings, as only the widget needs napari.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.segment.shipped import SHIPPED, STARTER
from emadapt.volumes.voxel import UNITS_NM, Voxel, as_voxel

if TYPE_CHECKING:
    import napari.layers
    import napari.viewer

PARTS = ("visible part", "slice", "volume")
"""What can be segmented: the part of the shown slice in view, that slice, all slices."""
ASKED: dict[str, Any] = {
    "image": {"label": "volume"},
    "model": {"mode": "d", "tooltip": "a folder that `train`, `tune` or `adapt` wrote"},
    "part": {"choices": PARTS},
    "voxel_nm": {
        "label": "voxel zyx, nm",
        "tooltip": "0 0 0: as the layer says",
        "options": {"max": 1e6, "step": 0.1},
    },
}
"""How magicgui asks for the arguments of `segment_layer`; napari fills in viewer and layers."""

Box = tuple[slice, ...]
Mask = npt.NDArray[np.uint8]


def segment_widget() -> Any:
    """The widget in napari's dock."""
    from magicgui import magicgui

    widget = magicgui(segment_layer, call_button="Segment", **ASKED)
    widget.max_width = 420  # pixels; the rest of the window is for the volume
    return widget


def segment_layer(
    viewer: "napari.viewer.Viewer",
    image: "napari.layers.Image",
    model: Path = SHIPPED / STARTER,
    part: str = PARTS[0],
    voxel_nm: Voxel = (0.0, 0.0, 0.0),
) -> None:
    """Segment an image layer, (Z, Y, X) or (Y, X), into a new labels layer in the background.

    Progress is a bar in the window; errors are notifications. A voxel size (z, y, x) of zeros is
    taken from the layer's scale and units.
    """
    from napari.qt.threading import create_worker
    from napari.utils.notifications import show_error

    try:
        array, box, voxel = array_of(image), box_of(viewer, image, part), voxel_of(image, voxel_nm)
    except InputError as error:
        show_error(str(error))
        return

    def add(found: tuple[Mask, tuple[str, ...]]) -> None:
        mask, classes = found
        features = {"index": range(len(classes) + 1), "class": ["background", *classes]}
        own = {"name": f"{image.name} {model.name}", "features": features}
        viewer.add_labels(mask, **own, **place_of(image, box))

    create_worker(
        segmented,
        array,
        box,
        str(model),
        voxel,
        _ignore_errors=True,
        _progress={"total": box[0].stop - box[0].start if len(box) == 3 else 1, "desc": part},
        _connect={"returned": add, "errored": lambda error: show_error(str(error))},
    )


def segmented(
    array: Any, box: Box, model: str, voxel_nm: Voxel
) -> Generator[Mask, None, tuple[Mask, tuple[str, ...]]]:
    """Segment a box of an array; yields the class ids so far after each slice.

    Returns the ids, and the names of the classes, which napari shows under the pointer. A single
    slice is seen with its neighbours, and with the grey window of the whole array.
    """
    _load_triton()
    from emadapt.segment.model import open_model
    from emadapt.segment.runner import array_runner

    opened = open_model(model)
    runner = array_runner(array, opened, voxel_nm)
    mask = np.zeros([s.stop - s.start for s in box], np.uint8)
    layers = mask.reshape((-1, *mask.shape[-2:]))
    if mask.shape == tuple(array.shape):
        found = runner.slices()
    else:
        z = box[0].start if len(box) == 3 else 0
        found = iter([(0, runner.part(z, *box[-2:]))])
    for k, probability in found:
        layers[k] = runner.ids(probability)
        yield mask
    return mask, opened.segmenter.classes


def _load_triton() -> None:
    """Load triton before torch does: its LLVM crashes on the one that napari's OpenGL loaded."""
    if sys.platform != "linux" or "triton" in sys.modules:
        return
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_DEEPBIND)  # its own symbols first
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("triton._C.libtriton")
    finally:
        sys.setdlopenflags(flags)


def place_of(image: Any, box: Box) -> dict[str, Any]:
    """Where a labels layer of the box belongs."""
    corner = image.data_to_world([s.start for s in box])
    return {"scale": image.scale, "units": image.units, "translate": corner}


def array_of(image: Any) -> Any:
    """The layer's array, of several scales the finest; it must be a stack of grey slices."""
    array = image.data[0] if image.multiscale else image.data
    if image.rgb or len(array.shape) not in (2, 3):
        found = "colours" if image.rgb else f"shape {tuple(array.shape)}"
        expected = "grey values, (Z, Y, X) or (Y, X)"
        raise _refused(image, found, expected, "Split the stack into its channels.")
    return array


def box_of(viewer: Any, image: Any, part: str) -> Box:
    """Which part of the layer's finest array is to be segmented; an InputError if none is seen."""
    array, dims = array_of(image), viewer.dims
    box = [slice(0, size) for size in array.shape]
    if part == "volume":
        return tuple(box)
    if dims.ndisplay != 2 or tuple(dims.displayed[-2:]) != (dims.ndim - 2, dims.ndim - 1):
        do = "Show them so, or segment the volume."
        raise _refused(image, "no Y X plane in view", "slices across z, in 2D", do)
    if image.ndim == 3:
        z = round(float(image.world_to_data(dims.point[-3:])[0]))
        if not 0 <= z < array.shape[0]:
            raise _refused(image, "a view outside it", "a slice of it", "Move the slider.")
        box[0] = slice(z, z + 1)
    if part == "visible part":
        finer = image.downsample_factors[image.data_level] if image.multiscale else 1
        low, high = (np.asarray(corner) * finer for corner in image.corner_pixels)
        for axis in (image.ndim - 2, image.ndim - 1):
            start, stop = max(int(low[axis]), 0), int(np.ceil(high[axis])) + 1
            box[axis] = slice(start, min(stop, array.shape[axis]))
            if start >= box[axis].stop:
                raise _refused(image, "nothing of it in view", "some", "Move or zoom out.")
    return tuple(box)


def voxel_of(image: Any, stated: Voxel) -> Voxel:
    """Voxel size (z, y, x) in nm as stated, else from the layer's scale and units."""
    if any(stated):
        return as_voxel(stated)
    units = [UNITS_NM.get(str(unit), 0.0) for unit in image.units]
    if not all(units):
        names = ", ".join(sorted({str(unit) for unit in image.units}))
        do = "State the voxel size (z y x) in nm."
        raise _refused(image, f"voxels in {names}", "a scale in nm or µm", do)
    sizes = [abs(float(s)) * unit for s, unit in zip(image.scale, units, strict=True)]
    return as_voxel(sizes if len(sizes) == 3 else [sizes[0], *sizes])  # z of a slice does not count


def _refused(image: Any, found: str, expected: str, do: str) -> InputError:
    return InputError(f"layer {image.name}", found=found, expected=expected, do=do)
