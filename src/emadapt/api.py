"""A few functions for notebooks and scripts: arrays in, arrays out.

The examples are run by the tests, one after the other, with a small model in the folder `model`, which `emadapt train` wrote.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.models.predict import smooth_z
from emadapt.segment.domain import Domain, domain_of_volume
from emadapt.segment.job import Block, Order, Runner, runner_for, settle, spread
from emadapt.segment.model import Model, open_model
from emadapt.segment.rows import Input
from emadapt.study.study import PARAMS, Study
from emadapt.study.study import load_study as _load_study
from emadapt.volumes.opening import open_source
from emadapt.volumes.source import Source, array_source
from emadapt.volumes.voxel import Voxel, as_voxel

Array = npt.NDArray[Any]


def load_study(path: str | Path = PARAMS) -> Study:
    """Read a study.

    >>> from emadapt import api
    >>> study = api.load_study("studies/demo/study.yaml")
    >>> study.name, len(study.units())
    ('demo', 6)

    Raises:
        ConfigError: the file is missing, or has unknown keys, wrong types or names that lead nowhere.
    """
    return _load_study(Path(path))


def load_model(model: str | Path) -> Model:
    """Load a model for prediction, on the GPU where there is one.

    >>> loaded = api.load_model("model")
    >>> loaded.name, loaded.voxels
    ('t-frozen-a-0', {'a': (30.0, 5.0, 5.0)})

    Args:
        model: a folder that `train` wrote, the name of a trained unit of the study in the working directory, or
            models:/NAME@ALIAS of MLflow's registry.

    Raises:
        InputError: it is not there, damaged, of another version, or its backbone's weights cannot be had.
    """
    return open_model(model)


def read_volume(path: str | Path, scale: int = 0) -> tuple[Array, Voxel | None]:
    """Read a whole volume into memory.

    >>> volume, voxel_nm = api.read_volume("volume.ome.tif")
    >>> volume.shape, voxel_nm
    ((3, 90, 100), (30.0, 5.0, 5.0))

    Args:
        path: TIFF, PNG, a folder of slices, `file.h5:/dataset`, Zarr or OME-Zarr.
        scale: of an OME-Zarr image, 0 for the finest.

    Returns:
        (Z, Y, X) in the file's own dtype, and its voxel size (z, y, x) in nm, None where the file does not say.

    Raises:
        InputError: it is not there, damaged, or no stack of grey slices.
    """
    source = open_source(str(path), scale)
    return source.read(0, source.shape[0]), source.voxel_nm


def segment(
    volume: Array,
    model: Model,
    voxel_nm: Voxel,
    *,
    probabilities: bool = False,
    threshold: float | None = None,
    flips: bool = False,
    window: tuple[float, float] | None = None,
) -> Array:
    """Segment an array; the same values as `emadapt segment` writes for a file of it.

    >>> mask = api.segment(volume, loaded, voxel_nm)
    >>> mask.shape, mask.dtype
    ((3, 90, 100), dtype('bool'))
    >>> probability = api.segment(volume[0], loaded, voxel_nm, probabilities=True)
    >>> bool((mask[0] == (probability > 0.5)).all())
    True

    Args:
        volume: (Z, Y, X) or (Y, X), grey values of any dtype.
        model: from `load_model`.
        voxel_nm: (z, y, x).
        probabilities: give these instead of a mask.
        threshold: of the mask; None: the model's.
        flips: mean over mirrored tiles, four times the work.
        window: grey values that become black and white; None: of 8 bits all, else percentiles of `volume`.

    Returns:
        bool, or float32 in [0, 1], of the shape of `volume`.

    Raises:
        InputError: the array has NaN, no fitting shape, or voxels of quite another size than in training.
    """
    shape = (1, *np.shape(volume))[-3:]
    out = np.empty(shape, np.float32 if probabilities else bool)
    for z, found in segment_slices(
        volume,
        model,
        voxel_nm,
        probabilities=probabilities,
        threshold=threshold,
        flips=flips,
        window=window,
    ):
        out[z] = found
    return out.reshape(np.shape(volume))


def segment_slices(
    volume: Any,
    model: Model,
    voxel_nm: Voxel,
    *,
    probabilities: bool = False,
    threshold: float | None = None,
    flips: bool = False,
    window: tuple[float, float] | None = None,
) -> Iterator[tuple[int, Array]]:
    """The same slice by slice as they are done, e.g. for an array of Zarr or dask, which is not read as a whole.

    >>> [(z, bool((found == mask[z]).all())) for z, found in api.segment_slices(volume, loaded, voxel_nm)]
    [(0, True), (1, True), (2, True)]

    Args:
        volume: as for `segment`, or anything that has `shape` and `dtype` and gives arrays for slices of (Z, Y, X).
        model: and what follows as for `segment`.

    Returns:
        Numbers of slices, and each one's (Y, X) bool, or float32 in [0, 1].

    Raises:
        InputError: as `segment`.
    """
    runner = _runner(volume, model, voxel_nm, threshold, flips, window)
    found = smooth_z(_slices(runner), runner.job.sigma)
    return ((z, p if probabilities else p > runner.job.threshold) for z, p in found)


def tokens(
    image: Array, model: Model, voxel_nm: Voxel, window: tuple[float, float] | None = None
) -> npt.NDArray[np.float32]:
    """Patch tokens of a slice, of the last block that the model's head sees, adapters included.

    >>> api.tokens(volume[0], loaded, voxel_nm).shape
    (4, 64, 4, 4)

    Args:
        image: (Y, X).
        model: from `load_model`.
        voxel_nm: (z, y, x).
        window: see `segment`.

    Returns:
        (n, D, h, w), a map for each of n tiles that cover the slice, row by row.
    """
    import torch

    from emadapt.models.device import autocast
    from emadapt.models.predict import BATCH_TILES

    runner = _runner(image, model, voxel_nm, None, False, window)
    shown, corners, found = (
        Input(runner.reader(0, runner.source.read(0, 1), 0), runner.geo),
        runner.geo.corners(0.0),
        [],
    )
    device = next(model.segmenter.buffers()).device
    for start in range(0, len(corners), BATCH_TILES):
        with torch.inference_mode(), autocast(model.segmenter.spec.precision):
            batch = shown.tiles(corners[start : start + BATCH_TILES]).to(device)
            found.append(model.segmenter.tokens(batch)[0][-1].float().cpu().numpy())
    return np.concatenate(found)


def domain_distance(
    volume: Array, model: Model, voxel_nm: Voxel, window: tuple[float, float] | None = None
) -> Domain:
    """How far a volume is from the data that a model was trained on, by the tokens of some tiles; see `emadapt.models.closest`.

    >>> domain = api.domain_distance(volume, loaded, voxel_nm)
    >>> domain.nearest, domain.verdict
    ('a', 'like')

    Args:
        volume: (Z, Y, X) or (Y, X).
        model: from `load_model`.
        voxel_nm: (z, y, x).
        window: see `segment`.

    Returns:
        Distances to each training dataset, those that are usual within it, and what follows.

    Raises:
        InputError: the model was trained by a version that did not keep what its tokens are like.
    """
    return domain_of_volume(_runner(volume, model, voxel_nm, None, False, window))


def evaluate_masks(predicted: Array, label: Array, voxel_nm: Voxel) -> dict[str, Any]:
    """Score a mask against a label, as `emadapt evaluate` does.

    >>> scores = api.evaluate_masks(mask, mask, voxel_nm)
    >>> scores["iou"], scores["dice"], scores["n"]
    (1.0, 1.0, 3)

    Args:
        predicted: (Z, Y, X) or (Y, X), not 0 in the foreground.
        label: of the same shape, likewise.
        voxel_nm: (z, y, x), for the width of the boundary and of blocks.

    Returns:
        `n` slices; `iou`, `dice` and `boundary_iou` pooled over them, each with `<metric>_ci95` from a bootstrap over blocks of
        slices; `per_slice` values.
    """
    from emadapt.metrics.pixels import boundary_band, overlap_counts, summarise
    from emadapt.training.evaluate import BOUNDARY_NM

    one, other = (array_source(np.asarray(a) != 0, voxel_nm) for a in (predicted, label))
    _same_shape(one, other)
    band = BOUNDARY_NM / float(np.mean(voxel_nm[1:]))
    area, boundary = [], []
    for z in range(one.shape[0]):
        a, b = one.read(z, z + 1)[0], other.read(z, z + 1)[0]
        area.append(overlap_counts(a, b))
        boundary.append(overlap_counts(boundary_band(a, band), boundary_band(b, band)))
    return summarise(
        np.asarray(area), np.asarray(boundary), voxel_nm[0], spread(one.shape[0], one.shape[0])
    )


def find_instances(
    mask: Array, voxel_nm: Voxel
) -> tuple[npt.NDArray[np.uint32], list[dict[str, float]]]:
    """Connected components of a mask that fits in memory, and a table of them, as `emadapt segment --instances` gives them.

    >>> labels, table = api.find_instances(mask, voxel_nm)
    >>> int(labels.max()) == len(table)
    True

    Args:
        mask: (Z, Y, X), not 0 in the foreground.
        voxel_nm: (z, y, x).

    Returns:
        (Z, Y, X) with 0 in the background and numbers from 1 on; rows with the columns of `emadapt.segment.instances.COLUMNS`.
    """
    from emadapt.segment.instances import components

    return components(np.asarray(mask) != 0, as_voxel(voxel_nm))


def _slices(runner: Runner) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Slices one after the other; of a model in 3D a block at a time, since neighbours share windows."""
    depth = runner.job.depth if runner.model.segmenter.regime.is_3d else 1
    z, y, _ = runner.job.shape
    for z0 in range(0, z, depth):
        whole = Block(z0, min(z0 + depth, z), 0, y)
        for at, parts in itertools.groupby(
            runner.probability(whole, runner.load(whole)), key=operator.itemgetter(0)
        ):
            yield at, np.concatenate([rows for _, _, rows in parts])


def _same_shape(one: Source, other: Source) -> None:
    from emadapt.errors import InputError

    if one.shape != other.shape:
        raise InputError(
            "label",
            found=f"shape {other.shape}",
            expected=f"{one.shape}, as the mask",
            do="Pass the same slices.",
        )


def _runner(
    volume: Any,
    model: Model,
    voxel_nm: Voxel,
    threshold: float | None,
    flips: bool,
    window: tuple[float, float] | None,
) -> Runner:
    lazy = len(getattr(volume, "shape", ())) == 3 and hasattr(volume, "dtype")
    source = array_source(volume if lazy else np.asarray(volume), as_voxel(voxel_nm))
    order = Order(
        "array",
        "",
        "",
        threshold=threshold,
        flips=flips,
        voxel_nm=as_voxel(voxel_nm),
        window=window,
    )
    return runner_for(settle(order, source, model), source, model)
