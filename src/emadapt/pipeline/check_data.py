"""Whether the raw data of a study can be read, and is enough for what the study wants of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.data.foreground import class_ids, foreground_share
from emadapt.data.images import find_images, read_image, split_images
from emadapt.data.ingest import INGESTED, check_pair, check_sizes, empty_or_full
from emadapt.data.label_values import LabelValues
from emadapt.data.labelled import amount
from emadapt.data.layouts import Part, parts_of
from emadapt.data.splits import (
    Split,
    check_depth,
    ends_of,
    evenly_spaced,
    runs_of,
    split_of,
    starts_in,
)
from emadapt.data.tiles import Geometry, geometry
from emadapt.data.unversioned import check_unchanged
from emadapt.errors import EmadaptError, InputError
from emadapt.models.archs import get_arch
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import DatasetSettings, TrainSetSettings
from emadapt.study.regimes import RegimeSettings
from emadapt.study.study import Study
from emadapt.volumes.source import tell

LABELS = 8
"""Parts, and slices of a part, whose labels are looked at; `ingest` reads all."""

Runs = list[list[int]]
"""Training slices in runs of neighbours."""


def problems_of_dataset(study: Study, name: str, data: Path) -> list[str]:
    """A line for each problem: pairing, split, labels wanted and some of their values."""
    spec = study.dataset_settings[name]
    root = Path(spec.path) if spec.path else data / name
    if spec.task == "classification":
        return said(_check_images, study, name, root, data)
    try:
        parts = parts_of(root, spec)
        check_sizes(parts, spec.voxel_nm)
        split = split_of(spec, study.split, parts, str(root))
        runs = runs_of(split["train"], ends_of(parts))
        _check_slices(study, name, split, runs, root)
        check_unchanged(study, name, INGESTED / name / "manifest.json", data)
        most = 1 if spec.synthetic else LABELS  # a domain takes seconds to make
        some = [parts[k] for k in evenly_spaced(len(parts), most)]
        shapes = [_check_part(part, spec, name) for part in some]
    except EmadaptError as error:
        return [str(error)]
    wanted = _wanted_labels(study, name, shapes[-1], split["train"], runs)
    return [line for where, n, total in wanted for line in said(amount, n, total, where)]


def said(check: Callable[..., object], *given: Any) -> list[str]:
    """What a check raises, as a problem."""
    try:
        check(*given)
    except EmadaptError as error:
        return [str(error)]
    return []


def _check_images(study: Study, name: str, root: Path, data: Path) -> None:
    """Whether the images can be found, split and drawn; some are read."""
    images = find_images(root)
    split = split_images(images, study.split, root)
    check_unchanged(study, name, INGESTED / name / "manifest.json", data)
    for n in evenly_spaced(len(images), LABELS):
        read_image(images[n].file)
    labels = [images[n].label for n in split["train"]]
    for train_set, wanted in _train_sets(study, name).items():
        for label in sorted(set(labels)):
            where = f"train_sets.{train_set}.slices of {name}, class {label}"
            amount(wanted.slices_of(name), labels.count(label), where)


def _check_slices(study: Study, name: str, split: Split, runs: Runs, root: Path) -> None:
    """Enough slices for the blocks of the diagnosis, and for the depth of samples in 3D."""
    slices = sum(map(len, split.values()))
    if len(study.datasets) > 1 and slices < study.diagnose.blocks:
        raise InputError(
            root,
            found=f"{slices} slices in train, val and test",
            expected=f"at least {study.diagnose.blocks}, one for each block of diagnose",
            do="Lower `diagnose.blocks`.",
        )
    if not _train_sets(study, name):
        return
    for regime in study.regimes:
        if patch := study.regime_settings[regime].sample:
            check_depth(f"{root}, regime {regime}", runs, patch)


def _check_part(part: Part, spec: DatasetSettings, name: str) -> tuple[int, int]:
    """Look at the first slice of a part and at some labels; the slice's shape."""
    image = part.images.read(0, 1)[0]
    if part.labels is not None:
        values, shares, chosen = LabelValues(spec), [], evenly_spaced(part.depth, LABELS)
        for z, label in zip(chosen, part.labels.slices(chosen), strict=True):
            values.add(label)
            mask = class_ids(label, spec.rules, part.labels.where(z), spec.ignore)
            shares.append(foreground_share(mask))
            check_pair(image, label, part.labels.where(z))
        lines = values.check(f"labels of {name}, slices {', '.join(map(str, chosen))}")
        tell(f"check {name}", lines + empty_or_full(np.array(shares), chosen))
    return image.shape[0], image.shape[1]


def _wanted_labels(
    study: Study, name: str, native: tuple[int, int], train: list[int], runs: Runs
) -> Iterator[tuple[str, int | str, int]]:
    """What training sets want labelled of a dataset: where, how much, and how much there is.

    Tiles of a 2D U-Net and after resampling to another voxel size are counted in training.
    """
    for train_set, wanted in _train_sets(study, name).items():
        where = f"train_sets.{train_set}"
        places = runs if study.dataset_settings[name].of_volumes else train
        yield f"{where}.slices of {name}", wanted.slices_of(name), len(places)
        if not wanted.crops:
            continue
        for backbone in study.backbones:
            spec = study.backbone_settings[backbone]
            for regime in map(study.regime_settings.__getitem__, study.regimes):
                if spec.pixel_nm or not (regime.uses_backbone or regime.sample):
                    continue
                starts = starts_in(runs, regime.depth, apart=True)
                total = len(starts) * len(_tiling(native, spec, regime).corners(0.0))
                yield f"{where}.crops of {name} under {backbone}", wanted.crops, total


def _tiling(native: tuple[int, int], spec: BackboneSettings, regime: RegimeSettings) -> Geometry:
    """How slices are cut into samples of a regime."""
    if not regime.sample:
        return geometry(native, spec, get_arch(spec.arch).patch)
    side = regime.sample[1:]
    return dataclasses.replace(geometry(native, spec.changed(tile=max(side)), 1), tile=side)


def _train_sets(study: Study, name: str) -> dict[str, TrainSetSettings]:
    """The study's training sets in which a dataset is labelled."""
    every = {train_set: study.train_set_settings[train_set] for train_set in study.train_sets}
    return {train_set: spec for train_set, spec in every.items() if name in spec.datasets}
