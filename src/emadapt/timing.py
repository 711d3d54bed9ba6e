"""Seconds of a call, as the benchmarks take them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and by the processor, those of children that have ended included; a GPU's work is waited for."""

    def processor() -> float:
        return sum(os.times()[:4])

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, cpu = time.perf_counter(), processor()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, processor() - cpu


def median_timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of what `timed` gives, after one run that does not count."""
    run()
    taken = [timed(run) for _ in range(repeats)]
    return statistics.median(t[0] for t in taken), statistics.median(t[1] for t in taken)
