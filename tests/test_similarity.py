import itertools

import numpy as np
import pytest

from emadapt.domains.similarity import linear_cka, mmd2
from emadapt.errors import InputError


def test_mmd_against_the_sums_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((9, 3)) + 1
    pooled = [*x, *y]
    width = np.median([np.linalg.norm(p - q) for p, q in itertools.combinations(pooled, 2)])

    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.exp(-np.sum((p - q) ** 2) / (2 * width**2)))

    within = sum(np.mean([kernel(p, q) for p, q in itertools.permutations(s, 2)]) for s in (x, y))
    between = np.mean([kernel(p, q) for p in x for q in y])
    # 1e-3: the median of the squared distances and of the distances differ where it lies between two
    assert mmd2(x, y) == pytest.approx(within - 2 * between, rel=1e-3)


def test_mmd_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    same = [mmd2(*rng.standard_normal((2, 15, 3))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert min(same) < 0
    x, y = rng.standard_normal((2, 40, 3))
    assert mmd2(x, y) < mmd2(x, y + 1) < mmd2(x, y + 3)


def test_cka_against_its_gram_matrix_form() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((25, 4)) + 3
    y = x @ rng.standard_normal((4, 7)) + rng.standard_normal((25, 7))
    centre = np.eye(25) - 1 / 25

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        return float(np.trace(k @ centre @ other @ centre))

    k, other = x @ x.T, y @ y.T
    expected = hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))
    assert linear_cka(x, y) == pytest.approx(expected)
    assert linear_cka(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(
        expected, rel=1e-5
    )


def test_cka_sees_through_rotation_and_scale_only() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, 5)) * [5, 3, 1, 1, 1]
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert linear_cka(x, x[:, :1]) < 0.99
    assert linear_cka(x, rng.standard_normal((200, 5))) < 0.1


def test_bad_input() -> None:
    x = np.eye(4)
    with pytest.raises(InputError, match=r"second sample: found features of shape \(1, 4\)"):
        mmd2(x, x[:1])
    with pytest.raises(InputError, match="nearly all the same"):
        mmd2(0 * x, 0 * x)
    with pytest.raises(InputError, match="4 and 3 tokens"):
        linear_cka(x, x[:3])
    with pytest.raises(InputError, match=r"second model: found 4 of 16 values"):
        linear_cka(x, np.where(x == 1, np.nan, x))
    with pytest.raises(InputError, match="all the same"):
        linear_cka(x, 0 * x)
