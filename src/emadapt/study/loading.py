"""The study that params.yaml selects, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from emadapt.errors import ConfigError
from emadapt.study.backbones import INPUT_PRESETS, BackboneSettings
from emadapt.study.datasets import (
    SPLIT_PRESETS,
    DatasetSettings,
    ImagesSettings,
    SplitSettings,
    TrainSetSettings,
)
from emadapt.study.reading import nearest, parse, parse_tagged, read_yaml
from emadapt.study.regimes import REGIME_SETTINGS, RegimeSettings
from emadapt.study.rules import problems_of
from emadapt.study.strict import NAME, Name, Settings
from emadapt.study.study import Study
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
    parts: dict[str, Any] = {
        f"{key.removesuffix('s')}_settings": _map(kind, raw[key], key, problems)
        for key, kind in maps.items()
    }
    split = _section(SplitSettings, raw.get("split"), "split", SPLIT_PRESETS, problems)
    train = _section(TrainSettings, raw.get("train"), "train", TRAIN_PRESETS, problems)
    diagnose = _section(DiagnoseSettings, raw.get("diagnose"), "diagnose", {}, problems)
    sweep = _section(SweepSettings, raw.get("sweep"), "sweep", {}, problems)
    if selection is None or problems:
        return None
    lists: dict[str, Any] = {name: getattr(selection, name) for name in Selection.model_fields}
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
            own = ImagesSettings if kind is DatasetSettings and _has_classes(value) else kind
            out[name] = parse(own, _expanded(kind, value, where, problems), where, problems)
    return out


def _has_classes(value: Any) -> bool:
    """Whether a dataset is one of whole images."""
    return isinstance(value, dict) and value.get("task") == "classification"


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
