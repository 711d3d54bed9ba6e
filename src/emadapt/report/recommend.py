"""What the report recommends, in plain words: model, regime, head and labels for each dataset, and what is not known."""

import json
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.report.comparisons import Entry, key_of, trained_on
from emadapt.report.transfer_matrix import labelled_words
from emadapt.study.regimes import RegimeSettings
from emadapt.study.study import Study
from emadapt.study.training import HEAD_NAMES
from emadapt.tracking.provenance import provenance_tags

Summary = Mapping[str, Any]

BASELINES = ("ridge", "knn", "unet2d", "resunet3d", "mitonet", "sam2")
SCRATCH = {"unet2d": "a U-Net from scratch", "resunet3d": "a 3D U-Net from scratch"}
"""Kinds without a backbone, in words."""
WIDTH = 118  # characters a line
FEW_SLICES = 10
"""Test slices below which a dataset's numbers are said to rest on few."""
WIDE = 0.1
"""Width of a 95 % interval from which it is said to be wide."""
MOST = 4  # names in a list


def recommend(root: Path, study: Study, datasets: Sequence[str]) -> list[str]:
    """Lines of at most WIDTH characters; every IoU with its 95 % interval.

    Args:
        root: the project root, with reports/summary.json.
        study: the study that wrote it; says what its regimes and training sets are.
        datasets: to recommend for, of the study.

    Raises:
        InputError: no summary, or one that is unreadable, of another study or of an older version.
    """
    summary = read_summary(root, study)
    seeds = f"{len(study.seeds)} seed{'s' * (len(study.seeds) > 1)}"
    lines = [
        f"Study {study.name}, {seeds}: foreground IoU (95 % interval), seconds and memory of training one seed, tokens cached."
    ]
    for dataset in datasets:
        ranked = sorted(
            trained_on(study, summary["units"], dataset), key=lambda entry: -entry["iou"]["mean"]
        )
        if not ranked:
            lines += [
                "",
                f"{dataset}: no unit was trained on it, so there is nothing to recommend.",
            ]
            continue
        lines += ["", f"{dataset}, {ranked[0]['n']} test slices"]
        said = [
            _best(study, ranked[0]),
            *_cheapest(study, summary, ranked),
            *_baselines(study, summary, ranked),
        ]
        lines += [
            line
            for text in [*said, *_labels(study, summary, ranked[0])]
            for line in _wrapped(text, "  ", "    ")
        ]
    lines += ["", *_wrapped(_one_for_all(study, summary, datasets), "", "  ")]
    return [
        *lines,
        "",
        *_wrapped(
            f"What is not known. {' '.join(unknowns(root, study, summary, datasets))}", "", "  "
        ),
    ]


def read_summary(root: Path, study: Study) -> Summary:
    """reports/summary.json, checked to be what a report of `study` writes.

    Raises:
        InputError: it is missing, no JSON, of another study, of other units than the study has, or of an older version.
    """
    file, do = (
        root / "reports/summary.json",
        "Run `emadapt report`, after `dvc repro` where units were not trained.",
    )
    expected = f"the summary of study {study.name}"
    try:
        summary = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(file, found="no file", expected=expected, do=do) from None
    except ValueError as error:
        raise InputError(file, found=f"no JSON ({error})", expected=expected, do=do) from None
    if not isinstance(summary, dict) or not isinstance(summary.get("units"), list):
        raise InputError(file, found="no summary", expected=expected, do=do)
    if summary.get("study") != study.name:
        do = f"Run `emadapt use {summary.get('study')}`, or `dvc repro` for {study.name}."
        raise InputError(
            file, found=f"that of study {summary.get('study')}", expected=expected, do=do
        )
    if missing := [name for name in ("against_best", "unions") if name not in summary]:
        raise InputError(
            file, found=f"no {missing[0]}: an older report wrote it", expected=expected, do=do
        )
    units = {
        (unit.backbone, unit.regime, unit.train_set, test)
        for unit in study.units()
        for test in study.tested
    }
    if odd := units ^ {(*key_of(entry), entry["test_set"]) for entry in summary["units"]}:
        named = "-".join(min(odd)[:3]) + f" on {min(odd)[3]}"
        where = "params.yaml" if min(odd) in units else "the summary"
        raise InputError(
            file,
            found=f"other units than params.yaml has ({named} is in {where} alone)",
            expected=expected,
            do=do,
        )
    return summary


