"""A plugin for napari: segment a volume that is open there, or the part of it in view. `emadapt.api` does the work.

napari finds it by napari.yaml beside this file. Annotations are evaluated here, since magicgui makes the widget of them; those of
napari's own types are strings, since nothing but the widget needs napari.
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
from emadapt.volumes.voxel import UNITS_NM, Voxel, as_voxel

if TYPE_CHECKING:
    import napari.layers
    import napari.viewer

PARTS = ("visible part", "slice", "volume")
"""What can be segmented: what of the shown slice is in view, all of that slice, all slices."""

Box = tuple[slice, ...]
Mask = npt.NDArray[np.uint8]


ASKED: dict[str, Any] = {
    "image": {"label": "volume"},
    "model": {
        "mode": "d",
        "tooltip": "as `emadapt segment --model` takes it: a folder that `train` wrote, the name of a unit",
    },
    "part": {"choices": PARTS},
    "voxel_nm": {
        "label": "voxel zyx, nm",
        "tooltip": "0 0 0: as the layer says",
        "options": {"max": 1e6, "step": 0.1},
    },
}
"""How magicgui asks for the arguments of `segment_in_thread`; napari fills in the viewer and the choice of layers."""


def segment_widget() -> Any:
    """The widget in napari's dock."""
    from magicgui import magicgui

    widget = magicgui(segment_in_thread, call_button="Segment", **ASKED)
    widget.max_width = 420  # pixels; the rest of the window is for the volume
    return widget


def segment_layer(
    viewer: Any, image: Any, model: str, part: str, voxel_nm: Voxel = (0.0, 0.0, 0.0)
) -> None:
    """Segment an image layer, or a part of it, into a new labels layer; at once, for scripts.

    Args:
        viewer: napari's; of it the shown slice, whether it is shown in 2D, and `add_labels`.
        image: the layer, (Z, Y, X) or (Y, X), grey.
        model: as for `emadapt.api.load_model`.
        part: of `PARTS`.
        voxel_nm: (z, y, x); zeros: the layer's scale and units.

    Raises:
        InputError: anything wrong with the layer or the model.
    """
    box, voxel = box_of(viewer, image, part), voxel_of(image, voxel_nm)
    *_, mask = segmented(array_of(image), box, model, voxel)
    add_mask(viewer, image, box, model, mask)


def segment_in_thread(
    viewer: "napari.viewer.Viewer",
    image: "napari.layers.Image",
    model: Path = Path("build/units"),
    part: str = PARTS[0],
    voxel_nm: Voxel = (0.0, 0.0, 0.0),
) -> None:
    """The same while the window goes on; progress is a bar, errors are notifications."""
    from napari.qt.threading import create_worker
    from napari.utils.notifications import show_error

    try:
        array, box, voxel = array_of(image), box_of(viewer, image, part), voxel_of(image, voxel_nm)
    except InputError as error:
        show_error(str(error))
        return
    slices = box[0].stop - box[0].start if len(box) == 3 else 1
    create_worker(
        segmented,
        array,
        box,
        str(model),
        voxel,
        _ignore_errors=True,
        _progress={"total": slices, "desc": part},
        _connect={
            "returned": lambda mask: add_mask(viewer, image, box, str(model), mask),
            "errored": lambda error: show_error(str(error)),
        },
    )


def segmented(array: Any, box: Box, model: str, voxel_nm: Voxel) -> Generator[Mask, None, Mask]:
    """Segment a box of an array: yields the mask so far after each slice, and returns it; 0 and 1 in the shape of the box."""
    _load_triton()
    from emadapt import api

    shape = tuple(s.stop - s.start for s in box)
    whole = shape == tuple(array.shape)  # a volume may be larger than memory: read slice by slice
    mask = np.zeros(shape, np.uint8)
    for z, found in api.segment_slices(
        array if whole else np.asarray(array[box]), api.load_model(model), voxel_nm
    ):
        mask.reshape((1, *shape)[-3:])[z] = found
        yield mask
    return mask


def _load_triton() -> None:
    """Load triton before torch does: its LLVM crashes on the one of Mesa's OpenGL, which napari's window has loaded."""
    if sys.platform != "linux" or "triton" in sys.modules:
        return
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_DEEPBIND)  # its own symbols first
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("triton._C.libtriton")
    finally:
        sys.setdlopenflags(flags)


def add_mask(viewer: Any, image: Any, box: Box, model: str, mask: Mask) -> None:
    """A labels layer at the place of the box."""
    viewer.add_labels(
        mask,
        name=f"{image.name} {Path(model).name}",
        scale=image.scale,
        units=image.units,
        translate=image.data_to_world([s.start for s in box]),
    )


def array_of(image: Any) -> Any:
    """The layer's array, of several scales the finest.

    Raises:
        InputError: it is no stack of grey slices.
    """
    array = image.data[0] if image.multiscale else image.data
    if image.rgb or len(array.shape) not in (2, 3):
        raise InputError(
            f"layer {image.name}",
            found=f"{'colours' if image.rgb else f'shape {tuple(array.shape)}'}",
            expected="grey values, (Z, Y, X) or (Y, X)",
            do="Split the stack into its channels.",
        )
    return array


def box_of(viewer: Any, image: Any, part: str) -> Box:
    """Which part of the layer's finest array is to be segmented.

    Raises:
        InputError: there is no slice in view: the layer is shown in 3D or from another side.
    """
    array, n = array_of(image), image.ndim
    box = [slice(0, size) for size in array.shape]
    if part == "volume":
        return tuple(box)
    if viewer.dims.ndisplay != 2 or tuple(viewer.dims.displayed[-2:]) != (
        viewer.dims.ndim - 2,
        viewer.dims.ndim - 1,
    ):
        raise InputError(
            f"layer {image.name}",
            found="no Y X plane in view",
            expected="slices across z, in 2D",
            do="Show them so, or segment the volume.",
        )
    if n == 3:
        z = round(float(image.world_to_data(viewer.dims.point[-n:])[0]))
        if not 0 <= z < array.shape[0]:
            raise InputError(
                f"layer {image.name}",
                found="a view outside it",
                expected="a slice of it",
                do="Move the slider.",
            )
        box[0] = slice(z, z + 1)
    if part == "visible part":
        finer = image.downsample_factors[image.data_level] if image.multiscale else np.ones(n)
        low, high = (np.asarray(corner) * finer for corner in image.corner_pixels)
        for axis in (n - 2, n - 1):
            start, stop = int(low[axis]), min(int(np.ceil(high[axis])) + 1, array.shape[axis])
            if max(start, 0) >= stop:
                raise InputError(
                    f"layer {image.name}",
                    found="nothing of it in view",
                    expected="some",
                    do="Move or zoom out.",
                )
            box[axis] = slice(max(start, 0), stop)
    return tuple(box)


def voxel_of(image: Any, stated: Voxel) -> Voxel:
    """Voxel size (z, y, x) in nm as stated, else from the layer's scale and units. Of a single slice z stands for nothing.

    Raises:
        InputError: neither says it.
    """
    if any(stated):
        return as_voxel(stated)
    units = [UNITS_NM.get(str(unit), 0.0) for unit in image.units]
    if not all(units):
        raise InputError(
            f"layer {image.name}",
            found=f"voxels in {', '.join(sorted({str(u) for u in image.units}))}",
            expected="a scale in nm or µm",
            do="State the voxel size (z y x) in nm.",
        )
    sizes = [abs(float(s)) * unit for s, unit in zip(image.scale, units, strict=True)]
    return as_voxel(sizes if len(sizes) == 3 else [sizes[0], *sizes])
