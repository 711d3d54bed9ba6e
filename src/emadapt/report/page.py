"""The page people read: reports/index.html, one file that opens from disk, with its figures inside and nothing from outside."""

import base64
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from PIL import Image

import emadapt
from emadapt.errors import InputError
from emadapt.report.aligned import by_gain
from emadapt.report.comparisons import Groups, headline
from emadapt.report.few_shot import enough_words, panels
from emadapt.report.objects import objects_boards, thresholds_words
from emadapt.report.transfer import Card, crossing_rows, grouped, pair_rows
from emadapt.report.transfer_matrix import labelled_words
from emadapt.report.transfer_matrix import matrices as transfer_matrices
from emadapt.report.unions import by_test_set
from emadapt.study.study import Study

Row = dict[str, Any]
Cards = Mapping[tuple[str, str], Card]

WIDEST = 1000  # px of an embedded picture
ALPHA = 0.05
MOST = 4  # comparisons that the summary names
PACKAGES = (
    "torch",
    "timm",
    "open_clip_torch",
    "peft",
    "numpy",
    "scipy",
    "scikit-learn",
    "albumentations",
    "dvc",
    "mlflow",
)


def build_page(
    root: Path,
    study: Study,
    summary: Mapping[str, Any],
    kinds: Sequence[str],
    groups: Groups,
    cards: Cards,
    joined: Mapping[str, Any],
) -> str:
    """The page as HTML; the same input gives the same text.

    Args:
        root: the project root, for figures, overlays and model.json of the units, each used where it is there.
        study: names and order of everything.
        summary: the content of summary.json.
        kinds: for each of its units a key of `emadapt.report.figures.KINDS`.
        groups: metrics of the seeds by (backbone, regime, training set).
        cards: what diagnose wrote by (backbone, regime); may be empty.
        joined: the content of domain-vs-iou.json.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "fixed": fixed,
        "signed": signed,
        "p": p_value,
        "whole": whole,
        "enough": enough_words,
    }
    environment.filters |= {
        "labelled": labelled_words,
        "verdict": verdict,
        "thresholds": thresholds_words,
    }
    boards = leaderboards(study, summary, kinds, groups)
    template = environment.from_string(
        resources.files("emadapt.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        study=study.name,
        first=study.regimes[0],
        summary=summary,
        findings=findings(study, summary, boards, cards),
        boards=boards,
        matrices=matrices(study, summary, kinds),
        objects=objects_boards(boards),
        few=few_shot_sections(root, summary),
        transfers=transfer_matrices(summary.get("transfer", [])),
        aligned_figure=picture(root / "reports/figures/aligned.png"),
        aligned=by_gain(summary.get("aligned", [])),
        unions=by_test_set(summary["unions"]),
        domain=[domain_section(root, *key, card) for key, card in cards.items()],
        joined=joined,
        iou=picture(root / "reports/figures/iou.png"),
        scatter=picture(root / "reports/figures/domain-vs-iou.png"),
        overlays=[overlays(root, board, groups) for board in boards],
        weights=weights(root, study),
        units=[unit_row(root, run) for runs in groups.values() for run in runs],
        versions=versions(),
    )


def leaderboards(
    study: Study, summary: Mapping[str, Any], kinds: Sequence[str], groups: Groups
) -> list[Row]:
    """A board per test dataset: its rows, the best foreground IoU first, each with its comparison with the first regime.

    `hidden`: models with few labels, which have a section of their own where others have all.
    """
    names = ("backbone", "regime", "train_set", "test_set")
    compared = {tuple(c[name] for name in names): c for c in summary["comparisons"]}
    rows = [
        {
            **entry,
            "kind": kind,
            "seeds": len(entry["iou"]["values"]),
            "against": compared.get(tuple(entry[n] for n in names)),
        }
        for entry, kind in headline(study, summary["units"], kinds)
    ]
    for row in rows:
        row["verdict"] = row["against"] and verdict(row["against"])
    boards, tests = [], next(iter(groups.values()))[0]["test"]
    for test_set in dict.fromkeys(row["test_set"] for row in rows):
        own = sorted(
            (row for row in rows if row["test_set"] == test_set),
            key=lambda row: -row["iou"]["mean"],
        )
        n = own[0]["n"]
        hidden = sum(entry["test_set"] == test_set for entry in summary["units"]) - len(own)
        blocks = n // tests[test_set]["block_slices"]
        boards.append(
            {"test_set": test_set, "n": n, "blocks": blocks, "rows": own, "hidden": hidden}
        )
    return boards


def verdict(comparison: Mapping[str, Any]) -> str:
    """What a comparison says after Holm's correction: "better", "worse" or "undecided"."""
    if comparison["p_holm"] >= ALPHA:
        return "undecided"
    return "better" if comparison["difference"] > 0 else "worse"


