"""What can be known before hours of work: settings that fit together, data that can be read, weights that can be had."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

from emadapt.errors import ConfigError, EmadaptError, InputError
from emadapt.study.regimes import PretrainedSystemSettings, ResUNet3dSettings
from emadapt.study.strict import NAME
from emadapt.study.study import PARAMS, Study, load_study


def check_study(path: Path, data: Path = Path("data")) -> list[str]:
    """Look at everything that a study needs, without running any of it.

    Args:
        path: the study's YAML file.
        data: folder of the raw data.

    Returns:
        One line per problem; empty if there is none.
    """
    try:
        study = load_study(path)
    except ConfigError as error:
        return error.problems
    settings = [*_check_sections(path), *_check_models(study, path), *_check_precision(study)]
    return [
        *settings,
        *_check_starts(study),
        *_check_data(study, data),
        *_check_weights(study),
        *_check_outside(study),
    ]


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
    temporary = PARAMS.with_name(f".{PARAMS.name}.part")
    temporary.write_text(source.read_text())
    temporary.replace(PARAMS)
    return study


def _check_sections(path: Path) -> list[str]:
    """Sections that DVC's stages name; emadapt alone would take the defaults."""
    from ruamel.yaml import YAML

    missing = [
        name
        for name in ("split", "train", "diagnose")
        if name not in YAML(typ="safe", pure=True).load(path.read_text())
    ]
    return [
        f"{path}: section {name!r} is missing, which dvc.yaml needs; write `{name}: default`"
        for name in missing
    ]


def _check_models(study: Study, path: Path) -> list[str]:
    from emadapt.models.archs import get_arch, resolve_blocks

    problems = []
    for name in study.backbones:
        spec = study.backbone_settings[name]
        try:
            arch = get_arch(spec.arch)
            last = (
                arch.depth if spec.blocks == "last" else resolve_blocks(spec.arch, spec.blocks)[-1]
            )
            for regime in study.regimes:
                for problem in study.regime_settings[regime].problems_on(arch.dim, last):
                    problems.append(f"{path}: regimes.{regime}.{problem} of {name}")
        except EmadaptError as error:
            problems.append(f"{path}: backbones.{name}: {error}")
    return problems


