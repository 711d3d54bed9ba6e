"""What is to be done to a volume, settled before any of it is done, so that all of it is done alike."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emadapt
from emadapt.data.align import Statistics, statistics_from
from emadapt.data.tiles import Geometry, Grey, around
from emadapt.errors import InputError
from emadapt.models.closest import nearest, statistics_of
from emadapt.models.predict import Probability
from emadapt.segment.model import (
    WHOLE_SLICE,
    Model,
    aligner_for,
    find_model,
    geometry_for,
    open_model,
    said,
    sha256_of,
    zoom_for,
)
from emadapt.segment.rows import Input, Read, predict_rows
from emadapt.volumes.grey import grey_window, to_uint8
from emadapt.volumes.opening import open_source
from emadapt.volumes.source import LARGE, Array, Source
from emadapt.volumes.voxel import Voxel
from emadapt.volumes.write_zarr import CHUNK

FORMAT = 1  # raise when a run of another version cannot be gone on with
SLICES = 64
"""Slices that grey values are looked up in, evenly spaced; of huge slices, bands of rows."""
TILES = 48
"""Tiles that tell the domain of a volume, spread over it."""
DEPTH = 16
"""Most slices of a block."""
BLOCK = 2**25
"""Voxels of a block, unless a slice, or `TILE_ROWS` of it, has more."""
TILE_ROWS = 8
"""Tiles above each other that a part of a slice holds at least: those at its borders are segmented for both its neighbours."""
BLOCK_3D = 2**27
"""The same for models in 3D, of which a patch as deep as the model's is held in numbers of 4 bytes."""
WINDOWS = 4
"""Windows of a model in 3D that a block has along z, at most: those at its ends are segmented for both its neighbours."""
APART = 1.5
"""Whoever uses a model that sees neighbouring slices is told of slices so many times nearer or farther than those of training."""


@dataclass(frozen=True)
class Order:
    """What a user asks for; see `emadapt segment --help`."""

    input: str
    output: str
    model: str
    scale: int = 0
    probabilities: bool = False
    instances: bool = False
    threshold: float | None = None
    flips: bool = False
    voxel_nm: Voxel | None = None
    window: tuple[float, float] | None = None
    overwrite: bool = False
    dask: str = ""


@dataclass(frozen=True)
class Block:
    """Slices [z0, z1), rows [y0, y1), whole rows."""

    z0: int
    z1: int
    y0: int
    y1: int


