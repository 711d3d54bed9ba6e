import numpy as np
import pytest

from emadapt.domains.knn import domain_mixing, segmentation_iou


def test_mixing_against_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((20, 3)), rng.standard_normal((30, 3)) + 0.7
    blocks_a, blocks_b = np.repeat([0, 1], [12, 8]), np.repeat([0, 1, 2], 10)
    everything = [("a", k, v) for k, v in zip(blocks_a, a, strict=True)] + [
        ("b", k, v) for k, v in zip(blocks_b, b, strict=True)
    ]
    ratios: dict[str, list[float]] = {"a": [], "b": []}
    for name, block, x in everything:
        searched = [
            (np.linalg.norm(v - x), n != name) for n, k, v in everything if (n, k) != (name, block)
        ]
        nearest = sorted(searched)[:4]
        share, expected_share = (
            float(np.mean([foreign for _, foreign in found])) for found in (nearest, searched)
        )
        ratios[name].append(share / expected_share)
    expected = (np.mean(ratios["a"]) + np.mean(ratios["b"])) / 2
    assert domain_mixing(a, blocks_a, b, blocks_b, k=4) == pytest.approx(expected)


def test_mixing_of_one_population_and_of_two():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((400, 4)), rng.standard_normal((100, 4))
    blocks_a, blocks_b = np.arange(400) // 100, np.arange(100) // 25
    assert domain_mixing(a, blocks_a, b, blocks_b) == pytest.approx(1, abs=0.1)
    assert domain_mixing(a, blocks_a, b + 20, blocks_b) == 0


def test_near_copies_in_a_block_do_not_count():
    rng = np.random.default_rng(2)
    blocks = np.repeat(np.arange(30), 5)
    a, b = (
        rng.standard_normal((30, 3))[blocks] + 1e-3 * rng.standard_normal((150, 3))
        for _ in range(2)
    )
    # with them it would be 0.1
    assert domain_mixing(a, blocks, b, blocks, k=5) == pytest.approx(1, abs=0.25)


def test_the_vote_against_brute_force():
    rng = np.random.default_rng(3)
    x, x_test = rng.standard_normal((60, 4)), rng.standard_normal((40, 4))
    y, y_test = (np.digitize(own[:, 0], [0.3, 1]) for own in (x, x_test))
    cosine = x_test @ x.T / np.linalg.norm(x_test, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    predicted = []
    for row in cosine:
        nearest = np.argsort(-row)[:7]
        predicted.append(np.bincount(y[nearest], np.exp(row[nearest] / 0.07)).argmax())
    pairs = [(np.asarray(predicted) == own, y_test == own) for own in (1, 2)]
    expected = [(found & truth).sum() / (found | truth).sum() for found, truth in pairs]
    assert segmentation_iou(x, y, x_test, y_test, 2, k=7) == pytest.approx(expected)
    assert segmentation_iou(5 * x, y, x, y, k=1) == 1.0  # cosine: length plays no part
    assert 0 < segmentation_iou(x[:3], y[:3], x_test, y_test, 2)[1] < 1  # fewer than k
    assert segmentation_iou(x, 0 * y, x_test, 0 * y_test) == 1.0
