"""The table of units: a row for each unit and test dataset, with what was varied as columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emadapt.errors import InputError
from emadapt.files import read_json
from emadapt.metrics import classification
from emadapt.metrics.intervals import over_seeds
from emadapt.study.study import Study, Unit
from emadapt.training.costs import cost_of
from emadapt.training.model_card import EVALUATED
from emadapt.training.tracked import UNITS

MODEL = ["backbone", "regime", "train_set"]
"""What names a model; its units differ in the seed."""
NO_COST = {"seconds": None, "peak_mb": None}
"""Of a model that was trained in another checkout."""
METRICS = {
    "iou": ("counts", "iou"),
    "dice": ("counts", "dice"),
    "boundary_iou": ("boundary_counts", "iou"),
}
"""Of each metric: the counts of metrics.json, and what is made of them."""
OBJECTS = (
    *("ap50", "ap75", "pq", "sq", "rq"),
    *("predicted", "labelled", "matched", "split", "merged", "vi_split", "vi_merge"),
)
COPIED = ("relation", "few", "labels", "amount", "seen_before", "labelled", "trainable_params")
"""Columns of the table of units that are the same for all seeds."""
RELATIONS = {
    "in-domain": "trained on this dataset alone",
    "union": "trained on this dataset and others",
    "cross-domain": "trained on other datasets only",
    "other labels": "trained on the same images with other labels",
    "warm start": "trained on other datasets, from a model that saw this one",
    "zero-shot": "a published system, not trained here",
    "label prompts": "a published system prompted with the true labels, an upper bound",
}
"""How a model can relate to the dataset that it is tested on."""

Entry = Mapping[str, Any]
"""A model on a test dataset, as in `units` of summary.json."""


def read_units(root: Path, study: Study) -> pd.DataFrame:
    """Read build/evaluate/<unit>/metrics.json of all units.

    Returns:
        A row for each unit and test dataset, in the study's order. `unit`, `backbone`, `regime`,
        `train_set`, `seed`, `test_set`; what was varied, see `varied`; `test`, `unseen`: scores of
        the test slices, and of slices of the whole dataset (None unless all its labels are new
        to the model); `labelled`, `trainable_params`, `seconds`, `peak_mb`.

    Raises:
        InputError: metrics are missing, unreadable, of another study or of another model than the
            unit has now, or units were made from different weights or data.
    """
    rows = []
    made_from: dict[str, tuple[str, str]] = {}
    for unit in study.units():
        metrics = _metrics(root, unit, study.tested)
        for what, own in metrics["made_from"].items():
            other, first = made_from.setdefault(what, (own, unit.name))
            if own != other:
                raise InputError(
                    f"unit {unit.name}",
                    found=f"{what} with hash {own[:12]}",
                    expected=f"{other[:12]}, as for unit {first}",
                    do="Run `dvc repro`, which makes again what is out of date.",
                )
        for test_set in study.tested:
            scores = metrics["test"][test_set]
            row = {
                "unit": unit.name,
                **dataclasses.asdict(unit),
                "test_set": test_set,
                **varied(study, unit, test_set),
                "test": scores,
                "unseen": scores.get("unseen"),
                "labelled": metrics["labelled"],
                "trainable_params": metrics["trainable_params"],
                "backbone_share": metrics["backbone_share"],
                **NO_COST,
                **cost_of(metrics["key"], root),
            }
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)  # keeps None


def varied(study: Study, unit: Unit, test_set: str) -> dict[str, Any]:
    """The factors that a study can vary, as they are for a unit and a test dataset.

    Returns:
        `relation`: a key of RELATIONS.
        `few`: whether the training set uses a part of its labels.
        `labels`, `amount`: how many labels of the test dataset it trained on ("all", "4 slices"),
        and the unit of that ("all", "slices", "tiles", "images"); None: none.
        `others`: other datasets that it trained on; None where it trained on none or not at all.
        `seen_before`: whether its warm start saw labels of the test dataset that it lacks itself.
        `alignment`, `warm_start`: empty without one.
        `plain_backbone`, `plain_regime`: the same without alignment, if the study has it.
        `cold_regime`: the same regime without warm start, if the study has it.
    """
    backbone = study.backbone_settings[unit.backbone]
    regime = study.regime_settings[unit.regime]
    train_set = study.train_set_settings[unit.train_set]
    trained_on_it = regime.trains and test_set in train_set.datasets
    labels, amount = _labels(study, unit, test_set) if trained_on_it else (None, None)
    others = [name for name in train_set.datasets if name != test_set]
    pixels = f"pixels of {backbone.pixel_nm:g} nm" if backbone.pixel_nm else ""
    alignments = [backbone.align, pixels, "self-training" if study.unlabelled_of(unit) else ""]
    backbones, regimes = study.backbone_settings, study.regime_settings
    no_alignment = {"align": "", "reference": "", "pixel_nm": 0.0}
    plain = _same_but(backbones, study.backbones, unit.backbone, no_alignment)
    return {
        "relation": relation(study, unit, test_set),
        "few": train_set.few,
        "labels": labels,
        "amount": amount,
        "others": " and ".join(others) if trained_on_it else None,
        "seen_before": test_set in seen_before(study, unit),
        "alignment": " + ".join(filter(None, alignments)),
        "warm_start": study.warm_start_of(unit),
        "plain_backbone": plain if regime.uses_backbone else None,
        "plain_regime": _same_but(regimes, study.regimes, unit.regime, {"self_training": 0.0}),
        "cold_regime": _same_but(regimes, study.regimes, unit.regime, {"warm_start": ""}),
    }


def relation(study: Study, unit: Unit, test_set: str) -> str:
    """How a unit relates to a test dataset, a key of RELATIONS."""
    regime = study.regime_settings[unit.regime]
    if not regime.trains:
        return "label prompts" if regime.sees_test_labels else "zero-shot"
    datasets = study.train_set_settings[unit.train_set].datasets
    if test_set in datasets:
        return "union" if len(datasets) > 1 else "in-domain"
    if test_set in seen_before(study, unit):
        return "warm start"
    images = {study.images_of(name) for name in datasets}
    return "other labels" if study.images_of(test_set) in images else "cross-domain"


def seen_before(study: Study, unit: Unit) -> set[str]:
    """Datasets of which a unit's warm start saw labels that the unit's training set lacks.

    What a model folder was trained on is not known here and counts as nothing.
    """
    own = study.train_set_settings[unit.train_set]
    earlier = {source.train_set for source in study.sources_of(unit)} - {unit.train_set}
    seen = {name for other in earlier for name in study.train_set_settings[other].datasets}
    complete = {name for name in own.datasets if not own.slices_of(name) and not own.crops}
    return seen - complete


def entries(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """`units` of summary.json: an entry for each model and test dataset, over its seeds.

    Returns:
        Names, `n` slices, each metric as `over_seeds` gives it; of several classes, `classes` has
        the metrics of each by name, and `confusion` the pixels (labelled, predicted) of all seeds;
        `unseen`, `instances` where all seeds have them; `relation`, `few`, `labels`, `amount`,
        `seen_before` as in `varied`; `labelled`, `trainable_params`; `seconds` (mean), `peak_mb`
        (largest), None if not known. Of whole images the scores of `metrics.classification`, and
        `backbone_share`, what is trained of the backbone.
    """
    found = []
    for names, seeds in rows.groupby([*MODEL, "test_set"], sort=False):
        first, tests = seeds.iloc[0], list(seeds["test"])
        of_images = score_of(tests[0]) == "auroc"
        entry: dict[str, Any] = dict(zip([*MODEL, "test_set"], names, strict=True))
        entry["n"] = tests[0]["n"]
        if of_images:
            scores = classification.SCORES
            entry |= {name: classification.over_seeds(tests, name) for name in scores}
        else:
            entry |= {metric: _metric(tests, metric) for metric in METRICS}
        if seeds["unseen"].notna().all():
            whole = list(seeds["unseen"])
            entry["unseen"] = {"n": whole[0]["n"], "iou": _metric(whole, "iou")}
        if "classes" in tests[0]:
            entry["classes"] = {
                name: {metric: _metric(tests, metric, at) for metric in METRICS}
                for at, name in enumerate(tests[0]["classes"])
            }
            entry["confusion"] = np.sum([test["confusion"] for test in tests], 0).tolist()
        if all("instances" in test for test in tests):
            entry["instances"] = {name: _mean(tests, name) for name in OBJECTS}
        entry |= {name: first[name] for name in COPIED}
        if of_images:
            entry["backbone_share"] = first["backbone_share"]
        costs = seeds[list(NO_COST)].dropna().astype(float)
        known = len(costs) == len(seeds)
        entry["seconds"] = round(costs["seconds"].mean(), 6) if known else None
        entry["peak_mb"] = round(costs["peak_mb"].max(), 6) if known else None
        found.append(entry)
    return found


def score_of(entry: Entry) -> str:
    """The headline of a model's scores: `iou`, of whole images `auroc`."""
    return "auroc" if "auroc" in entry else "iou"


