from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.svm import LinearSVC

from emadapt.domains.probe import domain_probe, foreground_probe
from emadapt.errors import InputError

SEEDED: dict[str, Any] = {"permutations": 99, "seed": 0, "names": ("here", "there")}


def volume(
    seed: int, blocks: int = 4, per_block: int = 12, dim: int = 6, drift: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose z-blocks differ, as those of a volume do."""
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(blocks), per_block)
    x = rng.standard_normal((len(block), dim)) + drift * rng.standard_normal((blocks, dim))[block]
    return x.astype(np.float32), block


def test_datasets_that_differ_are_told_apart() -> None:
    (a, blocks), (b, _) = volume(0), volume(1)
    b[:, 0] += 12
    probe = domain_probe(a, blocks, b, blocks, **SEEDED)
    assert probe.balanced_accuracy > 0.95
    assert (probe.auroc, probe.n) == (1.0, (48, 48))
    assert probe.p_value == 1 / 8  # one of the 2^3 labellings
    again = domain_probe(b, blocks, a, blocks, **SEEDED)
    assert (again.balanced_accuracy, again.p_value) == (probe.balanced_accuracy, 1 / 8)


def test_drift_along_z_is_not_a_difference_of_datasets() -> None:
    found = []
    for seed in range(8):
        (a, blocks), (b, _) = volume(2 * seed, drift=3), volume(2 * seed + 1, drift=3)
        found.append(domain_probe(a, blocks, b, blocks, **SEEDED))
    assert np.mean([f.balanced_accuracy for f in found]) == pytest.approx(0.5, abs=0.12)
    assert np.mean([f.p_value for f in found]) == pytest.approx(0.56, abs=0.25)
    # What a random split, whose training part has seen every block, would have said of the last of
    # them:
    x, other = np.concatenate([a, b]), np.repeat([0, 1], 48)
    leaky = cross_val_predict(LinearSVC(), x, other, cv=KFold(6, shuffle=True, random_state=0))
    assert balanced_accuracy_score(other, leaky) > found[-1].balanced_accuracy + 0.1


def test_the_p_value_against_blocks_that_were_really_exchanged() -> None:
    (a, blocks), (b, _) = volume(4, blocks=3), volume(5, blocks=3)
    b[:, 0] += 0.8
    accuracies = []
    for swapped in ([], [1], [2], [1, 2]):
        swap = np.isin(blocks, swapped)[:, None]
        one, other = np.where(swap, b, a), np.where(swap, a, b)
        accuracies.append(
            domain_probe(
                one, blocks, other, blocks, permutations=0, seed=0, names=("", "")
            ).balanced_accuracy
        )
    found = domain_probe(a, blocks, b, blocks, **SEEDED)
    assert found.balanced_accuracy == pytest.approx(accuracies[0])
    assert found.p_value == np.mean(np.asarray(accuracies) >= accuracies[0] - 1e-9)


def test_more_labellings_than_permutations_are_drawn() -> None:
    (a, blocks), (b, _) = volume(0, blocks=6, per_block=3), volume(1, blocks=6, per_block=3)
    seeded: dict[str, Any] = {"permutations": 9, "names": ("a", "b")}
    one, again = (domain_probe(a, blocks, b + 20, blocks, seed=0, **seeded) for _ in range(2))
    assert one == again
    assert one.p_value == 1 / 10


def labelled(seed: int, n: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens with foreground in runs, as in an organelle, and six z-blocks."""
    x, blocks = volume(seed, blocks=6, per_block=n // 6)
    y = np.repeat(np.random.default_rng(seed).random(n // 8) < 0.4, 8)
    return x, y, blocks


def test_foreground_within_and_across_datasets() -> None:
    (x, y, blocks), (x_test, y_test, _) = labelled(0), labelled(1)
    x[:, 0] += 4 * y
    x_test[:, 0] += 4 * y_test
    within = foreground_probe(x, y, blocks, **SEEDED)
    across = foreground_probe(x, y, blocks, x_test[:120], y_test[:120], **SEEDED)
    for probe in (within, across):
        assert probe.balanced_accuracy > 0.85
        assert probe.auroc > 0.95
        assert probe.p_value <= 0.05
    assert (within.n, across.n) == ((240, 240), (240, 120))
    reverse = foreground_probe(x, y, blocks, -x_test, y_test, **SEEDED)
    assert reverse.auroc < 0.2
    assert reverse.p_value > 0.5


def test_predictions_in_runs_are_no_evidence_for_labels_in_runs() -> None:
    p_values = []
    for seed in range(20):
        x, y, blocks = labelled(seed)
        x[:, 0] += 6 * np.repeat(
            np.random.default_rng(100 + seed).random(30) < 0.4, 8
        )  # runs of something else
        p_values.append(
            foreground_probe(x, y, blocks, permutations=19, seed=0, names=("", "")).p_value
        )
    assert np.mean(np.asarray(p_values) <= 0.1) <= 0.2


def test_bad_input() -> None:
    x, blocks = volume(0)
    y = np.arange(48) % 2 == 0
    with pytest.raises(InputError, match=r"here: found 1 z-block"):
        domain_probe(x, 0 * blocks, x, blocks, **SEEDED)
    with pytest.raises(InputError, match=r"there: found no tokens in z-blocks \[3\]"):
        domain_probe(x, blocks, x[blocks < 3], blocks[blocks < 3], **SEEDED)
    with pytest.raises(InputError, match=r"6 of here, 5 of there"):
        domain_probe(x, blocks, x[:, :5], blocks, **SEEDED)
    with pytest.raises(InputError, match=r"there: found features of shape \(0, 6\)"):
        domain_probe(x, blocks, x[:0], blocks[:0], **SEEDED)
    with pytest.raises(InputError, match=r"there: found 48 of 288 values that are NaN"):
        domain_probe(x, blocks, np.where(np.arange(6) == 2, np.nan, x), blocks, **SEEDED)
    with pytest.raises(InputError, match=r"here: found no foreground tokens"):
        foreground_probe(x, y & False, blocks, **SEEDED)
    with pytest.raises(InputError, match=r"there: found no background tokens"):
        foreground_probe(x, y, blocks, x, y | True, **SEEDED)
    with pytest.raises(InputError, match=r"here without z-block 1: found no foreground tokens"):
        foreground_probe(x, blocks == 1, blocks, **SEEDED)
