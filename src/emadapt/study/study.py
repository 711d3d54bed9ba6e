"""The study as frozen dataclasses, read strictly from params.yaml: unknown keys, wrong types and dangling names are errors."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emadapt.errors import ConfigError, EmadaptError
from emadapt.study.reading import NAME, build, names_of, read_yaml, specs_of
from emadapt.study.rules import problems_of
from emadapt.study.settings import (
    OWN_TRAINING,
    BackboneSettings,
    DatasetSettings,
    DiagnoseSettings,
    RegimeSettings,
    SplitSettings,
    TrainSetSettings,
    TrainSettings,
)
from emadapt.study.sweep import SweepSettings

PARAMS = Path("params.yaml")


PAPER_TRAIN = TrainSettings(
    head="deconv",
    loss="dice",
    head_lr=5e-5,
    adapter_lr=5e-5,
    weight_decay=1e-4,
    schedule="constant",
    warmup_steps=0,
    epochs=1000,
    steps_per_epoch=0,
    batch=1,
    patience=20,
    monitor="val_loss",
    val_slices=0,
    augment=False,
    balanced=False,
    clip=1.0,
    precision="fp32",
)
"""The reference study's protocol (Fuster-Barceló & Uhlmann, arXiv 2602.08505)."""

PRESETS: dict[str, dict[str, Any]] = {
    "train": {"default": TrainSettings(), "paper": PAPER_TRAIN},
    "split": {
        "default": SplitSettings(),
        "paper": SplitSettings(kind="random", val=0.1, test=0.15, gap_nm=0.0),
    },
    "diagnose": {"default": DiagnoseSettings()},
    "sweep": {"default": SweepSettings()},
}

# The reference's input: whole slices, 1022 pixels long, the last block's tokens, ImageNet statistics for every backbone.
PAPER_INPUT = {
    "blocks": "last",
    "longest_edge": 1022,
    "tile": 0,
    "views": 0,
    "overlap": 0.0,
    "normalisation": "imagenet",
    "precision": "fp32",
}


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

    def units(self) -> list[Unit]:
        """All units of the study, in the order of DVC's matrix."""
        return [
            Unit(*u)
            for u in itertools.product(self.backbones, self.regimes, self.train_sets, self.seeds)
        ]

    def unit(self, name: str) -> Unit:
        """The unit called `name`.

        Raises:
            EmadaptError: no such unit in the study.
        """
        for unit in self.units():
            if unit.name == name:
                return unit
        have = ", ".join(u.name for u in self.units()[:4])
        raise EmadaptError(
            f"unit {name!r} is not in study {self.name!r}; its units are {have}, ..."
        )

    def train_settings(self, unit: Unit) -> TrainSettings:
        """`train` with the regime's own head, epochs, learning rates and weight decay, and the training set's own way to draw."""
        regime = self.regime_settings[unit.regime]
        own: dict[str, Any] = dict(OWN_TRAINING.get(regime.kind, {}))
        for key in ("head", "epochs", "head_lr", "adapter_lr"):
            if getattr(regime, key):
                own[key] = getattr(regime, key)
        if regime.weight_decay >= 0:
            own["weight_decay"] = regime.weight_decay
        if regime.own_head:
            own["head"] = regime.own_head
        if draw := self.train_set_settings[unit.train_set].draw:
            own["balanced"] = draw == "balanced"
        return dataclasses.replace(self.train, **own)

    def source_of(self, unit: Unit) -> Unit | None:
        """The unit whose model `unit` starts from (`init_from`); None where there is none, or a folder."""
        start = self.regime_settings[unit.regime].init_from
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

    def images_of(self, dataset: str) -> str:
        """The folder of a dataset's raw data: datasets that share it are the same images under other labels."""
        return str(Path(self.dataset_settings[dataset].path or f"data/{dataset}"))

    @property
    def tested(self) -> tuple[str, ...]:
        """The study's datasets that have labels to be scored on."""
        return tuple(name for name in self.datasets if self.dataset_settings[name].labelled)

    def unlabelled_of(self, unit: Unit) -> tuple[str, ...]:
        """Datasets that `unit` sees the images of, without labels."""
        return (
            self.train_set_settings[unit.train_set].unlabelled
            if self.regime_settings[unit.regime].penalised
            else ()
        )

    def head_of(self, regime: str) -> str:
        """The head that units of a regime have."""
        spec = self.regime_settings[regime]
        return spec.own_head or spec.head or self.train.head

    def tokens_of(self, regime: str) -> str:
        """The regime under which `diagnose` measures the tokens that `regime` works on; empty where it works on none.

        Ridge and kNN work on what a frozen regime of the study works on; without one, on the first that does as they do.
        """
        kind = self.regime_settings[regime].kind
        if self.regime_settings[regime].no_backbone:
            return ""
        if kind not in ("ridge", "knn"):
            return regime
        alike = [name for name in self.regimes if self.regime_settings[name].pretrained_tokens]
        return next(
            (name for name in alike if self.regime_settings[name].kind == "frozen"), alike[0]
        )

    def describe(self, unit: Unit) -> dict[str, Any]:
        """Everything that defines the unit's training, as plain JSON-able values (for keys, model cards and trackers)."""
        train_set = self.train_set_settings[unit.train_set]
        described = {
            "unit": dataclasses.asdict(unit),
            "backbone": self.backbone_settings[unit.backbone].described(),
            "regime": dataclasses.asdict(self.regime_settings[unit.regime]),
            "train": dataclasses.asdict(self.train_settings(unit)),
            "split": dataclasses.asdict(self.split),
            "datasets": {
                name: self.dataset_settings[name].described() for name in train_set.datasets
            },
        }
        if train_set.few:
            described["labelled"] = {"slices": train_set.slices, "crops": train_set.crops}
        if unlabelled := self.unlabelled_of(unit):
            described["unlabelled"] = {
                name: self.dataset_settings[name].described() for name in unlabelled
            }
        if source := self.source_of(unit):
            described["source"] = self.describe(source)
        return typing.cast(dict[str, Any], json.loads(json.dumps(described)))