def _best(study: Study, entry: Entry) -> str:
    spec = study.regime_settings[entry["regime"]]
    note = " A baseline: no adaptation does better here." if spec.kind in BASELINES else ""
    return f"Best: {_model(study, entry)}: {_iou(entry)}, {_cost(entry)}.{note}"


def _cheapest(study: Study, summary: Summary, ranked: Sequence[Entry]) -> list[str]:
    """The model with the least seconds among those that are not significantly worse than the best."""
    if len(ranked) == 1:
        return ["No GPU, or little time: nothing else was trained on it."]
    best, rivals = ranked[0], _against_best(summary, ranked)
    equal = [best, *(entry for entry in ranked[1:] if rivals[key_of(entry)]["ci95"][1] >= 0)]
    cheapest = min(equal, key=lambda entry: entry["seconds"])
    if cheapest is best:
        return [
            "No GPU, or little time: the best is also the cheapest that is not significantly worse."
        ]
    return [
        f"No GPU, or little time: {_model(study, cheapest)}: {_iou(cheapest)}, {_cost(cheapest)}; against the best"
        f" {_difference(rivals[key_of(cheapest)])}, {_not_worse(rivals[key_of(cheapest)])}."
    ]


def _baselines(study: Study, summary: Summary, ranked: Sequence[Entry]) -> list[str]:
    """How the other baselines, each with its best training set, stand against the best."""
    rivals, said = _against_best(summary, ranked), []
    for kind in BASELINES:
        own = [entry for entry in ranked if study.regime_settings[entry["regime"]].kind == kind]
        if own and own[0] is not ranked[0]:
            comparison = rivals[key_of(own[0])]
            verdict = (
                "is worse"
                if comparison["ci95"][1] < 0
                else f"does as well ({_not_worse(comparison)})"
            )
            said.append(f"{_regime(study, own[0]['regime'])} {verdict}: {_difference(comparison)}")
    if said:
        return [f"Baselines against the best: {'; '.join(said)}."]
    if study.regime_settings[ranked[0]["regime"]].kind in BASELINES:
        return []
    return [f"Baselines ({', '.join(BASELINES)}) were not run: whether adapting pays is not known."]


def _labels(study: Study, summary: Summary, best: Entry) -> list[str]:
    """How many labels are enough for the best regime, and for the one that needs the fewest if that is fewer."""
    dataset = best["test_set"]
    curves = [curve for curve in summary.get("few_shot", []) if curve["test_set"] == dataset]
    if not curves:
        return [
            f"Labels: how many are enough was not measured; add training sets such as {dataset}_4: {{datasets: [{dataset}],"
            f" slices: 4}} (docs/how-to.md)."
        ]
    ranked = sorted(
        curves,
        key=lambda curve: (
            (curve["backbone"], curve["regime"]) != (best["backbone"], best["regime"]),
            len(curve["datasets"]),
        ),
    )
    frugal = [
        curve
        for curve in ranked[1:]
        if curve["enough"] and curve["enough"]["n"] and curve["amount"] == ranked[0]["amount"]
    ]
    chosen = [ranked[0], *sorted(frugal, key=lambda curve: curve["enough"]["n"])[:1]]
    return [f"Labels: {_curve(study, curve)}" for curve in chosen]


