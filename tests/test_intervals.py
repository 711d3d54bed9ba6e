"""Intervals hold the truth as often as they say, in volumes whose neighbours are alike."""

import numpy as np
import pytest

from benchmarks.calibration import CORRELATIONS, SLICES, calibration
from emadapt.metrics.intervals import independent_slices, influence, over_seeds, sampling_error


def test_the_linearisation_is_the_change_that_a_cell_makes():
    counts = np.random.default_rng(0).integers(1, 100, (4, 2, 3, 3))
    counts[..., 1:] += counts[..., :1]
    for metric in ("iou", "dice"):
        value, lifts = influence(counts * 10**6, metric)
        grown = counts * 10**6
        grown[1, 0, 2] = counts[1, 0, 2] * (10**6 + 1000)
        assert influence(grown, metric)[0] - value == pytest.approx(1e-3 * lifts[1, 0, 2], rel=0.01)
        assert lifts.sum() == pytest.approx(0, abs=1e-12)


def test_independent_cells_have_the_error_of_a_mean():
    """Mean of the estimated variance over many simulated volumes, against the true variance."""
    rng, size = np.random.default_rng(0), np.ones((4, 5))
    drawn = rng.standard_normal((400, 6, 4, 5))
    lifts = (drawn - drawn.mean((1, 2, 3), keepdims=True)) / 120
    found = [sampling_error(own, size) for own in lifts]
    assert np.median([error.variance for error in found]) == pytest.approx(1 / 120, rel=0.15)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_independent_slices_are_those_of_the_variance_of_a_mean(correlation):
    at = np.arange(12)
    covariance = correlation ** np.abs(np.subtract.outer(at, at))
    assert 1 / covariance.mean() == pytest.approx(independent_slices(12, correlation))


def test_seeds_that_differ_widen_the_interval():
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
def test_intervals_hold_and_equal_models_rarely_differ(n, correlation):
    found = calibration(n, (3, 3), 100, correlation=correlation)
    assert found["held"] >= 90
    assert found["called different"] <= 9
    assert found["no answer"] <= 15


@pytest.mark.slow
@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("n", SLICES)
def test_calibration(n, correlation):
    """Coverage of 93 to 97 % and at most 6 % false positives, with the noise of 1000 volumes."""
    found = calibration(n, (4, 5), 1000, correlation=correlation)
    assert 93 <= found["held"] <= 98
    assert found["called different"] <= 6


@pytest.mark.slow
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_one_column_is_silent_rather_than_wrong(correlation):
    found = calibration(40, (1, 1), 400, correlation=correlation)
    assert found["called different"] <= 6
