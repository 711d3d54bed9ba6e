"""Seconds of a call, and a table of results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median over `repeats` calls, after one that does not count. A GPU's work is waited for."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same keys, the keys first; numbers to three digits."""

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
