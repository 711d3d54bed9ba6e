"""A table of the report, which the page shows as HTML and the leaderboard as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Column(NamedTuple):
    """A heading.

    Attributes:
        title: its text.
        numeric: whether it is aligned right and sorted by number.
        volatile: whether it changes from run to run, and so stays out of files under git.
    """

    title: str
    numeric: bool = False
    volatile: bool = False


class Cell(NamedTuple):
    """A value.

    Attributes:
        text: what is shown.
        value: what a numeric column is sorted by; None: a missing value, sorted last.
        note: a second line in small print.
        tone: "better", "worse" or nothing.
    """

    text: str
    value: float | None = None
    note: str = ""
    tone: str = ""


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
    """A part of the report.

    Attributes:
        name: its anchor.
        title: its heading.
        text: paragraphs that say how to read it.
        parts: tables and pictures, in this order.
        kept: whether leaderboard.md, which git follows, has it.
    """

    name: str
    title: str
    text: Sequence[str]
    parts: Sequence[Table | Picture]
    kept: bool = True


def number(value: float | None, digits: int = 3) -> Cell:
    """A number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Cell("–")
    return Cell(f"{value:.{digits}f}".replace("-", "−"), value)


def whole(value: float | None) -> Cell:
    """A whole number, with thin spaces between thousands."""
    return Cell("–") if value is None else Cell(f"{value:,.0f}".replace(",", "\u202f"), value)


def with_interval(value: float, ends: Sequence[float]) -> Cell:
    """A number above its 95 % interval."""
    return number(value)._replace(note=f"{number(ends[0]).text} to {number(ends[1]).text}")


def difference(value: float, ends: Sequence[float], tone: str = "") -> Cell:
    """A difference with its sign, above its 95 % interval."""
    low, high = (signed(end) for end in ends)
    return Cell(signed(value), value, f"{low} to {high}", tone)


def signed(value: float) -> str:
    """A number with its sign and three digits."""
    return f"{value:+.3f}".replace("-", "−")


def p_value(value: float | None) -> Cell:
    """Three digits, four below 0.01."""
    return number(value, 4 if value is not None and value < 0.01 else 3)


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
