"""A unit as a run in MLflow, from the files that training and evaluation wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emadapt.data.ingest import INGESTED, Volume, open_volume
from emadapt.files import file_md5
from emadapt.study.regimes import REGIME_SETTINGS
from emadapt.study.study import Study, Unit
from emadapt.tracking.provenance import provenance_tags
from emadapt.tracking.publish import publish
from emadapt.tracking.run import MODEL, Dataset, Model, Run
from emadapt.training.costs import cost_of
from emadapt.training.model_card import EVALUATED
from emadapt.training.plan import BACKBONE_ONLY

UNITS = Path("build/units")


def unit_run(study: Study, unit: Unit, stage: str) -> Run:
    """The run of a unit with its tags and settings, and no results; `stage` makes it if need be."""
    tags = {
        "unit": unit.name,
        "backbone": unit.backbone,
        "regime": unit.regime,
        "train_set": unit.train_set,
        "seed": str(unit.seed),
        "study": study.name,
        "stage": stage,
        **provenance_tags(Path()),
    }
    datasets = study.train_set_settings[unit.train_set].datasets
    if wrong := [name for name in datasets if study.dataset_settings[name].mispaired]:
        tags["pairing.lexicographic"] = ",".join(wrong)
    return Run(study.name, unit.name, tags, settings_of(study.describe(unit)))


def settings_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Of all settings of a unit those that its kind of regime has, each of them once."""
    kind = REGIME_SETTINGS[described["regime"]["kind"]]
    regime = kind.model_construct(**described["regime"])  # unchecked: an earlier version wrote it
    train = {k: v for k, v in described["train"].items() if k not in regime.unused}
    found = {
        **described,
        "train": train,
        "regime": {k: v for k, v in described["regime"].items() if k not in train},
    }
    if not regime.uses_backbone:
        own = described["backbone"].items()
        found["backbone"] = {k: v for k, v in own if k not in BACKBONE_ONLY}
    if "source" in described:
        found["source"] = settings_of(described["source"])
    return found


def publish_units(study: Study) -> tuple[int, int]:
    """Publish every trained unit of a study, as after `dvc pull`: how many it has, and lacks."""
    units = [unit for unit in study.units() if (UNITS / unit.name / "model.json").is_file()]
    sent = sum(bool(publish(finished_run(study, unit, "track"))) for unit in units)
    return sent, len(units) - sent


def finished_run(study: Study, unit: Unit, stage: str) -> Run:
    """The run of a trained unit, with its history, its model and, if it was evaluated, its scores.

    It goes on with the run that trained the model. Where there is none, as for a model from DVC's
    cache, the new one says so.

    Raises:
        OSError: the unit is not trained.
    """
    run = unit_run(study, unit, stage)
    run.same, run.origin = ("unit", "model.md5"), "restored"
    add_model(run, UNITS / unit.name)
    if (EVALUATED / unit.name / "metrics.json").is_file():
        _add_scores(run, EVALUATED / unit.name)
    return run


def add_model(run: Run, folder: Path) -> None:
    """Add what training wrote: each epoch's numbers, the final ones, and the model."""
    card = json.loads((folder / "model.json").read_text())
    history = json.loads((folder / "history.json").read_text())
    for epoch, numbers in enumerate(history["epochs"], 1):
        run.log(numbers, epoch)
    run.log({f"val/best_{name}": value for name, value in card["val"].items()})
    run.log(cost_of(card["key"]) | {"trainable_params": card["trainable_params"]})
    run.params = settings_of(card["settings"])
    run.tags |= {
        "weights.source": card["weights"]["source"],
        "weights.sha256": card["weights"]["sha256"],
    }
    add_files(run, folder, card)


def add_files(run: Run, folder: Path, card: Mapping[str, Any]) -> None:
    """Add a model's folder as MLflow's model, see `mlflow.pyfunc.load_model`."""
    voxel = next(iter(card["voxel_nm"].values()))
    run.model = Model("emadapt.segment.served", [float(side) for side in voxel])
    run.tags["model.md5"] = file_md5(folder / "model.safetensors")
    for name in ("model.safetensors", "model.json"):
        run.artifacts[f"{MODEL}/{name}"] = folder / name


def _add_scores(run: Run, folder: Path) -> None:
    """Add what evaluation wrote: scores on each test dataset, overlays and the model card."""
    scores: dict[str, dict[str, Any]] = json.loads((folder / "metrics.json").read_text())["test"]
    for dataset, own in scores.items():
        values = {name: own[name] for name in own if f"{name}_ci95" in own}
        if objects := own.get("instances"):
            values |= {name: objects[name] for name in ("ap50", "pq")}
        run.log({f"test/{name}.{dataset}": value for name, value in values.items()})
        by_class = own.get("classes", {}).items()
        run.log({f"test/iou.{dataset}.{name}": found["iou"] for name, found in by_class})
    ingested = [name for name in scores if (INGESTED / name / "manifest.json").is_file()]
    run.datasets += [as_dataset(open_volume(name), "test") for name in ingested]
    run.artifacts["metrics.json"] = folder / "metrics.json"
    run.artifacts |= {f"overlays/{path.name}": path for path in folder.glob("overlay-*.png")}
    if (folder / "model-card.md").is_file():
        run.artifacts[f"{MODEL}/model-card.md"] = folder / "model-card.md"


def as_dataset(volume: Volume, context: str) -> Dataset:
    """A volume as MLflow's dataset; `context` is what it is read for."""
    return Dataset(volume.name, volume.md5, str(INGESTED / volume.name), context)
