"""How often intervals hold the truth, and how often equal models are called different.

Volumes are simulated whose foreground and whose errors are correlated in z and in the plane: smooth
Gaussian fields in the plane (standard deviation of the kernel 0.2 µm), first-order autoregression
along z. Two models of a volume share half of their errors' variance and have the same true IoU.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from benchmarks.timing import print_table
from emadapt.metrics.contrasts import paired
from emadapt.metrics.intervals import Counts, over_seeds

CORRELATIONS = (0.0, 0.7, 0.9, 0.95)
SLICES = (4, 8, 16, 40)
FINE = 4  # cells along the side of a column, 1 µm
SMOOTH = 0.8  # cells
MEAN, SPREAD = 0.8, 0.12  # of the IoU of a cell
PIXELS = 10_000  # of a cell

Floats = npt.NDArray[np.float64]


def fields(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int],
    correlation: float,
    shared: float = 0.0,
    smooth: float = SMOOTH,
) -> Floats:
    """Gaussian fields (number, slices, Y, X) of variance 1.

    Args:
        rng: of the noise.
        shape: of the result.
        correlation: of neighbouring slices.
        shared: share of the variance that all cells of a slice have in common.
        smooth: standard deviation of the kernel in the plane, in cells.
    """
    noise = gaussian_filter(rng.standard_normal(shape), (0, 0, smooth, smooth), mode="wrap")
    noise *= ((1 - shared) / kernel_energy(smooth)) ** 0.5
    noise += shared**0.5 * rng.standard_normal((*shape[:2], 1, 1))
    for z in range(1, shape[1]):
        new = (1 - correlation**2) ** 0.5 * noise[:, z]
        noise[:, z] = correlation * noise[:, z - 1] + new
    return np.asarray(noise)


@functools.cache
def kernel_energy(smooth: float) -> float:
    """Variance of white noise of variance 1 behind the filter."""
    impulse = np.zeros((65, 65))
    impulse[32, 32] = 1
    return float((gaussian_filter(impulse, smooth, mode="wrap") ** 2).sum())


def volume(
    rng: np.random.Generator, n: int, grid: tuple[int, int], models: int, **of_fields: float
) -> Counts:
    """Counts (models, slices, rows, columns, 3) of models with the same true IoU.

    A prediction lies inside the label, so the union is the label.
    """
    margin = 8  # the filter wraps around
    height, width = (FINE * side + margin for side in grid)
    drawn = fields(rng, (models + 2, n, height, width), **of_fields)[..., :-margin, :-margin]
    labelled = PIXELS * (0.01 + 1 / (1 + np.exp(6 - 6 * drawn[0])))
    errors = (drawn[1] + drawn[2:]) / 2**0.5
    both = labelled * np.clip(MEAN + SPREAD * errors, 0, 1)
    cells = np.stack([both, both, np.broadcast_to(labelled, both.shape)], -1)
    rows, columns = grid
    split = cells.reshape(models, n, rows, FINE, columns, FINE, 3)
    return np.asarray(split.sum((3, 5)).round(), np.int64)


@functools.cache
def truth() -> float:
    """The true IoU: labels and errors are independent."""
    errors = np.random.default_rng(0).standard_normal(1_000_000)
    return float(np.clip(MEAN + SPREAD * errors, 0, 1).mean())


def calibration(
    n: int, grid: tuple[int, int], volumes: int, seeds: int = 1, **of_fields: float
) -> dict[str, Any]:
    """Percent of intervals that hold the truth, of equal models called different, of no answer.

    Args:
        n: slices.
        grid: rows and columns of 1 µm.
        volumes: that are simulated.
        seeds: of each model; a single one is counted twice, for one alone is never significant.
        of_fields: see `fields`.
    """
    rng, held, called, silent = np.random.default_rng(0), 0, 0, 0
    for _ in range(volumes):
        counts = volume(rng, n, grid, 2 * seeds, **of_fields)
        a, b = counts[:seeds], counts[seeds:]
        low, high = over_seeds(a)["ci95"]
        held += int(low <= truth() <= high)
        silent += int(high - low == 1)
        if seeds == 1:
            a, b = np.repeat(a, 2, 0), np.repeat(b, 2, 0)
        called += paired(a, b).p_value < 0.05
    shares = {"held": held, "called different": called, "no answer": silent}
    return {name: 100 * share / volumes for name, share in shares.items()}


def main(volumes: int) -> None:
    """Print three tables."""
    for title, grid, shared in (
        ("4 x 5 µm: errors correlated in z and in the plane", (4, 5), 0.0),
        ("The same; whole slices share a twentieth of the variance", (4, 5), 0.05),
        ("1 x 1 µm: a single column", (1, 1), 0.0),
    ):
        print(title)
        cases = [
            {"slices": n, "correlation": correlation}
            | calibration(n, grid, volumes, correlation=correlation, shared=shared)
            for n, correlation in itertools.product(SLICES, CORRELATIONS)
        ]
        print_table(cases)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