def _check_starts(study: Study) -> list[str]:
    """Models in folders that regimes start from; whether their tensors fit is seen when they are loaded."""
    problems = []
    folders = {
        name: where
        for name in study.regimes
        if "/" in (where := getattr(study.regime_settings[name], "warm_start", ""))
    }
    for name, folder in folders.items():
        try:
            found, expected = (
                json.loads(Path(folder, "model.json").read_text())["head"],
                study.head_of(name),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(
                f"regimes.{name}.warm_start: {folder}: found no model that can be read ({type(error).__name__}: "
                f"{error}); expected model.json and model.safetensors, as `train` writes them"
            )
        else:
            if found != expected:
                problems.append(
                    f"regimes.{name}.warm_start: {folder}: found a head {found}; expected {expected}"
                )
    return problems


def _check_precision(study: Study) -> list[str]:
    """Half precision in 3D where the CPU emulates it."""
    named = {"train.precision": study.train.precision}
    named |= {
        f"backbones.{name}.precision": study.backbone_settings[name].precision
        for name in study.backbones
    }
    half = {where: precision for where, precision in named.items() if precision in ("bf16", "fp16")}
    if not half or not any(study.regime_settings[regime].depth > 1 for regime in study.regimes):
        return []
    from emadapt.models.device import check_precision  # torch, which takes seconds

    problems = []
    for where, precision in half.items():
        try:
            check_precision(precision, where)
        except InputError as error:
            problems.append(str(error))
    return problems


def _check_data(study: Study, data: Path) -> list[str]:
    """Pair the files, split the slices and read the first pair of each dataset; `ingest` reads the rest."""
    from emadapt.data.foreground import foreground_mask
    from emadapt.data.ingest import check_pair, split_of
    from emadapt.data.layouts import find_parts
    from emadapt.data.splits import check_depth

    problems = []
    for name in study.datasets:
        spec = study.dataset_settings[name]
        root = Path(spec.path) if spec.path else data / name
        try:
            parts = find_parts(root, spec.layout, spec.pairing, labelled=spec.labelled)
            split = split_of(study, name, parts, str(root))
            if (slices := sum(map(len, split.values()))) < study.diagnose.blocks:
                raise InputError(
                    root,
                    found=f"{slices} slices in train, val and test",
                    do="Lower `diagnose.blocks`.",
                    expected=f"at least {study.diagnose.blocks}, one for each block of diagnose",
                )
            for regime in (
                study.regimes
                if any(name in study.train_set_settings[t].datasets for t in study.train_sets)
                else ()
            ):
                settings = study.regime_settings[regime]
                if isinstance(settings, ResUNet3dSettings):
                    check_depth(f"{root}, regime {regime}", split["train"], settings.patch)
            for part in parts:
                image = part.images.read(0, 1)[0]
                if part.labels is not None:
                    label = part.labels.read(0, 1)[0]
                    foreground_mask(label, spec.rule, part.labels.where(0))
                    check_pair(image, label, part.labels.where(0))
            problems += _check_labelled(study, name, image.shape, split["train"])
        except EmadaptError as error:
            problems.append(str(error))
    return problems


def _check_labelled(
    study: Study, name: str, native: tuple[int, ...], train: list[int]
) -> list[str]:
    """Training sets that want more labelled slices or tiles than the dataset has; a U-Net's tiles are counted at its training."""
    from emadapt.data.labelled import amount
    from emadapt.data.splits import starts_in
    from emadapt.data.tiles import geometry
    from emadapt.models.archs import get_arch

    problems = []
    for train_set in (t for t in study.train_sets if name in study.train_set_settings[t].datasets):
        wanted = study.train_set_settings[train_set]
        counts = {("slices", "", wanted.slices_of(name)): len(train)}
        for backbone, regime in itertools.product(
            study.backbones, map(study.regime_settings.get, study.regimes)
        ):
            spec = study.backbone_settings[backbone]
            if (
                not wanted.crops
                or regime is None
                or spec.align == "voxel"
                or (not regime.uses_backbone and regime.depth == 1)
            ):
                continue
            if isinstance(regime, ResUNet3dSettings):
                geo = geometry((native[0], native[1]), spec.changed(tile=max(regime.patch[1:])), 1)
                geo = dataclasses.replace(geo, tile=regime.patch[1:])
            else:
                geo = geometry((native[0], native[1]), spec, get_arch(spec.arch).patch)
            starts = starts_in(train, regime.depth, apart=True)
            counts["crops", f" under {backbone}", wanted.crops] = len(starts) * len(
                geo.corners(0.0)
            )
        for (kind, where, n), total in counts.items():
            try:
                amount(n, total, f"train_sets.{train_set}.{kind} of {name}{where}")
            except InputError as error:
                problems.append(str(error))
    return problems


def _check_outside(study: Study) -> list[str]:
    """Packages and weights of the published systems among the regimes."""
    problems = []
    for name in study.regimes:
        regime = study.regime_settings[name]
        if not isinstance(regime, PretrainedSystemSettings):
            continue
        try:
            if regime.kind == "sam2":
                from emadapt.models import sam2

                sam2.check(regime.weights)
            else:
                from emadapt.models import mitonet

                mitonet.check(Path(regime.weights))
        except EmadaptError as error:
            problems.append(str(error))
    return problems


def _check_weights(study: Study) -> list[str]:
    from emadapt.models.archs import check_settings

    problems = []
    for name in study.backbones:
        spec = study.backbone_settings[name]
        try:
            if spec.source in ("hub", "file"):
                from emadapt.models.weights import check_source  # torch, which takes seconds

                check_source(spec.arch, spec.source, spec.file or None)
            else:
                check_settings(spec.arch, spec.source, spec.file or None)
        except EmadaptError as error:
            problems.append(str(error))
    return problems
