"""Metrics of one unit on the test slices of every dataset of the study, at the data's own resolution."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt import tracking
from emadapt.config import Study, Unit, not_default
from emadapt.data.ingest import INGESTED, Volume, open_volume
from emadapt.device import device
from emadapt.errors import InputError
from emadapt.files import write_json
from emadapt.models import regimes
from emadapt.models.segmenter import Segmenter, load_segmenter
from emadapt.predict import predict_slices
from emadapt.tokens import token_views
from emadapt.train import UNITS, file_md5, unit_tags

EVALUATED = Path("build/evaluate")
BOUNDARY_NM = 25.0
"""Width of the band inside the boundary that boundary IoU looks at: 5 pixels of 5 nm."""
BLOCK_NM = 100.0
"""Thickness of the blocks of slices that the bootstrap draws, unless that leaves fewer than four."""
REPLICATES = 2000

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


def evaluate_unit(study: Study, unit: Unit, out: Path = EVALUATED) -> Path:
    """Score `unit` on every dataset of the study and write metrics.json and three overlays per dataset.

    Raises:
        InputError: the unit was not trained, or a dataset not ingested.
    """
    folder = UNITS / unit.name
    segmenter, card = load_segmenter(folder)
    segmenter.to(device())
    if not_default(card["settings"]) != not_default(study.describe(unit)):
        raise InputError(folder, found="a model that was trained under other settings than params.yaml has",
                         expected="a model of the settings that are selected now",
                         do=f"Run `dvc repro train@{unit.name}`.")  # fmt: skip
    regime = study.regime_specs[unit.regime]
    cached = regime.pretrained_tokens or regime.kind == "lora_last_k"
    history = json.loads((folder / "history.json").read_text())
    results = {}
    for name in study.datasets:
        volume = open_volume(name)
        view = token_views(segmenter.backbone, segmenter.spec, volume, range(1), cut=segmenter.cut)[0] if cached else None
        regimes.merge(segmenter.backbone)
        results[name] = score_volume(segmenter, volume, view, out / unit.name, f"{unit.name} on {name}")
        regimes.unmerge(segmenter.backbone)
        if segmenter.domains:
            results[name]["routed_to" if regime.align == "routed" else "normalised_as"] = segmenter.domain
        if segmenter.distances:
            results[name]["distances"] = {known: round(away, 6) for known, away in segmenter.distances.items()}
        low, high = results[name]["iou_ci95"]
        iou, n = results[name]["iou"], results[name]["n"]
        print(f"evaluate {unit.name} on {name}: IoU {iou:.4f} [{low:.4f}, {high:.4f}], n = {n} slices")
    metrics = {
        "unit": unit.name, **dataclasses.asdict(unit),
        "model_md5": file_md5(folder / "model.safetensors"), "trainable_params": card["trainable_params"],
        "train_seconds": history["seconds"], "labelled": card["labelled"],
        "peak_mb": history["peak_mb"], "val_iou": card["val"]["iou"], "test": results,
    }  # fmt: skip
    path = out / unit.name / "metrics.json"
    write_json(path, metrics)
    _track(study, unit, card, metrics, path)
    return path


def _track(study: Study, unit: Unit, card: dict[str, Any], metrics: dict[str, Any], path: Path) -> None:
    """Add the test metrics to the run that trained the model; where there is none (a restored model) make one that says so."""
    tags = {**unit_tags(study, unit, "evaluate"), "model.md5": metrics["model_md5"], "weights.source": card["weights"]["source"],
            "weights.sha256": card["weights"]["sha256"], "trainable_params": card["trainable_params"]}  # fmt: skip
    params = study.describe(unit)
    with tracking.open_run(Path(), study.name, tags, params, resume_by=("unit", "model.md5"), origin="restored") as tracker:
        for name, scores in metrics["test"].items():
            volume = open_volume(name)
            tracker.log_dataset(name, volume.md5, str(INGESTED / name), "test")
            tracker.log_metrics({f"test/{k}.{name}": scores[k] for k in ("iou", "dice", "boundary_iou")}, step=0)
            if "routed_to" in scores:
                tracker.set_tags({f"routed_to.{name}": scores["routed_to"]})
            for which in ("", "-best", "-worst"):
                if (overlay := path.parent / f"overlay-{name}{which}.png").is_file():
                    tracker.log_artifact(overlay, "overlays")
        tracker.log_artifact(path)


def score_volume(segmenter: Segmenter, volume: Volume, view: Any, folder: Path, title: str) -> dict[str, Any]:
    """Predict the test slices, count, and draw the slice in the middle, the best and the worst (by IoU, with foreground).

    Args:
        segmenter: in its regime, adapters merged.
        volume: the dataset.
        view: its cached tokens, or None to run the backbone.
        folder: gets overlay-<dataset>.png, overlay-<dataset>-best.png and -worst.png.
        title: of the overlays; the slice and its IoU are added.

    Returns:
        `n`; `iou`, `dice`, `boundary_iou` pooled over the slices, each with `<metric>_ci95`; `per_slice` values and `counts`.
    """
    from emadapt.figures import overlay_png

    slices = volume.split["test"]
    band = BOUNDARY_NM / float(np.mean(volume.manifest["voxel_nm"][1:]))
    area, boundary = [], []
    shown: dict[str, tuple[float, int, Mask]] = {}  # which overlay: IoU, slice, prediction; three slices in memory, not all
    for z, probability in predict_slices(segmenter, volume, slices, view):
        predicted, label = probability > 0.5, np.asarray(volume.label[z]) > 0
        area.append(overlap_counts(predicted, label))
        boundary.append(overlap_counts(boundary_band(predicted, band), boundary_band(label, band)))
        iou = pooled(np.asarray(area[-1]))["iou"]
        if z == slices[len(slices) // 2]:
            shown[""] = iou, z, predicted
        if label.any() and ("-best" not in shown or iou > shown["-best"][0]):
            shown["-best"] = iou, z, predicted
        if label.any() and ("-worst" not in shown or iou < shown["-worst"][0]):
            shown["-worst"] = iou, z, predicted
    folder.mkdir(parents=True, exist_ok=True)
    for which, (iou, z, predicted) in shown.items():
        what = f"{title}, {which[1:] + ' ' if which else ''}slice {z}, IoU {iou:.3f}"
        file = folder / f"overlay-{volume.name}{which}.png"
        overlay_png(file, np.asarray(volume.image[z]), np.asarray(volume.label[z]) > 0, predicted, what)
    return summarise(np.asarray(area), np.asarray(boundary), volume.manifest["voxel_nm"][0], slices)


def overlap_counts(predicted: Mask, label: Mask) -> tuple[int, int, int]:
    """Pixels that are (in both, predicted, labelled)."""
    return int((predicted & label).sum()), int(predicted.sum()), int(label.sum())


def boundary_band(mask: Mask, width: float) -> Mask:
    """Foreground within `width` pixels of its own boundary (Cheng et al. 2021, Boundary IoU, eq. 2); the image's edge is none."""
    from scipy.ndimage import distance_transform_edt

    if mask.all() or not mask.any():
        return np.zeros_like(mask)
    return np.asarray(mask & (distance_transform_edt(mask) <= width))


