"""Slices of several datasets are brought closer together before a backbone sees them.

A backbone's setting `align` names a method of `METHODS`, and `reference` the dataset that others
are made to resemble. Methods see training slices without labels, and change all slices alike. A
dataset that the model was not trained on is aligned by its own statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.data.ingest import Volume, open_volume
from emadapt.data.splits import evenly_spaced
from emadapt.study.backbones import BackboneSettings

Grey = npt.NDArray[np.uint8]
Change = Callable[[Grey], Grey]  # a slice (Y, X) to one of the same shape

SLICES = 256  # training slices that statistics are taken from, evenly spaced where there are more


@dataclass(frozen=True)
class Statistics:
    """What alignment knows of a dataset, from its training slices, without labels."""

    md5: str  # of the dataset; empty if its slices were changed
    voxel_nm: list[float]  # (z, y, x)
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


def voxel(own: Statistics, reference: Statistics) -> Aligner:
    """Slices resampled in plane to the reference's nm per pixel.

    As nnU-Net's target spacing (Isensee et al. 2021).
    """
    pairs = zip(own.voxel_nm[1:], reference.voxel_nm[1:], strict=True)
    y, x = (round(a / b, 6) for a, b in pairs)
    if (y, x) == (1.0, 1.0):
        return AS_IT_IS
    return Aligner({"method": "voxel", "reference": reference.md5, "zoom": [y, x]}, zoom=(y, x))


METHODS: dict[str, Callable[[Statistics, Statistics], Aligner]] = {
    "histogram": histogram,
    "voxel": voxel,
}
"""(Statistics of the dataset, of the reference) -> aligner of the dataset."""


def aligner_of(volume: Volume, spec: BackboneSettings, change: Change | None = None) -> Aligner:
    """What `spec` does to the slices of `volume`, after `change`."""
    if not spec.align:
        return AS_IT_IS
    return METHODS[spec.align](statistics(volume, change), statistics(open_volume(spec.reference)))


def described(volumes: Sequence[Volume], spec: BackboneSettings) -> dict[str, Any]:
    """What model.json says of alignment: what was done to each dataset, and the reference.

    With the statistics of the reference, `METHODS` can align other data without it.
    """
    if not spec.align:
        return {}
    return {
        "datasets": {volume.name: aligner_of(volume, spec).facts for volume in volumes},
        "reference": dataclasses.asdict(statistics(open_volume(spec.reference))),
    }


_KNOWN: dict[tuple[Any, ...], Statistics] = {}
"""Of datasets by md5 and shape, for the life of a process."""


def statistics(volume: Volume, change: Change | None = None) -> Statistics:
    """Statistics of a volume's training slices, labelled or not, after `change`."""
    key = volume.md5, *volume.image.shape
    if change is None and key in _KNOWN:
        return _KNOWN[key]
    slices = volume.training_images
    images = (np.asarray(volume.image[slices[i]]) for i in evenly_spaced(len(slices), SLICES))
    changed = (change(image) if change else image for image in images)
    found = statistics_from(changed, volume.manifest["voxel_nm"], "" if change else volume.md5)
    if change is None:
        _KNOWN[key] = found
    return found


def statistics_from(images: Iterable[Grey], voxel_nm: Sequence[float], md5: str = "") -> Statistics:
    """Statistics of slices (Y, X) as ingested, with voxels (z, y, x), of a dataset of this md5."""
    counts = np.zeros(256, np.int64)
    for image in images:
        counts += np.bincount(image.ravel(), minlength=256)
    return Statistics(md5, list(voxel_nm), counts.tolist())