def _curve(study: Study, curve: Mapping[str, Any]) -> str:
    tiles = "patches" if study.regime_settings[curve["regime"]].depth > 1 else "tiles"
    unit = tiles if curve["amount"] == "crops" else "slices"
    few = [point for point in curve["points"] if not point["all"]]
    who, last = _named(study, curve["backbone"], curve["regime"]), few[-1]
    found = curve["enough"]
    if found is None:
        return f"{who} with {last['n']} {unit} has {_point(last)}; nothing was trained on all labels to compare with."
    whole = next(point for point in curve["points"] if point["all"])
    with_all = f"{100 * found['share']:.0f} % of the {_point(whole)} of all {whole['n']}"
    if found["n"] is None:
        return f"{who} needs more than {last['n']} {unit} for {with_all}: {last['n']} give {_point(last)}."
    reached = next(point for point in few if point["n"] == found["n"])
    low, high = (found[end] or f"more than {last['n']}" for end in ("earliest", "latest"))
    return f"{who} reaches {with_all} with {reached['n']} {unit}: {_point(reached)}; read off the intervals, {low} to {high}."


def _one_for_all(study: Study, summary: Summary, datasets: Sequence[str]) -> str:
    """The union that serves the datasets best, dataset by dataset against a model of its own."""
    unions = [u for u in summary["unions"] if u["test_set"] in datasets and not u.get("few")]
    if not unions:
        return "One model for several datasets: not measured; it takes a training set of several and one of each alone."
    entries = {(*key_of(entry), entry["test_set"]): entry for entry in summary["units"]}
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for union in unions:
        groups.setdefault(key_of(union), []).append(union)

    def mean(key: tuple[str, str, str]) -> tuple[int, float]:
        ious = [entries[(*key, union["test_set"])]["iou"]["mean"] for union in groups[key]]
        return len(ious), sum(ious) / len(ious)

    key = max(groups, key=mean)
    said, worse = [], []
    for union in groups[key]:
        said.append(
            f"on {union['test_set']} {_iou(entries[(*key, union['test_set'])])}, against {union['against']} alone"
            f" {_difference(union)}"
        )
        worse += [union["test_set"]] if union["ci95"][1] < 0 else []
    verdict = (
        f"it costs IoU on {' and '.join(worse)}"
        if worse
        else "no loss was found, within these intervals"
    )
    return f"One model for several datasets: {_named(study, *key[:2])} trained on {key[2]}: {'; '.join(said)}. So {verdict}."


def unknowns(root: Path, study: Study, summary: Summary, datasets: Sequence[str]) -> list[str]:
    """What the numbers cannot say, from facts of the study and its summary."""
    said = []
    if provenance_tags(root).get("params.sha256") != summary["params_sha256"]:
        said.append("params.yaml has changed since this report was written.")
    if len(study.seeds) == 1:
        said.append("One seed: chance in training is in no interval.")
    chosen = []
    for dataset in datasets:
        if not (own := trained_on(study, summary["units"], dataset)):
            continue
        low, high = max(own, key=lambda entry: entry["iou"]["mean"])["iou"]["ci95"]
        if own[0]["n"] < FEW_SLICES or high - low >= WIDE:
            said.append(
                f"{dataset} has {own[0]['n']} test slices and an interval {high - low:.2f} wide around its best: other"
                " slices may give another order."
            )
        chosen += [f"{len(own)} models for {dataset}"] if len(own) > 1 else []
    if chosen:
        said.append(
            f"The best was found on the slices that it is scored on ({', '.join(chosen)}): its IoU is rather too high."
        )
    said += _one_of_a_kind(study)
    said.append(
        "Training and test slices are of the same datasets: no other sample, microscope or laboratory was tested."
    )
    if missing := [
        name
        for name in datasets
        if name not in {curve["test_set"] for curve in summary.get("few_shot", [])}
    ]:
        said.append(f"Curves of few labels were not run for {' and '.join(missing)}.")
    else:
        said.append("Numbers of labels leave out the validation slices, which choose the epoch.")
    return said + _not_tried(study)


