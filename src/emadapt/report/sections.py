"""The sections of the report: each draws its figure and makes its table.

`folder` is reports/figures, `entries` are the `units` of summary.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from emadapt.metrics.classification import SCORES
from emadapt.metrics.contrasts import MARGIN
from emadapt.report import domain, figures
from emadapt.report.contrasts import FACTORS
from emadapt.report.figures import Line, Panel, Row
from emadapt.report.labels import curves
from emadapt.report.tables import (
    MISSING,
    Cell,
    Picture,
    Section,
    Table,
    columns,
    difference,
    number,
    p_value,
    whole,
    with_interval,
)
from emadapt.report.units import RELATIONS, headline, key_of, ranked, score_of
from emadapt.study.study import SAID
from emadapt.training.model_card import EVALUATED

RELATION_COLOURS = {
    "in-domain": figures.BLUE,
    "union": figures.GREEN,
    "cross-domain": figures.ORANGE,
    "other labels": figures.PINK,
    "warm start": figures.LIGHT_BLUE,
    "zero-shot": figures.GREY,
    "label prompts": figures.BLACK,
}
VERDICT_COLOURS = {"better": figures.BLUE, "worse": figures.RED, "undecided": figures.GREY}
Entries = list[dict[str, Any]]
MASKS = (
    "Dice and boundary IoU are pooled over the test slices at the data's own resolution. They are"
    " means over seeds, with 95 % intervals: how far they would move in other {places} and with"
    " other seeds. 0 to 1: too few places."
)
IMAGES = (
    "AUROC is the mean over classes, each against the others; balanced accuracy is the mean of the"
    " classes' shares of right answers. They are means over seeds, with 95 % intervals: how far"
    " they would move with other images (groups of images, where there are groups) and other seeds."
)
"""What the scores of the leaderboard mean."""


def leaderboard(folder: Path, entries: Entries, *, of_volumes: bool) -> Section:
    """Every model with all labels, by test dataset, the best first; label prompts are last.

    `folder` gets iou.png. Datasets are `of_volumes` or of one each.
    """
    masks = MASKS.format(places="volumes" if of_volumes else "places of the same volume")
    shown = headline(entries)
    score = score_of(shown[0])
    of_images = score == "auroc"
    tests = dict.fromkeys(entry["test_set"] for entry in shown)
    boards = {test: ranked(e for e in shown if e["test_set"] == test) for test in tests}
    rows = {
        f"tested on {test}": [
            Row(_model(e), e[score]["mean"], e[score]["ci95"], RELATION_COLOURS[e["relation"]])
            for e in board
        ]
        for test, board in boards.items()
    }
    there = {entry["relation"] for entry in shown}
    legend = {RELATION_COLOURS[name]: name for name in RELATIONS if name in there}
    measured = _measured(shown)
    figures.forest_png(folder / "iou.png", rows, measured, legend)
    text = [
        IMAGES if of_images else f"{measured[0].upper()}{measured[1:]}, {masks}",
        "; ".join(f"{name}: {RELATIONS[name]}" for name in RELATIONS if name in there) + ".",
    ]
    if any("unseen" in entry for entry in shown):
        text.append(
            "IoU, all slices: of slices of the whole dataset, where the model saw none of its"
            " labels."
        )
    if any("instances" in entry for entry in shown):
        text.append(
            "AP 0.5: true positives / all objects, predicted or labelled, at IoU above 0.5. PQ:"
            " panoptic quality. Objects: connected components, found / labelled."
        )
    if len(shown) < len(entries):
        text.append("Models with few labels have a section of their own.")
    parts: list[Table | Picture] = [Picture(folder / "iou.png", f"{measured}, 95 % intervals.")]
    for test, board in boards.items():
        parts.append(_board(test, board))
        if "classes" in board[0]:
            path = folder / f"confusion-{test}.png"
            figures.confusion_png(path, board[0]["confusion"], ["background", *board[0]["classes"]])
            words = f"Which classes are taken for which, in {test}: {_model(board[0])}, the best."
            parts += [_classes(test, board), Picture(path, words)]
    return Section("leaderboard", "Leaderboard", text, parts)


def _measured(entries: Entries) -> str:
    """What the headline is."""
    if score_of(entries[0]) == "auroc":
        return "AUROC"
    several = any("classes" in entry for entry in entries)
    return "mean IoU over classes" if several else "foreground IoU"


def _classes(test_set: str, board: Entries) -> Table:
    headings = columns("Trained on", "Backbone", "Regime", *(f"#{c}" for c in board[0]["classes"]))
    rows = []
    for entry in board:
        ious = [own["iou"] for own in entry["classes"].values()]
        names = [Cell(entry[name]) for name in ("train_set", "backbone", "regime")]
        rows.append([*names, *(with_interval(iou["mean"], iou["ci95"]) for iou in ious)])
    return Table(f"IoU by class, tested on {test_set}.", headings, rows)


def _board(test_set: str, board: Entries) -> Table:
    of_images = score_of(board[0]) == "auroc"
    unseen_too = any("unseen" in entry for entry in board)
    objects_too = any("instances" in entry for entry in board)
    scores = ["#AUROC", "#Accuracy", "#Balanced accuracy"] if of_images else ["#IoU"]
    scores += ["#IoU, all slices"] * unseen_too
    scores += ["#Dice", "#Boundary IoU"] * (not of_images)
    scores += ["#AP 0.5", "#PQ", "#Objects", "#Split / merged"] * objects_too
    costs = ["#Seeds", "#Parameters", *["#Share of the backbone, %"] * of_images]
    headings = columns(
        *("Trained on", "Relation", "Backbone", "Regime"),
        *(*scores, *costs, "~Seconds", "~Peak MB"),
    )
    rows = []
    for entry in board:
        cells = [Cell(entry[name]) for name in ("train_set", "relation", "backbone", "regime")]
        shown = list(SCORES) if of_images else ["iou"]
        cells += [with_interval(entry[name]["mean"], entry[name]["ci95"]) for name in shown]
        if unseen_too:
            of = entry["unseen"]["iou"] if "unseen" in entry else None
            cells.append(with_interval(of["mean"], of["ci95"]) if of else MISSING)
        if not of_images:
            cells += [number(entry[name]["mean"]) for name in ("dice", "boundary_iou")]
        if objects_too:
            cells += _object_cells(entry.get("instances"))
        cells += [whole(len(entry[shown[0]]["values"])), whole(entry["trainable_params"])]
        if of_images:
            cells.append(number(100 * entry["backbone_share"], 2))
        cells += [whole(entry["seconds"]), whole(entry["peak_mb"])]
        rows.append(cells)
    what = "images" if of_images else "slices"
    return Table(f"Tested on {test_set}: {board[0]['n']} {what}.", headings, rows)


def _object_cells(objects: Mapping[str, Any] | None) -> list[Cell]:
    if objects is None:
        return [MISSING] * 4
    cells = [number(objects[name]["mean"]) for name in ("ap50", "pq")]
    for pair in (("predicted", "labelled"), ("split", "merged")):
        one, other = (objects[name]["mean"] for name in pair)
        cells.append(Cell(f"{one:.3g} / {other:.3g}", one))
    return cells


def changes(folder: Path, factor: str, found: Sequence[Mapping[str, Any]]) -> Section:
    """What changing one thing does: `found`, the contrasts of a factor. `folder` gets a figure."""
    spec = FACTORS[factor]
    tests = dict.fromkeys(row["test_set"] for row in found)
    colours = VERDICT_COLOURS
    panels = {
        f"tested on {test}": [
            Row(_model(row["model"]), row["difference"], row["ci95"], colours[row["verdict"]])
            for row in found
            if row["test_set"] == test
        ]
        for test in tests
    }
    legend = {colour: name for name, colour in colours.items()}
    path = folder / f"{factor}.png"
    said = SAID[score_of(found[0])]
    xlabel = f"difference in {said}, against: {found[0]['baseline']}"
    figures.forest_png(path, panels, xlabel, legend, zero=True)
    seeds = "" if min(min(row["seeds"]) for row in found) > 1 else " One seed decides nothing."
    text = [
        f"{spec.question} Both models of a row differ in nothing else and are scored on the same"
        " slices: the test slices, or slices of the whole dataset where neither saw its labels."
        " The difference has a paired 95 % interval. Better and worse: p below 0.05 after Holm's"
        f" correction for the {len(found)} comparisons of this section.{seeds}"
        f" As good: at most {MARGIN} {said} worse, one-sided at 95 %."
    ]
    figure = Picture(path, f"{spec.title}: differences in {said} with 95 % intervals.")
    return Section(factor, spec.title, text, [figure, _changes_table(spec.title, found)])


def _changes_table(title: str, found: Sequence[Mapping[str, Any]]) -> Table:
    score = score_of(found[0])
    n, said = "Images" if score == "auroc" else "Slices", SAID[score]
    headings = columns(
        *("Tested on", "Model", "Compared with", f"#{n}", f"#{said}", f"#{said} of the other"),
        *("#Difference", "#p (Holm)", "Verdict", "As good"),
    )
    rows = []
    for row in found:
        tone = row["verdict"] if row["verdict"] != "undecided" else ""
        model = _model(row["model"])
        rows.append(
            [
                Cell(row["test_set"]),
                Cell(model, note="" if row["level"] in model else row["level"]),
                Cell(_model(row["against"])),
                whole(row["n"]),
                number(row[score]),
                number(row[f"against_{score}"]),
                difference(row["difference"], row["ci95"], tone),
                p_value(row["p_holm"]),
                Cell(row["verdict"], tone=tone),
                Cell("yes" if row["as_good"] else "not shown"),
            ]
        )
    return Table(f"{title}: pairs of models that differ in nothing else.", headings, rows)


def labels(
    folder: Path, entries: Entries, contrasts: Sequence[Mapping[str, Any]]
) -> Section | None:
    """IoU against the number of labels; None where no model has few. `folder` gets curves.png."""
    found = curves(entries, contrasts)
    if not found:
        return None
    groups: dict[tuple[str, str], Entries] = {}
    for curve in found:
        groups.setdefault((curve["test_set"], curve["amount"]), []).append(curve)
    panels = [
        Panel(
            f"tested on {test_set}",
            f"labelled {amount}",
            [
                Line(
                    f"{curve['regime']} on {curve['backbone']}",
                    [(p["n"], p["score"], p["ci95"], p["all"]) for p in curve["points"]],
                )
                for curve in own
            ],
        )
        for (test_set, amount), own in groups.items()
    ]
    path = folder / "curves.png"
    said = SAID[score_of(entries[0])]
    figures.curves_png(path, panels, said, "all labels")
    text = [
        f"{said} of models of one dataset by the number of labelled training slices, tiles or"
        " whole images. Those of validation, which choose the epoch, are not counted. Last column:"
        " the smallest number that is, like every larger one, shown to be as good as all labels"
        f" (within {MARGIN} {said})."
    ]
    tables = [_labels_table(*group, own) for group, own in groups.items()]
    figure = Picture(path, f"{said} by number of labels, with 95 % intervals.")
    return Section("curves", "How many labels are enough", text, [figure, *tables])


def _labels_table(test_set: str, amount: str, own: Entries) -> Table:
    places = sorted({(point["n"], point["all"]) for curve in own for point in curve["points"]})
    amounts = [f"#{n} (all)" if every else f"#{n}" for n, every in places]
    headings = columns("Backbone", "Regime", *amounts, "#As good as all")
    rows = []
    for curve in own:
        at = {(point["n"], point["all"]): point for point in curve["points"]}
        cells = [Cell(curve["backbone"]), Cell(curve["regime"])]
        for place in places:
            point = at.get(place)
            cells.append(with_interval(point["score"], point["ci95"]) if point else MISSING)
        enough = curve["enough"]
        rows.append([*cells, whole(enough) if enough else Cell("not shown")])
    return Table(f"Tested on {test_set}, by labelled {amount}.", headings, rows)


def distances(root: Path, cards: domain.Cards) -> Section:
    """How far apart the datasets are for each model, with the figures that `diagnose` drew."""
    title = "Distance between datasets"
    if not cards:
        missing = "Not measured: run `emadapt diagnose`, then `emadapt report`."
        return Section("domain", title, [missing], [], kept=False)
    text = [
        "Fréchet distance: between the tokens of two datasets, in units of their own variance,"
        " with a 95 % interval over blocks of slices. Null: the largest distance between two"
        " halves of one dataset; a pair reads as different when its distance is larger.",
        "Probe: balanced accuracy of a linear classifier that guesses the dataset of held-out"
        " tokens (0.5: chance), with its permutation p. Mixing: how often a token's neighbours"
        " come from the other dataset (1: as if they were one dataset, 0: never).",
        "kNN IoU: how well labelled tokens of one dataset label another's.",
    ]
    text += [card["note"] for card in cards.values() if card.get("note")]
    parts: list[Table | Picture] = []
    for (backbone, regime), card in cards.items():
        if card["pairs"]:
            parts.append(domain.pairs_table(card))
        crossings = domain.crossings_table(card)
        parts += [crossings] if crossings else []
        parts += domain.pictures(root, backbone, regime)
    return Section("domain", title, text, parts, kept=False)


def slices(folder: Path, root: Path, rows: pd.DataFrame, entries: Entries) -> Section:
    """A test slice under the best model of each relation, and the worst slice of the best model.

    `root` has the overlays of evaluate; `folder` gets overlays-<dataset>.jpg.
    """
    units = rows.drop_duplicates(["backbone", "regime", "train_set"])  # the first seed
    first = {key_of(row): row["unit"] for row in units.to_dict("records")}
    parts: list[Table | Picture] = []
    for test_set in dict.fromkeys(entry["test_set"] for entry in entries):
        board = ranked(entry for entry in headline(entries) if entry["test_set"] == test_set)
        best: dict[str, dict[str, Any]] = {}
        for entry in board:
            best.setdefault(entry["relation"], entry)
        overlays = [
            root / EVALUATED / first[key_of(entry)] / f"overlay-{test_set}.png"
            for entry in best.values()
        ]
        if there := [file for file in overlays if file.is_file()]:
            path = folder / f"overlays-{test_set}.jpg"
            figures.stack_jpg(path, there)
            words = f"The middle test slice of {test_set} under the best model of each relation:"
            parts.append(Picture(path, f"{words} {', '.join(best)}."))
        worst = root / EVALUATED / first[key_of(board[0])] / f"overlay-{test_set}-worst.png"
        if worst.is_file():
            parts.append(Picture(worst, f"The worst test slice of {test_set}, best model."))
    text = (
        "Image, label, prediction and errors, in the colours below each. Of several seeds the first"
        " is shown."
    )
    return Section("slices", "Test slices", [text], parts, kept=False)


def _model(names: Mapping[str, Any]) -> str:
    """A model in words."""
    return f"{names['regime']} on {names['backbone']}, {names['train_set']}"
