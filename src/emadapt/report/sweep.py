"""The section on sweeps: what they found, from the files that they left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emadapt.report.tables import MISSING, Cell, Picture, Section, Table, columns, number
from emadapt.study.study import Study

FOLDER = Path("scratch/sweeps")
CAPTIONS = {
    "parallel": "Each line is a trial: its settings and its validation score.",
    "slice": "Validation score of each trial by each setting.",
    "importance": "Share of the variance of validation score that each setting explains (fANOVA).",
    "history": "Validation score of each trial in turn, and the best so far.",
}
BEST = 10
"""Trials in the table."""


def sweeps(root: Path, study: Study) -> Section | None:
    """The sweeps of a study that have ended on this machine; None without one."""
    parts: list[Table | Picture] = []
    for file in sorted((root / FOLDER).glob("*/sweep.json")):
        sweep = json.loads(file.read_text())
        if sweep["study"] == study.name:
            parts += [_table(sweep), *_pictures(file.parent, sweep)]
    if not parts:
        return None
    text = (
        "Settings of a regime, searched for the best validation score; no trial sees test slices. "
        "The verb emadapt sweep promote makes the best trial a regime of its own."
    )
    return Section("sweep", "Sweep", [text], parts, kept=False)


def _table(sweep: Mapping[str, Any]) -> Table:
    """The best trials, and the default settings wherever they come."""
    finished = [trial for trial in sweep["trials"] if trial["val_score"] is not None]
    finished.sort(key=lambda trial: -trial["val_score"])
    shown = [t for at, t in enumerate(finished) if at < BEST or t["default"]]
    names = sorted({name for trial in shown for name in trial["params"]})
    rows = []
    for trial in shown:
        own = [_value(trial["params"].get(name)) for name in names]
        first = Cell(str(trial["trial"]), trial["trial"], "default" if trial["default"] else "")
        rows.append([first, number(trial["val_score"], 4), *own])
    pruned = len(sweep["trials"]) - len(finished)
    return Table(
        f"{sweep['name']}: {sweep['regime']} on {sweep['backbone']}, trained on"
        f" {sweep['train_set']}; {len(finished)} finished and {pruned} pruned trials.",
        columns("#Trial", "#Validation score", *(f"#{name}" for name in names)),
        rows,
    )


def _value(value: Any) -> Cell:
    if value is None:
        return MISSING
    return Cell(f"{value:.3g}", value) if isinstance(value, float) else Cell(str(value))


def _pictures(folder: Path, sweep: Mapping[str, Any]) -> list[Picture]:
    return [
        Picture(folder / f"{name}.png", f"{sweep['name']}. {caption}")
        for name, caption in CAPTIONS.items()
        if f"{name}.png" in sweep["figures"]
    ]
