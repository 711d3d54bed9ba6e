"""A job at work: its volume and model open, blocks of the volume to probabilities."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from emadapt.data.align import Statistics
from emadapt.data.crops import as_input
from emadapt.data.foreground import most_probable
from emadapt.data.tiles import Grey
from emadapt.errors import InputError
from emadapt.models.predict import smooth_z
from emadapt.models.segmenter import Probability
from emadapt.segment.job import Block, Job, Order, settle
from emadapt.segment.model import Model, aligner_for, cached_model, geometry_for, sha256_of
from emadapt.segment.rows import View, entering
from emadapt.volumes.grey import MIDDLE, REACH, constant, to_uint8
from emadapt.volumes.opening import open_image
from emadapt.volumes.source import Array, Source, array_source, as_image
from emadapt.volumes.voxel import as_voxel

LEAST = np.float32(1e-4)
"""The lowest probability of a voxel that a model looked at."""


class Runner:
    """A job with its volume and model open."""

    def __init__(self, job: Job, source: Source, model: Model) -> None:
        self.job, self.source, self.model = job, source, model
        statistics = Statistics(**job.statistics) if job.statistics else None
        self.views = []
        for zoom in filter(None, (job.zoom, job.second_zoom)):
            aligner = aligner_for(model, statistics, zoom)
            geo = geometry_for(model, job.shape[1:], job.dataset, aligner)
            self.views.append(View(model.segmenter, geo, job.shape[0]))
        self.view = self.views[0]
        self.geo = self.view.geo

    def load(self, block: Block) -> Array:
        """All that a block needs of the volume."""
        return self.source.read(*self.view.slices(block.z0, block.z1), *self._rows(block))

    def _rows(self, block: Block) -> tuple[int, int]:
        """First and end of the rows that the model must see, with those that `constant` needs."""
        ranges = [view.native_rows(block.y0, block.y1) for view in self.views]
        return self._around(min(top for top, _ in ranges), max(bottom for _, bottom in ranges))

    def _around(self, top: int, bottom: int) -> tuple[int, int]:
        return max(0, top - REACH), min(self.job.shape[1], bottom + REACH)

    def probability(self, block: Block, loaded: Array) -> Iterator[tuple[int, Probability]]:
        """The number of a slice and the block's rows of it, (n, X) in [0, 1], as they are done.

        Of several classes they are (classes, n, X). It is 0 where the volume is constant, and only
        there.
        """
        first, _ = self.view.slices(block.z0, block.z1)
        top, _ = self._rows(block)

        greys = [self.grey(values) for values in loaded]

        def read(z: int, y0: int, y1: int) -> Grey:
            return greys[z - first][y0 - top : y1 - top]

        place = (block.z0, block.z1), (block.y0, block.y1)
        looks = (view.predict(read, *place) for view in self.views)
        for (z, own), *others in zip(*looks, strict=True):
            found = np.mean([own, *(second for _, second in others)], axis=0)
            empty = constant(loaded[z - first])[block.y0 - top : block.y1 - top]
            yield z, np.where(empty, np.float32(0), np.maximum(found, LEAST))

    def part(self, z: int, rows: slice, columns: slice) -> Probability:
        """A part of slice `z`, (h, w) in [0, 1], as if the volume had only these rows and columns.

        The model sees the neighbouring slices that it sees in the volume.
        """
        job, reach = self.job, self.job.reach
        near = max(0, z - reach), min(z + reach + 1, job.shape[0])
        first, end = self.view.slices(*near)

        def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
            top = rows.start
            return self.source.read(first + z0, first + z1, top + y0, top + y1)[..., columns]

        shape = end - first, rows.stop - rows.start, columns.stop - columns.start
        source = Source("part", shape, self.source.dtype, job.voxel_nm, 1, cut, [])
        own = Runner(dataclasses.replace(job, shape=shape), source, self.model)
        block = Block(near[0] - first, near[1] - first, 0, shape[1])
        found = own.probability(block, own.load(block))
        return next(p for at, p in smooth_z(found, job.sigma) if at == z - first)

    def slices(self) -> Iterator[tuple[int, Probability]]:
        """Number and probability (Y, X) of each slice of the volume, smoothed along z."""
        return smooth_z(self._slices(), self.job.sigma)

    def _slices(self) -> Iterator[tuple[int, Probability]]:
        _, height, width = self.job.shape
        for _, parts in itertools.groupby(self.job.blocks(), key=lambda block: block.z0):
            blocks = list(parts)
            z0, z1 = blocks[0].z0, blocks[0].z1
            whole = np.empty((z1 - z0, *self.job.channels, height, width), np.float32)
            for block in blocks:
                for z, rows in self.probability(block, self.load(block)):
                    whole[z - z0, ..., block.y0 : block.y1, :] = rows
            yield from enumerate(whole, z0)

    def ids(self, probability: Probability) -> Grey:
        """Class ids (Y, X) of probabilities, see `most_probable`."""
        return most_probable(probability, self.job.threshold)

    def tiles(self, z: int, corners: list[tuple[int, int]]) -> torch.Tensor:
        """Tiles at these corners of a padded slice as the model sees them, (n, 1 or 3, h, w)."""
        height, width = self.geo.tile

        def read(z: int, y0: int, y1: int) -> Grey:
            first, end = self._around(y0, y1)
            return self.grey(self.source.read(z, z + 1, first, end)[0])[y0 - first : y1 - first]

        def enter(z: int, y: int) -> Grey:
            return entering(read, self.geo, z, y, y + height)

        found = []
        for y, x in corners:
            rows = self.view.seen(functools.partial(enter, y=y), z)
            found.append(as_input(rows[:, x : x + width]))
        return torch.stack(found)

    def grey(self, values: Array) -> Grey:
        """Rows of a slice (Y, X) as the model sees them; `constant` areas as `MIDDLE`."""
        grey = to_uint8(values, *self.job.window)
        return self.geo.aligner(np.where(constant(values), MIDDLE, grey))


def open_runner(job: Job) -> Runner:
    """Open the job's volume and model; an InputError if they changed since it was settled."""
    source, model = open_image(job.input, job.scale), cached_model(job.model)
    if (source.stamp, *sha256_of(model.folder)) != (job.stamp, job.weights, job.card):
        what = job.input if source.stamp != job.stamp else job.model
        found, expected = "another content than when the run began", "the same in all of a run"
        raise InputError(what, found=found, expected=expected, do="Start over with --overwrite.")
    return Runner(job, source, model)


def array_runner(
    volume: Any,
    model: Model,
    voxel_nm: Sequence[float] | None,
    *,
    threshold: float | None = None,
    window: tuple[float, float] | None = None,
    fast: bool = False,
) -> Runner:
    """A runner for an array; arguments and errors as of `emadapt.api.segment`."""
    is_lazy = len(getattr(volume, "shape", ())) == 3 and hasattr(volume, "dtype")
    voxel = None if voxel_nm is None else as_voxel(voxel_nm)
    source = as_image(array_source(volume if is_lazy else np.asarray(volume), voxel))
    order = Order("array", "", "", threshold=threshold, voxel_nm=voxel, window=window, fast=fast)
    return Runner(settle(order, source, model), source, model)
