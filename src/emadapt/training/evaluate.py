"""Score one unit on every labelled dataset of the study."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from emadapt.data.ingest import Volume, open_volume
from emadapt.files import file_md5, write_json, write_text
from emadapt.metrics.classification import SCORES
from emadapt.models.adapters import merge, unmerge
from emadapt.models.classifier import Classifier
from emadapt.models.device import device
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import plain_view
from emadapt.study.study import Study, Unit
from emadapt.tracking.publish import publish
from emadapt.training.model_card import EVALUATED, model_card
from emadapt.training.model_files import load_unit
from emadapt.training.plan import check_planned, evaluate_plan
from emadapt.training.regimes import regime_of
from emadapt.training.regimes.images import check_classes
from emadapt.training.scores import score_images, score_volumes
from emadapt.training.tracked import UNITS, finished_run
from emadapt.training.unseen import score_unseen, unseen_by

IOU = Path("build/iou")
"""The headline of each unit, for `dvc metrics`."""


def evaluate_unit(study: Study, unit: Unit) -> Path:
    """Score `unit` on every dataset; write metrics.json, a model card and overlays.

    A dataset of which it has seen no label is scored on slices of all of it as well (`unseen`).

    Raises:
        InputError: the unit was not trained, or a dataset not ingested, or not as planned.
    """
    check_planned("evaluate", unit.name, lambda: evaluate_plan(study, unit))
    folder, out = UNITS / unit.name, EVALUATED / unit.name
    segmenter, card = load_unit(study, unit)
    metrics = {
        "unit": unit.name,
        **dataclasses.asdict(unit),
        "model_md5": file_md5(folder / "model.safetensors"),
        "key": card["key"],
        "made_from": _made_from(study, unit, card),
        "trainable_params": card["trainable_params"],
        "backbone_share": card["backbone_share"],
        "labelled": card["labelled"],
        f"val_{study.score}": card["val"][study.score],
        "test": _scores(study, unit, segmenter.to(device()), out),
    }
    write_json(out / "metrics.json", metrics)
    write_text(out / "model-card.md", model_card(card, metrics))
    headline = {name: round(own[study.score], 4) for name, own in metrics["test"].items()}
    write_json(IOU / f"{unit.name}.json", {study.score: headline})
    publish(finished_run(study, unit, "evaluate"))
    return out / "metrics.json"


def _made_from(study: Study, unit: Unit, card: dict[str, Any]) -> dict[str, str]:
    """Hashes of the data and weights, by what they are: equal in all units of a study."""
    own = card["data_md5"] | {name: open_volume(name).md5 for name in study.tested}
    weights = {f"weights of {unit.backbone}, {unit.regime}": card["weights"]["sha256"]}
    return weights | {f"dataset {name}": md5 for name, md5 in own.items()}


def _scores(study: Study, unit: Unit, segmenter: Segmenter, folder: Path) -> dict[str, Any]:
    """Scores by dataset; datasets of the same images are predicted once."""
    cached, found = regime_of(study, unit).cached, dict[str, dict[str, Any]]()
    tested = [open_volume(name) for name in study.tested]
    if of_images := isinstance(segmenter, Classifier):
        check_classes(tested, segmenter.classes, "those of the model")
    unseen = [] if of_images else unseen_by(study, unit, segmenter)
    apart = bool(of_images or segmenter.spec.align or segmenter.needs_labels)
    for volumes in _alike(tested, apart=apart):
        first, view = volumes[0], None
        if cached:
            view = plain_view(segmenter.backbone, segmenter.spec, first, cut=segmenter.cut)
        merge(segmenter.backbone)
        if isinstance(segmenter, Classifier):
            scored = [score_images(segmenter, first, view)]
        else:
            scored = score_volumes(segmenter, volumes, view, folder, unit.name)
        for volume, scores in zip(volumes, scored, strict=True):
            if volume.name in unseen:
                seen = scores["slices"], scores["counts"]
                scores["unseen"] = score_unseen(segmenter, volume, *seen)
            found[volume.name] = scores
        unmerge(segmenter.backbone)
    for name in study.tested:
        print(f"evaluate {unit.name} on {name}: {_in_words(found[name])}")
    return {name: found[name] for name in study.tested}


def _in_words(scores: dict[str, Any]) -> str:
    if "auroc" in scores:
        said = [f"{score} {scores[score]:.4f} {scores[f'{score}_ci95']}" for score in SCORES]
        return f"{', '.join(said)}, n = {scores['n']} images"
    low, high = scores["iou_ci95"]
    words = f"IoU {scores['iou']:.4f} [{low:.4f}, {high:.4f}], n = {scores['n']} slices"
    for name, own in scores.get("classes", {}).items():
        words += f"; {name} {own['iou']:.4f}"
    if whole := scores.get("unseen"):
        words += f"; all of it, unseen: {whole['iou']:.4f}, n = {whole['n']}"
    return words


def _alike(volumes: list[Volume], *, apart: bool) -> list[list[Volume]]:
    """Volumes in groups that differ in their labels alone; each by itself if `apart`."""
    groups: dict[Any, list[Volume]] = {}
    for volume in volumes:
        facts, test = volume.manifest, volume.split["test"]
        key = volume.name if apart else (facts["image_md5"], *facts["voxel_nm"], *test)
        groups.setdefault(key, []).append(volume)
    return list(groups.values())
