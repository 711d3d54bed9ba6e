"""A trained model as `segment` uses it: which one it is, and how a user's slices enter it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emadapt.data.align import AS_IT_IS, METHODS, Aligner, Statistics
from emadapt.data.tiles import Geometry, geometry
from emadapt.errors import InputError
from emadapt.models import regimes
from emadapt.models.device import device
from emadapt.models.segmenter import Segmenter, load_segmenter
from emadapt.study.study import BackboneSettings
from emadapt.volumes.voxel import Voxel

UNITS = Path("build/units")
NEEDED = ("voxel_nm", "intensity", "threshold", "version")
"""Of model.json, beside what builds the model."""
TOLERANCE = 0.1
"""A pixel may be larger or smaller than in training by this share without being resampled."""
LIMIT = 8.0
"""Resampling by more than this factor is a mistake in a unit."""
WHOLE_SLICE = ("clahe", "fda")
"""Alignments that look at a slice as a whole."""


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
        return str(self.card.get("unit", self.folder.name))

    @property
    def voxels(self) -> dict[str, Voxel]:
        """Voxel size (z, y, x) in nm of each dataset that it was trained on."""
        return {
            name: (float(v[0]), float(v[1]), float(v[2]))
            for name, v in self.card["voxel_nm"].items()
        }


def find_model(text: str) -> Path:
    """The folder of a model: `text` itself, build/units/`text`, or a copy of what MLflow's registry has under that address.

    Raises:
        InputError: none holds a model.
    """
    if text.startswith("models:/"):
        from emadapt.segment.registry import fetch  # and mlflow, which takes seconds

        return fetch(Path(), text)
    for folder in (Path(text), UNITS / text):
        if (folder / "model.json").is_file():
            return folder
    have = sorted(p.parent.name for p in UNITS.glob("*/model.json"))
    raise InputError(
        f"model {text}",
        found="no model.json in it, nor such a unit",
        expected="a folder that `emadapt train` wrote, models:/NAME@ALIAS, or a trained unit: "
        f"{', '.join(have[:6]) or 'there is none here'}",
        do="Check the path.",
    )


def open_model(text: str | Path) -> Model:
    """Load a model for prediction.

    Raises:
        InputError: it is not there, damaged, of another version, or its backbone's weights cannot be had.
    """
    folder = find_model(str(text))
    segmenter, card = load_segmenter(folder)
    if segmenter.regime.oracle:
        raise InputError(
            folder,
            found=f"SAM 2 with prompts made of labels ({segmenter.regime.prompts})",
            do="Take another unit.",
            expected="a model that needs no labels to predict",
        )
    if missing := [key for key in NEEDED if key not in card]:
        raise InputError(
            folder / "model.json",
            found=f"no {', '.join(missing)}: a model of another version",
            expected="what this version's `emadapt train` writes",
            do="Train the unit again.",
        )
    regimes.merge(segmenter.backbone)
    return Model(folder, segmenter.to(device()), card)


def sha256_of(folder: Path) -> tuple[str, str]:
    """Of the trained tensors, and of the card."""
    tensors, card = (
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "model.json")
    )
    return tensors, card


def zoom_for(model: Model, voxel_nm: Voxel) -> tuple[str, tuple[float, float]]:
    """The training dataset whose pixels are the nearest in size, and the factors (y, x) that bring a slice to that size.

    They are 1 where the sizes differ by at most `TOLERANCE`, unless the model was trained on resampled slices
    (`align: voxel`), which then are resampled exactly.

    Raises:
        InputError: the sizes differ by more than `LIMIT`.
    """
    known, spec = model.voxels, model.segmenter.spec
    away = {
        name: max(
            abs(math.log(own / other)) for own, other in zip(voxel_nm[1:], v[1:], strict=True)
        )
        for name, v in known.items()
    }
    name = min(away, key=lambda key: away[key])
    target = known[name]
    if spec.align == "voxel":
        reference = model.card["align"]["reference"]["voxel_nm"]
        target = (reference[0], reference[1], reference[2])
    y, x = (round(own / other, 6) for own, other in zip(voxel_nm[1:], target[1:], strict=True))
    if not all(1 / LIMIT <= f <= LIMIT for f in (y, x)):
        raise InputError(
            f"voxels of {said(voxel_nm)} nm",
            found="pixels of quite another size than in training",
            expected=f"about {said(target)} nm (z y x; {name}), at most {LIMIT:g} times more or less",
            do="Correct it with --voxel-nm Z Y X, in nm; of an OME-Zarr take another --scale.",
        )
    if spec.align != "voxel" and all(abs(math.log(f)) <= math.log(1 + TOLERANCE) for f in (y, x)):
        return name, (1.0, 1.0)
    return name, (y, x)


def said(voxel_nm: Voxel) -> str:
    """A voxel size in words: 30 x 4 x 4."""
    return " x ".join(f"{v:g}" for v in voxel_nm)


def aligner_for(model: Model, statistics: Statistics | None, zoom: tuple[float, float]) -> Aligner:
    """What is done to slices beforehand: the model's alignment by the volume's own statistics, and `zoom`."""
    spec = model.segmenter.spec
    if not spec.align or spec.align == "voxel" or statistics is None:
        return dataclasses.replace(AS_IT_IS, zoom=zoom)
    known = model.card.get("align", {}).get("reference")
    return dataclasses.replace(
        METHODS[spec.align](statistics, Statistics(**known) if known else statistics), zoom=zoom
    )


def geometry_for(model: Model, native: tuple[int, int], dataset: str, aligner: Aligner) -> Geometry:
    """How slices of shape `native` (Y, X) enter the model, as those of its training dataset `dataset` did.

    A model of whole slices (`tile: 0`, `longest_edge`) sees slices of another shape at the pixel size of training, in tiles as
    large as the slices of training.

    Raises:
        InputError: the slices of training are not on record.
    """
    spec, patch = model.segmenter.spec, model.segmenter.backbone.arch.patch
    if not spec.longest_edge and spec.tile:
        return geometry(native, spec, patch, aligner)
    shapes = model.card.get("shape", {})
    if dataset not in shapes:
        raise InputError(
            model.folder / "model.json",
            found=f"no shape of {dataset}: a model of another version",
            expected="the shape of the slices that it was trained on",
            do="Train the unit again.",
        )
    trained = (int(shapes[dataset][1]), int(shapes[dataset][2]))
    if trained == native and aligner.zoom == (1.0, 1.0):
        return geometry(native, spec, patch, aligner)
    scale = spec.longest_edge / max(trained) if spec.longest_edge else spec.scale
    side = spec.tile or min(geometry(trained, spec, patch).tile)
    tiled = dataclasses.replace(
        spec,
        longest_edge=0,
        scale=scale,
        tile=side,
        overlap=spec.overlap or BackboneSettings.overlap,
    )
    return geometry(native, tiled, patch, aligner)
