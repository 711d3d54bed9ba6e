"""Intervals over seeds and paired contrasts: what they must find, and what they must not."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emadapt.errors import InputError
from emadapt.metrics.contrasts import holm, paired_bootstrap, verdict
from emadapt.metrics.intervals import over_seeds

FEW = 2000


def slices(iou: Any, labelled: int = 10_000) -> np.ndarray:
    """(seeds, slices, 3) counts of these IoUs, prediction and label of the same size."""
    both = 2 * labelled * np.asarray(iou) / (1 + np.asarray(iou))
    return np.stack([both, *np.full((2, *both.shape), labelled)], -1).round().astype(int)


def test_the_statistic_by_brute_force():
    rng = np.random.default_rng(0)
    label = rng.random((5, 6, 7)) < 0.4
    masks = rng.random((2, 5, 6, 7)) < 0.4
    counts = [
        [((p & t).sum(), p.sum(), t.sum()) for p, t in zip(one, label, strict=True)]
        for one in masks
    ]
    a, b = np.array(counts), np.array(counts)
    b[..., 0] //= 2
    wanted = np.mean([(m & label).sum() / (m | label).sum() for m in masks])
    less = np.mean([c[:, 0].sum() / (c[:, 1:].sum() - c[:, 0].sum()) for c in b])
    found = paired_bootstrap(a, b, 1, replicates=FEW)
    assert found.difference == pytest.approx(wanted - less, abs=1e-12)
    assert (found.n, found.seeds) == (5, (2, 2))


def test_turned_round_it_changes_sign_only():
    a, b = (slices(v) for v in np.random.default_rng(0).uniform(0.6, 0.8, (2, 1, 20)))
    one, other = (paired_bootstrap(*pair, 2, replicates=FEW) for pair in ((a, b), (b, a)))
    assert one.difference == pytest.approx(-other.difference)
    assert one.p_value == pytest.approx(other.p_value, abs=0.1)
    assert one.ci95 == pytest.approx([-other.ci95[1], -other.ci95[0]], abs=0.02)


def test_the_same_model_does_not_differ_from_itself():
    a = slices(np.random.default_rng(0).uniform(0.5, 0.9, (2, 12)))
    found = paired_bootstrap(a, a, 3, replicates=FEW)
    assert (found.difference, found.p_value) == (0, pytest.approx(1, abs=0.05))


def test_a_clear_difference_has_the_smallest_p_there_can_be():
    hard = np.random.default_rng(0).normal(0, 0.05, 40)
    one = paired_bootstrap(slices([0.8 + hard]), slices([0.5 + hard]), 2, replicates=FEW)
    assert one.p_value == 2 / (FEW + 1)
    assert 0.25 < one.ci95[0] < one.at_least < one.difference < one.ci95[1] < 0.35
    assert verdict(one, one.p_value) == "undecided"  # one seed
    assert not one.as_good
    seeds = np.array([[0.0], [0.001]])
    two = paired_bootstrap(slices(0.8 + hard + seeds), slices(0.5 + hard + seeds), 2)
    assert verdict(two, two.p_value) == "better"
    assert verdict(two, 0.06) == "undecided"
    assert two.as_good


def test_as_good_needs_data_not_noise():
    """A model that is truly as good is shown to be so by many slices, not by few noisy ones."""
    rng = np.random.default_rng(0)

    def contrast(n: int, noise: float) -> Any:
        a, b = (slices(0.7 + rng.normal(0, noise, (3, n))) for _ in range(2))
        return paired_bootstrap(a, b, 1, replicates=FEW)

    assert contrast(200, 0.01).as_good
    assert not contrast(5, 0.1).as_good


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    hard = np.clip(0.6 + 0.2 * rng.standard_normal(40), 0.1, 0.9)
    a, b = slices([hard + 0.02]), slices([hard])
    paired = paired_bootstrap(a, b, 1, replicates=FEW)
    unpaired = paired_bootstrap(a, b[:, rng.permutation(40)], 1, replicates=FEW)
    assert unpaired.difference == pytest.approx(paired.difference)
    assert np.ptp(paired.ci95) < np.ptp(unpaired.ci95) / 5
    assert paired.p_value < 0.05 < unpaired.p_value


@pytest.mark.parametrize(("seeds", "n", "block"), [(1, 16, 4), (1, 6, 1), (2, 12, 1), (5, 12, 1)])
def test_equal_models_rarely_differ(seeds, n, block):
    """Also with few blocks and few seeds, where plain percentiles fail."""
    rng, called, studies = np.random.default_rng(0), 0, 300
    for _ in range(studies):
        hard = rng.normal(0, 0.05, n)

        def model(hard: np.ndarray) -> np.ndarray:
            of_seed = (seeds > 1) * rng.normal(0, 0.05, (seeds, 1))
            iou = 0.6 + hard + rng.normal(0, 0.03, (seeds, n)) + of_seed
            return slices(np.clip(iou, 0.05, 0.95))

        found = paired_bootstrap(model(hard), model(hard), block, replicates=500)
        called += found.p_value < 0.05
        assert found.ci95[0] <= found.difference <= found.ci95[1]
    assert called / studies < 0.08


def test_one_block_says_nothing():
    found = paired_bootstrap(slices([[0.9, 0.9]]), slices([[0.1, 0.1]]), 2)
    assert (found.ci95, found.p_value, found.as_good) == ((-1, 1), 1, False)


@pytest.mark.parametrize(
    "other", [slices([[0.5] * 5]), slices([[0.5] * 4], labelled=9_000)], ids=["slices", "labels"]
)
def test_models_of_different_slices_are_not_compared(other):
    with pytest.raises(InputError, match="different slices"):
        paired_bootstrap(slices([[0.5] * 4]), other, 1)


@given(st.lists(st.floats(0, 1), max_size=5))
def test_holm_is_the_closed_bonferroni_test(p_values):
    """A hypothesis is rejected when Bonferroni rejects every intersection that it is in."""
    numbers = range(len(p_values))
    subsets = [s for r in numbers for s in itertools.combinations(numbers, r + 1)]
    for index, corrected in enumerate(holm(p_values)):
        own = [min(1, len(s) * min(p_values[i] for i in s)) for s in subsets if index in s]
        assert corrected == pytest.approx(max(own))


def test_the_interval_of_one_seed_is_that_of_its_slices():
    one = over_seeds([0.5], [(0.4, 0.7)])
    assert one == {"mean": 0.5, "std": 0.0, "values": [0.5], "ci95": [0.4, 0.7]}
    assert over_seeds([0.5, 0.5], [(0.4, 0.7), (0.4, 0.7)])["ci95"] == [0.4, 0.7]
    assert over_seeds([0.1, 0.99], [(0.0, 0.2), (0.9, 1.0)])["ci95"] == [0, 1]


@pytest.mark.parametrize(("of_slices", "of_seeds"), [(0.02, 0.005), (0.01, 0.01), (0.003, 0.02)])
def test_the_interval_over_seeds_covers_the_truth(of_slices, of_seeds):
    """Every seed sees the same slices (a shared error) and adds an error of its own."""
    rng, truth, hits, studies = np.random.default_rng(0), 0.7, 0, 600
    for _ in range(studies):
        values = truth + rng.normal(0, of_slices) + rng.normal(0, of_seeds, size=5)
        ends = [(v - 1.96 * of_slices, v + 1.96 * of_slices) for v in values]
        low, high = over_seeds(list(values), ends)["ci95"]
        hits += low <= truth <= high
    assert 0.93 <= hits / studies <= 0.995
