"""What is wrong with settings that types cannot say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emadapt.study.settings import RegimeSettings
    from emadapt.study.study import Study

ALIGNMENTS = {"histogram": True, "voxel": True}
"""Methods of `data.align.METHODS`, and whether they need a reference."""


def problems_of(study: Study) -> list[str]:
    """A line for each name that leads nowhere, value out of range and pair of settings that exclude each other."""
    sections = (
        _check_names,
        _check_train_sets,
        _check_datasets,
        _check_backbones,
        _check_regimes,
        _check_training,
    )
    return [problem for check in sections for problem in check(study)] + study.sweep.problems()


def _check_names(study: Study) -> list[str]:
    """Names in `study:` and members of training sets."""
    bad = []
    for what, have in (
        ("datasets", study.dataset_settings),
        ("backbones", study.backbone_settings),
        ("regimes", study.regime_settings),
        ("train_sets", study.train_set_settings),
    ):
        bad += [
            f"study.{what}: {n!r} is not in the map `{what}`"
            for n in getattr(study, what)
            if n not in have
        ]
    for name in study.train_sets:
        spec = study.train_set_settings.get(name)
        members = (*spec.datasets, *spec.unlabelled) if spec else ()
        bad += [
            f"train_sets.{name}: {m!r} is not in study.datasets"
            for m in members
            if m not in study.datasets
        ]
    for name in (name for name in study.regimes if name in study.regime_settings):
        begins = study.train_set_settings.get(
            study.regime_settings[name].init_from.partition("-")[2]
        )
        bad += [
            f"regimes.{name}.init_from: {m!r}, of its training set, is not in study.datasets"
            for m in (begins.datasets if begins else ())
            if m not in study.datasets
        ]
    return bad


def _check_train_sets(study: Study) -> list[str]:
    """Problems of the map `train_sets`, but for its members' names."""
    bad = []
    for name, train_set in study.train_set_settings.items():
        if len(set(members := (*train_set.datasets, *train_set.unlabelled))) < len(members):
            bad.append(f"train_sets.{name}: a name stands twice in {list(members)}")
        without = [
            d
            for d in train_set.datasets
            if d in study.dataset_settings and not study.dataset_settings[d].labelled
        ]
        bad += [
            f"train_sets.{name}: {d!r} has no labels (`labelled: false`); expected it in `unlabelled`"
            for d in without
        ]
        if train_set.slices and train_set.crops:
            bad.append(f"train_sets.{name}: found slices and crops; expected one of them")
        if train_set.draw and len(train_set.datasets) < 2:
            bad.append(
                f"train_sets.{name}.draw: found {train_set.draw!r} for one dataset; expected it where there are several"
            )
        amounts = train_set.slices if isinstance(train_set.slices, dict) else {"": train_set.slices}
        places = {
            f"slices{dataset and '.'}{dataset}": value for dataset, value in amounts.items()
        } | {"crops": train_set.crops}
        for place, value in places.items():
            if not _is_amount(value) or (
                value == 0 and place.startswith("slices.")
            ):  # all labels: leave the dataset out
                bad.append(
                    f"train_sets.{name}.{place}: found {value!r}; expected a number from 1 on, or a share such as 25%"
                )
        bad += [
            f"train_sets.{name}.slices: {dataset!r} is not among its datasets {list(train_set.datasets)}"
            for dataset in amounts
            if dataset and dataset not in train_set.datasets
        ]
        penalised = any(
            study.regime_settings[r].penalised for r in study.regimes if r in study.regime_settings
        )
        if train_set.unlabelled and name in study.train_sets and not penalised:
            bad.append(
                f"train_sets.{name}.unlabelled: found {list(train_set.unlabelled)}; expected a regime of the study with "
                "align coral or adversarial, no other looks at them"
            )
    return bad


