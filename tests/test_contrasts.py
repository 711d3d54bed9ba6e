"""Paired contrasts and Holm: what they must find, and what they must not."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emadapt.errors import InputError
from emadapt.metrics.contrasts import LEAST_P, holm, paired, verdict


def counts(iou: Any, labelled: int = 1_000_000) -> np.ndarray:
    """(seeds, slices, rows, columns, 3) counts of cells with these IoUs."""
    both = labelled * np.asarray(iou)
    return np.stack([both, both, np.full_like(both, labelled)], -1).round().astype(int)


def noise(shape: tuple[int, ...], spread: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, shape)


def test_the_statistic_by_brute_force():
    rng = np.random.default_rng(0)
    label = rng.random((5, 6, 7)) < 0.4
    masks = rng.random((2, 5, 6, 7)) < 0.4
    cells = [np.stack([mask & label, mask, label], -1).astype(int) for mask in masks]
    a, b = np.array(cells), np.array(cells)
    b[..., 0] //= 2
    wanted = np.mean([(m & label).sum() / (m | label).sum() for m in masks])
    sums = b.sum((1, 2, 3))
    less = np.mean(sums[:, 0] / (sums[:, 1] + sums[:, 2] - sums[:, 0]))
    found = paired(a, b)
    assert found.difference == pytest.approx(wanted - less, abs=1e-12)
    assert found.score == pytest.approx((wanted, less))
    assert found.seeds == (2, 2)


def test_turned_round_it_changes_sign_only():
    a, b = (counts(0.7 + noise((2, 9, 3, 4), 0.1, seed)) for seed in (0, 1))
    one, other = paired(a, b), paired(b, a)
    assert one.difference == pytest.approx(-other.difference)
    assert one.p_value == pytest.approx(other.p_value)
    assert one.ci95 == pytest.approx([-other.ci95[1], -other.ci95[0]])


def test_a_clear_difference_is_found_but_not_of_one_seed():
    hard, seeds = noise((1, 12, 3, 4), 0.05), np.array([0, 0.001]).reshape(2, 1, 1, 1)
    a, b = counts(0.8 + hard + seeds + noise(hard.shape, 0.01, 1)), counts(0.5 + hard + seeds)
    two, one = paired(a, b), paired(a[:1], b[:1])
    assert two.p_value == LEAST_P
    assert 0.25 < two.ci95[0] < two.at_least < two.difference < two.ci95[1] < 0.35
    assert (verdict(two, two.p_value), verdict(two, 0.06)) == ("better", "undecided")
    assert two.as_good
    assert one.difference == pytest.approx(0.3, abs=0.02)
    assert (one.p_value, verdict(one, 0.0), one.as_good) == (1, "undecided", False)


def test_as_good_needs_data_not_noise():
    """A model that is truly as good is shown to be so by much data, not by little and noisy."""

    def contrast(n: int, spread: float) -> Any:
        return paired(*(counts(0.7 + noise((3, n, 4, 4), spread, seed)) for seed in (0, 1)))

    assert contrast(40, 0.02).as_good
    assert not contrast(3, 0.3).as_good


def test_pairing_cancels_what_is_hard_for_both():
    hard = np.repeat(noise((1, 10, 4, 4), 0.1), 2, 0)
    a, b = counts(0.61 + hard + noise(hard.shape[1:], 0.01, 1)), counts(0.6 + hard)
    found, unpaired = paired(a, b), paired(a[:, :, ::-1, ::-1], b)
    assert found.difference == pytest.approx(unpaired.difference)
    assert np.ptp(found.ci95) < np.ptp(unpaired.ci95) / 3
    assert found.p_value < 0.05 < unpaired.p_value


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1)], ids=["one cell", "four slices"])
def test_too_few_parts_say_nothing(shape):
    a, b = (counts(v + noise((2, *shape), 0.01)) for v in (0.9, 0.1))
    b[..., 0] -= np.arange(b[..., 0].size).reshape(b.shape[:-1]) * 1000
    found = paired(a, b)
    assert (found.ci95, found.p_value, found.as_good) == ((-1, 1), 1, False)


@pytest.mark.parametrize("change", [0, 2], ids=["slices", "labels"])
def test_models_of_different_slices_are_not_compared(change):
    a = counts(0.5 + noise((1, 4, 2, 2), 0.01))
    b = a[:, :3] if change == 0 else a + np.array([0, 0, 1])
    with pytest.raises(InputError, match="different slices"):
        paired(a, b)


@given(st.lists(st.floats(0, 1), max_size=5))
def test_holm_is_the_closed_bonferroni_test(p_values):
    """A hypothesis is rejected when Bonferroni rejects every intersection that it is in."""
    numbers = range(len(p_values))
    subsets = [s for r in numbers for s in itertools.combinations(numbers, r + 1)]
    for index, corrected in enumerate(holm(p_values)):
        own = [min(1, len(s) * min(p_values[i] for i in s)) for s in subsets if index in s]
        assert corrected == pytest.approx(max(own))