def without_places(described: dict[str, Any]) -> dict[str, Any]:
    """What `Study.describe` gave with settings that change no weights at their default: where files lie, how many processes load.

    What the files hold stands beside them in every key, as hashes.
    """
    nowhere = {
        "backbone": described["backbone"] | {"file": ""},
        "train": described["train"] | {"workers": 0},
    }
    for part in ("datasets", "unlabelled"):
        if part in described:
            nowhere[part] = {name: own | {"path": ""} for name, own in described[part].items()}
    if "source" in described:
        nowhere["source"] = without_places(described["source"])
    return described | nowhere


def not_default(described: dict[str, Any]) -> dict[str, Any]:
    """What `Study.describe` gave without the settings at their default: a setting that a later version adds changes nothing.

    Nor do those that change no weights (`without_places`).
    """
    described = without_places(described)
    kinds = {
        "backbone": BackboneSettings,
        "regime": RegimeSettings,
        "train": TrainSettings,
        "split": SplitSettings,
    }
    kept = dict(described)
    for section, kind in kinds.items():
        defaults = json.loads(
            json.dumps(
                {
                    f.name: f.default
                    for f in dataclasses.fields(kind)
                    if f.default is not dataclasses.MISSING
                }
            )
        )
        kept[section] = {
            k: v for k, v in described[section].items() if k not in defaults or v != defaults[k]
        }
    if "source" in kept:
        kept["source"] = not_default(kept["source"])
    return kept