def _check_datasets(study: Study) -> list[str]:
    """Problems of the map `datasets`."""
    bad = []
    for name, data in study.dataset_settings.items():
        if isinstance(data.foreground, str) and not re.fullmatch(r">\d+(\.\d+)?", data.foreground):
            bad.append(
                f"datasets.{name}.foreground: found {data.foreground!r}; expected '>N' or a list of label ids"
            )
        bad += _check_organelles(study, name)
        if not data.labelled and data.mispaired:
            bad.append(
                f"datasets.{name}.pairing: found {data.pairing!r}; expected number or stem, a dataset without labels has no pairs"
            )
        if min(data.voxel_nm) <= 0:
            bad.append(
                f"datasets.{name}.voxel_nm: found {data.voxel_nm}; expected three positive sizes (z, y, x) in nm"
            )
    return bad


def _check_backbones(study: Study) -> list[str]:
    """Problems of the map `backbones`."""
    bad = []
    for name, backbone in study.backbone_settings.items():
        if isinstance(backbone.blocks, str) and backbone.blocks not in ("auto", "last"):
            bad.append(
                f"backbones.{name}.blocks: found {backbone.blocks!r}; expected 'auto', 'last' or a list of block numbers"
            )
        if backbone.source == "file" and not backbone.file:
            bad.append(f"backbones.{name}: source `file` needs `file`")
        if (
            not 0 <= backbone.overlap < 0.9
            or backbone.scale <= 0
            or min(backbone.tile, backbone.views, backbone.stride) < 0
        ):
            bad.append(
                f"backbones.{name}: overlap must lie in [0, 0.9), scale above 0, tile, views and stride at or above 0"
            )
        if backbone.smooth_z_nm < 0:
            bad.append(
                f"backbones.{name}.smooth_z_nm: found {backbone.smooth_z_nm}; expected nm, 0 for none"
            )
        if backbone.tile == 0 and backbone.views > 0:
            bad.append(
                f"backbones.{name}: whole slices (tile: 0) turn their sides when augmented; set views to 0"
            )
        bad += _check_alignment(study, name)
    return bad


def _check_regimes(study: Study) -> list[str]:
    """Problems of the map `regimes`."""
    bad = []
    for name, regime in study.regime_settings.items():
        if regime.rank < 1 or regime.epochs < 0 or not 0 <= regime.dropout < 1 or regime.alpha <= 0:
            bad.append(
                f"regimes.{name}: rank must be at least 1, epochs at least 0, dropout in [0, 1), alpha above 0"
            )
        if regime.own_head and regime.head not in ("", regime.own_head):
            bad.append(
                f"regimes.{name}.head: found {regime.head!r}; {regime.kind} has a head of its own, leave this out"
            )
        if regime.init == "ridge" and (
            regime.own_head or (regime.head or study.train.head) != "linear"
        ):
            bad.append(
                f"regimes.{name}.init: ridge gives a `linear` head its first weights; add `head: linear`"
            )
        if regime.init == "ridge" and regime.kind == "lora_last_k":
            bad.append(
                f"regimes.{name}.init: found ridge; its weights are of blocks that lora_last_k does not cache, use lora"
            )
        if not 0 < regime.layer_decay <= 1:
            bad.append(
                f"regimes.{name}.layer_decay: found {regime.layer_decay}; expected a factor above 0, at most 1"
            )
        if regime.is_3d:
            bad += _check_3d(study, name)
        if (regime.kind == "lora_last_k") != (regime.k > 0):
            bad.append(
                f"regimes.{name}.k: found {regime.k}; expected a number of blocks from 1 on for lora_last_k, else nothing"
            )
        bad += _check_outside(regime, f"regimes.{name}")
        bad += (
            _check_start(study, name)
            + _check_interpolation(study, name)
            + _check_align(study, name)
        )
    return bad


