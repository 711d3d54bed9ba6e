"""Benchmarks of emadapt's own numerics against what one would write otherwise, both in one run, as ratios.

A new benchmark is a function without arguments that returns rows (dictionaries with the same keys), named in `BENCHMARKS`.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
import sklearn
import torch
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_info, threadpool_limits

from emadapt.domains.frechet import frechet, frechet_samples
from emadapt.errors import InputError
from emadapt.models.device import device

Array = npt.NDArray[np.float64]
Row = dict[str, Any]

DIMS = (384, 768, 1024)
"""Of tokens: ViT-S, ViT-B, ViT-L."""
REPEATS = 5


def run_benchmarks(names: Sequence[str] = ()) -> dict[str, Any]:
    """Run `BENCHMARKS`, all or those of these names, with one thread and with as many as the libraries take by themselves.

    Returns:
        "machine": what it ran on; then per benchmark its rows, with "threads" in each. Where other work takes the cores, threads
        wait for each other, and only the rows of one thread can be relied on: see "load" (of the minute before).

    Raises:
        InputError: no such benchmark.
    """
    if odd := [name for name in names if name not in BENCHMARKS]:
        raise InputError(
            f"benchmark {odd[0]!r}",
            found="no such one",
            expected=", ".join(BENCHMARKS),
            do="Correct the name.",
        )
    torch.get_num_threads()  # at its first call it chooses a number, over what was set before
    threads = max((library["num_threads"] for library in threadpool_info()), default=1)
    result: dict[str, Any] = {
        "machine": {
            "cpu": _cpu(),
            "cpus": os.cpu_count(),
            "device": str(device()),
            "threads": threads,
            "load": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-learn": sklearn.__version__,
            "torch": torch.__version__,
        }
    }
    for name in names or BENCHMARKS:
        result[name] = []
        for n in sorted({1, threads}):
            with threadpool_limits(n):
                result[name] += [{"threads": n, **row} for row in BENCHMARKS[name]()]
    return result


def print_benchmarks(result: dict[str, Any]) -> None:
    """Print what `run_benchmarks` returned, one table a benchmark."""
    from rich.console import Console
    from rich.table import Table

    console = Console(
        width=None if sys.stdout.isatty() else 140
    )  # in a log lines would be folded at 80 characters
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for name in (key for key in result if key != "machine"):
        table = Table(title=name)
        for column in result[name][0]:
            table.add_column(column, justify="right", overflow="fold")
        for row in result[name]:
            table.add_row(*(_cell(value) for value in row.values()))
        console.print(table)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def frechet_benchmark(
    dims: Sequence[int] = DIMS, few: int = 64, repeats: int = REPEATS
) -> list[Row]:
    """Fréchet distance against the formula with scipy's matrix square root.

    Args:
        dims: D of the covariances, of 4 D samples each; of the last also the form for samples, of `few` samples.
        few: samples where there are fewer than dimensions.
        repeats: timings of either side, in turns; medians count.

    Returns:
        Rows: dim; form, "moments" or "samples"; sqrtm_s and fast_s by the clock; ratio; relative_difference of the two distances.
    """
    rows = []
    for dim in dims:
        moments = [m for seed in range(2) for m in _moments(_tokens(4 * dim, dim, seed))]
        rows.append(
            {
                "dim": dim,
                "form": "moments",
                **_against(lambda m: _by_sqrtm(*m), lambda m: frechet(*m), moments, repeats),
            }
        )
    samples = [_tokens(few, dims[-1], seed) for seed in range(2)]
    slow, fast = (
        lambda x: _by_sqrtm(*_moments(x[0]), *_moments(x[1])),
        lambda x: frechet_samples(*x),
    )
    return [*rows, {"dim": dims[-1], "form": "samples", **_against(slow, fast, samples, repeats)}]


def regimes_benchmark() -> list[Row]:
    """A training step under each regime, see `benchmarks.models_bench`."""
    from benchmarks.models_bench import regimes_benchmark as run

    return run()


def segment_benchmark() -> list[Row]:
    """The whole command against the model alone and MONAI's sliding window, see `benchmarks.segment_bench`."""
    from benchmarks.segment_bench import segment_benchmark as run

    return run()


def _pipeline(name: str) -> Callable[[], list[Row]]:
    """One of `benchmarks.pipeline_bench`, which loads what trains."""

    def run() -> list[Row]:
        from benchmarks import pipeline_bench

        return list(getattr(pipeline_bench, f"{name}_benchmark")())

    return run


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    **{
        name: _pipeline(name)
        for name in (
            "start",
            "stages",
            "ingest",
            "tokens",
            "cache",
            "augmentation",
            "prepared",
            "scores",
            "growth",
        )
    },
    "frechet": frechet_benchmark,
    "regimes": regimes_benchmark,
    "segment": segment_benchmark,
}


def _against(
    slow: Callable[[Any], float], fast: Callable[[Any], float], given: Any, repeats: int
) -> Row:
    """Median times of two ways to the same number, measured in turns so that what disturbs one disturbs the other."""
    times, values = np.zeros((repeats, 2)), [0.0, 0.0]
    for repeat in range(repeats):
        for side, compute in enumerate((slow, fast)):
            start = time.perf_counter()
            values[side] = compute(given)
            times[repeat, side] = time.perf_counter() - start
    slow_s, fast_s = (float(t) for t in np.median(times, 0))
    return {
        "sqrtm_s": slow_s,
        "fast_s": fast_s,
        "ratio": slow_s / max(fast_s, 1e-9),
        "relative_difference": abs(values[1] - values[0]) / values[0],
    }


def _by_sqrtm(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """The formula as it is written, as FID implementations compute it."""
    shift = mean_a - mean_b
    return float(
        shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(sqrtm(cov_a @ cov_b)).real
    )


def _tokens(n: int, dim: int, seed: int) -> Array:
    """(n, dim) samples of a Gaussian whose variances fall as those of DINOv2's tokens do, like k^-2, in random directions."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return np.asarray(
        (rng.standard_normal((n, dim)) + rng.standard_normal(dim))
        / np.arange(1, dim + 1)
        @ directions
    )


def _moments(x: Array) -> tuple[Array, Array]:
    return x.mean(0), np.cov(x, rowvar=False)


def _cpu() -> str:
    """Model of the processor; `platform` does not know it on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
