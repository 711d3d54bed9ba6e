"""The stage `plan`: what each later stage depends on, in small files that DVC can watch.

A stage of DVC names its dependencies by a fixed pattern, but which datasets and weights a unit
needs is up to the settings. So this stage writes one file for each entry of the token cache, each
unit, each evaluation and each diagnosis, with all that it depends on and nothing else. A change
then reruns what it must, and no more. The key of a unit is the hash of its plan, but for what the
model card says of the data.

No torch here: the stage runs with every `dvc repro`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import emadapt
from emadapt.data.ingest import INGESTED
from emadapt.data.unversioned import check_unchanged
from emadapt.errors import InputError
from emadapt.files import read_json, whole_folder, write_json
from emadapt.models.identity import backbone_weights, model_folder, system_weights
from emadapt.study.backbones import BackboneSettings
from emadapt.study.keys import affecting, digest
from emadapt.study.regimes import PretrainedSystemSettings, RegimeSettings
from emadapt.study.study import Study, Unit

Plan = dict[str, Any]

PLAN = Path("build/plan")
ASIDE = Path("build/aside")
"""Results of what the study does not have now."""

REFERENCE = {"reference"}
"""A backbone's setting that is in a plan by the hash of the dataset that it names."""
BACKBONE_ONLY = {"arch", "source", "file", "blocks", "views", "normalisation"}
"""Settings of a backbone that change nothing where a regime has none."""
SYSTEMS_OWN = {"scale", "longest_edge", "tile", "context"}
"""Settings of a backbone that a pretrained system replaces by its own."""
ON_CARD = ("intensity", "voxel_nm", "pairing", "source", "classes")
"""Facts on a dataset that model.json repeats."""
TRAINING = {"epochs", "head", "head_lr", "adapter_lr", "weight_decay", "warm_start", "weights"}
"""Settings of a regime that are in a plan elsewhere."""


def tokens_plan(study: Study, backbone: str, dataset: str) -> Plan:
    """What the cached tokens of a dataset depend on; empty if no regime has a backbone."""
    if not any(study.regime_settings[name].uses_backbone for name in study.regimes):
        return {}
    spec = study.backbone_settings[backbone]
    return {
        "backbone": _without(affecting(spec, "tokens"), REFERENCE),
        "weights": backbone_weights(spec),
        "data": _seen_as(spec, dataset),
        "reference": _reference(spec),
    }


def unit_plan(study: Study, unit: Unit) -> Plan:
    """What the trained weights of a unit depend on.

    No name of the unit, its backbone, regime or training set is in it: units with the same plan are
    the same model. Of a regime that draws nothing, the seed is left out.
    """
    regime = study.regime_settings[unit.regime]
    train_set = study.train_set_settings[unit.train_set]
    spec = study.backbone_settings[unit.backbone]
    drawn = regime.trains and (regime.draws or train_set.few)
    return {
        "version": emadapt.__version__,
        "seed": unit.seed if drawn else None,
        "backbone": _without(affecting(spec, "weights"), _unused(regime)),
        "reference": _reference(spec),
        "regime": _without(affecting(regime, "weights"), TRAINING),
        "train": _without(affecting(study.train_settings(unit), "weights"), regime.unused),
        "train_set": train_set.model_dump(mode="json", include={"slices", "crops", "sampling"}),
        "data": [[name, *_seen_as(spec, name)] for name in train_set.datasets],
        "unlabelled": [
            [name, data_md5(name), *_manifest(name)["voxel_nm"]]  # near sections are paired
            for name in study.unlabelled_of(unit)
        ],
        "weights": _weights(study, unit),
        "start": _start(study, unit),
    }


def unit_key(study: Study, unit: Unit) -> str:
    """Hash of all that trained weights depend on. A checkpoint of another key is not resumed."""
    return digest(unit_plan(study, unit))[:24]


def train_plan(study: Study, unit: Unit) -> Plan:
    """What the stage `train` depends on: what the weights do, and what the card says of data."""
    return unit_plan(study, unit) | {"card": _on_the_card(study, unit)}


def evaluate_plan(study: Study, unit: Unit) -> Plan:
    """What the scores of a unit depend on, besides the unit itself."""
    chain = [unit, *study.sources_of(unit)]
    trained_on = {name for u in chain for name in study.train_set_settings[u.train_set].datasets}
    images = {study.images_of(name) for name in trained_on}
    return {
        "data": {name: [data_md5(name), *_manifest(name)["voxel_nm"]] for name in study.tested},
        "seen": [name for name in study.tested if study.images_of(name) in images],
    }


def diagnose_plan(study: Study, backbone: str, regime: str) -> Plan:
    """What the diagnosis of a backbone under a regime depends on, besides the units themselves."""
    source = study.tokens_of(regime)
    if source != regime:
        return {"study": study.name, "same_as": source}
    adapted = not study.regime_settings[regime].on_pretrained_tokens
    units = [u for u in study.units() if (u.backbone, u.regime) == (backbone, regime)]
    classes = [_manifest(name).get("classes", []) for name in study.tested]
    return {
        **({"classes": classes} if any(classes) else {}),
        "study": study.name,
        "settings": affecting(study.diagnose, "scores"),
        "tokens": {name: tokens_plan(study, backbone, name) for name in study.datasets},
        "units": {u.name: unit_key(study, u) for u in units} if adapted else {},
    }