def _check_training(study: Study) -> list[str]:
    """Problems of `train`, `split` and `diagnose`."""
    bad = []
    train, split = study.train, study.split
    if not 0 <= train.average < 1:
        bad.append(
            f"train.average: found {train.average}; expected the share that is kept, in [0, 1)"
        )
    if (
        min(train.epochs, train.batch) < 1
        or min(train.steps_per_epoch, train.patience, train.workers) < 0
    ):
        bad.append(
            "train: epochs and batch must be at least 1; steps_per_epoch, patience and workers at least 0"
        )
    if min(train.head_lr, train.adapter_lr, train.clip) <= 0 or train.weight_decay < 0:
        bad.append("train: learning rates and clip must be above 0, weight_decay not below")
    if not 0 < split.val < 0.9 or not 0 < split.test < 0.9 or split.gap_nm < 0:
        bad.append("split: val and test must lie in (0, 0.9), gap_nm at or above 0")
    own = study.diagnose
    if own.against and own.against not in study.datasets:
        bad.append(f"diagnose.against: {own.against!r} is not in study.datasets")
    if own.blocks < 4 or (own.slices and own.slices < own.blocks) or own.slices < 0:
        bad.append(
            "diagnose: blocks must be at least 4, slices 0 (all) or at least as many as blocks"
        )
    if own.tokens < 10 * own.blocks or min(own.permutations, own.replicates) < 1:
        bad.append(
            "diagnose: tokens must be at least ten a block, permutations and replicates at least 1"
        )
    return bad


def _check_organelles(study: Study, name: str) -> list[str]:
    """Problems of a dataset's `organelles` and `organelle`."""
    data, where = study.dataset_settings[name], f"datasets.{name}"
    if (data.organelle or data.organelles) and data.organelle not in data.organelles:
        have = ", ".join(data.organelles) or "none: name them and their label ids in `organelles`"
        return [f"{where}.organelle: found {data.organelle or 'nothing'}; expected one of {have}"]
    if data.organelle and data.foreground != type(data).foreground:
        return [
            f"{where}: found organelle and foreground, which both say what is segmented; leave out foreground"
        ]
    return []


def _is_amount(value: int | str) -> bool:
    if isinstance(value, int):
        return value >= 0
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", value)
    return share is not None and 0 < float(share[1]) <= 100


def _check_alignment(study: Study, name: str) -> list[str]:
    """Problems of a backbone's `align` and `reference`."""
    spec, where = study.backbone_settings[name], f"backbones.{name}"
    if spec.align not in ("", *ALIGNMENTS):
        return [
            f"{where}.align: found {spec.align!r}; expected one of {', '.join(ALIGNMENTS)}, or leave it out"
        ]
    if not ALIGNMENTS.get(spec.align):
        what = f"align: {spec.align} has" if spec.align else "a backbone without `align` has"
        return (
            [f"{where}.reference: found {spec.reference!r}; {what} none, leave it out"]
            if spec.reference
            else []
        )
    have = study.datasets if name in study.backbones else tuple(study.dataset_settings)
    if spec.reference not in have:
        return [
            f"{where}.reference: found {spec.reference or 'nothing'}; align: {spec.align} needs one of study.datasets, "
            f"{', '.join(have)}"
        ]
    if spec.align == "voxel" and spec.longest_edge:
        return [
            f"{where}: longest_edge gives every slice one size whatever its voxels; with align: voxel use scale"
        ]
    return []