def _one_of_a_kind(study: Study) -> list[str]:
    """Kinds of imaging (sections thicker than two pixels, or not) of which there is one dataset."""
    kinds: dict[str, list[str]] = {}
    for name in study.tested:
        z, _, x = study.dataset_settings[name].voxel_nm
        kinds.setdefault("thick sections" if z > 2 * x else "near-isotropic voxels", []).append(
            name
        )
    alone = [
        f"{names[0]} is the only one with {kind}"
        for kind, names in kinds.items()
        if len(names) == 1
    ]
    return (
        [
            f"Of the datasets {' and '.join(alone)}: what holds for it need not hold for others of its kind."
        ]
        if alone
        else []
    )


def _not_tried(study: Study) -> list[str]:
    from emadapt.models.archs import BACKBONES

    used = {study.backbone_settings[name].arch for name in study.backbones}
    kinds = {study.regime_settings[name].kind for name in study.regimes}
    backbones = [name for name in BACKBONES if name not in used and not name.startswith("tiny_")]
    regimes = [
        name
        for name in typing.get_args(typing.get_type_hints(RegimeSettings)["kind"])
        if name not in kinds
    ]
    heads = [
        name
        for name in HEAD_NAMES
        if name not in {study.head_of(regime) for regime in study.regimes}
    ]
    lists = [
        f"{what} {_some(names)}"
        for what, names in (("backbones", backbones), ("regimes", regimes), ("heads", heads))
        if names
    ]
    random = [name for name in study.backbones if study.backbone_settings[name].source == "random"]
    said = [f"Not tried: {'; '.join(lists)}."] if lists else []
    return said + [f"{name} has random weights: a control, no recommendation." for name in random]


def _against_best(
    summary: Summary, ranked: Sequence[Entry]
) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    test_set = ranked[0]["test_set"]
    return {
        key_of(comparison): comparison
        for comparison in summary["against_best"]
        if comparison["test_set"] == test_set
    }


def _not_worse(comparison: Mapping[str, Any]) -> str:
    low = comparison["ci95"][0]
    return "not significantly worse" + (
        f", though it may be by up to {-low:.2f}" if low <= -0.01 else ""
    )


def _model(study: Study, entry: Entry) -> str:
    spec = study.regime_settings[entry["regime"]]
    labels = labelled_words(entry["labelled"])
    labels = labels.replace("tiles", "patches") if spec.depth > 1 else labels
    start = "" if not spec.uses_backbone else f"{entry['backbone']}, "
    what = f"{start}regime {_regime(study, entry['regime'])}"
    head = "" if spec.own_head else f", head {study.head_of(entry['regime'])}"
    if not spec.trains:
        return f"{what}, not trained"
    return f"{what}{head}, trained on {entry['train_set']}" + (f" ({labels})" if labels else "")


def _named(study: Study, backbone: str, regime: str) -> str:
    """Backbone, where there is one, and regime."""
    start = "" if study.regime_settings[regime].from_scratch else f"{backbone} "
    return start + _regime(study, regime)


def _regime(study: Study, name: str) -> str:
    """The name; of a regime without a backbone what it is, too: "deep (a 3D U-Net from scratch)"."""
    kind = study.regime_settings[name].kind
    return f"{name} ({SCRATCH[kind]})" if kind in SCRATCH else name


def _iou(entry: Entry) -> str:
    low, high = entry["iou"]["ci95"]
    return f"IoU {entry['iou']['mean']:.3f} ({low:.3f} to {high:.3f})"


def _cost(entry: Entry) -> str:
    return f"{entry['seconds']:,.0f} s, {entry['peak_mb'] / 1000:.1f} GB"


def _difference(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["ci95"]
    return f"{comparison['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def _point(point: Mapping[str, Any]) -> str:
    return f"{point['iou']:.3f} ({point['ci95'][0]:.3f} to {point['ci95'][1]:.3f})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
