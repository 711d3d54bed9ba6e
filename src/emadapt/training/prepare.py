"""A unit's model and data, made once."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from emadapt.data.ingest import open_volume
from emadapt.errors import InputError
from emadapt.models import parallel
from emadapt.models.adapters import State
from emadapt.models.device import device
from emadapt.study.study import Study, Unit
from emadapt.training import duplicates
from emadapt.training.inputs import Inputs
from emadapt.training.labelled import label
from emadapt.training.plan import unit_key
from emadapt.training.regimes import regime_of
from emadapt.training.regimes.regime import Regime
from emadapt.training.warm_start import folder_state

SCRATCH = Path("scratch/units")


def prepare(study: Study, unit: Unit, regime: Regime | None = None) -> Inputs:
    """A fresh model of `unit` and its data. Tokens are computed where they are not cached.

    Args:
        study: that the unit belongs to.
        unit: what is to be trained.
        regime: of the unit, where it is at hand.

    Raises:
        EmadaptError: the data or the settings do not suit the regime, or several processes cannot
            train it.
    """
    regime = regime or regime_of(study, unit)
    check_processes(unit, regime, parallel.size())
    train, train_set = study.train_settings(unit), study.train_set_settings[unit.train_set]
    whole = [open_volume(name) for name in train_set.datasets]
    regime.check(whole, train)
    labelled = label(whole, train_set, unit.seed, regime.geometry, regime.depth)
    unlabelled = [open_volume(name) for name in study.unlabelled_of(unit)]
    segmenter = regime.build(unit.seed).to(device())
    from_cache = regime.trains_from_cache(train, few_tiles=bool(labelled.tiles))
    views = regime.views(segmenter, labelled, train) if from_cache else []
    if state := start_of(study, unit, regime):
        segmenter.load_trained({**segmenter.trained_state(), **state})
    samples = regime.samples(segmenter, labelled, views, unlabelled, train)
    return Inputs(unit, train, segmenter, labelled, views, samples, unlabelled)


def check_processes(unit: Unit, regime: Regime, processes: int) -> None:
    """Refuse several processes where one must see a whole batch.

    Raises:
        InputError: there are several, and the regime needs one.
    """
    if processes > 1 and not regime.settings.several_devices:
        raise InputError(
            f"unit {unit.name}",
            found=f"{processes} processes",
            expected="one: its regime cannot be trained by several",
            do="Train it on one device.",
        )


def start_of(study: Study, unit: Unit, regime: Regime) -> State:
    """The tensors that a unit starts from. A source unit is trained if need be."""
    source = study.source_of(unit)
    if source is None:
        folder = study.warm_start_of(unit)
        return folder_state(Path(folder), regime) if folder else {}
    own = regime_of(study, source)
    key = unit_key(study, source)
    with duplicates.turn(key):
        if finished := duplicates.find(key):
            return dict(load_file(finished / "model.safetensors"))
        inputs = prepare(study, source, own)
        own.fit(inputs, SCRATCH / source.name / key, lambda metrics, epoch: None)
    return inputs.segmenter.trained_state()
