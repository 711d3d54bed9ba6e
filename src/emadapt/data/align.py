"""Slices of several datasets are brought closer together before a backbone sees them.

A backbone's setting `align` names a method of `METHODS`, and `reference` the dataset that others
are made to resemble. Methods see training slices without labels, and change all slices alike. A
dataset that the model was not trained on is aligned by its own statistics. `pixel_nm` brings all
datasets to one pixel size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.data.ingest import Volume, open_volume
from emadapt.data.splits import evenly_spaced
from emadapt.errors import InputError
from emadapt.study.backbones import BackboneSettings
from emadapt.volumes.grey import PERCENTILES, constant, to_uint8

Grey = npt.NDArray[np.uint8]

SLICES = 256  # training slices that statistics are taken from, evenly spaced where there are more


@dataclass(frozen=True)
class Statistics:
    """What alignment knows of a dataset, from its training slices, without labels."""

    md5: str  # of the dataset; empty if it was not ingested
    histogram: list[int]  # 256 counts of grey values


@dataclass(frozen=True)
class Aligner:
    """What is done to the slices of one dataset."""

    facts: dict[str, Any] = field(default_factory=dict)  # what the result depends on, for keys
    table: Grey | None = None  # new grey values of 0 to 255; None: they stay
    zoom: tuple[float, float] = (1.0, 1.0)  # of a slice (y, x), which the geometry of tiles applies

    def __call__(self, image: Grey) -> Grey:
        """(Y, X) slice as ingested to a slice of the same shape."""
        return image if self.table is None else self.table[np.asarray(image)]


AS_IT_IS = Aligner()


def histogram(own: Statistics, reference: Statistics) -> Aligner:
    """The grey value at each quantile of the training slices becomes the reference's there.

    As `skimage.exposure.match_histograms` on all training slices at once (Gonzalez & Woods, Digital
    Image Processing, 3.3), rounded. The reference stays as it is.
    """
    if own.histogram == reference.histogram:
        return AS_IT_IS
    counts, wanted = np.asarray(own.histogram), np.asarray(reference.histogram)
    [values] = np.nonzero(wanted)
    quantiles = np.cumsum(wanted[values]) / wanted.sum()
    matched = np.interp(np.cumsum(counts) / counts.sum(), quantiles, values)
    table = np.clip(np.rint(matched), 0, 255).astype(np.uint8)
    facts = {"method": "histogram", "reference": reference.md5, "table": table.tolist()}
    return Aligner(facts, table)


def percentiles(own: Statistics, _reference: Statistics) -> Aligner:
    """Grey values between the percentiles of `volumes.grey` are stretched over 0 to 255."""
    share = np.cumsum(own.histogram) / max(1, np.sum(own.histogram))
    low, high = (int(np.searchsorted(share, p / 100)) for p in PERCENTILES)
    table = to_uint8(np.arange(256), low, high)
    return Aligner({"method": "percentiles", "table": table.tolist()}, table)


METHODS: dict[str, Callable[[Statistics, Statistics], Aligner]] = {
    "histogram": histogram,
    "percentiles": percentiles,
}
"""(Statistics of the dataset, of the reference) -> aligner of the dataset."""


def aligner_of(volume: Volume, spec: BackboneSettings) -> Aligner:
    """What `spec` does to the slices of `volume`."""
    aligner = AS_IT_IS
    if spec.align:
        own = statistics(volume)
        aligner = METHODS[spec.align](own, reference_of(spec) if spec.reference else own)
    return resampled(aligner, volume.manifest["voxel_nm"], spec.pixel_nm)


def resampled(aligner: Aligner, voxel_nm: Sequence[float], pixel_nm: float) -> Aligner:
    """The aligner of voxels (z, y, x) that also brings pixels to `pixel_nm`; 0: they stay.

    As nnU-Net's target spacing (Isensee et al. 2021).
    """
    y, x = (round(own / (pixel_nm or own), 6) for own in voxel_nm[1:])
    if (y, x) == (1.0, 1.0):
        return aligner
    return dataclasses.replace(aligner, facts=aligner.facts | {"zoom": [y, x]}, zoom=(y, x))


def reference_of(spec: BackboneSettings) -> Statistics:
    """Of the dataset that others are made to resemble, or of the reference of a model folder.

    Raises:
        InputError: the dataset is not ingested, or the model has no reference.
    """
    if "/" not in spec.reference:
        return statistics(open_volume(spec.reference))
    card = Path(spec.reference) / "model.json"
    try:
        return Statistics(**json.loads(card.read_text())["align"]["reference"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            card,
            found=f"no statistics of a reference ({type(error).__name__})",
            expected="a model that was trained with `align: histogram`",
            do="Take another model as the backbone's `reference`, or a dataset.",
        ) from error


def described(volumes: Sequence[Volume], spec: BackboneSettings) -> dict[str, Any]:
    """What model.json says of alignment: what was done to each dataset, and the reference.

    With the statistics of the reference, `METHODS` can align other data without it.
    """
    if not spec.reference:
        return {}
    return {
        "datasets": {volume.name: aligner_of(volume, spec).facts for volume in volumes},
        "reference": dataclasses.asdict(reference_of(spec)),
    }


_KNOWN: dict[tuple[Any, ...], Statistics] = {}
"""Of datasets by md5 and shape, for the life of a process."""


def statistics(volume: Volume) -> Statistics:
    """Statistics of a volume's training slices, labelled or not, without `constant` areas."""
    key = volume.md5, *volume.image.shape
    if key not in _KNOWN:
        slices = volume.training_images
        images = (np.asarray(volume.image[slices[i]]) for i in evenly_spaced(len(slices), SLICES))
        _KNOWN[key] = statistics_from((i[~constant(i)] for i in images), volume.md5)
    return _KNOWN[key]


def statistics_from(images: Iterable[Grey], md5: str = "") -> Statistics:
    """Statistics of grey values as ingested, an array a slice, of a dataset of this md5."""
    counts = np.zeros(256, np.int64)
    for image in images:
        counts += np.bincount(image.ravel(), minlength=256)
    return Statistics(md5, counts.tolist())
