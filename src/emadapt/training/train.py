"""Train one unit. It resumes exactly; on a CPU the same unit gives the same bytes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emadapt
from emadapt.data.align import described as alignment_of
from emadapt.files import file_md5, whole_folder, write_json
from emadapt.models import parallel
from emadapt.models.device import device, peak_mb, resolve_precision
from emadapt.models.token_statistics import token_facts
from emadapt.study.study import SAID, Study, Unit
from emadapt.tracking.publish import live
from emadapt.tracking.run import Run
from emadapt.training import devices, duplicates
from emadapt.training.costs import cost_of, note_cost
from emadapt.training.fit import CHECKPOINT
from emadapt.training.inputs import Inputs, OnEpoch, Progress
from emadapt.training.model_card import sources_of
from emadapt.training.model_files import save_model
from emadapt.training.plan import check_planned, train_plan, unit_key
from emadapt.training.prepare import SCRATCH, behind_folders, check_processes, prepare
from emadapt.training.regimes import regime_of
from emadapt.training.regimes.regime import Regime
from emadapt.training.self_training import verdict
from emadapt.training.tracked import UNITS, add_model, as_dataset, unit_run
from emadapt.training.validate import validate

ADAPTED = Path("build/adapted")
CURVES = Path("build/curves")
"""The metrics of each epoch, for `dvc plots`; `score` is the headline on validation data."""


@dataclass(frozen=True)
class Trained:
    """A unit whose model is fitted; `scores` are those of all validation slices."""

    key: str
    regime: Regime
    inputs: Inputs
    progress: Progress
    scores: dict[str, float]


def train_unit(study: Study, unit: Unit) -> Path:
    """Train `unit`, or go on where it was stopped.

    Of several processes the first one writes and logs.

    Returns:
        build/units/<unit>/ with model.safetensors, model.json and history.json.

    Raises:
        EmadaptError: the loss is not finite, or the inputs are not there or not those planned.
    """
    check_planned("train", unit.name, lambda: train_plan(study, unit))
    regime = regime_of(study, unit)
    devices.join()
    check_processes(unit, regime, parallel.size())
    key = unit_key(study, unit)
    run = _run(study, unit, key, regime)
    with live(run) as log_epoch, duplicates.turn(key):
        trained = _trained(study, unit, key, regime, run, log_epoch)
        processes, is_first = parallel.size(), parallel.rank() == 0
        devices.leave()
        if not is_first:
            return UNITS / unit.name
        facts = _facts(study, trained)
        if processes > 1:
            run.results["processes"] = facts["processes"] = processes
        folder = _publish(trained, facts)
        _note_adapted(study, unit, folder)
        add_model(run, folder)
    return folder


def _run(study: Study, unit: Unit, key: str, regime: Regime) -> Run:
    """The unit's run in MLflow; a training that goes on goes on with its run."""
    run = unit_run(study, unit, "train")
    weights = regime.backbone.provenance
    run.tags["unit.key"] = key
    run.tags |= {"weights.source": weights.source, "weights.sha256": weights.sha256}
    if (SCRATCH / unit.name / key / CHECKPOINT).is_file():
        run.same = ("unit", "unit.key")
    run.muted, run.watched = parallel.rank() > 0, device().type == "cuda"
    return run


def _trained(
    study: Study, unit: Unit, key: str, regime: Regime, run: Run, log_epoch: OnEpoch
) -> Trained:
    """Fit the model, or take over that of a finished unit with the same key."""
    inputs = prepare(study, unit, regime)
    for context, volumes in (("training", inputs.volumes), ("unlabelled", inputs.unlabelled)):
        run.datasets += [as_dataset(volume, context) for volume in volumes]
    same = duplicates.find(key, unit.name) if parallel.size() == 1 else None
    if same:
        run.results["copy_of"] = same.name
        print(f"train: {same.name} is the same model: copied")
        return Trained(key, regime, inputs, *duplicates.take_over(same, inputs.segmenter))
    progress = regime.fit(inputs, SCRATCH / unit.name / key, log_epoch)
    note_cost(key, progress.seconds, peak_mb())
    return Trained(key, regime, inputs, progress, validate(inputs, every=0))


def _note_adapted(study: Study, unit: Unit, folder: Path) -> None:
    """Write the md5 of a model with tokens of its own, on which `diagnose` depends."""
    own = study.tokens_of(unit.regime) == unit.regime
    adapted = own and not study.regime_settings[unit.regime].on_pretrained_tokens
    md5 = file_md5(folder / "model.safetensors") if adapted else None
    path = ADAPTED / f"{unit.backbone}-{unit.regime}" / f"{unit.name}.json"
    write_json(path, {"model_md5": md5})


def _facts(study: Study, trained: Trained) -> dict[str, Any]:
    """What model.json says besides how to build the model."""
    inputs, unit = trained.inputs, trained.inputs.unit
    volumes, shown = inputs.volumes, [*inputs.volumes, *inputs.unlabelled]
    views = [own[0] for own in inputs.views]
    facts = {
        "labelled": inputs.labelled.counts,
        "unit": unit.name,
        "key": trained.key,
        "study": study.name,
        "settings": study.describe(unit),
        "threshold": 0.5,
        "data_md5": {v.name: v.md5 for v in volumes},
        "sources": sources_of(study.describe(unit)),
        "val": trained.scores,
        "best_epoch": trained.progress.best_epoch,
        "trainable_params": inputs.segmenter.n_trainable(),
        "backbone_share": round(inputs.segmenter.share(), 6),
        "precision": resolve_precision(inputs.train.precision),
        "version": emadapt.__version__,
        "shape": {v.name: list(v.image.shape) for v in shown},
        "voxel_nm": {v.name: v.manifest["voxel_nm"] for v in shown},
    }
    for name in ("intensity", "pairing"):
        facts[name] = {v.name: v.manifest[name] for v in volumes}
    optional = {
        "tokens": {} if study.classifies else token_facts(inputs.segmenter, volumes, views),
        "align": alignment_of(volumes, trained.regime.spec),
        "unlabelled_md5": {v.name: v.md5 for v in inputs.unlabelled},
        "started_from": behind_folders(study, unit),
        "check": verdict(trained.progress.history),
    }
    return facts | {name: value for name, value in optional.items() if value}


def _publish(trained: Trained, facts: dict[str, Any]) -> Path:
    """Write the unit's folder and its curve; print what it took."""
    name, segmenter, progress = facts["unit"], trained.inputs.segmenter, trained.progress
    folder = UNITS / name
    with whole_folder(folder) as temporary:
        save_model(segmenter, trained.regime, temporary, facts)
        write_json(temporary / "history.json", {"epochs": progress.history})
    score = segmenter.score
    curve = [
        {"epoch": n, "score": metrics[f"val/{score}"], **metrics}
        for n, metrics in enumerate(progress.history, 1)
    ]
    write_json(CURVES / f"{name}.json", curve)
    cost = cost_of(trained.key)
    took = f", {cost['seconds']:.0f} s, peak {cost['peak_mb']:.0f} MB" if cost else ""
    print(
        f"train {name}: val {SAID[score]} {trained.scores[score]:.4f} "
        f"(epoch {progress.best_epoch + 1}), "
        f"{segmenter.n_trainable():,} trained parameters, "
        f"of the backbone {segmenter.share():.2%}{took}"
    )
    if odd := facts.get("check"):
        print(f"train {name}: on images without labels {odd}", file=sys.stderr)
    return folder
