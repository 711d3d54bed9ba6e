"""A trained model as `segment` uses it: which one it is, and how a user's slices enter it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emadapt.data.align import AS_IT_IS, METHODS, Aligner, Statistics
from emadapt.data.tiles import Geometry, geometry
from emadapt.errors import InputError
from emadapt.models.adapters import merge
from emadapt.models.device import device
from emadapt.models.segmenter import Segmenter
from emadapt.segment.shipped import SHIPPED
from emadapt.study.backbones import BackboneSettings
from emadapt.training.model_files import load_model
from emadapt.training.tracked import UNITS
from emadapt.volumes.voxel import Voxel, said

TOLERANCE = 0.1
"""Pixels may differ by this share from those of training without being resampled."""
LIMIT = 8.0
"""Resampling by more than this factor is a mistake in a unit."""


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        folder: that `train` wrote.
        segmenter: in eval mode on the device, its adapters merged.
        card: its model.json.
    """

    folder: Path
    segmenter: Segmenter
    card: dict[str, Any]

    @property
    def name(self) -> str:
        """The unit that it was trained as, e.g. `dinov2_s-lora-lucchi-0`."""
        return str(self.card["unit"])

    @property
    def voxels(self) -> dict[str, Voxel]:
        """Voxel size (z, y, x) in nm of each dataset that it was trained on."""
        sizes = self.card["voxel_nm"].items()
        return {name: (float(z), float(y), float(x)) for name, (z, y, x) in sizes}


def find_model(text: str) -> Path:
    """The folder that is named.

    It is itself a folder, a trained unit, a model that ships with the package (`starter`), or
    models:/NAME@ALIAS of MLflow's registry.

    Raises:
        InputError: there is no such model.
    """
    if text.startswith("models:/"):
        from emadapt.segment.registry import fetch  # and MLflow, which takes seconds

        return fetch(Path(), text)
    for folder in (Path(text), UNITS / text, SHIPPED / text):
        if (folder / "model.json").is_file():
            return folder
    have = ", ".join(sorted(path.parent.name for path in UNITS.glob("*/model.json"))[:6])
    raise InputError(
        f"model {text}",
        found="no model.json in it, nor such a unit",
        expected="a model of `emadapt models`, models:/NAME@ALIAS, a folder, or a trained unit: "
        f"{have or 'there is none here'}",
        do="Check the path.",
    )


def open_model(text: str | Path) -> Model:
    """Load a model for prediction, see `find_model`.

    Raises:
        InputError: it is missing, damaged, needs labels, or its backbone's weights cannot be had.
    """
    folder = find_model(str(text)).resolve()
    segmenter, card = load_model(folder)
    if segmenter.score != "iou":
        found, expected = "a model that classifies whole images", "one that segments"
        do = "See `emadapt.api.embed`, or take another model."
        raise InputError(folder, found=found, expected=expected, do=do)
    if segmenter.needs_labels:
        found, expected = "a model that needs labels for its prompts", "one that needs none"
        raise InputError(folder, found=found, expected=expected, do="Take another unit.")
    merge(segmenter.read_weights().backbone)
    return Model(folder, segmenter.to(device()), card)


def cached_model(folder: str) -> Model:
    """A model, opened once a process as long as its files stay the same."""
    return _opened(folder, sha256_of(Path(folder)))


@functools.lru_cache(maxsize=1)
def _opened(folder: str, _content: tuple[str, str]) -> Model:
    return open_model(folder)


def sha256_of(folder: Path) -> tuple[str, str]:
    """Of the trained tensors, and of the card."""
    tensors, card = (
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "model.json")
    )
    return tensors, card


def zoom_for(model: Model, voxel_nm: Voxel) -> tuple[str, tuple[float, float]]:
    """The training dataset of the nearest pixel size, and the factors (y, x) to that size.

    They are 1 where pixels differ by at most `TOLERANCE`; a model with a `pixel_nm` is always given
    exactly that.

    Raises:
        InputError: the sizes differ by more than `LIMIT`.
    """

    def away(size: Voxel) -> float:
        pairs = zip(voxel_nm[1:], size[1:], strict=True)
        return max(abs(math.log(own / other)) for own, other in pairs)

    name = min(model.voxels, key=lambda key: away(model.voxels[key]))
    target = model.voxels[name]
    exact = model.segmenter.spec.pixel_nm
    if exact:
        target = target[0], exact, exact
    if away(target) > math.log(LIMIT):
        raise InputError(
            f"voxels of {said(voxel_nm)} nm",
            found="pixels of quite another size than in training",
            expected=f"about {said(target)} nm (z y x; {name}), at most {LIMIT:g} times as much",
            do="Correct it with --voxel-nm Z Y X, in nm; of an OME-Zarr take another --scale.",
        )
    if not exact and away(target) <= math.log(1 + TOLERANCE):
        return name, (1.0, 1.0)
    return name, (round(voxel_nm[1] / target[1], 6), round(voxel_nm[2] / target[2], 6))


def second_zoom_for(model: Model, voxel_nm: Voxel) -> tuple[float, float] | None:
    """The factors (y, x) to the pixel size of the model's second look; None: it has none."""
    pixel = model.card.get("second_pixel_nm")
    return (round(voxel_nm[1] / pixel, 6), round(voxel_nm[2] / pixel, 6)) if pixel else None


def aligner_for(model: Model, statistics: Statistics | None, zoom: tuple[float, float]) -> Aligner:
    """What is done to slices first: `zoom`, and grey values aligned by `statistics`, if any."""
    if statistics is None:
        return dataclasses.replace(AS_IT_IS, zoom=zoom)
    known = model.card.get("align", {}).get("reference")
    reference = Statistics(**known) if known else statistics
    aligner = METHODS[model.segmenter.spec.align](statistics, reference)
    return dataclasses.replace(aligner, zoom=zoom)


def geometry_for(model: Model, native: tuple[int, int], dataset: str, aligner: Aligner) -> Geometry:
    """How slices of shape `native` (Y, X) enter the model, as those of `dataset` did in training.

    A model of whole slices (`tile: 0`, `longest_edge`) sees slices of another shape at the pixel
    size of training, in tiles as large as the slices of training.
    """
    spec, patch = model.segmenter.spec, model.segmenter.patch
    tiled = spec.tile and not spec.longest_edge
    trained = (int(model.card["shape"][dataset][1]), int(model.card["shape"][dataset][2]))
    if tiled or (trained == native and aligner.zoom == (1.0, 1.0)):
        return geometry(native, spec, patch, aligner)
    own = spec.changed(
        longest_edge=0,
        scale=spec.longest_edge / max(trained) if spec.longest_edge else spec.scale,
        tile=spec.tile or min(geometry(trained, spec, patch).tile),
        overlap=spec.overlap or BackboneSettings.model_fields["overlap"].default,
    )
    return geometry(native, own, patch, aligner)