def matrices(study: Study, summary: Mapping[str, Any], kinds: Sequence[str]) -> list[Row]:
    """Foreground IoU, training set x test dataset, for each backbone and regime."""
    cell = {
        (e["backbone"], e["regime"], e["train_set"], e["test_set"]): {
            **e["iou"],
            "kind": kind,
            "n": e["n"],
            "labelled": e["labelled"],
        }
        for e, kind in zip(summary["units"], kinds, strict=True)
    }
    return [
        {
            "backbone": backbone,
            "regime": regime,
            "tests": [
                (test, cell[backbone, regime, study.train_sets[0], test]["n"])
                for test in study.tested
            ],
            "rows": [
                (
                    name,
                    study.train_set_settings[name].few,
                    [cell[backbone, regime, name, test] for test in study.tested],
                )
                for name in study.train_sets
            ],
        }
        for backbone in study.backbones
        for regime in study.regimes
    ]


def few_shot_sections(root: Path, summary: Mapping[str, Any]) -> list[Row]:
    """Figure and panels of each test dataset that has few-label curves; points with their comparison with the first regime."""
    names = ("backbone", "regime", "train_set", "test_set")
    compared = {tuple(c[name] for name in names): c for c in summary["comparisons"]}
    sections: dict[str, Row] = {}
    for panel in panels(summary.get("few_shot", [])):
        test_set = panel["test_set"]
        figure = picture(root / "reports/figures" / f"few-shot-{test_set}.png")
        section = sections.setdefault(
            test_set, {"test_set": test_set, "figure": figure, "panels": []}
        )
        rows = []
        for curve in panel["curves"]:
            own = {
                (point["n"], point["all"]): {
                    **point,
                    "against": compared.get(
                        (curve["backbone"], curve["regime"], point["train_set"], test_set)
                    ),
                }
                for point in curve["points"]
            }
            rows.append({"curve": curve, "cells": [own.get(place) for place in panel["n"]]})
        section["panels"].append(panel | {"rows": rows})
    return list(sections.values())


def findings(
    study: Study, summary: Mapping[str, Any], boards: Sequence[Row], cards: Cards
) -> list[str]:
    """What was found, in sentences."""
    one_of = (
        (study.backbones, "backbone"),
        (study.regimes, "regime"),
        (study.train_sets, "training set"),
        (study.seeds, "seed"),
    )
    sizes = ", ".join(f"{len(some)} {word}{'s' * (len(some) > 1)}" for some, word in one_of)
    said = [
        f"Study {study.name} trained {len(study.units())} models ({sizes}), each tested on {' and '.join(study.tested)}."
    ]
    for board in boards:
        best = board["rows"][0]
        low, high = best["iou"]["ci95"]
        of = " of those with all labels" if board["hidden"] else ""
        said.append(
            f"On {board['test_set']} ({board['n']} test slices) the best{of} is {best['backbone']} {best['regime']} trained on"
            f" {best['train_set']}: foreground IoU {fixed(best['iou']['mean'])} (95 % interval {fixed(low)} to {fixed(high)},"
            f" {best['seeds']} seed{'s' * (best['seeds'] > 1)})."
        )
    return said + _compared(summary["comparisons"], study.regimes[0]) + _apart(cards)


