"""What is to be done to a volume, settled before any of it is done."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emadapt
from emadapt.data.align import statistics_from
from emadapt.data.splits import evenly_spaced
from emadapt.data.tiles import Geometry
from emadapt.errors import InputError
from emadapt.models.predict import smoothing_reach
from emadapt.segment.model import (
    Model,
    aligner_for,
    cached_model,
    find_model,
    geometry_for,
    second_zoom_for,
    sha256_of,
    zoom_for,
)
from emadapt.segment.rows import View
from emadapt.segment.shipped import SHIPPED, STARTER
from emadapt.study.datasets import INTERIOR_BOUNDARY, ONE_CLASS
from emadapt.volumes.grey import SLICES, constant, grey_window, to_uint8
from emadapt.volumes.opening import open_image
from emadapt.volumes.source import LARGE, Array, Source, tell, voxel_of
from emadapt.volumes.voxel import Voxel, said
from emadapt.volumes.write_zarr import CHUNK

DEPTH = 16
"""Most slices of a block; twice as many as a model's windows have, if these are more."""
BLOCK = 2**24
"""Voxels of a block, unless `TILE_ROWS` tiles above each other have more. A slice of so many takes
about 400 MB while it is segmented."""
TILE_ROWS = 6
"""Fewest rows of tiles in a block: those at its borders are segmented for both neighbours."""
APART = 1.5
"""A model that sees neighbouring slices warns where these are so many times nearer or farther."""


@dataclass(frozen=True)
class Order:
    """What a user asks for; see `emadapt segment --help`."""

    input: str
    output: str
    model: str = STARTER
    scale: int = 0
    probabilities: bool = False
    instances: bool = False
    min_voxels: int = 1
    threshold: float | None = None
    voxel_nm: Voxel | None = None
    window: tuple[float, float] | None = None
    fast: bool = False
    overwrite: bool = False
    dask: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of outputs."""
        asked = {"probabilities": self.probabilities, "instances": self.instances}
        return ("mask", *(kind for kind, wanted in asked.items() if wanted))


@dataclass(frozen=True)
class Block:
    """Slices [z0, z1), rows [y0, y1), whole rows."""

    z0: int
    z1: int
    y0: int
    y1: int

    def __len__(self) -> int:
        """Slices."""
        return self.z1 - self.z0

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """As an index of the volume."""
        return slice(self.z0, self.z1), slice(self.y0, self.y1), slice(None)


@dataclass(frozen=True)
class Job:
    """All that the result depends on, as values that JSON can hold.

    Attributes:
        input: the volume, at `scale`; its `stamp` changes with its content.
        shape: (Z, Y, X).
        voxel_nm: (z, y, x).
        kinds: of outputs: mask, probabilities, instances.
        min_voxels: smaller components are no instances.
        depth: slices of a block, and `rows` of it.
        model: its folder; `unit` is its name, `weights` and `card` the sha256 of its files. None
            of these for a mask that is only to be numbered.
        window: grey values that become 0 and 255.
        zoom: factors (y, x) to the pixel size of `dataset`, on which the model was trained.
        second_zoom: those of a second look, averaged with the first; None: there is none.
        statistics: of the volume, where the model aligns grey values by them.
        sigma: standard deviation, in slices, of the Gaussian along z over probabilities; 0: none.
        threshold: foreground has a higher probability; of several classes the most probable counts.
        classes: names of what is segmented.
    """

    input: str
    stamp: list[Any]
    shape: tuple[int, int, int]
    voxel_nm: Voxel
    kinds: tuple[str, ...]
    min_voxels: int
    depth: int
    rows: int
    scale: int = 0
    model: str = ""
    unit: str = ""
    weights: str = ""
    card: str = ""
    window: tuple[float, float] = (0.0, 255.0)
    zoom: tuple[float, float] = (1.0, 1.0)
    second_zoom: tuple[float, float] | None = None
    dataset: str = ""
    statistics: dict[str, Any] | None = None
    sigma: float = 0.0
    threshold: float = 0.5
    classes: tuple[str, ...] = ONE_CLASS
    version: str = emadapt.__version__

    def blocks(self) -> list[Block]:
        """All of them, from the first slice on."""
        z, y, _ = self.shape
        return [
            Block(z0, min(z0 + self.depth, z), y0, min(y0 + self.rows, y))
            for z0 in range(0, z, self.depth)
            for y0 in range(0, y, self.rows)
        ]

    @property
    def cored(self) -> bool:
        """Whether the model tells the interior of objects from their boundary."""
        return self.classes == INTERIOR_BOUNDARY

    @property
    def channels(self) -> tuple[int, ...]:
        """First axes of probabilities: none of one class, else one of classes."""
        return (len(self.classes),) if len(self.classes) > 1 else ()

    @property
    def reach(self) -> int:
        """Slices on each side with which a slice is smoothed."""
        return smoothing_reach(self.sigma)

    def to_json(self) -> dict[str, Any]:
        """As run.json has it."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))


def from_json(value: dict[str, Any]) -> Job:
    """The job of which `to_json` gave this."""
    settings: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) and key != "stamp" else v for key, v in value.items()
    }
    return Job(**settings)