@dataclass(frozen=True)
class Job:
    """All that the result depends on, as JSON-able values.

    Attributes:
        input: the volume and `scale` of it; `stamp` changes with its content.
        shape: (Z, Y, X).
        voxel_nm: (z, y, x).
        model: its folder; `unit` its name; `weights` and `card` the sha256 of its tensors and of its model.json.
        window: grey values that become 0 and 255.
        zoom: factors (y, x) to the pixel size of training, that of `dataset`.
        statistics: of the volume, where the model aligns slices by them.
        domain: whose normalisation layers are used (`align: norm`).
        sigma: of the Gaussian along z over probabilities, in slices; 0: none.
        kinds: of outputs: mask, probabilities, instances.
        depth: slices, and `rows`, of a block.
    """

    input: str
    scale: int
    stamp: list[Any]
    shape: tuple[int, int, int]
    dtype: str
    voxel_nm: Voxel
    model: str
    unit: str
    weights: str
    card: str
    window: tuple[float, float]
    zoom: tuple[float, float]
    dataset: str
    statistics: dict[str, Any] | None
    domain: str
    sigma: float
    threshold: float
    flips: bool
    kinds: tuple[str, ...]
    depth: int
    rows: int
    version: str = emadapt.__version__
    format: int = FORMAT

    def blocks(self) -> list[Block]:
        """All of them, from the first slice on."""
        z, y, _ = self.shape
        return [
            Block(z0, min(z0 + self.depth, z), y0, min(y0 + self.rows, y))
            for z0 in range(0, z, self.depth)
            for y0 in range(0, y, self.rows)
        ]

    @property
    def reach(self) -> int:
        """Slices on each side that a slice is smoothed with, see `emadapt.models.predict.smooth_z`."""
        return int(3 * self.sigma + 0.5)

    def to_json(self) -> dict[str, Any]:
        """As run.json has it."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))


def from_json(value: dict[str, Any]) -> Job:
    """What `to_json` gave."""
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) and k != "stamp" else v for k, v in value.items()
    }
    return Job(**settings)


def prepare(order: Order) -> Job:
    """Look at the volume and the model, and settle everything.

    Raises:
        InputError: the volume cannot be read or has no voxel size, or the model does not fit it.
    """
    return settle(
        order,
        open_source(order.input, order.scale),
        cached_model(str(find_model(order.model).resolve())),
    )


def settle(order: Order, source: Source, model: Model) -> Job:
    """The same for a volume and a model that are open."""
    voxel = voxel_of(source, model, order.voxel_nm)
    dataset, zoom = zoom_for(model, voxel)
    spec = model.segmenter.spec
    if spec.align in WHOLE_SLICE and math.prod(source.shape[1:]) > LARGE:
        raise InputError(
            source.name,
            found=f"slices of {source.shape[1]} x {source.shape[2]}",
            expected=f"at most {LARGE} pixels for a model with `align: {spec.align}`, which sees whole slices",
            do="Cut it up, or use a model without.",
        )
    apart = model.voxels[dataset][0] / voxel[0]
    if (model.segmenter.regime.is_3d or spec.context) and not 1 / APART <= apart <= APART:
        print(
            f"slices {voxel[0]:g} nm apart, in training {model.voxels[dataset][0]:g} nm ({dataset}): this model learned from"
            " neighbours at that distance, so look at the result with care",
            file=sys.stderr,
        )
    window = order.window or grey_window(sampled(source), source.name)
    if not window[0] < window[1]:
        raise InputError(
            "grey values",
            found=f"{window[0]:g} to {window[1]:g}",
            expected="the lower before the higher",
            do="Correct --window.",
        )
    statistics = (
        grey_statistics(source, window, voxel) if spec.align and spec.align != "voxel" else None
    )
    aligner = aligner_for(model, statistics, zoom)
    geo = geometry_for(model, source.shape[1:], dataset, aligner)
    domain = ""
    if model.segmenter.domains:
        tiles = spread_tiles(source, window, geo, TILES, spec.context)
        domain, _ = nearest(
            model.segmenter, statistics_of(model.segmenter, tiles.split(1)), source.name
        )
    depth, rows = (
        block_size_3d(source, geo, model)
        if model.segmenter.regime.is_3d
        else block_size(source, geo)
    )
    kinds = (
        "mask",
        *(["probabilities"] if order.probabilities else []),
        *(["instances"] if order.instances else []),
    )
    threshold = float(model.card["threshold"] if order.threshold is None else order.threshold)
    known = dataclasses.asdict(statistics) if statistics else None
    return Job(
        str(Path(order.input).resolve()),
        order.scale,
        source.stamp,
        source.shape,
        str(source.dtype),
        voxel,
        str(model.folder),
        model.name,
        *sha256_of(model.folder),
        window,
        zoom,
        dataset,
        known,
        domain,
        spec.smooth_z_nm / voxel[0],
        threshold,
        order.flips or spec.flips,
        kinds,
        depth,
        rows,
    )


def voxel_of(source: Source, model: Model, stated: Voxel | None) -> Voxel:
    """The voxel size as stated by the user, else by the file; an error where neither does."""
    if found := stated or source.voxel_nm:
        if not all(math.isfinite(v) and v > 0 for v in found):
            raise InputError(
                source.name,
                found=f"voxels of {said(found)} nm",
                expected="positive sizes",
                do="Correct --voxel-nm.",
            )
        return found
    trained = "; ".join(f"{said(v)} ({name})" for name, v in model.voxels.items())
    raise InputError(
        source.name,
        found="no voxel size in the file",
        expected=f"one: the model was trained at {trained} nm (z y x)",
        do="State it: --voxel-nm Z Y X, in nm.",
    )


def block_size(source: Source, geo: Geometry) -> tuple[int, int]:
    """Slices and rows of a block: whole slices unless they are larger than `BLOCK`; as many as lie together in the source."""
    _, y, x = source.shape
    if x * y > BLOCK:
        tile = math.ceil(geo.tile[0] * geo.native[0] / geo.resized[0])
        rows = math.ceil(max(BLOCK // x, TILE_ROWS * tile) / CHUNK) * CHUNK
        return 1, min(rows, y)
    most = min(DEPTH, BLOCK // (x * y))
    if source.depth > most:
        most = max(d for d in range(1, most + 1) if source.depth % d == 0)
    elif source.depth > 1:
        most = most // source.depth * source.depth
    return most, y


def block_size_3d(source: Source, geo: Geometry, model: Model) -> tuple[int, int]:
    """Slices and rows of a block for a model in 3D: up to `WINDOWS` windows along z.

    Slices are whole unless as many of them as a patch is deep have more than `BLOCK_3D` voxels.
    """
    _, y, x = source.shape
    deep, tile = (
        model.segmenter.regime.patch[0],
        math.ceil(geo.tile[0] * geo.native[0] / geo.resized[0]),
    )
    step = max(1, int(deep * (1 - geo.overlap)))
    rows = min(y, math.ceil(max(BLOCK_3D // (deep * x), 2 * tile) / CHUNK) * CHUNK)
    return step * max(1, min(WINDOWS, 2 * BLOCK_3D // (step * rows * x))), rows


def sampled(source: Source, most: int = SLICES) -> Iterator[Array]:
    """(Y, X) slices, evenly spaced; of huge ones four bands of rows each."""
    height, width = source.shape[1:]
    band = height if height * width <= LARGE else min(height, CHUNK)
    for z in spread(source.shape[0], most):
        for y in [0] if band == height else spread(height - band, 4):
            yield source.read(z, z + 1, y, y + band)[0]


def spread(n: int, most: int) -> list[int]:
    """At most so many of the numbers below n, evenly spaced: all, or the middles of `most` equal parts."""
    return list(range(n)) if n <= most else [int((k + 0.5) * n / most) for k in range(most)]


def grey_statistics(source: Source, window: tuple[float, float], voxel: Voxel) -> Statistics:
    """What alignment knows of the volume."""
    return statistics_from((to_uint8(image, *window) for image in sampled(source)), voxel)


def spread_tiles(
    source: Source, window: tuple[float, float], geo: Geometry, n: int, context: int = 0
) -> torch.Tensor:
    """About n tiles of the volume as the model sees them, (n, 1 or 3, h, w) in [0, 1]: a few of each of up to eight slices."""
    slices = spread(source.shape[0], 8)
    corners, tiles = geo.corners(0.0), []
    for i, z in enumerate(slices):
        image = Input(functools.partial(grey_rows_of, source, window, geo, context, z), geo)
        share = [k for k in range(len(corners)) if k % len(slices) == i] or [
            i % len(corners)
        ]  # other places in each slice
        tiles += [
            image.tiles([corners[share[k]]]) for k in spread(len(share), max(1, n // len(slices)))
        ]
    return torch.cat(tiles)


def grey_rows_of(
    source: Source,
    window: tuple[float, float],
    geo: Geometry,
    context: int,
    z: int,
    y0: int,
    y1: int,
) -> Grey:
    """Rows of a slice of the volume, aligned; of alignments that need a whole slice, that slice's.

    With `context` (n, X, 3): of the slice below, of itself and above; at an end its one neighbour stands on both sides.
    """
    if context:
        return np.stack(
            [
                grey_rows_of(source, window, geo, 0, k, y0, y1)
                for k in around(z, 0, source.shape[0] - 1)
            ],
            -1,
        )
    if geo.aligner.facts.get("method") in WHOLE_SLICE:
        return geo.aligner(to_uint8(source.read(z, z + 1)[0], *window))[y0:y1]
    return geo.aligner(to_uint8(source.read(z, z + 1, y0, y1)[0], *window))


class Runner:
    """A job with its volume and model open."""

    def __init__(self, job: Job, source: Source, model: Model) -> None:
        self.job, self.source, self.model = job, source, model
        self.context = model.segmenter.spec.context
        statistics = Statistics(**job.statistics) if job.statistics else None
        self.geo = geometry_for(
            model, job.shape[1:], job.dataset, aligner_for(model, statistics, job.zoom)
        )
        if job.domain:
            model.segmenter.use(job.domain)

    def load(self, block: Block) -> Array | None:
        """What is read of a block of whole slices, with neighbours where the model sees them, at once since it lies together.

        Of a part of a slice nothing yet.
        """
        if block.y1 - block.y0 < self.job.shape[1]:
            return None
        return self.source.read(self._first(block), min(block.z1 + self.context, self.job.shape[0]))

    def _first(self, block: Block) -> int:
        """The first slice that is read of a block of whole slices."""
        return max(block.z0 - self.context, 0)

    def probability(
        self, block: Block, loaded: Array | None
    ) -> Iterator[tuple[int, int, Probability]]:
        """The block's rows as they are done: number of the slice, number of the first row, (n, X) in [0, 1]."""
        for z in range(block.z0, block.z1):
            y = block.y0
            read = self.reader(z, loaded, self._first(block))
            for rows in predict_rows(
                self.model.segmenter, read, self.geo, block.y0, block.y1, self.job.flips
            ):
                yield z, y, rows
                y += len(rows)

    def reader(self, z: int, loaded: Array | None, first: int) -> Read:
        """Rows of slice z, aligned, of what is loaded from slice `first` on."""
        if loaded is None:
            return functools.partial(
                grey_rows_of, self.source, self.job.window, self.geo, self.context, z
            )
        seen = around(z, 0, self.job.shape[0] - 1) if self.context else (z,)
        images = [loaded[k - first] for k in seen]
        if self.model.segmenter.spec.align in WHOLE_SLICE:
            images = [self.geo.aligner(to_uint8(image, *self.job.window)) for image in images]
            return lambda y0, y1: _channels([image[y0:y1] for image in images])
        return lambda y0, y1: _channels(
            [self.geo.aligner(to_uint8(image[y0:y1], *self.job.window)) for image in images]
        )