def _compared(comparisons: Sequence[Mapping[str, Any]], first: str) -> list[str]:
    """How many comparisons with the first regime are significant, and which."""
    if not comparisons:
        return [f"Only one regime ({first}) was run, so regimes are not compared."]
    decided = [c for c in comparisons if verdict(c) != "undecided"]
    count = f"Of {len(comparisons)} comparison{'s' * (len(comparisons) > 1)} with {first}"
    said = [
        f"{count}, {len(decided) or 'none'} {'are' if len(decided) > 1 else 'is'} significant after Holm's correction."
    ]
    for several in grouped([{**c, "verdict": verdict(c)} for c in decided], "regime", "verdict"):
        listed = [
            f"{c['train_set']} and tested on {c['test_set']} ({signed(c['difference'])})"
            for c in several[:MOST]
        ]
        more = f", and {len(several) - MOST} more" if len(several) > MOST else ""
        said.append(
            f"Significantly {several[0]['verdict']}: {several[0]['regime']} trained on {', on '.join(listed)}{more}."
        )
    return said


def _apart(cards: Cards) -> list[str]:
    """Which datasets read as different to which models, by all tokens."""
    if not cards:
        return ["How far apart the datasets are has not been measured: diagnose has not been run."]
    said = []
    for (backbone, regime), card in cards.items():
        tokens = [
            row
            for row in pair_rows(card["pairs"])
            if (row["level"], row["class"]) == ("token", "all")
        ]
        for rows in grouped(tokens, "a", "b"):
            different = sum(
                row["different"] > 0.5 for row in rows
            )  # of the seeds of a training set
            each = "each" if different == len(rows) else str(different)
            who, after = f"{backbone} with {regime}", f" after {each} of {len(rows)} training sets"
            if rows[0]["train_set"] is None:
                who, after = f"the pretrained {backbone}", ""
            ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
            span = (
                " to ".join(dict.fromkeys(fixed(end, 1) for end in (min(ratios), max(ratios))))
                if ratios
                else "unknown"
            )
            what = f"different{after}" if different else "the same"
            said.append(
                f"To {who}, {rows[0]['a']} and {rows[0]['b']} read as {what} (distance {span} times the null)."
            )
    return said


def domain_section(root: Path, backbone: str, regime: str, card: Card) -> Row:
    """Tables and figures of what diagnose wrote about one backbone and regime."""
    said = {"halves": "same", "contrast": "different", "random": None, "pixels": None}
    what = {
        "pca": "principal components of the tokens: slices and tokens by dataset",
        "maps": "first three principal components as colours beside their slices",
        "distances": "distances between the datasets with their nulls",
    }
    figures = []
    for file in sorted((root / "reports/domain" / f"{backbone}-{regime}").glob("*.png")):
        figures.append(
            picture(file) | {"caption": f"{backbone}, {regime}: {what.get(file.stem, file.stem)}."}
        )
    return {
        "backbone": backbone,
        "regime": regime,
        "note": card.get("note", ""),
        "pairs": pair_rows(card["pairs"]),
        "controls": [
            {
                **row,
                "control": name,
                "expected": expected if row["level"] == "pixel" or name == "halves" else None,
            }
            for name, expected in said.items()
            for row in pair_rows((card.get("controls") or {}).get(name, []))
        ],
        "crossings": crossing_rows(card),
        "figures": figures,
    }


def overlays(root: Path, board: Row, groups: Groups) -> Row:
    """Best and worst test slice of the best unit on a dataset, and the worst slice of the worst unit."""
    test_set, rows = board["test_set"], board["rows"]
    wanted = [(rows[0], "best", "the best unit"), (rows[0], "worst", "the best unit")]
    if len(rows) > 1:
        wanted.append((rows[-1], "worst", "the worst unit"))
    items = []
    for row, which, whose in wanted:
        run = groups[row["backbone"], row["regime"], row["train_set"]][
            0
        ]  # the first seed stands for all
        file = root / "build/evaluate" / run["unit"] / f"overlay-{test_set}-{which}.png"
        if (slice_ := extreme_slice(run["test"][test_set], which)) and file.is_file():
            z, iou = slice_
            caption = f"{which.capitalize()} slice of {whose}, {run['unit']}: slice {z}, IoU {fixed(iou)}."
            alt = f"Image, label, prediction and errors side by side of {test_set} slice {z} under {run['unit']}"
            items.append(picture(file) | {"caption": caption, "alt": alt})
    return {"test_set": test_set, "items": items}


