"""Functions for notebooks and scripts: arrays in, arrays out.

A `volume` is (Z, Y, X) or (Y, X), grey values of any dtype; `model` comes from `load_model`;
`voxel_nm` is (z, y, x) in nm. `read_volume` gives None where a file states none; `segment` then
takes that of the model that ships. `window` are the grey values of black and white; None: all of 8
bits, else percentiles of the volume. Errors are `emadapt.errors.InputError`, or ConfigError of a
study.

The tests run the examples, one after the other, with a small model in the folder `model` that
`emadapt train` wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from emadapt.data.images import square
from emadapt.errors import InputError
from emadapt.segment.domain import Domain, domain_of_volume
from emadapt.segment.instances import components
from emadapt.segment.model import Model, open_model
from emadapt.segment.runner import array_runner
from emadapt.study.backbones import BackboneSettings
from emadapt.study.loading import PARAMS
from emadapt.study.loading import load_study as _load_study
from emadapt.study.study import Study
from emadapt.volumes.opening import open_image
from emadapt.volumes.voxel import Voxel, as_voxel

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]
Window = tuple[float, float]


def load_study(path: str | Path = PARAMS) -> Study:
    """Read a study.

    >>> from emadapt import api
    >>> study = api.load_study("studies/demo/study.yaml")
    >>> study.name, len(study.units())
    ('demo', 6)
    """
    return _load_study(Path(path))


def load_model(model: str | Path) -> Model:
    """Load a model for prediction, on the GPU if there is one.

    >>> loaded = api.load_model("model")
    >>> loaded.name, loaded.voxels
    ('t-frozen-a-0', {'a': (30.0, 5.0, 5.0)})

    Args:
        model: a folder that `train` wrote, the name of a trained unit of the study in the working
            directory, or models:/NAME@ALIAS of MLflow's registry.
    """
    return open_model(model)


def read_volume(path: str | Path, scale: int = 0) -> tuple[Array, Voxel | None]:
    """Read a whole volume into memory.

    >>> volume, voxel_nm = api.read_volume("volume.ome.tif")
    >>> volume.shape, voxel_nm
    ((3, 90, 100), (30.0, 5.0, 5.0))

    Args:
        path: TIFF, PNG, a folder of slices, `file.h5:/dataset`, Zarr, OME-Zarr or NIfTI.
        scale: of an OME-Zarr image, 0 for the finest.

    Returns:
        (Z, Y, X) in the file's own dtype, and its voxel size (z, y, x) in nm, None if unknown.
    """
    source = open_image(str(path), scale)
    return source.read(0, source.shape[0]), source.voxel_nm


def segment(
    volume: Any,
    model: Model,
    voxel_nm: Voxel | None,
    *,
    probabilities: bool = False,
    threshold: float | None = None,
    window: Window | None = None,
    fast: bool = False,
) -> Array:
    """Segment an array, as `emadapt segment` segments a file of it.

    >>> mask = api.segment(volume, loaded, voxel_nm)
    >>> mask.shape, mask.dtype
    ((3, 90, 100), dtype('bool'))
    >>> probability = api.segment(volume[0], loaded, voxel_nm, probabilities=True)
    >>> bool((mask[0] == (probability > 0.5)).all())
    True

    A stack may be anything that gives arrays for slices of it, such as an array of Zarr or dask; it
    is read block by block. `threshold` is that of the mask; None: the model's. `fast` leaves out
    the second look at other pixels of a model that has one, such as the one that ships.

    Returns:
        bool, or float32 in [0, 1], in the shape of `volume`; of several classes uint8 ids, or
        (Z, classes, Y, X).

    Raises:
        InputError: the array has NaN or another number of axes, or voxels of quite another size
            than in training.
    """
    runner = array_runner(volume, model, voxel_nm, threshold=threshold, window=window, fast=fast)
    (z, y, x), several = runner.job.shape, runner.job.channels
    by_class = several if probabilities else ()
    dtype = np.float32 if probabilities else np.uint8 if several else bool
    out = np.empty((z, *by_class, y, x), dtype)
    for at, found in runner.slices():
        out[at] = found if probabilities else runner.ids(found)
    return out if by_class else out.reshape(np.shape(volume))


def tokens(
    image: Array, model: Model, voxel_nm: Voxel, window: Window | None = None
) -> npt.NDArray[np.float32]:
    """Patch tokens of a slice (Y, X), from the last block that the model's head sees.

    >>> api.tokens(volume[0], loaded, voxel_nm).shape
    (4, 64, 4, 4)

    Returns:
        (n, D, h, w), a map for each of n tiles that cover the slice, row by row.
    """
    import torch

    from emadapt.models.device import autocast
    from emadapt.models.segmenter import BATCH_TILES

    runner, segmenter = array_runner(image, model, voxel_nm, window=window), model.segmenter
    tiles = runner.tiles(0, runner.geo.corners(0.0)).to(segmenter.device)
    with torch.inference_mode(), autocast(segmenter.spec.precision):
        found = [segmenter.tokens(batch)[-1].float().cpu() for batch in tiles.split(BATCH_TILES)]
    return torch.cat(found).numpy()


def embed(images: Sequence[Array], backbone: BackboneSettings) -> npt.NDArray[np.float32]:
    """A vector for each image or tile: class token and mean patch token of a pretrained backbone.

    >>> backbone = study.backbone_settings["t"]
    >>> api.embed(volume, backbone).shape
    (3, 512)

    A nearest neighbour or a linear model on them says whether a tile has a synapse.

    Args:
        images: (Y, X) or (Y, X, 3), uint8, of any size; each is brought to a square of `tile`.
        backbone: settings, of a study or `BackboneSettings(arch="dinov2_s", source="pypi")`.

    Returns:
        (n, blocks * 2 * D).
    """
    from emadapt.models import classifier

    return classifier.embed(_squares(images, backbone.tile), backbone.of_images())


def classify(images: Sequence[Array], model: str | Path) -> dict[str, npt.NDArray[np.float32]]:
    """Probabilities (n,) of each class, by name, of whole images.

    >>> shares = api.classify(volume, "classifier")
    >>> shares["synapse"].shape
    (3,)

    Args:
        images: as for `embed`.
        model: a folder that `train` wrote in a study of `task: classification`.

    Raises:
        InputError: the folder has no such model.
    """
    from emadapt.models.classifier import Classifier, batches
    from emadapt.training.model_files import load_model as load

    loaded, card = load(Path(model))
    if not isinstance(loaded, Classifier):
        expected, do = "one that classifies whole images", "Use `api.segment`."
        raise InputError(model, found="a model that segments", expected=expected, do=do)
    side = next(iter(card["shape"].values()))[1]
    shown = batches(_squares(images, side), loaded.spec, loaded.patch)
    return dict(zip(loaded.classes, loaded.probabilities(shown).T, strict=True))


def _squares(images: Sequence[Array], side: int) -> list[Array]:
    coloured = any(image.ndim == 3 for image in images)
    return [square(image, side, coloured) for image in images]


def domain_distance(
    volume: Array, model: Model, voxel_nm: Voxel, window: Window | None = None
) -> Domain:
    """A volume beside the data that a model was trained on, in figures of some tiles.

    >>> domain = api.domain_distance(volume, loaded, voxel_nm)
    >>> domain.nearest, domain.inverted
    ('a', False)

    Returns:
        Grey values, polarity and distances of tokens; `words()` has them as text.
    """
    return domain_of_volume(array_runner(volume, model, voxel_nm, window=window))


def evaluate_masks(predicted: Array, label: Array, voxel_nm: Voxel) -> dict[str, Any]:
    """Score a mask (Z, Y, X) against a label of the same shape, as `emadapt evaluate` does.

    >>> scores = api.evaluate_masks(mask, mask, voxel_nm)
    >>> scores["iou"], scores["dice"], scores["n"]
    (1.0, 1.0, 3)

    Returns:
        `n` slices; `iou`, `dice` and `boundary_iou` pooled over them, each with `<metric>_ci95`
        (see `emadapt.metrics.intervals`); `per_slice` values.
    """
    from emadapt.metrics.pixels import boundary_band, column_grid, overlap_counts, summarise
    from emadapt.training.scores import BOUNDARY_NM

    if predicted.shape != label.shape:
        found, expected = f"shape {label.shape}", f"{predicted.shape}, as the mask"
        raise InputError("label", found=found, expected=expected, do="Pass the same slices.")
    band = BOUNDARY_NM / float(np.mean(voxel_nm[1:]))
    grid = column_grid((predicted.shape[1], predicted.shape[2]), voxel_nm)
    area, boundary = [], []
    for a, b in zip(predicted != 0, label != 0, strict=True):
        area.append(overlap_counts(a, b, grid))
        boundary.append(overlap_counts(boundary_band(a, band), boundary_band(b, band), grid))
    return summarise(np.asarray(area), np.asarray(boundary), list(range(len(predicted))))


def find_instances(mask: Array, voxel_nm: Voxel) -> tuple[npt.NDArray[np.uint32], pd.DataFrame]:
    """Connected components of a mask (Z, Y, X), as `emadapt segment --instances` gives them.

    >>> labels, table = api.find_instances(mask, voxel_nm)
    >>> int(labels.max()) == len(table)
    True

    Returns:
        (Z, Y, X) with 0 in the background and numbers from 1 on, and a table of them with the
        columns of `emadapt.segment.instances.COLUMNS`.
    """
    return components(np.asarray(mask) != 0, as_voxel(voxel_nm))