def _channels(rows: list[Grey]) -> Grey:
    """(n, X) of one slice, (n, X, 3) of three."""
    return rows[0] if len(rows) == 1 else np.stack(rows, -1)


def open_runner(job: Job) -> Runner:
    """Open the job's volume and model, on whatever machine this is.

    Raises:
        InputError: either is not what it was when the job was settled.
    """
    source, model = open_source(job.input, job.scale), cached_model(job.model)
    if (source.stamp, *sha256_of(model.folder)) != (job.stamp, job.weights, job.card):
        raise InputError(
            job.input if source.stamp != job.stamp else job.model,
            found="another content than when the run began",
            expected="the same files for all of a run",
            do="Start over with --overwrite.",
        )
    return runner_for(job, source, model)


def runner_for(job: Job, source: Source, model: Model) -> Runner:
    """The runner of the model's kind."""
    if model.segmenter.regime.is_3d:
        from emadapt.segment.rows3d import Runner3d  # which builds on this file

        return Runner3d(job, source, model)
    return Runner(job, source, model)


def cached_model(folder: str) -> Model:
    """A model, opened once a process."""
    return _opened(folder, sha256_of(Path(folder)))


@functools.lru_cache(maxsize=1)
def _opened(folder: str, _content: tuple[str, str]) -> Model:
    return open_model(folder)