def key_of(entry: Entry) -> tuple[str, str, str]:
    """Which model an entry is about."""
    return entry["backbone"], entry["regime"], entry["train_set"]


def headline(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries for the leaderboard: those trained with all labels, or all if there are none."""
    return [entry for entry in entries if not entry["few"]] or entries


def ranked(entries: Iterable[Entry]) -> list[Any]:
    """The best first; systems that were prompted with the labels are last, whatever their IoU."""
    return sorted(
        entries, key=lambda e: (e["relation"] == "label prompts", -e[score_of(e)]["mean"])
    )


def _metric(tests: list[Any], name: str, at: int | None = None) -> dict[str, Any]:
    """A metric over seeds, of several classes their mean or that of the one `at` this place."""
    counts, metric = METRICS[name]
    found = np.array([test[counts] for test in tests])
    return over_seeds(found if at is None else found[:, :, at], metric)


def _mean(tests: list[Any], name: str) -> dict[str, Any]:
    values = [test["instances"][name] for test in tests]
    return {"mean": round(sum(values) / len(values), 6), "values": values}


def _same_but(
    settings: Mapping[str, Any], names: tuple[str, ...], name: str, plain: dict[str, Any]
) -> str:
    """The first of `names` whose settings are those of `name` but for `plain`; else `name`."""
    fields = settings[name].model_dump()
    wanted = fields | {key: value for key, value in plain.items() if key in fields}
    return next((other for other in names if settings[other].model_dump() == wanted), name)


def _labels(study: Study, unit: Unit, test_set: str) -> tuple[str, str]:
    train_set = study.train_set_settings[unit.train_set]
    slices, tiles = train_set.slices_of(test_set), train_set.crops
    if not slices and not tiles:
        return "all", "all"
    number, amount = (slices, "slices") if slices else (tiles, "tiles")
    if slices and study.dataset_settings[test_set].of_volumes:
        return f"{number} volumes", amount
    if study.classifies:
        return f"{number} images of each class", "images"
    if isinstance(number, str):  # a share
        return f"{number} of {amount}", amount
    return f"{number} {amount if number > 1 else amount[:-1]}", amount


def _metrics(root: Path, unit: Unit, datasets: tuple[str, ...]) -> dict[str, Any]:
    """What evaluate wrote about a unit, checked as far as the report needs it."""
    file = root / EVALUATED / unit.name / "metrics.json"
    expected = f"the test metrics of unit {unit.name} on {', '.join(datasets)}"
    do = f"Run `dvc repro evaluate@{unit.name}`."
    metrics = read_json(file, expected=expected, do=do)
    tests = metrics.get("test", {})
    scored = [name for name in datasets if {"counts", "truth"} & tests.get(name, {}).keys()]
    if metrics.get("unit") != unit.name or len(scored) < len(datasets):
        found = f"those of unit {metrics.get('unit')} on {', '.join(scored) or 'none'}"
        raise InputError(file, found=found, expected=expected, do=do)
    model = root / UNITS / unit.name / "model.json"
    if model.is_file():
        key = read_json(model, expected="what `train` writes", do="Train the unit again.")["key"]
        if key != metrics["key"]:
            found, expected = "scores of another model", f"those of {model.parent}"
            raise InputError(file, found=found, expected=expected, do=do)
    return metrics
