"""Image-level alignment: slices of several datasets are brought closer together before a backbone sees them.

A backbone's setting `align` names a method of `METHODS`, and `reference`, where the method needs one, the dataset that others
are made to resemble. No method looks at labels. What a method knows of a dataset comes from its training slices alone, and
the same change is made to its training, validation and test slices. A dataset that the model was not trained on is aligned
by its own statistics, as those in training were by theirs; of data without a split, all slices count as training slices.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from emadapt.data.ingest import Volume, open_volume
from emadapt.errors import InputError
from emadapt.files import write_json
from emadapt.study.study import BackboneSettings

Grey = npt.NDArray[np.uint8]
Change = Callable[[Grey], Grey]
"""A slice (Y, X) to one of the same shape."""

KEPT = Path("scratch/align")
FORMAT = 1  # raise when the same data begin to give other statistics
SLICES = 256
"""Training slices that statistics are taken from, evenly spaced where there are more."""
MEAN, DEVIATION = 128.0, 45.0
"""What `standardise` gives every dataset: the middle of the range, and a deviation at which few values of EM are clipped."""
CLIP, GRID, BLUR = 2.56, 8, 1.0
"""Of `clahe`: no grey value counts more than CLIP times the mean one, GRID x GRID regions, deviation of the blur in pixels."""
BETA = 0.01
"""Of `fda`: frequencies up to BETA times the shorter side of the reference's slices, in cycles a slice, are exchanged."""


@dataclass(frozen=True)
class Statistics:
    """What alignment knows of a dataset, from its training slices, without labels.

    Attributes:
        md5: of the dataset; empty where its slices were changed.
        voxel_nm: (z, y, x).
        histogram: 256 counts of grey values.
        amplitude: (2b + 1, 2b + 1) mean over slices of the modulus of the Fourier coefficients from -b to b cycles a slice,
            divided by the number of pixels, so that the one in the middle is the mean grey value; b as `BETA` says.
    """

    md5: str
    voxel_nm: list[float]
    histogram: list[int]
    amplitude: list[list[float]]


@dataclass(frozen=True)
class Aligner:
    """What is done to the slices of one dataset.

    Attributes:
        facts: all that the result depends on, as JSON-able values, for keys; empty: slices stay as they are.
        change: of the grey values; None: none.
        zoom: factors (y, x) on the size of a slice.
    """

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    change: Change | None = None
    zoom: tuple[float, float] = (1.0, 1.0)

    def __call__(self, image: Grey) -> Grey:
        """(Y, X) slice as ingested to a slice of the same shape; `zoom` is left to the geometry."""
        return self.change(np.asarray(image)) if self.change else image


AS_IT_IS = Aligner()


def aligner_of(volume: Volume, spec: BackboneSettings, change: Change | None = None) -> Aligner:
    """What `spec` does to the slices of `volume`.

    Args:
        volume: the dataset, of the training set or not.
        spec: with `align` and `reference`.
        change: what is done to each of its slices beforehand; the statistics are those of the changed slices.

    Raises:
        InputError: the reference is not ingested.
    """
    if not spec.align:
        return AS_IT_IS
    own = statistics(volume, change)
    reference = statistics(open_reference(spec)) if spec.reference else own
    return METHODS[spec.align](own, reference)


def open_reference(spec: BackboneSettings) -> Volume:
    """The dataset that others are made to resemble.

    Raises:
        InputError: it is not ingested.
    """
    try:
        return open_volume(spec.reference)
    except InputError as error:
        raise InputError(
            f"align: {spec.align}, reference: {spec.reference}",
            found=f"no ingested volume in {error.what}",
            expected="what `emadapt ingest` writes",
            do=f"Run `dvc repro ingest@{spec.reference}`.",
        ) from error


def described(volumes: Sequence[Volume], spec: BackboneSettings) -> dict[str, Any]:
    """What model.json says of alignment: what was done to each dataset, and all that is known of the reference.

    With the latter, `METHODS` can align other data where the reference is not at hand.
    """
    if not spec.align:
        return {}
    datasets: dict[str, Any] = {"datasets": {v.name: aligner_of(v, spec).facts for v in volumes}}
    return datasets | (
        {"reference": dataclasses.asdict(statistics(open_reference(spec)))}
        if spec.reference
        else {}
    )