def write_plans(study: Study) -> int:
    """Write the plans of a study; how many. Results of what it does not have are put aside.

    Raises:
        InputError: a dataset is not ingested, or weights are missing.
    """
    _set_aside(study)
    plans: dict[str, Plan] = {}
    for backbone in study.backbones:
        for dataset in study.datasets:
            plans[f"tokens/{backbone}-{dataset}"] = tokens_plan(study, backbone, dataset)
        for regime in study.regimes:
            plans[f"diagnose/{backbone}-{regime}"] = diagnose_plan(study, backbone, regime)
    for name in study.datasets:
        check_unchanged(study, name, INGESTED / name / "manifest.json")
    for unit in study.units():
        plans[f"train/{unit.name}"] = train_plan(study, unit)
        plans[f"evaluate/{unit.name}"] = evaluate_plan(study, unit)
    with whole_folder(PLAN) as folder:
        for name, plan in plans.items():
            write_json(folder / f"{name}.json", plan)
    return len(plans)


def check_planned(verb: str, name: str, plan: Callable[[], Plan]) -> None:
    """Refuse to run a stage of DVC on another plan than the one that DVC will record for it.

    Otherwise a model of settings that were edited while the pipeline ran would be kept, and found
    again, as one of the settings before.

    Raises:
        InputError: the plan is not the one that the stage `plan` wrote.
    """
    if os.environ.get("DVC_STAGE") != f"{verb}@{name}":
        return
    planned = json.loads((PLAN / verb / f"{name}.json").read_text())
    if digest(planned) != digest(plan()):
        raise InputError(
            f"{verb} {name}",
            found="other settings, data or weights than when the pipeline was begun",
            expected="the same until it ends",
            do="Run `emadapt repro` again: it begins with those of now.",
        )


def _set_aside(study: Study) -> None:
    """Take what the study does not have out of folders that a stage depends on as a whole.

    It waits in ASIDE, and comes back to a study that has it. Trained units stay, for no stage
    depends on all of them.
    """
    build = Path("build")
    units = {unit.name for unit in study.units()}
    pairs = {f"{backbone}-{regime}" for backbone in study.backbones for regime in study.regimes}
    wanted = {
        INGESTED: set(study.datasets),
        build / "evaluate": units,
        Path("reports/domain"): pairs,
        **{build / "adapted" / pair: units for pair in pairs},
    }
    for folder, names in wanted.items():
        for path in list(folder.glob("[!.]*")):
            if path.name.removesuffix(".json") not in names:
                _move(path, ASIDE / path)
        for path in list((ASIDE / folder).glob("*")):
            back = folder / path.name
            if path.name.removesuffix(".json") in names and not back.exists():
                _move(path, back)


def _move(path: Path, to: Path) -> None:
    """Move a file or a folder; it replaces what is there."""
    if to.is_dir():
        shutil.rmtree(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    path.replace(to)


def data_md5(dataset: str) -> str:
    """Md5 of an ingested dataset: its images, labels and split.

    Raises:
        InputError: it is not ingested.
    """
    return str(_manifest(dataset)["md5"])


def _seen_as(spec: BackboneSettings, dataset: str) -> list[Any]:
    """What a backbone's results depend on: the data and, where it is used, the voxel size."""
    voxel = _manifest(dataset)["voxel_nm"] if spec.pixel_nm or spec.smooth_z_nm else []
    return [data_md5(dataset), *voxel]


def _on_the_card(study: Study, unit: Unit) -> Any:
    """What model.json says of the data that does not change the weights."""
    chain = [unit, *study.sources_of(unit)]
    names = [n for u in chain for n in study.train_set_settings[u.train_set].datasets]
    names += [n for u in chain for n in study.unlabelled_of(u)]
    facts = {name: _manifest(name) for name in names}
    return {name: {f: own[f] for f in ON_CARD if f in own} for name, own in facts.items()}


def _manifest(dataset: str) -> dict[str, Any]:
    return read_json(
        INGESTED / dataset / "manifest.json",
        expected="what the stage `ingest` writes",
        do=f"Run `emadapt ingest {dataset}`, or all: `emadapt repro`.",
    )


def _reference(spec: BackboneSettings) -> Any:
    """Md5 of the dataset that others are made to resemble, or the hashes of a model folder."""
    if "/" in spec.reference:
        return model_folder(Path(spec.reference))
    return data_md5(spec.reference) if spec.reference else None


def _unused(regime: RegimeSettings) -> set[str]:
    """Settings of a backbone that change no weights of a regime, or are in its plan elsewhere."""
    no_backbone = set() if regime.uses_backbone else BACKBONE_ONLY
    return REFERENCE | no_backbone | (set() if regime.trains else SYSTEMS_OWN)


def _weights(study: Study, unit: Unit) -> dict[str, str] | None:
    """The identity of the pretrained weights; None for a network from scratch."""
    regime = study.regime_settings[unit.regime]
    if isinstance(regime, PretrainedSystemSettings):
        return system_weights(regime)
    if not regime.uses_backbone:
        return None
    return backbone_weights(study.backbone_settings[unit.backbone])


def _start(study: Study, unit: Unit) -> Any:
    """The key of the unit that this one starts from, or the hashes of a model folder."""
    if source := study.source_of(unit):
        return unit_key(study, source)
    where = study.warm_start_of(unit)
    return model_folder(Path(where)) if where else None


def _without(settings: Plan, names: AbstractSet[str]) -> Plan:
    return {k: v for k, v in settings.items() if k not in names}
