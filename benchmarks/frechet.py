"""The Fréchet distance against the formula with scipy's matrix square root."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import sqrtm

from benchmarks.timing import print_table, seconds
from emadapt.domains.frechet import frechet, frechet_samples

Array = npt.NDArray[np.float64]


def by_sqrtm(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """The formula as it is written."""
    shift, root = mean_a - mean_b, sqrtm(cov_a @ cov_b)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


def tokens(n: int, dim: int, seed: int) -> Array:
    """(n, dim) Gaussian samples whose variances fall like k^-2, as those of DINOv2's tokens do."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    samples = rng.standard_normal((n, dim)) + rng.standard_normal(dim)
    return np.asarray(samples / np.arange(1, dim + 1) @ directions)


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and covariance."""
    return x.mean(0), np.cov(x, rowvar=False)


def compared(dim: int, n: int) -> dict[str, float]:
    """Seconds of both ways for two samples of n tokens; with few, ours works on samples."""
    a, b = tokens(n, dim, 0), tokens(n, dim, 1)
    given = (*moments(a), *moments(b))

    def ours() -> float:
        return frechet(*given) if n > dim else frechet_samples(a, b)

    slow, fast = seconds(lambda: by_sqrtm(*given), 3), seconds(ours, 3)
    difference = abs(ours() / by_sqrtm(*given) - 1)
    row = {"dimensions": dim, "tokens": n, "sqrtm_s": slow, "emadapt_s": fast}
    return row | {"ratio": slow / fast, "relative_difference": difference}


if __name__ == "__main__":
    cases = [(384, 1536), (768, 3072), (1024, 4096), (1024, 64)]
    print_table([compared(dim, n) for dim, n in cases])
