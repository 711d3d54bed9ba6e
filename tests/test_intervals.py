"""Intervals hold the truth as often as they say, in volumes whose neighbours are alike."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_gradient_magnitude

from benchmarks.calibration import CORRELATIONS, SLICES, calibration, fields
from emadapt.metrics.contrasts import paired
from emadapt.metrics.intervals import independent_slices, influence, over_seeds, sampling_error
from emadapt.metrics.pixels import overlap_counts

REAL = Path(os.environ.get("EMADAPT_REAL_DATA", "../shared/data"))


def test_the_linearisation_is_the_change_that_a_cell_makes() -> None:
    counts = np.random.default_rng(0).integers(1, 100, (4, 2, 3, 3))
    counts[..., 1:] += counts[..., :1]
    for metric in ("iou", "dice"):
        value, lifts = influence(counts * 10**6, metric)
        grown = counts * 10**6
        grown[1, 0, 2] = counts[1, 0, 2] * (10**6 + 1000)
        assert influence(grown, metric)[0] - value == pytest.approx(1e-3 * lifts[1, 0, 2], rel=0.01)
        assert lifts.sum() == pytest.approx(0, abs=1e-12)


def test_independent_cells_have_the_error_of_a_mean() -> None:
    """Mean of the estimated variance over many simulated volumes, against the true variance."""
    rng, size = np.random.default_rng(0), np.ones((4, 5))
    drawn = rng.standard_normal((400, 6, 4, 5))
    lifts = (drawn - drawn.mean((1, 2, 3), keepdims=True)) / 120
    found = [sampling_error(own, size) for own in lifts]
    assert np.median([error.variance for error in found]) == pytest.approx(1 / 120, rel=0.15)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_independent_slices_are_those_of_the_variance_of_a_mean(correlation: float) -> None:
    at = np.arange(12)
    covariance = correlation ** np.abs(np.subtract.outer(at, at))
    assert 1 / covariance.mean() == pytest.approx(independent_slices(12, correlation))


def test_seeds_that_differ_widen_the_interval() -> None:
    both = 1000 * (0.7 + 0.02 * np.random.default_rng(0).standard_normal((3, 8, 4, 4)))
    counts = np.stack([both, both, np.full_like(both, 1000)], -1).astype(int)
    apart = counts.copy()
    apart[0, ..., :2] += 50
    apart[2, ..., :2] -= 50
    alike, different = over_seeds(counts), over_seeds(apart)
    assert alike["mean"] == pytest.approx(different["mean"], abs=1e-5)
    assert different["std"] == pytest.approx(0.05, abs=0.01)
    assert np.ptp(different["ci95"]) > 3 * np.ptp(alike["ci95"])
    assert over_seeds(counts[:, :1, :1, :1])["ci95"] == [0, 1], "one cell says nothing of others"


@pytest.mark.parametrize(("n", "correlation"), [(4, 0.0), (8, 0.95)])
def test_intervals_hold_and_equal_models_rarely_differ(n: int, correlation: float) -> None:
    found = calibration(n, (3, 3), 100, correlation=correlation)
    assert found["held"] >= 90
    assert found["called different"] <= 9
    assert found["no answer"] <= 15


@pytest.mark.slow
@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("n", SLICES)
def test_calibration(n: int, correlation: float) -> None:
    """Coverage of 93 to 97 % and at most 6 % false positives, with the noise of 1000 volumes."""
    found = calibration(n, (4, 5), 1000, correlation=correlation)
    assert 93 <= found["held"] <= 98
    assert found["called different"] <= 6


@pytest.mark.slow
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_one_column_is_silent_rather_than_wrong(correlation: float) -> None:
    found = calibration(40, (1, 1), 400, correlation=correlation)
    assert found["called different"] <= 6


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_predictions_of_real_slices_under_shuffled_names(correlation: float) -> None:
    """Which of two models predicts a place is drawn, so neither can be better.

    What is drawn is alike in places that are near: smooth fields in the plane (0.2 µm), first-order
    autoregression along z.
    """
    if not (REAL / "lucchi").is_dir():
        pytest.skip(f"no real data in {REAL}")
    names = [REAL / f"lucchi/Test_{kind}" for kind in ("In", "Out")]
    slices = range(0, 32, 2)
    images = [Image.open(names[0] / f"mask{z:04d}.png") for z in slices]
    labels = [np.asarray(Image.open(names[1] / f"{z}.png")) > 127 for z in slices]
    models = []
    for sigma in (3, 6):  # dark places with little structure, at two scales
        grey = [np.asarray(image, np.float32) for image in images]
        score = [gaussian_filter(g, sigma) + gaussian_gradient_magnitude(g, sigma) for g in grey]
        models.append([s < np.percentile(s, 10) for s in score])
    grid, fine = (4, 5), 4  # columns, and cells in a column
    cells = np.array(
        [
            [overlap_counts(p, m, (16, 20)) for p, m in zip(own, labels, strict=True)]
            for own in models
        ]
    )
    rng, called, shuffles = np.random.default_rng(0), 0, 400
    for _ in range(shuffles):
        swap = fields(rng, (1, len(cells[0]), 16, 20), correlation)[0] > 0
        a, b = (np.where(s[..., None], cells[0], cells[1]) for s in (swap, ~swap))
        columns = [c.reshape(-1, grid[0], fine, grid[1], fine, 3).sum((2, 4)) for c in (a, b)]
        pair = [np.repeat(c[None], 2, 0) for c in columns]  # two equal seeds
        called += paired(*pair).p_value < 0.05
    assert called / shuffles <= 0.07