def _check_align(study: Study, name: str) -> list[str]:
    """Problems of a regime's `align`, by itself and with the training sets of the study."""
    regime, where = (
        study.regime_settings[name],
        f"regimes.{name}.align: found {study.regime_settings[name].align!r}",
    )
    if not regime.align:
        return []
    if regime.kind in ("ridge", "knn") or (regime.per_dataset and regime.init != "random"):
        return [
            f"{where}; kind {regime.kind} with init {regime.init} is not trained that way, leave this out"
        ]
    if regime.align == "routed" and not (regime.low_rank or regime.kind == "frozen"):
        return [
            f"{where} with kind {regime.kind}; expected frozen, or a low-rank kind, whose adapters can stand side by side"
        ]
    bad = []
    if regime.align_weight <= 0:
        bad.append(
            f"regimes.{name}.align_weight: found {regime.align_weight}; expected a number above 0"
        )
    if regime.penalised and regime.kind == "frozen" and study.head_of(name) == "linear":
        bad.append(
            f"{where}; before the last layer of a `linear` head on a frozen backbone nothing is trained"
        )
    if name not in study.regimes:
        return bad
    for train_set in (t for t in study.train_sets if t in study.train_set_settings):
        spec = study.train_set_settings[train_set]
        if len(spec.datasets) + regime.penalised * len(spec.unlabelled) < 2:
            needs = (
                "a second dataset, labelled or in `unlabelled`"
                if regime.penalised
                else "a second labelled dataset"
            )
            bad.append(
                f"{where}, which needs {needs}; train_sets.{train_set} has {list(spec.datasets)}"
            )
    whole = [
        b
        for b in study.backbones
        if b in study.backbone_settings and study.backbone_settings[b].tile == 0
    ]
    crops = any(
        study.train_set_settings[t].crops for t in study.train_sets if t in study.train_set_settings
    )
    cached = study.train.cached and regime.kind in ("frozen", "lora_last_k") and not crops
    if whole and study.train.augment and not cached:  # samples and datasets are matched by shape
        bad.append(
            f"{where}; whole slices (backbones.{whole[0]}.tile: 0) turn their sides when augmented, set a tile"
        )
    return bad


def _check_3d(study: Study, name: str) -> list[str]:
    """Problems of a regime in 3D, by itself and with the training sets of the study."""
    regime, where, bad = study.regime_settings[name], f"regimes.{name}", []
    z, y, x = regime.patch
    if z < 1 or y != x or y % 16 or y < 32:
        bad.append(
            f"{where}.patch: found {list(regime.patch)}; expected voxels [z, y, x] with y = x, a multiple of 16 from 32 on"
        )
    if min(regime.channels) < 1:
        bad.append(f"{where}.channels: found {list(regime.channels)}; expected numbers from 1 on")
    if name in study.regimes:
        few = [
            t
            for t in study.train_sets
            if t in study.train_set_settings and study.train_set_settings[t].slices
        ]
        bad += [
            f"train_sets.{t}.slices: found {study.train_set_settings[t].slices}; {name} sees neighbours together, "
            "expected `crops`, labelled patches"
            for t in few
        ]
    return bad


def _check_outside(regime: RegimeSettings, where: str) -> list[str]:
    """Problems of a published system of another package, and of its settings where there is none."""
    bad, plain = [], {"weights": "", "factor": 1, "finetune": False, "prompts": "automatic"}
    own = {"mitonet": ("weights", "factor", "finetune"), "sam2": ("weights", "prompts")}.get(
        regime.kind, ()
    )
    bad += [
        f"{where}.{key}: found {getattr(regime, key)!r}; kind {regime.kind} has none, leave it out"
        for key, empty in plain.items()
        if key not in own and getattr(regime, key) != empty
    ]
    if not regime.outside:
        return bad
    if not regime.weights:
        kept = (
            "a file with its tensors"
            if regime.kind == "mitonet"
            else "a folder, or a repository of the Hugging Face hub"
        )
        bad.append(f"{where}.weights: found nothing; expected {kept} (docs/how-to.md, Baselines)")
    if (
        given := [key for key in ("init_from", "align") if getattr(regime, key)]
        + ["checkpointing"] * regime.checkpointing
    ):
        bad.append(
            f"{where}: found {', '.join(given)}; a published system starts from its own weights, leave this out"
        )
    if regime.oracle and "oracle" not in where.rpartition(".")[2]:
        bad.append(
            f"{where}: prompts {regime.prompts} are made of the labels that are scored on; expected a name that says so, "
            f"e.g. sam2_oracle_{regime.prompts.replace('+', '_')}"
        )
    return bad


