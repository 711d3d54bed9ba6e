"""Ridge and kNN: what they choose on, and what they draw."""

import numpy as np
import pytest
import torch

from emadapt.models.tokens import TokenView
from emadapt.training.regimes.at_once import EDGES, best_of
from emadapt.training.regimes.knn import BANK, draw_bank
from emadapt.training.regimes.ridge import ridge_path


def a_view(seed: int, slices: int, rows: int = 2) -> TokenView:
    """`rows` tiles of 3 x 3 tokens (D = 5) a slice; the last slice is for testing. Tokens say which
    slice they are of."""
    rng = np.random.default_rng(seed)
    index = np.zeros((slices * rows, 3), np.int32)
    index[:, 0] = np.repeat(np.arange(slices), rows)
    tokens = rng.normal(size=(len(index), 5, 3, 3)).astype(np.float16)
    tokens[:, 0] = index[:, :1, None]
    labels = (rng.random((len(index), 12, 12)) > 0.6).astype(np.uint8)
    split = {"train": list(range(slices - 1)), "val": [], "test": [slices - 1]}
    return TokenView(tokens, labels, index, split)


def test_the_choice_is_the_best_of_all_candidates_and_thresholds():
    rng = np.random.default_rng(0)
    labels = [rng.random(300) > 0.7, rng.random(500) > 0.8]
    middles = (EDGES[1:] + EDGES[:-1]) / 2  # thresholds at edges never tie with them

    def scores(label: np.ndarray, noise: float) -> np.ndarray:
        bins = 120 + 90 * label + rng.normal(0, noise, len(label))
        return np.asarray(middles[np.clip(bins, 0, 399).astype(int)])

    shares = [[scores(label, noise) for noise in (90, 30, 60)] for label in labels]
    counts = np.array(
        [
            [[np.histogram(s[label == own], EDGES)[0] for own in (False, True)] for s in three]
            for three, label in zip(shares, labels, strict=True)
        ],
        float,
    )

    def iou(candidate: int, threshold: float) -> float:
        pairs = [
            (own[candidate] > threshold, label) for own, label in zip(shares, labels, strict=True)
        ]
        return float(np.mean([(f & y).sum() / max((f | y).sum(), 1) for f, y in pairs]))

    choice = best_of(counts[:, :, None])
    everything = np.array([[iou(c, t) for t in EDGES[:-1]] for c in range(3)])
    assert choice.i == 1
    assert iou(choice.i, choice.thresholds[0]) == pytest.approx(everything.max())
    np.testing.assert_allclose(choice.table[:, 0], everything.max(1))

    def loss(slope: float) -> float:
        z = [slope * (own[choice.i] - choice.thresholds[0]) for own in shares]
        signed = (np.where(y, -v, v) for v, y in zip(z, labels, strict=True))
        return float(sum(np.logaddexp(0, s).mean() for s in signed))

    assert loss(choice.slopes[0]) <= min(loss(s) for s in np.geomspace(1, 100, 200)) + 1e-5
    twice = best_of(np.stack([counts, counts[..., ::-1, ::-1]], 2))  # and the rest as a class
    alone = [best_of(own[:, :, None]) for own in (counts, counts[..., ::-1, ::-1])]
    np.testing.assert_allclose(twice.table, np.mean([own.table for own in alone], 0))


def test_a_class_that_no_patch_in_training_is_of_is_found_nowhere():
    counts = np.zeros((1, 1, 1, 2, len(EDGES) - 1))
    counts[..., 0, 100], counts[..., 1, 100] = 990, 10  # all scores are 0
    assert best_of(counts).thresholds[0] > 0


def test_a_bank_is_spread_over_datasets_and_their_training_slices():
    views = [[a_view(0, slices=5)], [a_view(1, slices=9)]]
    tokens, foreground = draw_bank(views, seed=0, size=64)
    assert tokens.shape == (64, 5)
    assert np.bincount(tokens[:32, 0].int()).tolist() == [8] * 4
    assert np.bincount(tokens[32:, 0].int()).tolist() == [4] * 8
    assert set(foreground.tolist()) == {0, 1}
    again, other = (draw_bank(views, seed=seed, size=64)[0] for seed in (0, 1))
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    assert len(draw_bank(views, seed=0, size=BANK)[0]) == 2 * 9 * (4 + 8)  # all there are


def test_datasets_of_a_union_weigh_the_same_where_they_are_balanced():
    small, large = a_view(0, slices=3), a_view(1, slices=9)
    balanced = ridge_path([[small], [large]], balanced=True)
    repeated = ridge_path([[small] * 4 + [large]], balanced=True)  # 2 and 8 training slices
    np.testing.assert_allclose(balanced.weights, repeated.weights, atol=1e-9)
    plain, one = (ridge_path(v, balanced=False) for v in ([[small], [large]], [[small, large]]))
    np.testing.assert_allclose(plain.weights, one.weights, atol=1e-9)
    assert np.abs(plain.weights - balanced.weights).max() > 1e-3
