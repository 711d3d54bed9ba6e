"""Seconds of a call, as the benchmarks take them."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

import torch


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and by the processor, those of children that have ended included; a GPU's work is waited for.

    Neither is 0: of a run so short that the processor's clock did not tick (10 ms on some systems) the other is given for both.
    """

    def processor() -> float:
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in used)

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, cpu = time.perf_counter(), processor()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, processor() - cpu or seconds


def median_timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of what `timed` gives, after one run that does not count."""
    run()
    taken = [timed(run) for _ in range(repeats)]
    return statistics.median(t[0] for t in taken), statistics.median(t[1] for t in taken)
