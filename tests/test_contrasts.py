"""The comparison of regimes: what it must find, what it must not, and the statistic by hand."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emadapt.errors import InputError
from emadapt.metrics.contrasts import holm, paired_bootstrap

FEW = 2000


def slices(iou: Any, labelled: int = 10_000) -> np.ndarray:
    """(seeds, slices, 3) counts of these IoUs, prediction and label of the same size."""
    both = 2 * labelled * np.asarray(iou) / (1 + np.asarray(iou))
    return np.stack([both, *np.full((2, *both.shape), labelled)], -1).round().astype(int)


def masks_to_counts(seed: int) -> tuple[np.ndarray, list[Any]]:
    """(2, 5, 3) counts of small random masks, and the masks."""
    rng = np.random.default_rng(seed)
    label = rng.random((5, 6, 7)) < 0.4
    predicted = rng.random((2, 5, 6, 7)) < 0.4
    counts = [
        [((p & t).sum(), p.sum(), t.sum()) for p, t in zip(one, label, strict=True)]
        for one in predicted
    ]
    return np.array(counts), [predicted, label]


def test_the_statistic_by_brute_force():
    a, (masks, label) = masks_to_counts(0)
    b = a.copy()
    b[..., 0] //= 2
    wanted = np.mean([(m & label).sum() / (m | label).sum() for m in masks])
    less = np.mean([c[:, 0].sum() / (c[:, 1].sum() + c[:, 2].sum() - c[:, 0].sum()) for c in b])
    found = paired_bootstrap(a, b, 1, replicates=FEW)
    assert found.difference == pytest.approx(wanted - less, abs=1e-12)
    assert (found.n, found.seeds) == (5, (2, 2))


def test_turned_round_it_changes_sign_only():
    rng = np.random.default_rng(0)
    a, b = slices(rng.uniform(0.6, 0.8, (1, 20))), slices(rng.uniform(0.6, 0.8, (1, 20)))
    one, other = (
        paired_bootstrap(a, b, 2, replicates=FEW),
        paired_bootstrap(b, a, 2, replicates=FEW),
    )
    assert one.difference == pytest.approx(-other.difference)
    assert one.p_value == pytest.approx(other.p_value, abs=0.1)
    assert one.ci95 == pytest.approx([-other.ci95[1], -other.ci95[0]], abs=0.02)


def test_the_same_model_does_not_differ_from_itself():
    a = slices(np.random.default_rng(0).uniform(0.5, 0.9, (1, 12)))
    found = paired_bootstrap(a, a, 3, replicates=FEW)
    assert (found.difference, found.ci95, found.p_value) == (0, (0, 0), 1)


def test_a_clear_difference_has_the_smallest_p_there_can_be():
    hard = np.random.default_rng(0).normal(0, 0.05, 40)
    found = paired_bootstrap(slices([0.8 + hard]), slices([0.5 + hard]), 2, replicates=FEW)
    assert found.p_value == 2 / (FEW + 1)
    assert 0.25 < found.ci95[0] < found.difference < found.ci95[1] < 0.35


def test_pairing_cancels_what_is_hard_for_both():
    """Slices differ much, models little: the same counts with their slices in another order have a wider interval."""
    rng = np.random.default_rng(0)
    hard = np.clip(0.6 + 0.2 * rng.standard_normal(40), 0.1, 0.9)
    a, b = slices([hard + 0.02]), slices([hard])
    paired = paired_bootstrap(a, b, 1, replicates=FEW)
    unpaired = paired_bootstrap(a, b[:, rng.permutation(40)], 1, replicates=FEW)
    assert unpaired.difference == pytest.approx(paired.difference)
    assert np.ptp(paired.ci95) < np.ptp(unpaired.ci95) / 5
    assert paired.p_value < 0.05 < unpaired.p_value


@pytest.mark.parametrize(("seeds", "n", "block"), [(1, 16, 4), (1, 6, 1), (2, 12, 1), (5, 12, 1)])
def test_equal_regimes_rarely_differ(seeds, n, block):
    """Simulated pairs without a difference, also with few blocks and few seeds, where plain percentiles fail."""
    rng, called, studies = np.random.default_rng(0), 0, 80
    for _ in range(studies):
        hard = rng.normal(0, 0.05, n)
        a, b = (
            slices(
                np.clip(
                    0.6
                    + hard
                    + rng.normal(0, 0.03, (seeds, n))
                    + (seeds > 1) * rng.normal(0, 0.05, (seeds, 1)),
                    0.05,
                    0.95,
                )
            )
            for _ in range(2)
        )
        found = paired_bootstrap(a, b, block, replicates=500)
        called += found.p_value < 0.05
        assert found.ci95[0] <= found.difference <= found.ci95[1]
    assert called / studies < 0.1


def test_one_block_says_nothing():
    found = paired_bootstrap(slices([[0.9, 0.9]]), slices([[0.1, 0.1]]), 2)
    assert (found.ci95, found.p_value) == ((-1, 1), 1)


def test_the_same_seed_draws_the_same():
    rng = np.random.default_rng(0)
    a, b = slices(rng.uniform(0.6, 0.8, (2, 9))), slices(rng.uniform(0.6, 0.8, (2, 9)))
    assert paired_bootstrap(a, b, 1, replicates=2500) == paired_bootstrap(a, b, 1, replicates=2500)
    assert (
        paired_bootstrap(a, b, 1, replicates=2500).ci95
        != paired_bootstrap(a, b, 1, replicates=2500, seed=1).ci95
    )


@pytest.mark.parametrize(
    ("a", "b", "block", "message"),
    [
        (slices([[0.5] * 4]), slices([[0.5] * 5]), 1, "different slices"),
        (slices([[0.5] * 4]), slices([[0.5] * 4], labelled=9_000), 1, "different slices"),
        (slices([[0.5] * 4]), slices([[0.5] * 4]), 5, "blocks of 5 slices"),
        (slices([0.5] * 4), slices([0.5] * 4), 1, r"shape \(4, 3\)"),
        (np.zeros((0, 4, 3), int), slices([[0.5] * 4]), 1, r"shape \(0, 4, 3\)"),
        (np.array([[[5, 4, 6]]]), np.array([[[5, 6, 6]]]), 1, "more pixels in both"),
    ],
)
def test_what_does_not_fit_is_refused(a, b, block, message):
    with pytest.raises(InputError, match=message):
        paired_bootstrap(a, b, block)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_controls_every_subset_as_bonferroni_does(p_values):
    """Closed testing: a hypothesis is rejected when Bonferroni rejects every intersection that it is in."""
    for index, corrected in enumerate(holm(p_values)):
        subsets = [
            s
            for r in range(len(p_values))
            for s in itertools.combinations(range(len(p_values)), r + 1)
            if index in s
        ]
        assert corrected == pytest.approx(
            max(min(1, len(s) * min(p_values[i] for i in s)) for s in subsets)
        )


def test_holm_of_none():
    assert holm([]) == []
