import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from emadapt.metrics.thresholds import GRID, choose_threshold, histogram, iou_by_threshold


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.booleans())
def test_iou_at_every_threshold_against_scikit_learn(
    seed: int, share: float, on_grid: bool
) -> None:
    rng = np.random.default_rng(seed)
    label = rng.random((6, 7)) < share
    probability = np.clip(rng.normal(0.4 + 0.2 * label, 0.2), 0, 1).astype(np.float32)
    if on_grid:  # a probability that equals a threshold is background
        probability = GRID[(probability * 100).astype(int)]
    found = iou_by_threshold(histogram(probability, label))
    for k in range(0, 101, 7):
        expected = jaccard_score(label.ravel(), (probability > k / 100).ravel(), zero_division=1.0)
        assert found[k] == pytest.approx(expected)


def test_the_threshold_is_where_the_means_of_datasets_are_best_and_near_a_half_among_equals() -> (
    None
):
    label = np.array([0, 0, 1, 1])
    dim = histogram(np.array([0.1, 0.2, 0.32, 0.9], np.float32), label)
    threshold, iou = choose_threshold([dim])
    assert (threshold, iou) == (0.31, 1.0)  # anything from 0.20 to 0.31
    bright = histogram(np.array([0.1, 0.28, 0.8, 0.9], np.float32), label)
    assert choose_threshold([dim, bright]) == (0.31, 1.0)
    assert choose_threshold([histogram(np.array([0.0, 0.1, 0.9, 1.0], np.float32), label)]) == (
        0.5,
        1.0,
    )
    nothing = histogram(np.array([0.1, 0.2], np.float32), np.array([0, 0]))
    assert choose_threshold([nothing]) == (0.5, 1.0)
