"""What is wrong with a study that no single settings model can see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from emadapt.study.reading import nearest
from emadapt.study.study import CLASSIFIERS, Study

NOT_OF_IMAGES = {
    *("scale", "longest_edge", "overlap", "views", "jitter", "smooth_z_nm", "context"),
    *("pixel_nm", "align", "reference"),
}
"""Settings of a backbone that are for slices of volumes."""


def problems_of(study: Study) -> list[str]:
    """A line for each name that leads nowhere and each pair of settings that exclude each other."""
    if dangling := list(_names(study)) or list(_tasks(study)):
        return dangling
    rules = (
        _classes,
        _train_sets,
        _references,
        _oracles,
        _warm_starts,
        _self_training,
        _blocks_of_slices,
    )
    return [problem for rule in rules for problem in rule(study)]


def _names(study: Study) -> Iterator[str]:
    """Names in `study` that are not in the map of that name, or are listed twice."""
    maps: dict[str, dict[str, Any]] = {
        "datasets": study.dataset_settings,
        "backbones": study.backbone_settings,
        "regimes": study.regime_settings,
        "train_sets": study.train_set_settings,
    }
    for section, known in maps.items():
        names = getattr(study, section)
        if len(set(names)) < len(names):
            yield f"study.{section}: a name is listed twice in {list(names)}"
        for name in names:
            if name not in known:
                hint = nearest(name, list(known))
                yield f"study.{section}: {name!r} is not in the map `{section}`; {hint}"
    for name in study.train_sets:
        if train_set := study.train_set_settings.get(name):
            for member in (*train_set.datasets, *train_set.unlabelled):
                if member not in study.datasets:
                    yield f"train_sets.{name}: {member!r} is not in study.datasets"


def _classes(study: Study) -> Iterator[str]:
    """Labelled datasets with different classes, and regimes that can only segment one."""
    named = {name: study.dataset_settings[name].class_names for name in study.tested}
    first = next(iter(named), "")
    for name, classes in named.items():
        if classes != named[first]:
            yield (
                f"datasets.{name}.classes: found {', '.join(classes)}; expected "
                f"{', '.join(named[first])}, as {first}: a study is of the same classes"
            )
    if any(len(classes) > 1 for classes in named.values()):
        for name in study.regimes:
            if not study.regime_settings[name].several_classes:
                yield f"regimes.{name}: it segments one class; choose one with `organelle`"


def _tasks(study: Study) -> Iterator[str]:
    """Datasets of two tasks, and what means nothing to whole images."""
    tasks = {name: study.dataset_settings[name].task for name in study.datasets}
    if len(set(tasks.values())) > 1:
        yield f"study.datasets: found {tasks}; expected one task in a study"
        return
    if not study.classifies:
        return
    for name in study.regimes:
        regime = study.regime_settings[name]
        if regime.kind not in CLASSIFIERS:
            kinds = ", ".join(CLASSIFIERS)
            yield f"regimes.{name}: {regime.kind} does not classify images; expected {kinds}"
        if "head" in regime.model_fields_set:
            yield f"regimes.{name}.head: found one; a classifier has its own"
    for name in study.backbones:
        if odd := study.backbone_settings[name].model_fields_set & NOT_OF_IMAGES:
            yield f"backbones.{name}: {', '.join(sorted(odd))} mean nothing to whole images"
        if not study.backbone_settings[name].tile:
            yield f"backbones.{name}.tile: found 0; expected the side that images are brought to"
    for name in study.train_sets:
        train_set = study.train_set_settings[name]
        if train_set.crops or train_set.unlabelled:
            yield f"train_sets.{name}: crops and unlabelled are not for whole images"


def _train_sets(study: Study) -> Iterator[str]:
    """Members without labels, and unlabelled datasets that no regime looks at."""
    looks = any(getattr(study.regime_settings[r], "self_training", 0) for r in study.regimes)
    for name in study.train_sets:
        train_set = study.train_set_settings[name]
        for dataset in train_set.datasets:
            if not study.dataset_settings[dataset].labelled:
                yield f"train_sets.{name}: {dataset!r} has no labels; name it in `unlabelled`"
        if train_set.unlabelled and not looks:
            yield f"train_sets.{name}.unlabelled: no regime of the study has `self_training`"


def _references(study: Study) -> Iterator[str]:
    """References of alignments that are no dataset of the study."""
    for name in study.backbones:
        reference = study.backbone_settings[name].reference
        if reference and "/" not in reference and reference not in study.datasets:
            yield f"backbones.{name}.reference: {reference!r} is not in study.datasets"


def _oracles(study: Study) -> Iterator[str]:
    """Names that hide that a model was given the labels it is scored on."""
    for name in study.regimes:
        if study.regime_settings[name].sees_test_labels and "oracle" not in name:
            yield (
                f"regimes.{name}: its prompts are made of the labels that it is scored on; "
                f"call it so, e.g. {name}_oracle"
            )


def _warm_starts(study: Study) -> Iterator[str]:
    """Warm starts that lead nowhere, back to themselves, or to a model that does not fit."""
    for name in study.regimes:
        start = getattr(study.regime_settings[name], "warm_start", "")
        if start and "/" not in start and (problem := _warm_start(study, name, start)):
            yield f"regimes.{name}.warm_start: found {start!r}; {problem}"


def _warm_start(study: Study, name: str, start: str) -> str:
    source, dash, train_set = start.partition("-")
    if source not in study.regime_settings or (dash and train_set not in study.train_set_settings):
        return "expected REGIME or REGIME-TRAIN_SET of this file, or a folder (with a slash)"
    for dataset in study.train_set_settings[train_set].datasets if dash else ():
        if dataset not in study.datasets:
            return f"{dataset!r}, of its training set, is not in study.datasets"
    if name in _chain(study, source):
        return f"it leads back to {name!r}"
    if study.head_of(source) != study.head_of(name):
        return f"its head is {study.head_of(source)}, not {study.head_of(name)}"
    own, other = study.regime_settings[name], study.regime_settings[source]
    if not other.on_pretrained_tokens and own.adapter != other.adapter:
        return f"its adapter is {other.adapter}; expected {own.adapter}, or a frozen regime"
    return ""


def _chain(study: Study, regime: str) -> list[str]:
    """Regimes that `regime` starts from, one through another, with itself first."""
    chain: list[str] = []
    while regime in study.regime_settings and regime not in chain:
        chain.append(regime)
        start = getattr(study.regime_settings[regime], "warm_start", "")
        regime = "" if "/" in start else start.partition("-")[0]
    return chain


def _self_training(study: Study) -> Iterator[str]:
    """Self-training in a study whose training sets name no images for it."""
    names = [r for r in study.regimes if getattr(study.regime_settings[r], "self_training", 0)]
    if names and not any(study.train_set_settings[t].unlabelled for t in study.train_sets):
        yield f"regimes.{names[0]}.self_training: no training set of the study has `unlabelled`"


def _blocks_of_slices(study: Study) -> Iterator[str]:
    """Regimes on blocks of slices cannot train on single labelled slices, only on volumes."""
    deep = [name for name in study.regimes if study.regime_settings[name].depth > 1]
    for train_set in study.train_sets if deep else ():
        spec = study.train_set_settings[train_set]
        few = [name for name in spec.datasets if spec.slices_of(name)]
        if not all(study.dataset_settings[name].of_volumes for name in few):
            yield (
                f"train_sets.{train_set}.slices: {deep[0]} sees neighbouring slices together; "
                "use `crops` (labelled patches) instead"
            )
