"""The study that params.yaml selects: its units, and the settings of each."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from emadapt.errors import ConfigError, EmadaptError
from emadapt.study.backbones import INPUT_PRESETS, BackboneSettings
from emadapt.study.datasets import SPLIT_PRESETS, DatasetSettings, SplitSettings, TrainSetSettings
from emadapt.study.reading import nearest, parse, parse_tagged, read_yaml
from emadapt.study.regimes import REGIME_SETTINGS, RegimeSettings
from emadapt.study.rules import problems_of
from emadapt.study.strict import NAME, Name, Settings
from emadapt.study.sweep import SweepSettings
from emadapt.study.training import TRAIN_PRESETS, DiagnoseSettings, TrainSettings

PARAMS = Path("params.yaml")

Names = Annotated[tuple[Name, ...], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Selection(Settings):
    """The section `study`: what is run. Units are the product of the last four."""

    name: Name
    datasets: Names
    backbones: Names
    regimes: Names
    train_sets: Names
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]


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
        return self.train.changed(**own | {"head": self.head_of(unit.regime)})

    def head_of(self, regime: str) -> str:
        """The head that units of a regime have."""
        settings = self.regime_settings[regime]
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
        """The folder of a dataset's raw data, which several datasets may share."""
        return str(Path(self.dataset_settings[dataset].path or f"data/{dataset}"))

    @property
    def tested(self) -> tuple[str, ...]:
        """The study's datasets that have labels to be scored on."""
        return tuple(name for name in self.datasets if self.dataset_settings[name].labelled)

    def unlabelled_of(self, unit: Unit) -> tuple[str, ...]:
        """Datasets whose images `unit` sees without labels."""
        adversarial = getattr(self.regime_settings[unit.regime], "adversarial", 0.0)
        return self.train_set_settings[unit.train_set].unlabelled if adversarial else ()

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


def load_study(path: Path = PARAMS) -> Study:
    """Read and check a params.yaml.

    Raises:
        ConfigError: it is missing or not YAML, or has unknown keys, wrong values, or names that
            lead nowhere. All problems are listed.
    """
    raw = read_yaml(path)
    problems: list[str] = []
    study = _parsed(raw, problems)
    if study and not problems:
        problems = problems_of(study)
    if study is None or problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return study


def _parsed(raw: dict[str, Any], problems: list[str]) -> Study | None:
    maps = {
        "datasets": DatasetSettings,
        "train_sets": TrainSetSettings,
        "backbones": BackboneSettings,
        "regimes": RegimeSettings,
    }
    sections = ["study", *maps, "split", "train", "diagnose", "sweep"]
    for key in set(raw) - set(sections):
        problems.append(f"unknown section {key!r}; {nearest(str(key), sections)}")
    missing = [key for key in ("study", *maps) if not isinstance(raw.get(key), dict)]
    problems += [f"section {key!r} is missing" for key in missing]
    if missing:
        return None
    selection = parse(Selection, raw["study"], "study", problems)
    parts = {
        f"{key.removesuffix('s')}_settings": _map(kind, raw[key], key, problems)
        for key, kind in maps.items()
    }
    split = _section(SplitSettings, raw.get("split"), "split", SPLIT_PRESETS, problems)
    train = _section(TrainSettings, raw.get("train"), "train", TRAIN_PRESETS, problems)
    diagnose = _section(DiagnoseSettings, raw.get("diagnose"), "diagnose", {}, problems)
    sweep = _section(SweepSettings, raw.get("sweep"), "sweep", {}, problems)
    if selection is None or problems:
        return None
    lists = {name: getattr(selection, name) for name in Selection.model_fields}
    return Study(**lists, **parts, split=split, train=train, diagnose=diagnose, sweep=sweep)


def _map(kind: Any, raw: dict[Any, Any], section: str, problems: list[str]) -> dict[str, Any]:
    """A map of names to settings."""
    out = {}
    for name, value in raw.items():
        where = f"{section}.{name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            problems.append(f"{where}: a name has letters, digits and underscores only")
        elif kind is RegimeSettings:
            out[name] = parse_tagged(REGIME_SETTINGS, value, where, problems)
        else:
            out[name] = parse(kind, _expanded(kind, value, where, problems), where, problems)
    return out


def _expanded(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Short forms written out: a training set as a list, a backbone's `input: paper`."""
    if kind is TrainSetSettings and isinstance(value, list):
        return {"datasets": value}
    if kind is BackboneSettings and isinstance(value, dict) and "input" in value:
        own = {key: v for key, v in value.items() if key != "input"}
        return _preset(value["input"], INPUT_PRESETS, f"{where}.input", problems) | own
    return value


def _section(
    kind: Any, value: Any, section: str, presets: dict[str, dict[str, Any]], problems: list[str]
) -> Any:
    """A map of settings; or a preset's name; or a map with `preset` that changes the preset."""
    if value is None:
        value = {}
    if isinstance(value, str):
        value = {"preset": value}
    if isinstance(value, dict) and "preset" in value:
        own = {key: v for key, v in value.items() if key != "preset"}
        value = _preset(value["preset"], presets, section, problems) | own
    return parse(kind, value, section, problems)


def _preset(
    name: Any, presets: dict[str, dict[str, Any]], where: str, problems: list[str]
) -> dict[str, Any]:
    known = {"default": dict[str, Any](), **presets}
    if not isinstance(name, str) or name not in known:
        problems.append(f"{where}: unknown preset {name!r}; {nearest(str(name), list(known))}")
        return {}
    return known[name]
