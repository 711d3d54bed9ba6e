"""The study that params.yaml selects: its units, and the settings of each."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emadapt.errors import EmadaptError
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import DatasetSettings, SplitSettings, TrainSetSettings
from emadapt.study.reading import nearest
from emadapt.study.regimes import RegimeSettings
from emadapt.study.strict import Settings
from emadapt.study.sweep import SweepSettings
from emadapt.study.training import DiagnoseSettings, TrainSettings

CLASSIFIERS = {**dict.fromkeys(("frozen", "lora", "bitfit", "full"), "probe"), "knn": "votes"}
"""Kinds of regimes that classify whole images, and their heads."""
SAID = {"iou": "IoU", "auroc": "AUROC"}
"""The headline of a task's scores, and how it is written."""
TEACHER = 0.99
"""Share that the teacher of self-training keeps at each step, unless `train.ema` says otherwise."""


@dataclass(frozen=True)
class Unit:
    """One training run: backbone x regime x training set x seed."""

    backbone: str
    regime: str
    train_set: str
    seed: int

    @property
    def name(self) -> str:
        """E.g. `dinov2_s-lora-lucchi-0`, also the key of its DVC stages."""
        return f"{self.backbone}-{self.regime}-{self.train_set}-{self.seed}"


@dataclass(frozen=True)
class Study:
    """What is selected now, with every setting resolved."""

    name: str
    datasets: tuple[str, ...]
    backbones: tuple[str, ...]
    regimes: tuple[str, ...]
    train_sets: tuple[str, ...]
    seeds: tuple[int, ...]
    dataset_settings: dict[str, DatasetSettings]
    train_set_settings: dict[str, TrainSetSettings]
    backbone_settings: dict[str, BackboneSettings]
    regime_settings: dict[str, RegimeSettings]
    split: SplitSettings = field(default_factory=SplitSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    diagnose: DiagnoseSettings = field(default_factory=DiagnoseSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)

    @property
    def classifies(self) -> bool:
        """Whether its datasets are whole images with a class each, not masks."""
        return self.dataset_settings[self.datasets[0]].task == "classification"

    @property
    def score(self) -> str:
        """The headline of its metrics: `iou`, of whole images `auroc`."""
        return "auroc" if self.classifies else "iou"

    def units(self) -> list[Unit]:
        """All units of the study, in the order of DVC's matrix."""
        factors = (self.backbones, self.regimes, self.train_sets, self.seeds)
        return [Unit(*levels) for levels in itertools.product(*factors)]

    def unit(self, name: str) -> Unit:
        """The unit called `name`.

        Raises:
            EmadaptError: the study has no such unit.
        """
        units = {unit.name: unit for unit in self.units()}
        if name not in units:
            known = nearest(name, list(units)[:4])
            raise EmadaptError(f"unit {name!r} is not in study {self.name!r}; {known}")
        return units[name]

    def train_settings(self, unit: Unit) -> TrainSettings:
        """`train` with what the unit's regime and training set say instead."""
        regime = self.regime_settings[unit.regime]
        own = dict(regime.train_defaults)
        for name in ("head", "epochs", "head_lr", "adapter_lr", "weight_decay"):
            if (value := getattr(regime, name, None)) is not None:
                own[name] = value
        if sampling := self.train_set_settings[unit.train_set].sampling:
            own["sampling"] = sampling
        if self.unlabelled_of(unit):  # no labels say which epoch is best there
            own |= {"monitor": "last", "ema": self.train.ema or TEACHER}
        if self.classifies:
            own["loss"] = "ce"
        return self.train.changed(**own | {"head": self.head_of(unit.regime)})

    def head_of(self, regime: str) -> str:
        """The head that units of a regime have."""
        settings = self.regime_settings[regime]
        if self.classifies:
            return CLASSIFIERS.get(settings.kind, "")
        return settings.own_head or getattr(settings, "head", None) or self.train.head

    def source_of(self, unit: Unit) -> Unit | None:
        """The unit whose model `unit` starts from; None without one, or for a model folder."""
        start = self.warm_start_of(unit)
        if not start or "/" in start:
            return None
        regime, _, train_set = start.partition("-")
        return Unit(unit.backbone, regime, train_set or unit.train_set, unit.seed)

    def sources_of(self, unit: Unit) -> list[Unit]:
        """The units whose models `unit` starts from, one through another, the nearest first."""
        found, source = list[Unit](), self.source_of(unit)
        while source:
            found.append(source)
            source = self.source_of(source)
        return found

    def warm_start_of(self, unit: Unit) -> str:
        """What the regime's `warm_start` says; empty without one."""
        return getattr(self.regime_settings[unit.regime], "warm_start", "")

    def images_of(self, dataset: str) -> str:
        """The folder or seed that a dataset's images are from, which several may share."""
        spec = self.dataset_settings[dataset]
        if spec.synthetic:
            return f"seed {spec.seed}"
        return str(Path(spec.path or f"data/{dataset}").resolve())

    @property
    def tested(self) -> tuple[str, ...]:
        """The study's datasets that have labels to be scored on."""
        return tuple(name for name in self.datasets if self.dataset_settings[name].labelled)

    def unlabelled_of(self, unit: Unit) -> tuple[str, ...]:
        """Datasets whose images `unit` sees without labels."""
        looks = getattr(self.regime_settings[unit.regime], "self_training", 0.0)
        return self.train_set_settings[unit.train_set].unlabelled if looks else ()

    def tokens_of(self, regime: str) -> str:
        """The regime under which `diagnose` measures the tokens that `regime` works on.

        Regimes on pretrained tokens share those of the study's frozen regime, or of the first of
        them. Empty: the regime sees no tokens.
        """
        settings = self.regime_settings[regime]
        if not settings.uses_backbone:
            return ""
        if settings.kind == "frozen" or not settings.on_pretrained_tokens:
            return regime
        alike = [r for r in self.regimes if self.regime_settings[r].on_pretrained_tokens]
        frozen = [r for r in alike if self.regime_settings[r].kind == "frozen"]
        return (frozen or alike)[0]

    def describe(self, unit: Unit) -> dict[str, Any]:
        """All settings of the unit as JSON values, for model.json and for MLflow."""
        train_set = self.train_set_settings[unit.train_set]
        members = (*train_set.datasets, *self.unlabelled_of(unit))
        described = {
            "unit": asdict(unit),
            "backbone": dumped(self.backbone_settings[unit.backbone]),
            "regime": dumped(self.regime_settings[unit.regime]),
            "train": dumped(self.train_settings(unit)),
            "train_set": dumped(train_set),
            "split": dumped(self.split),
            "datasets": {name: dumped(self.dataset_settings[name]) for name in members},
        }
        if source := self.source_of(unit):
            described["source"] = self.describe(source)
        return described


def dumped(settings: Settings) -> dict[str, Any]:
    """Settings as JSON values."""
    return settings.model_dump(mode="json")