def statistics(volume: Volume, change: Change | None = None) -> Statistics:
    """Those of a volume's training slices, kept under scratch/align/ once they are computed.

    Args:
        volume: labelled or not; training slices that do not count as labelled are looked at all the same.
        change: what to do to each slice first; the result is not kept.
    """
    if change:
        return _computed(volume, change)
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{volume.md5}-{FORMAT}.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            write_json(path, dataclasses.asdict(_computed(volume, None)))
        return Statistics(**json.loads(path.read_text()))


def _computed(volume: Volume, change: Change | None) -> Statistics:
    slices = volume.training_images
    chosen = np.unique(
        np.linspace(0, len(slices) - 1, min(SLICES, len(slices))).round().astype(int)
    )
    images = (np.asarray(volume.image[slices[i]]) for i in chosen)
    found = statistics_from(
        (change(i) if change else i for i in images),
        min(volume.image.shape[1:]),
        volume.manifest["voxel_nm"],
    )
    return dataclasses.replace(found, md5="" if change else volume.md5)


def statistics_from(images: Iterable[Grey], side: int, voxel_nm: Sequence[float]) -> Statistics:
    """Statistics of a dataset.

    Args:
        images: (Y, X) each, as ingested.
        side: the shorter one of its slices.
        voxel_nm: (z, y, x).
    """
    band, n = int(BETA * side), 0
    counts, total = np.zeros(256, np.int64), np.zeros((2 * band + 1, 2 * band + 1))
    for n, image in enumerate(images, 1):  # noqa: B007 - the last one is their number
        counts += np.bincount(image.ravel(), minlength=256)
        total += np.abs(_low(image, band)) / image.size
    amplitude = [
        [float(f"{value:.6g}") for value in row] for row in total / n
    ]  # the same digits on every machine
    return Statistics("", list(voxel_nm), counts.tolist(), amplitude)


def standardise(own: Statistics, reference: Statistics) -> Aligner:
    """Grey values shifted and stretched so that the dataset's training slices have mean `MEAN` and deviation `DEVIATION`.

    One pair of numbers a dataset, not a slice, so that what distinguishes its slices stays; clipped to 0..255. As nnU-Net
    normalises CT by the statistics of the training data (Isensee et al. 2021, Nature Methods 18:203).
    """
    values, counts = np.arange(256), np.asarray(own.histogram)
    mean = float(np.average(values, weights=counts))
    deviation = float(np.sqrt(np.average((values - mean) ** 2, weights=counts))) or 1.0
    table = _to_grey((values - mean) / deviation * DEVIATION + MEAN)
    return Aligner(
        {"method": "standardise", "table": table.tolist()}, functools.partial(_look_up, table)
    )


def clahe(own: Statistics, reference: Statistics) -> Aligner:
    """Contrast-limited adaptive histogram equalisation, then a Gaussian blur: Xie et al. 2025 (Bioinformatics Advances, vbaf021).

    CLAHE is Zuiderveld's (1994, Graphics Gems IV), each slice by itself. OpenCV's, at the settings that are scikit-image's
    defaults: up to the linear stretches with which scikit-image begins and ends it gives the same, in a tenth of the time, and
    it runs for every crop that is drawn.
    """
    facts = {"method": "clahe", "clip": CLIP, "grid": GRID, "blur": BLUR}
    return Aligner(facts, functools.partial(_equalised, clip=CLIP, grid=GRID, blur=BLUR))


def histogram(own: Statistics, reference: Statistics) -> Aligner:
    """Histogram matching: the grey value at each quantile of the training slices becomes the reference's at that quantile.

    As `skimage.exposure.match_histograms` on all training slices at once (Gonzalez & Woods, Digital Image Processing, 3.3),
    rounded; a lookup table. The reference stays as it is.
    """
    if (
        own.histogram == reference.histogram
    ):  # also of a dataset on the same images under other labels
        return AS_IT_IS
    counts, wanted = np.asarray(own.histogram), np.asarray(reference.histogram)
    [values] = np.nonzero(wanted)
    quantiles = np.cumsum(wanted[values]) / wanted.sum()
    table = _to_grey(np.interp(np.cumsum(counts) / counts.sum(), quantiles, values))
    facts = {"method": "histogram", "reference": reference.md5, "table": table.tolist()}
    return Aligner(facts, functools.partial(_look_up, table))


