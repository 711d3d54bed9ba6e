"""What the report recommends, in plain words: model, cost, labels, and what is not known."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from emadapt.errors import InputError
from emadapt.files import read_json
from emadapt.metrics.contrasts import MARGIN
from emadapt.report.contrasts import candidates
from emadapt.report.labels import curves
from emadapt.report.units import Entry, key_of, ranked, score_of
from emadapt.study.study import SAID, Study
from emadapt.tracking.provenance import provenance_tags

BASELINES = ("ridge", "knn", "unet2d", "resunet3d", "mitonet", "sam2")
"""Kinds of regimes that are no adaptation of a backbone."""
WIDTH = 100  # characters in a line
WIDE = 0.1
"""Width from which a 95 % interval is called wide."""

Summary = Mapping[str, Any]


def recommend(root: Path, study: Study, datasets: Sequence[str]) -> list[str]:
    """What to use for each dataset, in lines of at most WIDTH characters.

    Args:
        root: the project root, with reports/summary.json.
        study: the study that wrote it.
        datasets: of the study.

    Raises:
        InputError: there is no summary, or it is unreadable or of another study.
    """
    summary = read_summary(root, study)
    table = pd.DataFrame(summary["units"], dtype=object)
    table = table[candidates(table)]
    lines = _wrapped(
        f"Study {study.name}. Numbers are {SAID[study.score]} with 95 % intervals. Cost is that of"
        " training one seed with cached tokens.",
        "",
    )
    boards = []
    for dataset in datasets:
        own = table[table["test_set"] == dataset].to_dict("records")
        board = ranked(own)
        if not board:
            lines += ["", f"{dataset}: no model was trained on it."]
            continue
        lines += [
            "",
            f"{dataset} ({board[0]['n']} test {'images' if study.classifies else 'slices'})",
        ]
        said = [
            f"Best: {_model(study, board[0])}. {_score(board[0])}. {_cost(board[0])}.",
            _cheaper(study, summary, board),
            _baselines(study, summary, board),
            *_labels(summary, board[0]),
        ]
        lines += [line for text in said for line in _wrapped(text, "  ")]
        boards.append(board)
    lines += ["", *_wrapped(_one_for_all(study, summary, datasets), "")]
    unknown = " ".join(_unknown(root, study, summary, boards))
    return [*lines, "", *_wrapped(f"Not known. {unknown}", "")]


def read_summary(root: Path, study: Study) -> Summary:
    """reports/summary.json, checked to be what a report of `study` writes.

    Raises:
        InputError: it is missing, not JSON, or of another study or other units.
    """
    file = root / "reports/summary.json"
    expected = f"the summary of study {study.name} as params.yaml has it"
    do = "Run `emadapt report`, after `dvc repro`."
    summary = read_json(file, expected=expected, do=do)
    units = {
        (unit.backbone, unit.regime, unit.train_set, test)
        for unit in study.units()
        for test in study.tested
    }
    there = {(*key_of(entry), entry["test_set"]) for entry in summary.get("units", ())}
    if summary.get("study") != study.name or units != there:
        odd = [f"{'-'.join(names)} on {test}" for *names, test in sorted(units ^ there)[:3]]
        found = f"that of study {summary.get('study')}, other in {', '.join(odd) or 'its name'}"
        raise InputError(file, found=found, expected=expected, do=do)
    return summary


def _cheaper(study: Study, summary: Summary, board: Sequence[Entry]) -> str:
    """The fastest model that is shown to be as good as the best."""
    rivals = _against_best(summary, board[0]["test_set"])
    good = [
        entry
        for entry in board[1:]
        if rivals.get(key_of(entry), {}).get("as_good") and _seconds(entry) < _seconds(board[0])
    ]
    if not good:
        return f"Nothing cheaper was shown to be as good (within {MARGIN} {SAID[study.score]})."
    cheapest = min(good, key=lambda entry: entry["seconds"])
    return (
        f"Cheaper and as good (within {MARGIN} {SAID[study.score]}): {_model(study, cheapest)}."
        f" {_score(cheapest)}, {_difference(rivals[key_of(cheapest)])} to the best."
        f" {_cost(cheapest)}."
    )


def _baselines(study: Study, summary: Summary, board: Sequence[Entry]) -> str:
    """How regimes that do not adapt a backbone compare with the best."""
    rivals, said = _against_best(summary, board[0]["test_set"]), []
    if _kind(study, board[0]) in BASELINES:
        return "The best is a baseline: adapting a backbone does no better here."
    for kind in BASELINES:
        own = next((entry for entry in board if _kind(study, entry) == kind), None)
        if own is not None and (rival := rivals.get(key_of(own))):
            words = "as good" if rival["as_good"] else rival["verdict"]
            said.append(f"{own['regime']} {_difference(rival)}, {words}")
    if not said:
        return f"No baseline was run ({', '.join(BASELINES)}), so whether adapting pays is unknown."
    return f"Baselines compared with the best: {'; '.join(said)}."


def _labels(summary: Summary, best: Entry) -> list[str]:
    """How many labels are enough for the best regime."""
    names = ("test_set", "backbone", "regime")
    own = [
        c
        for c in curves(summary["units"], summary["contrasts"])
        if all(c[name] == best[name] for name in names)
    ]
    if not own:
        dataset = best["test_set"]
        return [
            "How many labels are enough was not measured. To measure it, add training sets such"
            f" as {dataset}_4: {{datasets: [{dataset}], slices: 4}}."
        ]
    said = []
    for curve in own:
        amount, enough = curve["amount"], curve["enough"]
        words = f"shown to be as good as all (within {MARGIN} {SAID[score_of(best)]})"
        said.append(
            f"Labels: {enough} {amount} were {words}."
            if enough
            else f"Labels: no fewer {amount} were {words}."
        )
    return said


def _one_for_all(study: Study, summary: Summary, datasets: Sequence[str]) -> str:
    """The union that serves the datasets best, against models of one dataset each."""
    rows = [
        row
        for row in summary["contrasts"]
        if row["factor"] == "union" and row["test_set"] in datasets
    ]
    if not rows:
        return (
            "One model for several datasets: not measured. It takes a training set of several"
            " datasets and one of each alone."
        )
    served: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        served.setdefault(key_of(row["model"]), []).append(row)
    own = max(served.values(), key=lambda own: (len(own), sum(row[study.score] for row in own)))
    backbone, regime, train_set = key_of(own[0]["model"])
    said = [
        f"{SAID[study.score]} {row[study.score]:.3f} on {row['test_set']}, {_difference(row)} to a"
        " model of its own"
        f"{', as good' if row['as_good'] else ''}"
        for row in own
    ]
    return (
        f"One model for several datasets: {regime} on {backbone}, trained on {train_set}."
        f" {'; '.join(said)}."
    )


def _unknown(
    root: Path, study: Study, summary: Summary, boards: Sequence[Sequence[Entry]]
) -> list[str]:
    """What the numbers cannot say."""
    said = []
    if provenance_tags(root).get("params.sha256") != summary["params_sha256"]:
        said.append("params.yaml has changed since this report was written.")
    for board in boards:
        dataset, (low, high) = board[0]["test_set"], board[0][study.score]["ci95"]
        if high - low >= WIDE:
            said.append(
                f"The interval of {dataset} is {high - low:.2f} wide: its order may change."
            )
    if any(len(board) > 1 for board in boards):
        said.append("The best was chosen on its test slices, so its score is rather too high.")
    said.append("No other sample, microscope or laboratory was tested.")
    if len(study.seeds) == 1:
        said.append("One seed: chance in training is in no interval.")
    random = [name for name in study.backbones if study.backbone_settings[name].source == "random"]
    return said + [f"{name} has random weights; it is a control." for name in random]


def _against_best(summary: Summary, test_set: str) -> dict[tuple[str, ...], Mapping[str, Any]]:
    return {
        key_of(row["model"]): row
        for row in summary["contrasts"]
        if row["factor"] == "best" and row["test_set"] == test_set
    }


def _kind(study: Study, entry: Entry) -> str:
    return study.regime_settings[entry["regime"]].kind


def _model(study: Study, entry: Entry) -> str:
    regime = study.regime_settings[entry["regime"]]
    name = f"{entry['regime']} on {entry['backbone']}" if regime.uses_backbone else entry["regime"]
    if not regime.trains:
        return f"{name}, not trained"
    labels = "" if entry["labels"] == "all" else f" ({entry['labels']})"
    head = "" if regime.own_head else f", head {study.head_of(entry['regime'])}"
    return f"{name}{head}, trained on {entry['train_set']}{labels}"


def _score(entry: Entry) -> str:
    score, (low, high) = score_of(entry), entry[score_of(entry)]["ci95"]
    return f"{SAID[score]} {entry[score]['mean']:.3f} ({low:.3f} to {high:.3f})"


def _seconds(entry: Entry) -> float:
    """NaN if not known, which is not less than anything."""
    return math.nan if entry["seconds"] is None else float(entry["seconds"])


def _cost(entry: Entry) -> str:
    if entry["seconds"] is None:
        return "cost not known here"
    return f"{entry['seconds']:,.0f} s, {entry['peak_mb'] / 1000:.1f} GB"


def _difference(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def _wrapped(text: str, indent: str) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, indent, f"{indent}  ")
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.wrap(text)