def extreme_slice(test: Mapping[str, Any], which: str) -> tuple[int, float] | None:
    """(slice, IoU) of the best or worst test slice that has foreground, as evaluate chose it; None where none has any."""
    scored = [
        (iou, z)
        for iou, z, counts in zip(
            test["per_slice"]["iou"], test["slices"], test["counts"], strict=True
        )
        if counts[2]
    ]
    if not scored:
        return None
    iou, z = (max if which == "best" else min)(scored, key=lambda pair: pair[0])
    return z, iou


def weights(root: Path, study: Study) -> list[Row]:
    """Where each backbone's weights came from, as its trained units say; more than one row where they disagree."""
    found: dict[tuple[str, str], Row] = {}
    for unit in study.units():
        card = model_card(root, unit.name)
        if card:
            origin = card["weights"]
            found.setdefault(
                (unit.backbone, origin["sha256"]), {"backbone": unit.backbone, **origin}
            )
    return [{"name": "", "note": "", **row} for row in found.values()]


def unit_row(root: Path, run: Mapping[str, Any]) -> Row:
    """What a unit cost, and what it was made with."""
    card = model_card(root, run["unit"])
    return {
        **{
            name: run.get(name)
            for name in ("unit", "trainable_params", "train_seconds", "peak_mb", "model_md5")
        },
        "precision": card.get("precision"),
        "version": card.get("version"),
    }


def model_card(root: Path, unit: str) -> dict[str, Any]:
    """model.json of a unit; {} where the model is not here, as after `dvc pull` of the evaluation alone."""
    file = root / "build/units" / unit / "model.json"
    if not file.is_file():
        return {}
    try:
        card = json.loads(file.read_text())
    except ValueError:
        card = None
    if not isinstance(card, dict) or not {"source", "sha256"} <= set(card.get("weights", ())):
        raise InputError(
            file,
            found="no model card",
            expected=f"that of unit {unit}, with its weights' source and sha256",
            do=f"Run `dvc repro train@{unit}`.",
        )
    return card


def versions() -> list[tuple[str, str]]:
    """Packages that decide numbers, in the environment that writes the page."""
    found = [("emadapt", emadapt.__version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def picture(file: Path) -> Row:
    """`src` (a data URI, "" where there is no file), `width` and `height` of a picture of at most WIDEST pixels across.

    Plots are smallest as PNG, electron micrographs as JPEG: whichever is smaller is taken.
    """
    if not file.is_file():
        return {"src": "", "width": 0, "height": 0}
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if image.width > WIDEST:
        image = image.resize(
            (WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS
        )
    forms = []
    for kind, options in (("png", {}), ("jpeg", {"quality": 82, "optimize": True})):
        data = io.BytesIO()
        image.save(data, kind, **options)
        forms.append((data.tell(), kind, data.getvalue()))
    _, kind, content = min(forms)
    return {
        "src": f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        "width": image.width,
        "height": image.height,
    }


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with so many digits; a dash where there is none."""
    return (
        "–"
        if value is None or not math.isfinite(value)
        else f"{value:.{digits}f}".replace("-", "−")
    )


def signed(value: float) -> str:
    """A difference with its sign and three digits."""
    return ("+" if value > 0 else "") + fixed(value)


def whole(value: float | None) -> str:
    """A whole number with thin spaces between thousands; a dash where there is none."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def p_value(value: float | None) -> str:
    """A p-value with three digits, four below 0.01, not below 0.0001; a dash where there is none."""
    if value is None:
        return "–"
    return "≤ 0.0001" if value <= 0.0001 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"