def prepare(order: Order) -> Job:
    """Look at the volume and the model, and settle everything.

    Raises:
        InputError: the volume cannot be read or has no voxel size, or the model does not fit it.
    """
    source = open_image(order.input, order.scale)
    tell(source.name, source.notes)
    return settle(order, source, cached_model(str(find_model(order.model).resolve())))


def model_voxel(source: Source, stated: Voxel | None, model: Model) -> Voxel:
    """The voxel size of a volume that a model is to see; if unknown, what a shipped model assumes.

    Raises:
        InputError: it is unknown, and the model is the user's own; or it is none.
    """
    if model.folder.parent == SHIPPED and not (stated or source.voxel_nm or source.doubt):
        voxel = next(iter(model.voxels.values()))
        assumed = f"no voxel size in the file: taken as {said(voxel)} nm (z y x). State it with"
        tell(source.name, [f"{assumed} --voxel-nm Z Y X: pixels of another size cost accuracy"])
        return voxel
    trained = "; ".join(f"{said(size)} nm ({name})" for name, size in model.voxels.items())
    return voxel_of(source, stated, f"; the model was trained at {trained}")


def settle(order: Order, source: Source, model: Model) -> Job:
    """As `prepare`, for a volume and a model that are open."""
    voxel = model_voxel(source, order.voxel_nm, model)
    dataset, zoom = zoom_for(model, voxel)
    window = window_for(source, order.window)
    spec = model.segmenter.spec
    _check_classes(order, model)
    statistics = None
    if spec.align:
        images = (to_uint8(image[~constant(image)], *window) for image in sampled(source))
        statistics = statistics_from(images)
    aligner = aligner_for(model, statistics, zoom)
    geo = geometry_for(model, source.shape[1:], dataset, aligner)
    view = View(model.segmenter, geo, source.shape[0])
    tell(source.name, _distance(model.voxels[dataset][0], voxel[0], dataset, view))
    depth, rows = block_size(source, geo, view)
    weights, card = sha256_of(model.folder)
    return Job(
        input=str(Path(order.input).absolute()),
        scale=order.scale,
        stamp=source.stamp,
        shape=source.shape,
        voxel_nm=voxel,
        model=str(model.folder),
        unit=model.name,
        weights=weights,
        card=card,
        window=window,
        zoom=zoom,
        second_zoom=None if order.fast else second_zoom_for(model, voxel),
        dataset=dataset,
        statistics=dataclasses.asdict(statistics) if statistics else None,
        sigma=spec.smooth_z_nm / voxel[0],
        threshold=float(model.card["threshold"] if order.threshold is None else order.threshold),
        classes=model.segmenter.classes,
        kinds=order.kinds,
        min_voxels=order.min_voxels,
        depth=depth,
        rows=rows,
    )


def _check_classes(order: Order, model: Model) -> None:
    """Refuse a threshold for a model of several classes, of which the most probable counts."""
    classes = model.segmenter.classes
    if order.threshold is not None and len(classes) > 1:
        found, expected = f"--threshold and a model of {', '.join(classes)}", "a model of one class"
        raise InputError(model.folder, found=found, expected=expected, do="Leave it out.")


def window_for(source: Source, stated: tuple[float, float] | None) -> tuple[float, float]:
    """The grey values that become 0 and 255: as stated, else the volume's own, which are said."""
    if stated is None:
        found = grey_window(sampled(source), source.name)
        if found.is_padded or found[:2] != (0, 255):
            tell(source.name, [found.words()])
        return found.low, found.high
    if not stated[0] < stated[1]:
        order = f"{stated[0]:g} to {stated[1]:g}"
        expected = "the lower before the higher"
        raise InputError("grey values", found=order, expected=expected, do="Correct --window.")
    return stated


def _distance(trained_nm: float, own_nm: float, dataset: str, view: View) -> Iterator[str]:
    """A warning if a model that sees neighbouring slices learned from others, farther or nearer."""
    first, end = view.slices(0, 1)
    if end - first > 1 and not 1 / APART <= trained_nm / own_nm <= APART:
        yield (
            f"slices are {own_nm:g} nm apart, in training {trained_nm:g} nm ({dataset}). "
            "This model looks at neighbouring slices, so check the result with care"
        )


def block_size(source: Source, geo: Geometry, view: View) -> tuple[int, int]:
    """Slices and rows of a block: whole slices, unless the model's window of them is too large."""
    _, height, width = source.shape
    rows = height
    if view.depth * height * width > BLOCK:
        tile = math.ceil(geo.tile[0] * geo.native[0] / geo.resized[0])
        enough = max(BLOCK // (view.depth * width), TILE_ROWS * tile)
        rows = min(height, math.ceil(enough / CHUNK) * CHUNK)
    most = min(BLOCK // (rows * width), max(DEPTH, 2 * view.depth))
    together = math.lcm(view.step, source.depth)  # steps of windows, and chunks of the file
    return most // together * together or max(1, most // view.step) * view.step, rows


def sampled(source: Source) -> Iterator[Array]:
    """(Y, X) slices, evenly spaced; of huge ones four bands of rows each."""
    height, width = source.shape[1:]
    band = height if height * width <= LARGE else min(height, CHUNK)
    for z in evenly_spaced(source.shape[0], SLICES):
        for y in [0] if band == height else evenly_spaced(height - band, 4):
            yield source.read(z, z + 1, y, y + band)[0]
