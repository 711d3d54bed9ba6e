"""Metrics of one unit on the test slices of every dataset of the study, at the data's own resolution."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.data.ingest import Volume, open_volume
from emadapt.errors import InputError
from emadapt.files import file_md5, write_json, write_text
from emadapt.metrics.instances import Instances
from emadapt.metrics.pixels import (
    Mask,
    boundary_band,
    overlap_counts,
    pooled,
    summarise,
)
from emadapt.models import regimes
from emadapt.models.device import device
from emadapt.models.predict import Probability, predict_slices
from emadapt.models.segmenter import Segmenter, load_segmenter
from emadapt.models.tokens import plain_view
from emadapt.study.study import Study, Unit
from emadapt.tracking.publish import publish
from emadapt.training.model_card import EVALUATED, model_card
from emadapt.training.plan import unit_key
from emadapt.training.tracked import UNITS, finished_run
from emadapt.training.unseen import score_unseen, unseen_by

BOUNDARY_NM = 25.0
"""Width of the band inside the boundary that boundary IoU looks at: 5 pixels of 5 nm."""


def evaluate_unit(study: Study, unit: Unit, out: Path = EVALUATED) -> Path:
    """Score `unit` on every dataset of the study and write metrics.json, model-card.md and three overlays per dataset.

    A dataset of which it has seen no label is scored on slices of all of it as well (`unseen`).

    Raises:
        InputError: the unit was not trained, or a dataset not ingested.
    """
    folder = UNITS / unit.name
    segmenter, card = load_segmenter(folder)
    segmenter.to(device())
    if card["key"] != unit_key(study, unit):
        raise InputError(
            folder,
            found="a model of other settings, data or weights than those selected now",
            expected="a model of these",
            do=f"Run `dvc repro train@{unit.name}`.",
        )
    regime = study.regime_settings[unit.regime]
    cached = regime.pretrained_tokens or regime.kind == "lora_last_k"
    history = json.loads((folder / "history.json").read_text())
    found: dict[str, dict[str, Any]] = {}
    unseen = unseen_by(study, unit)
    apart = bool(segmenter.domains or segmenter.spec.align or regime.oracle)
    for volumes in _alike([open_volume(name) for name in study.tested], apart=apart):
        view = (
            plain_view(segmenter.backbone, segmenter.spec, volumes[0], cut=segmenter.cut)
            if cached
            else None
        )
        regimes.merge(segmenter.backbone)
        scored = score_volumes(segmenter, volumes, view, out / unit.name, unit.name)
        for volume, scores in zip(volumes, scored, strict=True):
            found[volume.name] = scores | _taken_for(segmenter)
            if volume.name in unseen:
                found[volume.name]["unseen"] = score_unseen(
                    segmenter, volume, scores["slices"], scores["counts"]
                )
        regimes.unmerge(segmenter.backbone)
    results = {name: found[name] for name in study.tested}
    for name, scores in results.items():
        (low, high), iou, n = scores["iou_ci95"], scores["iou"], scores["n"]
        whole = (
            f"; all of it, unseen: {scores['unseen']['iou']:.4f}, n = {scores['unseen']['n']}"
            if "unseen" in scores
            else ""
        )
        print(
            f"evaluate {unit.name} on {name}: IoU {iou:.4f} [{low:.4f}, {high:.4f}], n = {n} slices{whole}"
        )
    metrics = {
        "unit": unit.name,
        **dataclasses.asdict(unit),
        "model_md5": file_md5(folder / "model.safetensors"),
        "trainable_params": card["trainable_params"],
        "train_seconds": history["seconds"],
        "labelled": card["labelled"],
        "peak_mb": history["peak_mb"],
        "val_iou": card["val"]["iou"],
        "test": results,
    }
    path = out / unit.name / "metrics.json"
    write_json(path, metrics)
    write_text(path.parent / "model-card.md", model_card(card, metrics))
    publish(finished_run(study, unit, "evaluate", evaluated=out))
    return path


def _taken_for(segmenter: Segmenter) -> dict[str, Any]:
    """Which training dataset the volume that was scored last was taken for, where parts of the model belong to datasets."""
    if not segmenter.domains:
        return {}
    taken: dict[str, Any] = {
        "routed_to" if segmenter.regime.align == "routed" else "normalised_as": segmenter.domain
    }
    away = {name: round(distance, 6) for name, distance in segmenter.distances.items()}
    return taken | ({"distances": away} if away else {})


def _alike(volumes: list[Volume], *, apart: bool) -> list[list[Volume]]:
    """Volumes in groups of the same images and test slices, which differ in their labels alone; each on its own where `apart`."""
    groups: dict[Any, list[Volume]] = {}
    for volume in volumes:
        key = (
            volume.name
            if apart
            else (volume.manifest["image_md5"], *volume.manifest["voxel_nm"], *volume.split["test"])
        )
        groups.setdefault(key, []).append(volume)
    return list(groups.values())


def score_volumes(
    segmenter: Segmenter,
    volumes: list[Volume],
    view: Any,
    folder: Path,
    title: str,
) -> list[dict[str, Any]]:
    """Predict the test slices once, and score them on every volume's labels (see `Scores`).

    Args:
        segmenter: in its regime, adapters merged.
        volumes: of the same images, with the same test slices.
        view: cached tokens of the first, or None to run the backbone.
        folder: gets the overlays.
        title: of the overlays; dataset, slice and IoU are added.
    """
    several = [Scores(volume) for volume in volumes]
    for z, probability in predict_slices(segmenter, volumes[0], volumes[0].split["test"], view):
        for scores in several:
            scores.add(z, probability)
    for scores in several:
        scores.draw(folder, title)
    return [scores.summary() for scores in several]


class Scores:
    """Counts over the test slices of a volume, and the slice in the middle, the best and the worst (by IoU, with foreground)."""

    def __init__(self, volume: Volume) -> None:
        self.volume, self.slices = volume, volume.split["test"]
        self.band = BOUNDARY_NM / float(np.mean(volume.manifest["voxel_nm"][1:]))
        self.area: list[tuple[int, int, int]] = []
        self.boundary: list[tuple[int, int, int]] = []
        self.instances = Instances(self.slices, (volume.image.shape[1], volume.image.shape[2]))
        self.shown: dict[
            str, tuple[float, int, Mask]
        ] = {}  # overlay: IoU, slice, prediction; three slices in memory, not all

    def add(self, z: int, probability: Probability) -> None:
        """Score slice `z`."""
        predicted, label = probability > 0.5, np.asarray(self.volume.label[z]) > 0
        self.instances.add(z, predicted, label)
        self.area.append(overlap_counts(predicted, label))
        self.boundary.append(
            overlap_counts(boundary_band(predicted, self.band), boundary_band(label, self.band))
        )
        iou = pooled(np.asarray(self.area[-1]))["iou"]
        if z == self.slices[len(self.slices) // 2]:
            self.shown[""] = iou, z, predicted
        if label.any() and ("-best" not in self.shown or iou > self.shown["-best"][0]):
            self.shown["-best"] = iou, z, predicted
        if label.any() and ("-worst" not in self.shown or iou < self.shown["-worst"][0]):
            self.shown["-worst"] = iou, z, predicted

    def draw(self, folder: Path, title: str) -> None:
        """Write overlay-<dataset>.png, overlay-<dataset>-best.png and -worst.png."""
        from emadapt.training.overlays import overlay_png

        folder.mkdir(parents=True, exist_ok=True)
        for which, (iou, z, predicted) in self.shown.items():
            what = f"{title} on {self.volume.name}, {which[1:] + ' ' if which else ''}slice {z}, IoU {iou:.3f}"
            file = folder / f"overlay-{self.volume.name}{which}.png"
            overlay_png(
                file,
                np.asarray(self.volume.image[z]),
                np.asarray(self.volume.label[z]) > 0,
                predicted,
                what,
            )

    def summary(self) -> dict[str, Any]:
        """`n`; `iou`, `dice`, `boundary_iou` pooled over the slices, each with `<metric>_ci95`; `per_slice` and `counts`.

        `instances`, where there are not too many voxels (see `emadapt.metrics.instances`).
        """
        voxel_z_nm = self.volume.manifest["voxel_nm"][0]
        scores = summarise(
            np.asarray(self.area), np.asarray(self.boundary), voxel_z_nm, self.slices
        )
        if instances := self.instances.summary():
            scores["instances"] = instances
        return scores