def digest(value: Any) -> str:
    """Sha256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load_study(path: Path = PARAMS) -> Study:
    """Read and check a params.yaml.

    Raises:
        ConfigError: the file is missing or not YAML, or has unknown keys, wrong types or names that lead nowhere.
    """
    raw = read_yaml(path)
    problems: list[str] = []
    known = {
        "study",
        "datasets",
        "train_sets",
        "backbones",
        "regimes",
        "split",
        "train",
        "diagnose",
        "sweep",
    }
    problems += [
        f"{path}: unknown section {k!r}; known are {', '.join(sorted(known))}"
        for k in sorted(set(raw) - known)
    ]
    problems += [
        f"{path}: section {k!r} is missing"
        for k in ("study", "datasets", "train_sets", "backbones", "regimes")
        if not isinstance(raw.get(k), dict)
    ]
    if problems:
        raise ConfigError(problems)
    specs = {
        "datasets": specs_of(DatasetSettings, raw["datasets"], f"{path}: datasets", problems),
        "backbones": specs_of(
            BackboneSettings, _expand_input(raw["backbones"]), f"{path}: backbones", problems
        ),
        "regimes": specs_of(RegimeSettings, raw["regimes"], f"{path}: regimes", problems),
        "train_sets": specs_of(
            TrainSetSettings, _expand_lists(raw["train_sets"]), f"{path}: train_sets", problems
        ),
    }
    head = dict(raw["study"])
    lists = {k: names_of(head.pop(k, None), f"{path}: study.{k}", problems) for k in _STUDY_LISTS}
    seeds = head.pop("seeds", None)
    if (
        not isinstance(seeds, list)
        or not seeds
        or any(type(s) is not int or not 0 <= s < 2**32 for s in seeds)
    ):
        problems.append(
            f"{path}: study.seeds: found {seeds!r}; expected a list of whole numbers from 0 to {2**32 - 1}"
        )
        seeds = []
    name = head.pop("name", None)
    problems += [f"{path}: study: unknown key {k!r}" for k in head]
    if not isinstance(name, str) or not NAME.fullmatch(name):
        problems.append(
            f"{path}: study.name: found {name!r}; expected letters, digits and underscores"
        )
    study = Study(
        name=str(name),
        **{k: lists[k] for k in _STUDY_LISTS},
        seeds=tuple(seeds),
        dataset_settings=specs["datasets"],
        train_set_settings=specs["train_sets"],
        backbone_settings=specs["backbones"],
        regime_settings=specs["regimes"],
        split=_preset("split", SplitSettings, raw.get("split", "default"), path, problems),
        train=_preset("train", TrainSettings, raw.get("train", "default"), path, problems),
        diagnose=_preset(
            "diagnose", DiagnoseSettings, raw.get("diagnose", "default"), path, problems
        ),
        sweep=_preset("sweep", SweepSettings, raw.get("sweep", "default"), path, problems),
    )
    problems += [f"{path}: {p}" for p in problems_of(study)]
    if problems:
        raise ConfigError(problems)
    return study


_STUDY_LISTS = ("datasets", "backbones", "regimes", "train_sets")


def _expand_lists(train_sets: dict[str, Any]) -> dict[str, Any]:
    """`[lucchi, vnc]` stands for `{datasets: [lucchi, vnc]}`."""
    return {
        name: value if isinstance(value, dict) else {"datasets": value}
        for name, value in train_sets.items()
    }


def _expand_input(backbones: dict[str, Any]) -> dict[str, Any]:
    """`input: paper` stands for the reference's input settings; what is written beside it wins."""
    out = {}
    for name, value in backbones.items():
        if isinstance(value, dict) and value.get("input") == "paper":
            value = PAPER_INPUT | {k: v for k, v in value.items() if k != "input"}
        out[name] = value
    return out


def _preset(section: str, kind: type, value: Any, path: Path, problems: list[str]) -> Any:
    """`train: paper`, or a map that may start from one (`{preset: paper, epochs: 5}`)."""
    presets = PRESETS[section]
    name, own = (value, {}) if isinstance(value, str) else (None, value)
    if isinstance(own, dict):
        own = dict(own)
        name = name or own.pop("preset", "default")
    if not isinstance(name, str) or name not in presets:
        problems.append(
            f"{path}: {section}: unknown preset {name!r}; known are {', '.join(presets)}"
        )
        return presets["default"]
    return build(kind, own, f"{path}: {section}", problems, start=presets[name]) or presets[name]
