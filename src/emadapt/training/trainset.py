"""The stages `reference`, `trainset` and `start`: small files on which other stages depend; they need no torch, so no time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from emadapt.data.align import open_reference, statistics
from emadapt.errors import InputError
from emadapt.files import write_json
from emadapt.study.study import Study, digest, not_default


def record_reference(study: Study, backbone_name: str, root: Path = Path("build")) -> Path:
    """Write what the backbone's alignment takes from its reference: the statistics, or nothing where there is none.

    DVC cannot name another dataset than its own for each stage of `tokens`; this small file, whose bytes change only with the
    reference, stands for it.
    """
    spec = study.backbone_settings[backbone_name]
    path = root / "references" / f"{backbone_name}.json"
    write_json(
        path,
        {spec.reference: dataclasses.asdict(statistics(open_reference(spec)))}
        if spec.reference
        else {},
    )
    return path


def _tokens(root: Path, backbone_name: str, dataset: str) -> str:
    """What the `tokens` stage wrote of a dataset."""
    path = root / "tokens" / backbone_name / f"{dataset}.json"
    if not path.is_file():
        raise InputError(
            path,
            found="no such file",
            expected="what the stage `tokens` writes",
            do=f"Run `emadapt tokens {backbone_name} {dataset}`, or all: `emadapt repro`.",
        )
    return path.read_text()


def record_train_set(
    study: Study, backbone_name: str, train_set: str, root: Path = Path("build")
) -> Path:
    """Write what a training set consists of: its members' data and tokens, and nothing of other datasets.

    DVC cannot name a list of dependencies per training set; this small file, whose bytes change only with its own members,
    stands for them.

    Raises:
        InputError: a member's tokens were not made.
    """
    members: dict[str, Any] = {}
    spec = study.train_set_settings[train_set]
    for name in spec.datasets:
        manifest = json.loads(_tokens(root, backbone_name, name))
        members[name] = {k: manifest[k] for k in ("data_md5", "entries", "weights")}
    if spec.unlabelled:
        members["unlabelled"] = {}
    for name in spec.unlabelled:
        manifest = json.loads(_tokens(root, backbone_name, name))
        members["unlabelled"][name] = {k: manifest[k] for k in ("data_md5", "entries", "weights")}
    if spec.few:
        members["labelled"] = {"slices": spec.slices, "crops": spec.crops}
    if spec.draw:
        members["draw"] = spec.draw
    path = root / "trainsets" / backbone_name / f"{train_set}.json"
    write_json(path, members)
    return path


def record_start(study: Study, regime: str, root: Path = Path("build")) -> Path:
    """The `start` stage: what units of a regime start from. Its bytes change when that does, and only then.

    DVC cannot let one unit depend on another of the same matrix; this small file, on which `train` depends, stands for the
    settings, data and tokens of the sources.

    Raises:
        InputError: tokens of a source's training set were not made.
    """
    sources: dict[str, Any] = {}
    for unit in study.units():
        if unit.regime == regime and (chain := study.sources_of(unit)):
            tokens: list[str] = []
            for source in chain:
                names = (
                    *study.train_set_settings[source.train_set].datasets,
                    *study.unlabelled_of(source),
                )
                tokens += [_tokens(root, unit.backbone, name) for name in names]
            described = not_default(study.describe(chain[0]))
            sources[unit.name] = {"source": chain[0].name, "sha256": digest([described, tokens])}
    behind = {
        regime,
        *(
            source.regime
            for unit in study.units()
            if unit.regime == regime
            for source in study.sources_of(unit)
        ),
    }
    for folder in sorted({study.regime_settings[name].init_from for name in behind}):
        if "/" in folder and (file := Path(folder) / "model.json").is_file():
            sources[folder] = {"sha256": digest(json.loads(file.read_text()))}
    path = root / "starts" / f"{regime}.json"
    write_json(path, sources)
    return path
