import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.svm import LinearSVC

from emadapt.domains.probe import Probe, domain_probe


def volume(
    seed: int, blocks: int = 4, per_block: int = 12, dim: int = 6, drift: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose z-blocks differ, as those of a volume do."""
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(blocks), per_block)
    x = rng.standard_normal((len(block), dim)) + drift * rng.standard_normal((blocks, dim))[block]
    return x.astype(np.float32), block


def told_apart(
    a: np.ndarray, blocks_a: np.ndarray, b: np.ndarray, blocks_b: np.ndarray, most: int = 99
) -> Probe:
    datasets = {"here": (a, blocks_a), "there": (b, blocks_b)}
    return domain_probe(datasets, permutations=most, seed=0)


def test_datasets_that_differ_are_told_apart():
    (a, blocks), (b, _) = volume(0), volume(1)
    b[:, 0] += 12
    probe = told_apart(a, blocks, b, blocks)
    assert probe.balanced_accuracy > 0.95
    assert probe.p_value == 1 / 8  # one of the 2^3 labellings
    again = told_apart(b, blocks, a, blocks)
    assert (again.balanced_accuracy, again.p_value) == (probe.balanced_accuracy, 1 / 8)


def test_drift_along_z_is_not_a_difference_of_datasets():
    found = []
    for seed in range(8):
        (a, blocks), (b, _) = volume(2 * seed, drift=3), volume(2 * seed + 1, drift=3)
        found.append(told_apart(a, blocks, b, blocks))
    assert np.mean([f.balanced_accuracy for f in found]) == pytest.approx(0.5, abs=0.12)
    assert np.mean([f.p_value for f in found]) == pytest.approx(0.56, abs=0.25)
    # What a random split, whose training part has seen every block, would have said of the last of
    # them:
    x, other = np.concatenate([a, b]), np.repeat([0, 1], 48)
    leaky = cross_val_predict(LinearSVC(), x, other, cv=KFold(6, shuffle=True, random_state=0))
    assert balanced_accuracy_score(other, leaky) > found[-1].balanced_accuracy + 0.1


def test_the_p_value_against_blocks_that_were_really_exchanged():
    (a, blocks), (b, _) = volume(4, blocks=3), volume(5, blocks=3)
    b[:, 0] += 0.8
    accuracies = []
    for swapped in ([], [1], [2], [1, 2]):
        swap = np.isin(blocks, swapped)[:, None]
        one, other = np.where(swap, b, a), np.where(swap, a, b)
        accuracies.append(told_apart(one, blocks, other, blocks, 0).balanced_accuracy)
    found = told_apart(a, blocks, b, blocks)
    assert found.balanced_accuracy == pytest.approx(accuracies[0])
    assert found.p_value == np.mean(np.asarray(accuracies) >= accuracies[0] - 1e-9)


def test_more_labellings_than_permutations_are_drawn():
    (a, blocks), (b, _) = volume(0, blocks=6, per_block=3), volume(1, blocks=6, per_block=3)
    one, again = (told_apart(a, blocks, b + 20, blocks, 9) for _ in range(2))
    assert one == again
    assert one.p_value == 1 / 10
