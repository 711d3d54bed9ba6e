"""How far apart the datasets are for a model, from what diagnose wrote."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from emadapt.errors import InputError
from emadapt.files import read_json
from emadapt.report.tables import (
    Cell,
    Picture,
    Table,
    columns,
    number,
    p_value,
    whole,
    with_interval,
)
from emadapt.study.study import Study

Card = Mapping[str, Any]
"""What diagnose wrote about one backbone and regime."""
Cards = Mapping[tuple[str, str], Card]

CONTROLS = {"random": "with random weights", "pixels": "raw pixels"}
PICTURES = {
    "pca": "Slices and tokens on the first two principal components, by dataset.",
    "distances": "Distances between the datasets, with their nulls.",
}


def read_cards(root: Path, study: Study) -> dict[tuple[str, str], Card]:
    """Read reports/domain/<backbone>-<regime>.json, those that are there.

    Raises:
        InputError: a file is not JSON, or not of this study.
    """
    cards: dict[tuple[str, str], Card] = {}
    for backbone, regime in itertools.product(study.backbones, study.regimes):
        file = root / "reports/domain" / f"{backbone}-{regime}.json"
        if not file.is_file():
            continue
        wanted = {"study": study.name, "backbone": backbone, "regime": regime}
        expected = f"the diagnostics of {backbone}, {regime}, study {study.name}"
        do = "Run `dvc repro`, or delete the file."
        card = read_json(file, expected=expected, do=do)
        if (found := {name: card.get(name) for name in wanted}) != wanted:
            raise InputError(file, found=str(found), expected=expected, do=do)
        cards[backbone, regime] = card
    return cards


def pair_rows(pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of datasets, means over the seeds of a model.

    Returns:
        For each training set (None: the pretrained backbone), pair and level: `frechet` with
        `ci95`, and `null`, in units of the mean trace of the two covariances; `ratio` of the
        two; `different`: share of the seeds that read as different; `probe` balanced accuracy and
        its largest p; `mixing`; `n`, `models`.
    """
    rows = []
    for several in _grouped(pairs, "train_set", "a", "b", "level"):
        first, table = several[0], pd.json_normalize(several)
        scale = table["relative"] / table["frechet"].where(table["frechet"] != 0)
        low, high = (scale * [pair["ci95"][end] for pair in several] for end in (0, 1))
        null, frechet = (table["null"] * scale).mean(), table["relative"].mean()
        names = ("train_set", "a", "b", "level", "n")
        rows.append(
            {
                **{name: first.get(name) for name in names},
                "models": len(several),
                "frechet": frechet,
                "ci95": (low.mean(), high.mean()),
                "null": null,
                "ratio": frechet / null if null else float("nan"),
                "different": (table["reads_as"] == "different").mean(),
                "probe": table["probe.balanced_accuracy"].mean(),
                "probe_p": table["probe.p_value"].max(),
                "mixing": table["knn_mixing"].mean(),
            }
        )
    return rows


def pairs_table(card: Card) -> Table:
    """Distances between datasets, and the controls of the measure."""
    rows = [("", row) for row in pair_rows(card["pairs"])]
    for name, words in CONTROLS.items():
        controls = pair_rows(card["controls"].get(name, []))
        rows += [(f"control: {words}", row) for row in controls]
    headings = columns(
        *("Model trained on", "Datasets", "Level", "#n", "#Fréchet distance", "#Null"),
        *("#Distance / null", "Reads as", "#Probe", "#p", "#Mixing"),
    )
    caption = f"Pairs of datasets as {card['backbone']} with {card['regime']} sees them."
    return Table(caption, headings, [_pair_cells(control, row) for control, row in rows])


def _pair_cells(control: str, row: Mapping[str, Any]) -> list[Cell]:
    return [
        Cell(control or _model(row)),
        Cell(f"{row['a']}, {row['b']}"),
        Cell(row["level"]),
        Cell(", ".join(whole(n).text for n in row["n"]), row["n"][0]),
        with_interval(row["frechet"], row["ci95"]),
        number(row["null"]),
        number(row["ratio"], 1),
        Cell("different" if row["different"] > 0.5 else "the same"),
        number(row["probe"]),
        p_value(row["probe_p"]),
        number(row["mixing"]),
    ]


def crossings_table(card: Card) -> Table | None:
    """How well labels of one dataset carry over to another; None without any."""
    rows, classes = [], next((list(own.get("classes", {})) for own in card["segmentation"]), [])
    for several in _grouped(card["segmentation"], "train_set", "train", "test"):
        model = {"train_set": several[0]["train_set"], "models": len(several)}
        table = pd.json_normalize(several)
        values = ["knn_iou", *(f"classes.{name}" for name in classes)]
        words = _model(model), several[0]["train"], several[0]["test"]
        rows.append([*map(Cell, words), *(number(table[value].mean()) for value in values)])
    titles = ["Model trained on", "From", "To", "#kNN IoU", *(f"#{name}" for name in classes)]
    model_name = f"{card['backbone']} with {card['regime']}"
    caption = f"Tokens of one dataset, labelled by their neighbours in another, {model_name}."
    return Table(caption, columns(*titles), rows) if rows else None


def pictures(root: Path, backbone: str, regime: str) -> list[Picture]:
    """The figures that diagnose drew of a backbone and regime."""
    files = sorted((root / "reports/domain" / f"{backbone}-{regime}").glob("*.png"))
    return [Picture(file, f"{backbone}, {regime}: {PICTURES[file.stem]}") for file in files]


def _model(row: Mapping[str, Any]) -> str:
    if row["train_set"] is None:
        return "pretrained"
    return row["train_set"] + (f", {row['models']} seeds" if row["models"] > 1 else "")


def _grouped(rows: Iterable[Mapping[str, Any]], *names: str) -> list[list[Mapping[str, Any]]]:
    """Rows with the same values of these names together, in the order in which they came."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(groups.values())
