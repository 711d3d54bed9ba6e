"""A table of the report, which the page shows as HTML and the leaderboard as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Column(NamedTuple):
    """A heading."""

    title: str
    numeric: bool = False  # aligned right and sorted by number
    volatile: bool = False  # changes from run to run, and so stays out of files under git


class Cell(NamedTuple):
    """A value."""

    text: str
    value: float | None = None  # what a numeric column is sorted by; None: missing, sorted last
    note: str = ""  # a second line in small print
    tone: str = ""  # "better", "worse" or nothing


@dataclass(frozen=True)
class Table:
    """Rows under headings, with a caption that says what it holds."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    """A figure of the report."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    name: str  # its anchor
    title: str
    text: Sequence[str]  # paragraphs that say how to read it
    parts: Sequence[Table | Picture]
    kept: bool = True  # whether leaderboard.md, which git follows, has it


MISSING = Cell("–")


def number(value: float | None, digits: int = 3) -> Cell:
    """A number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return Cell(f"{value:.{digits}f}".replace("-", "−"), value)


def whole(value: float | None) -> Cell:
    """A whole number, with thin spaces between thousands."""
    return MISSING if value is None else Cell(f"{value:,.0f}".replace(",", "\u202f"), value)


def with_interval(value: float, ends: Sequence[float]) -> Cell:
    """A number above its 95 % interval."""
    return number(value)._replace(note=f"{number(ends[0]).text} to {number(ends[1]).text}")


def difference(value: float, ends: Sequence[float], tone: str = "") -> Cell:
    """A difference with its sign, above its 95 % interval."""
    text, low, high = (f"{each:+.3f}".replace("-", "−") for each in (value, *ends))
    return Cell(text, value, f"{low} to {high}", tone)


def p_value(value: float) -> Cell:
    """Three digits, four below 0.01."""
    return number(value, 4 if value < 0.01 else 3)


def columns(*titles: str) -> list[Column]:
    """Columns of these titles; numeric ones begin with #, volatile numeric ones with ~."""
    return [
        Column(title.lstrip("#~"), numeric=title[0] in "#~", volatile=title[0] == "~")
        for title in titles
    ]


def markdown(table: Table) -> list[str]:
    """Lines of a Markdown table, without volatile columns."""
    kept = [at for at, column in enumerate(table.columns) if not column.volatile]
    lines = ["| " + " | ".join(table.columns[at].title for at in kept) + " |"]
    lines.append(
        "|" + "|".join("---:" if table.columns[at].numeric else "---" for at in kept) + "|"
    )
    for row in table.rows:
        cells = (row[at] for at in kept)
        texts = (f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in cells)
        lines.append("| " + " | ".join(texts) + " |")
    return lines