def pooled(counts: Counts) -> dict[str, float]:
    """IoU and Dice of summed counts (..., 3); an empty label and an empty prediction agree (1.0)."""
    both, predicted, labelled = (int(c) for c in counts.reshape(-1, 3).sum(0))
    union = predicted + labelled - both
    return {"iou": both / union if union else 1.0, "dice": 2 * both / (predicted + labelled) if union else 1.0}


def block_bootstrap(counts: Counts, block: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Pooled IoU and Dice under resampling of blocks of neighbouring slices (Künsch 1989, moving blocks).

    Args:
        counts: (slices, 3) from `overlap_counts`, in the order of z.
        block: slices a block.
        seed: of the resampling.

    Returns:
        (replicates, 2): IoU, Dice.
    """
    n = len(counts)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, n - block + 1, size=(REPLICATES, math.ceil(n / block)))
    chosen = (starts[..., None] + np.arange(block)).reshape(REPLICATES, -1)[:, :n]
    both, predicted, labelled = np.moveaxis(counts[chosen].sum(1).astype(float), -1, 0)
    size = predicted + labelled
    iou = np.divide(both, size - both, out=np.ones_like(both), where=size > both)
    return np.stack([iou, np.divide(2 * both, size, out=np.ones_like(both), where=size > 0)], 1)


def summarise(area: Counts, boundary: Counts, voxel_z_nm: float, slices: list[int]) -> dict[str, Any]:
    """Pooled metrics with 95 % intervals, and per slice the values and pixels that are (in both, predicted, labelled)."""
    n = len(slices)
    block = max(1, min(math.ceil(BLOCK_NM / voxel_z_nm), n // 4))
    draws, boundary_draws = block_bootstrap(area, block), block_bootstrap(boundary, block)
    whole = pooled(area)
    values = {"iou": whole["iou"], "dice": whole["dice"], "boundary_iou": pooled(boundary)["iou"]}
    columns = {"iou": draws[:, 0], "dice": draws[:, 1], "boundary_iou": boundary_draws[:, 0]}
    return {
        "n": n,
        "block_slices": block,
        **{k: round(v, 6) for k, v in values.items()},
        **{f"{k}_ci95": [round(float(q), 6) for q in np.percentile(c, [2.5, 97.5])] for k, c in columns.items()},
        "slices": slices,
        "counts": area.tolist(),
        "per_slice": {
            "iou": [round(pooled(c)["iou"], 6) for c in area],
            "dice": [round(pooled(c)["dice"], 6) for c in area],
            "boundary_iou": [round(pooled(c)["iou"], 6) for c in boundary],
        },
    }
