"""A unit's model and data, and the model that it starts from (warm start)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from emadapt.data.ingest import open_volume
from emadapt.errors import InputError
from emadapt.models import parallel
from emadapt.models.adapters import State
from emadapt.models.device import device
from emadapt.models.segmenter import Segmenter
from emadapt.study.study import Study, Unit
from emadapt.training import duplicates
from emadapt.training.inputs import Inputs, label
from emadapt.training.model_card import datasets_behind
from emadapt.training.model_files import classes_of, read_model
from emadapt.training.plan import unit_key
from emadapt.training.regimes import regime_of
from emadapt.training.regimes.regime import Regime

SCRATCH = Path("scratch/units")


def prepare(study: Study, unit: Unit, regime: Regime | None = None) -> Inputs:
    """A fresh model of `unit` and its data. Tokens are computed where they are not cached.

    Raises:
        EmadaptError: the data or the settings do not suit the regime, or several processes cannot
            train it.
    """
    regime = regime or regime_of(study, unit)
    check_processes(unit, regime, parallel.size())
    train, train_set = study.train_settings(unit), study.train_set_settings[unit.train_set]
    whole = [open_volume(name) for name in train_set.datasets]
    regime.check(whole, train)
    labelled = label(whole, train_set, unit.seed, regime.geometry, regime.settings.depth)
    unlabelled = [open_volume(name) for name in study.unlabelled_of(unit)]
    segmenter = regime.build(unit.seed, whole[0].classes).to(device())
    from_cache = regime.trains_from_cache(train, few_tiles=bool(labelled.tiles))
    views = regime.views(segmenter, labelled, train) if from_cache else []
    if state := start_of(study, unit, regime, segmenter):
        segmenter.load_trained({**segmenter.trained_state(), **state})
    samples = regime.samples(segmenter, labelled, views, unlabelled, train)
    return Inputs(unit, train, segmenter, labelled, views, samples, unlabelled)


def check_processes(unit: Unit, regime: Regime, processes: int) -> None:
    """Raise InputError for several processes where one must see a whole batch."""
    if processes > 1 and not regime.settings.several_devices:
        what, found = f"unit {unit.name}", f"{processes} processes"
        expected, do = "one: its regime cannot be trained by several", "Train it on one device."
        raise InputError(what, found=found, expected=expected, do=do)


def start_of(study: Study, unit: Unit, regime: Regime, segmenter: Segmenter) -> State:
    """The tensors that a unit starts from. A source unit is trained if need be."""
    source = study.source_of(unit)
    if source is None:
        folder = study.warm_start_of(unit)
        return folder_state(Path(folder), regime, segmenter) if folder else {}
    own = regime_of(study, source)
    key = unit_key(study, source)
    with duplicates.turn(key):
        if finished := duplicates.find(key):
            return dict(load_file(finished / "model.safetensors"))
        inputs = prepare(study, source, own)
        own.fit(inputs, SCRATCH / source.name / key, lambda metrics, epoch: None)
    return inputs.segmenter.trained_state()


def folder_state(folder: Path, regime: Regime, segmenter: Segmenter) -> State:
    """Trained tensors of a model folder, for a fresh model of `regime` that starts from it.

    Of a model with another number of classes, the layer that tells them apart is left out. Of one
    with as many under other names it is kept, and said.

    Raises:
        InputError: it is no model, or one of another backbone, head or adapter.
    """
    card, state, theirs = read_model(folder)
    arch, weights = card["backbone"]["arch"], card["weights"]["sha256"]
    head, adapter, classes = card["head"], theirs.settings.adapter, classes_of(card)
    own, wanted = regime.spec.arch, regime.settings.adapter
    own_weights = str(regime.backbone.provenance.sha256)
    if own_weights != "none" and (arch, weights) != (own, own_weights):
        found = f"a model of backbone {arch}, weights {weights[:12]}"
        expected = f"{own}, weights {own_weights[:12]}"
        raise _unsuited(folder, found, expected, "Start from a model of the same backbone.")
    if head != regime.head_name:
        raise _unsuited(folder, f"a head {head}", regime.head_name, "Give the regime that head.")
    if adapter != wanted and any(name.startswith("adapter.") for name in state):
        do = "Give the regime the settings of that adapter."
        raise _unsuited(folder, f"an adapter {adapter}", str(wanted), do)
    if classes == segmenter.classes:
        return state
    fresh = segmenter.trained_state()
    if odd := sorted(state.keys() - fresh.keys()):
        do = "Give the backbone the `blocks` of that model."
        raise _unsuited(folder, ", ".join(odd), "the tensors of this head and adapter", do)
    anew = [name for name, own in state.items() if own.shape != fresh[name].shape]
    starts = f"new: {', '.join(anew)}" if anew else f"now {', '.join(segmenter.classes)}, in place"
    print(f"warm start from {folder}: its classes are {', '.join(classes)}; {starts}")
    return {name: own for name, own in state.items() if name not in anew}


def _unsuited(folder: Path, found: str, expected: str, do: str) -> InputError:
    return InputError(f"warm start from {folder}", found=found, expected=expected, do=do)


def behind_folders(study: Study, unit: Unit) -> list[dict[str, Any]]:
    """Datasets behind the model folders that a unit or its sources start from.

    Returns:
        `name` of each in its study, and `source`: what its SOURCE.json says.
    """
    found: dict[str, Any] = {}
    for at in (unit, *study.sources_of(unit)):
        if "/" in (start := study.warm_start_of(at)):
            card = json.loads((Path(start) / "model.json").read_text())
            found |= {data.name: dict(data.source) for data in datasets_behind(card)}
    return [{"name": name, "source": source} for name, source in found.items()]