def _check_start(study: Study, name: str) -> list[str]:
    """Problems of a regime's `init_from`, as far as the settings show them."""
    regime, where = (
        study.regime_settings[name],
        f"regimes.{name}.init_from: found {study.regime_settings[name].init_from!r}",
    )
    if not regime.init_from:
        return []
    begins = study.regime_settings.get(regime.init_from.partition("-")[0])
    if regime.per_dataset or (begins and begins.per_dataset):
        return [
            f"{where}; what belongs to a dataset (align: norm, routed) does not to another training set's, leave this out"
        ]
    if regime.kind in ("ridge", "knn") or regime.init != "random":
        return [
            f"{where}; a regime of kind {regime.kind} with init {regime.init} takes its weights from elsewhere"
        ]
    if "/" in regime.init_from:
        return []
    start, dash, train_set = regime.init_from.partition("-")
    if start not in study.regime_settings or (dash and train_set not in study.train_set_settings):
        return [
            f"{where}; expected REGIME or REGIME-TRAIN_SET of this file, or a folder with a slash in its path"
        ]
    source, chain = study.regime_settings[start], [name, start]
    while (
        following := study.regime_settings[chain[-1]].init_from.partition("-")[0]
    ) in study.regime_settings:
        if following in chain:
            return [
                f"{where}, which leads back to {following!r}; expected a regime that begins somewhere"
            ]
        chain.append(following)
    if study.head_of(start) != study.head_of(name):
        return [
            f"{where}, whose head is {study.head_of(start)}; expected {study.head_of(name)}, the head of {name}"
        ]
    if not source.pretrained_tokens and (source.kind, source.rank, source.alpha, source.k) != (
        regime.kind,
        regime.rank,
        regime.alpha,
        regime.k,
    ):
        return [
            f"{where}, whose adapter is another (kind, rank, alpha, k); expected the same, or a frozen regime"
        ]
    if regime.is_3d and source.channels != regime.channels:
        return [
            f"{where}, whose channels are {list(source.channels)}; expected {list(regime.channels)}, those of {name}"
        ]
    return []


def _check_interpolation(study: Study, name: str) -> list[str]:
    """Problems of a regime's `interpolate`: a share, between a frozen unit and one that started from it, and no training."""
    regime, where = (
        study.regime_settings[name],
        f"regimes.{name}.interpolate: found {study.regime_settings[name].interpolate:g}",
    )
    if regime.interpolate == -1:
        return []
    if not 0 <= regime.interpolate <= 1:
        return [f"{where}; expected a share from 0 (the frozen unit) to 1 (the one in `init_from`)"]
    if not (regime.low_rank or regime.kind in ("bitfit", "full")):
        return [
            f"{where}; nothing of the backbone is adapted under kind {regime.kind}, leave this out"
        ]
    source = study.regime_settings.get(regime.init_from)
    if source is None:
        return [
            f"{where} with init_from {regime.init_from!r}; expected the name of a regime in `init_from`, which stands for "
            "its unit of the same training set"
        ]
    first = study.regime_settings.get(source.init_from.partition("-")[0])
    if first is None or not first.pretrained_tokens:
        begins = source.init_from or "pretrained weights alone"
        return [
            f"{where} with init_from {regime.init_from!r}, which starts from {begins}; expected one that starts from a "
            "frozen regime with the same head (linear probing, then fine-tuning)"
        ]
    unused = {"epochs": 0, "head_lr": 0.0, "adapter_lr": 0.0, "weight_decay": -1.0, "align": ""}
    if given := [key for key, empty in unused.items() if getattr(regime, key) != empty]:
        return [
            f"{where} and {', '.join(given)}; interpolated weights are not trained, leave the other out"
        ]
    return []
