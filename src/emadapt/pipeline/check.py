"""All that can be known before hours of work: settings that fit together, data, and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emadapt.errors import ConfigError, EmadaptError, InputError
from emadapt.files import read_json, write_text
from emadapt.pipeline.check_data import problems_of_dataset, said
from emadapt.study.loading import PARAMS, load_study
from emadapt.study.strict import NAME
from emadapt.study.study import Study

SECTIONS = ("split", "train", "diagnose")
"""Sections that dvc.yaml names, and that may be left out otherwise."""


def check_study(path: Path, data: Path = Path("data")) -> list[str]:
    """A line for each problem of all that a study's YAML file needs; `data`: the raw data."""
    try:
        study = load_study(path)
    except ConfigError as error:
        return error.problems
    problems = [
        f"{path}: section {name!r} is missing, which dvc.yaml needs; write `{name}: default`"
        for name in SECTIONS
        if f"\n{name}:" not in f"\n{path.read_text()}"
    ]
    for name in study.backbones:
        problems += [f"{path}: {problem}" for problem in _backbone(study, name)]
        problems += said(_check_weights, study.backbone_settings[name])
    for name in study.regimes:
        problems += _warm_start(study, name)
        problems += said(_check_system, study.regime_settings[name])
    for name in study.datasets:
        problems += problems_of_dataset(study, name, data)
    return problems


def use_study(name: str) -> Study:
    """Make studies/NAME/study.yaml the study that is selected (params.yaml).

    Raises:
        EmadaptError: there is no such study, or its settings have problems.
    """
    source = Path("studies") / name / "study.yaml"
    if not NAME.fullmatch(name) or not source.is_file():
        have = ", ".join(sorted(p.parent.name for p in Path("studies").glob("*/study.yaml")))
        raise EmadaptError(f"{source}: no such study; there are: {have}")
    study = load_study(source)
    write_text(PARAMS, source.read_text())
    return study


def _backbone(study: Study, name: str) -> list[str]:
    """An architecture or blocks that do not exist, and regimes that do not fit them."""
    from emadapt.models.archs import get_arch, resolve_blocks

    spec = study.backbone_settings[name]
    try:
        arch, last = get_arch(spec.arch), resolve_blocks(spec.arch, spec.blocks)[-1]
    except EmadaptError as error:
        return [f"backbones.{name}: {error}"]
    return [
        f"regimes.{regime}.{problem} of {name}"
        for regime in study.regimes
        for problem in study.regime_settings[regime].problems_on(arch.dim, last)
    ]


def _warm_start(study: Study, name: str) -> list[str]:
    """A model folder that a regime starts from; its tensors are looked at when it is loaded."""
    folder = getattr(study.regime_settings[name], "warm_start", "")
    if "/" not in folder:
        return []
    expected = "model.json and model.safetensors, as `train` writes them"
    try:
        card = read_json(Path(folder, "model.json"), expected=expected, do="Correct `warm_start`.")
    except InputError as error:
        return [f"regimes.{name}.warm_start: {error}"]
    found, expected = card.get("head"), study.head_of(name)
    if found == expected:
        return []
    return [f"regimes.{name}.warm_start: {folder}: found a head {found}; expected {expected}"]


def _check_weights(spec: Any) -> None:
    """Whether a backbone can have weights, and a file or the hub has them."""
    from emadapt.models.archs import arch_of

    arch_of(spec)
    if spec.source in ("hub", "file"):
        from emadapt.models.weights import check_source  # torch, which takes seconds

        check_source(spec)


def _check_system(regime: Any) -> None:
    """The package and the weights of a pretrained system."""
    if regime.kind == "mitonet":
        from emadapt.models import mitonet

        mitonet.check(Path(regime.weights))
    elif regime.kind == "sam2":
        from emadapt.models import sam2

        sam2.check(regime.weights)
