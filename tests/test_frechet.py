import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from emadapt.domains.frechet import extrapolate, frechet, frechet_samples

SEEDS = st.integers(0, 2**32 - 1)


def pytorch_fid(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray, eps: float = 1e-6
) -> float:
    """calculate_frechet_distance of https://github.com/mseitzer/pytorch-fid, as a formula.

    Its sqrtm of the product, eps on both diagonals where that is not finite, the real part.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            offset = eps * np.eye(len(sigma1))
            root = sqrtm((sigma1 + offset) @ (sigma2 + offset))
    if np.iscomplexobj(root):
        assert np.allclose(np.diagonal(root).imag, 0, atol=1e-3)
        root = root.real
    return float(
        (mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)
    )


def tokens(n: int, dim: int, seed: int, decay: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    drawn = rng.standard_normal((n, dim)) + rng.standard_normal(dim)
    return drawn / np.arange(1, dim + 1) ** decay @ directions


def on_hyperplane(x: np.ndarray) -> np.ndarray:
    """What a LayerNorm does: sum 0, one scale."""
    x = x - x.mean(1, keepdims=True)
    return x / x.std(1, keepdims=True)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


CASES = {
    "well-conditioned": (tokens(300, 24, 0, 0.2), tokens(250, 24, 1, 0.2)),
    "decaying": (tokens(400, 48, 2), tokens(400, 48, 3)),
    "fewer samples than dimensions": (tokens(12, 48, 4), tokens(20, 48, 5)),
    "fewer in the first": (tokens(12, 48, 6), tokens(200, 48, 7)),
    "fewer in the second": (tokens(200, 48, 8), tokens(12, 48, 9)),
    "hyperplane": (on_hyperplane(tokens(300, 32, 10)), on_hyperplane(tokens(300, 32, 11))),
    "hyperplane, float16": tuple(
        on_hyperplane(tokens(300, 32, s)).astype(np.float16) for s in (12, 13)
    ),
    "hyperplane, fewer samples": (
        on_hyperplane(tokens(20, 32, 14)),
        on_hyperplane(tokens(300, 32, 15)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_forms_against_the_matrix_square_root(case):
    a, b = (x.astype(np.float64) for x in CASES[case])
    expected = pytorch_fid(*moments(a), *moments(b))
    assert frechet(*moments(a), *moments(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_samples(a, b) == pytest.approx(expected, rel=1e-6)
    # Tighter than sqrtm can be on singular matrices: the forms against each other, as close as
    # frechet.ROUNDING lets them be.
    assert frechet(*moments(a), *moments(b)) == pytest.approx(frechet_samples(a, b), rel=1e-7)


@given(SEEDS, st.integers(1, 6), st.integers(2, 9), st.integers(2, 9))
@settings(max_examples=30)
def test_properties(seed, dim, n, m):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, dim)), 2 * rng.standard_normal((m, dim)) + 1
    distance = frechet_samples(a, b)
    rotation, shift = np.linalg.qr(rng.standard_normal((dim, dim)))[0], rng.standard_normal(dim)
    size = np.square(a).sum() + np.square(b).sum()  # what cancels
    assert distance >= 0
    assert frechet_samples(b, a) == pytest.approx(distance, abs=1e-7 * size)
    assert frechet_samples(a @ rotation, b @ rotation) == pytest.approx(distance, abs=1e-7 * size)
    assert frechet_samples(a + shift, b + shift) == pytest.approx(distance, abs=1e-7 * size)
    assert frechet_samples(a, a) == pytest.approx(0, abs=1e-7 * size)
    assert frechet_samples(a, a + shift) == pytest.approx(
        shift @ shift, abs=1e-7 * (size + shift @ shift)
    )


def test_extrapolation_takes_off_most_of_the_bias_of_few_samples():
    x = tokens(4000, 16, 0)  # two halves of one population: 0
    sizes = [50, 100, 200]
    pairs = [
        list(zip(np.split(x[:2000], 2000 // n), np.split(x[2000:], 2000 // n), strict=True))
        for n in sizes
    ]
    found = [float(np.mean([frechet_samples(a, b) for a, b in pair])) for pair in pairs]
    assert found[-1] > 0
    assert abs(extrapolate(sizes, found)) < 0.1 * found[-1]
