"""What evaluate, train and diagnose leave behind, made up: the report is tested on these."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emadapt.files import write_json
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import DatasetSettings, SplitSettings, TrainSetSettings
from emadapt.study.regimes import regime_settings
from emadapt.study.study import Study, Unit
from emadapt.study.sweep import SweepSettings
from emadapt.study.training import DiagnoseSettings, TrainSettings

Settings = dict[str, dict[str, Any]]

DATASETS: Settings = {
    "lucchi": {"layout": "lucchi", "voxel_nm": (5.0, 5.0, 5.0)},
    "vnc": {"layout": "vnc", "voxel_nm": (50.0, 4.6, 4.6)},
}
BACKBONES: Settings = {"dinov2_s": {"arch": "dinov2_s", "source": "pypi"}}
REGIMES: Settings = {"frozen": {"kind": "frozen"}, "lora": {"kind": "lora"}}
TRAIN_SETS: Settings = {
    "lucchi": {"datasets": ("lucchi",)},
    "vnc": {"datasets": ("vnc",)},
    "paired": {"datasets": ("lucchi", "vnc")},
}
FEW: Settings = {
    "lucchi_1": {"datasets": ("lucchi",), "slices": 1},
    "lucchi_4": {"datasets": ("lucchi",), "slices": 4},
    "lucchi_16": {"datasets": ("lucchi",), "slices": 16},
    "vnc_4": {"datasets": ("vnc",), "slices": 4},
}
WITH_RIDGE: Settings = {"frozen": {"kind": "frozen"}, "ridge": {"kind": "ridge"}, **REGIMES}
SLICES = {"lucchi": 32, "vnc": 12}
LABELLED = {"lucchi": 48, "vnc": 12}  # training slices, each of four tiles


def a_study(
    seeds: tuple[int, ...] = (0, 1),
    regimes: Settings = REGIMES,
    train_sets: Settings = TRAIN_SETS,
    backbones: Settings = BACKBONES,
    datasets: Settings = DATASETS,
) -> Study:
    """Two datasets, one backbone."""
    return Study(
        name="demo",
        datasets=tuple(datasets),
        backbones=tuple(backbones),
        regimes=tuple(regimes),
        train_sets=tuple(train_sets),
        seeds=seeds,
        dataset_settings={name: DatasetSettings(**own) for name, own in datasets.items()},
        train_set_settings={name: TrainSetSettings(**own) for name, own in train_sets.items()},
        backbone_settings={name: BackboneSettings(**own) for name, own in backbones.items()},
        regime_settings={name: regime_settings(**own) for name, own in regimes.items()},
        split=SplitSettings(),
        train=TrainSettings(),
        diagnose=DiagnoseSettings(),
        sweep=SweepSettings(),
    )


def labelled_of(spec: TrainSetSettings) -> dict[str, list[int]]:
    """`labelled` of metrics.json."""
    total = sum(LABELLED[name] for name in spec.datasets)
    slices = sum(int(spec.slices_of(name)) for name in spec.datasets)
    tiles = len(spec.datasets) * int(spec.crops)
    return {
        "slices": [slices or min(tiles, total) or total, total],
        "crops": [tiles or 4 * (slices or total), 4 * total],
    }


def iou_of(study: Study, unit: Unit, dataset: str) -> float:
    """0.8 with all labels, 0.05 more with lora, less with few
    or several datasets, 0.2 on what it was not trained on."""
    spec = study.train_set_settings[unit.train_set]
    lora = 0.05 * ("lora" in unit.regime)
    if dataset not in spec.datasets:
        return 0.2 + lora + 0.01 * unit.seed + 1e-9
    n, of = labelled_of(spec)["crops" if spec.crops else "slices"]
    costs = 0.15 if study.warm_start_of(unit) else 0.4  # one label instead of all
    lost = costs * (1 / n - 1 / of) ** 0.5 if spec.few else 0.0
    union = 0.01 * (len(spec.datasets) - 1)
    return 0.8 - lost - union + lora + 0.01 * unit.seed + 1e-9


def counts_of(iou: float, dataset: str) -> np.ndarray:
    """(slices, 3, 3, 3) whose IoU is `iou`; a place is as hard for one model as for the other."""
    hard = np.random.default_rng(0).normal(0, 0.03, (SLICES[dataset], 3, 3))
    both = 10_000_000 * (iou + hard - hard.mean())
    return np.stack([both, both, np.full_like(both, 10_000_000)], -1).round().astype(int)


def scores_of(iou: float, dataset: str) -> dict[str, Any]:
    """A test dataset in metrics.json."""
    counts, boundary = (counts_of(value, dataset).tolist() for value in (iou, iou - 0.1))
    scores = {"iou": iou, "dice": iou + 0.05, "boundary_iou": iou - 0.1}
    objects = {"ap50": 0.5, "ap75": 0.25, "pq": 0.4, "sq": 0.8, "rq": 0.5}
    return {
        "n": len(counts),
        **scores,
        **{f"{name}_ci95": [value - 0.02, value + 0.01] for name, value in scores.items()},
        "slices": list(range(100, 100 + len(counts))),
        "counts": counts,
        "boundary_counts": boundary,
        "instances": {
            **objects,
            **{"predicted": 9, "labelled": 7, "matched": 4},
            **{"split": 1, "merged": 2, "vi_split": 0.2, "vi_merge": 0.3},
        },
    }


def write_metrics(root: Path, study: Study) -> None:
    """build/evaluate: metrics and overlays."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 160), dtype=np.uint8))
    for unit in study.units():
        folder = root / "build/evaluate" / unit.name
        folder.mkdir(parents=True)
        metrics = {
            "unit": unit.name,
            "seed": unit.seed,
            "model_md5": "0" * 32,
            "trainable_params": 442368,
            "backbone_share": 0.02,
            "key": unit.name,
            "made_from": {f"dataset {name}": "d" * 32 for name in study.tested},
            "labelled": labelled_of(study.train_set_settings[unit.train_set]),
            "test": {name: scores_of(iou_of(study, unit, name), name) for name in study.tested},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        seconds = (3.0 if unit.regime == "ridge" else 100.0) + unit.seed
        cost = {"seconds": seconds, "peak_mb": 900 + unit.seed}
        write_json(root / "scratch/costs" / f"{unit.name}.json", cost)
        for dataset in study.tested:
            for which in ("", "-best", "-worst"):
                noise.save(folder / f"overlay-{dataset}{which}.png")


def write_models(root: Path, study: Study) -> None:
    """build/units: model.json as far as the page reads it."""
    weights = {"name": "a <name> & more", "sha256": "dc75" * 16, "source": "pypi"}
    for unit in study.units():
        folder = root / "build/units" / unit.name
        folder.mkdir(parents=True)
        (folder / "model.json").write_text(json.dumps({"weights": weights, "key": unit.name}))


def pair_entry(level: str = "token", frechet: float = 41.0) -> dict[str, Any]:
    """An entry of `pairs` or `controls`; the mean trace of the covariances is 100."""
    return {
        "a": "lucchi",
        "b": "vnc",
        "level": level,
        "n": [32, 18] if level == "image" else [128000, 90000],
        "slices": [32, 18],
        "frechet": frechet,
        "relative": frechet / 100,
        "frechet_inf": 0.9 * frechet,
        "ci95": [0.8 * frechet, 1.2 * frechet],
        "null": 10.0,
        "reads_as": "different" if frechet > 10 else "same",
        "probe": {"balanced_accuracy": 0.99, "auroc": 1.0, "p_value": 0.01, "n": [1500, 1500]},
        "knn_mixing": 0.02,
    }


def a_card(study: Study, regime: str) -> dict[str, Any]:
    """reports/domain/<backbone>-<regime>.json; distances differ between models."""
    models: list[dict[str, Any]] = [{"train_set": None, "seed": None}]
    if regime != "frozen":
        units = [unit for unit in study.units() if unit.regime == regime]
        models = [{"train_set": unit.train_set, "seed": unit.seed} for unit in units]
    pairs, segmentation = [], []
    for number, model in enumerate(models):
        for step, level in enumerate(("token", "image")):
            pairs.append(model | pair_entry(level, 41.0 - 3 * number + 10 * step))
        for train in study.datasets:
            for test in study.datasets:
                way = model | {"train": train, "test": test}
                segmentation.append(way | {"knn_iou": 0.5 - 0.01 * number})
    controls = {"pixels": [pair_entry("pixel")]}
    return {
        "study": study.name,
        "backbone": "dinov2_s",
        "regime": regime,
        "pairs": pairs,
        "segmentation": segmentation,
        "controls": controls if regime == "frozen" else {},
    }


def write_domain(root: Path, study: Study) -> None:
    """reports/domain: a file and one figure per regime."""
    pixels = np.random.default_rng(1).integers(0, 256, (90, 1400, 3), dtype=np.uint8)
    for regime in study.regimes:
        folder = root / "reports/domain" / f"dinov2_s-{regime}"
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "pca.png")
        folder.with_suffix(".json").write_text(json.dumps(a_card(study, regime)))