def fda(own: Statistics, reference: Statistics) -> Aligner:
    """Fourier amplitude exchange of Yang & Soatto 2020 (FDA, CVPR, arXiv 2004.05498).

    Each slice keeps its phase; its amplitude at low frequencies becomes the mean amplitude of the reference's training slices,
    where the paper takes that of one random image of the target: the same for training and test, without chance. `BETA` is
    the paper's beta; it compares 0.01, 0.05 and 0.09, where larger values bring more of the style and more artefacts. At 0.01
    brightness and what varies over a hundredth of the slices' frequencies change, hardly the contrast of a membrane.
    Frequencies are in cycles a slice, as in the paper, where images have one size. The reference stays as it is.
    """
    if (
        own.amplitude == reference.amplitude
    ):  # also of a dataset on the same images under other labels
        return AS_IT_IS
    facts = {
        "method": "fda",
        "reference": reference.md5,
        "beta": BETA,
        "amplitude": reference.amplitude,
    }
    return Aligner(facts, functools.partial(_exchanged, amplitude=np.asarray(reference.amplitude)))


def voxel(own: Statistics, reference: Statistics) -> Aligner:
    """Voxel-size harmonisation: slices resampled in plane to the reference's nm per pixel, before `scale`.

    A pixel then is as large for every dataset, as where networks are trained on several (nnU-Net's target spacing, Isensee et
    al. 2021). Sections stay as thick as they are. Predictions come back at the slice's own resolution.
    """
    y, x = (round(a / b, 6) for a, b in zip(own.voxel_nm[1:], reference.voxel_nm[1:], strict=True))
    if (y, x) == (1.0, 1.0):
        return AS_IT_IS
    return Aligner({"method": "voxel", "reference": reference.md5, "zoom": [y, x]}, zoom=(y, x))


METHODS: dict[str, Callable[[Statistics, Statistics], Aligner]] = {
    "standardise": standardise,
    "clahe": clahe,
    "histogram": histogram,
    "fda": fda,
    "voxel": voxel,
}
"""(Statistics of the dataset, of the reference) -> aligner of the dataset; methods without a reference ignore the latter."""


def _to_grey(values: npt.NDArray[Any]) -> Grey:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _look_up(table: Grey, image: Grey) -> Grey:
    return table[image]


def _equalised(image: Grey, clip: float, grid: int, blur: float) -> Grey:
    import cv2

    cv2.setNumThreads(0)  # OpenCV's own threads get in the way of forked workers
    equal = cv2.createCLAHE(clip, (grid, grid)).apply(np.ascontiguousarray(image))
    return np.asarray(cv2.GaussianBlur(equal, (0, 0), blur), np.uint8)


def _exchanged(image: Grey, amplitude: npt.NDArray[np.float64]) -> Grey:
    middle = len(amplitude) // 2
    band = min(middle, (min(image.shape) - 1) // 2)
    wanted = (
        amplitude[middle - band : middle + band + 1, middle - band : middle + band + 1] * image.size
    )
    rows, columns = (_waves(side, band) for side in image.shape)
    found = _low(image, band)
    change = (wanted - np.abs(found)) * np.exp(1j * np.angle(found))
    return _to_grey(
        image + (rows.conj().T @ change.astype(np.complex64) @ columns.conj()).real / image.size
    )


def _low(image: Grey, band: int) -> npt.NDArray[np.complex64]:
    """Fourier coefficients (2 * band + 1, 2 * band + 1) of the lowest frequencies, from -band to band cycles a slice.

    So few that two small matrix products are faster than the transform of the slice.
    """
    rows, columns = (_waves(side, band) for side in image.shape)
    return np.asarray(rows @ image.astype(np.float32) @ columns.T)


def _waves(length: int, band: int) -> npt.NDArray[np.complex64]:
    """(2 * band + 1, length) waves of -band to band cycles."""
    return np.exp(
        -2j * np.pi * np.outer(np.arange(-band, band + 1), np.arange(length) / length)
    ).astype(np.complex64)
