"""Fréchet distance between two sets of features, also extrapolated to infinite samples.

The squared distance between the Gaussians with the sets' moments (Dowson & Landau 1982; Heusel et
al. 2017, eq. 6): |mean_a - mean_b|² + tr(A) + tr(B) - 2 tr sqrt(AB). All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, eigh, lapack, svdvals

Array = npt.NDArray[np.floating]

ROUNDING = 1e-8
"""Share of tr sqrt(AB) that rounding may reach before the slower form is used."""


def frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Fréchet distance from moments.

    Args:
        mean_a: (D,).
        cov_a: (D, D), symmetric and positive semidefinite; it may be singular.
        mean_b: (D,).
        cov_b: (D, D), likewise.

    Returns:
        At least 0, in squared units of the features.
    """
    m_a, a, m_b, b = (np.asarray(m, np.float64) for m in (mean_a, cov_a, mean_b, cov_b))
    return _distance(m_a - m_b, np.trace(a), np.trace(b), _trace_root(a, b))


def frechet_samples(x_a: Array, x_b: Array) -> float:
    """Squared Fréchet distance from samples, with unbiased covariances.

    With R the centred samples over sqrt(n - 1), A = R_a'R_a and B = R_b'R_b. So tr sqrt(AB) is the
    nuclear norm of the (n_a, n_b) matrix R_a R_b', and nothing of size (D, D) is needed.

    Args:
        x_a: (n_a, D), two samples or more.
        x_b: (n_b, D).

    Returns:
        At least 0, in squared units of the features. Biased upwards in 1 / n: see `extrapolate`.
    """
    means = x_a.mean(0), x_b.mean(0)
    pairs = zip((x_a, x_b), means, strict=True)
    r_a, r_b = ((x - mean) / np.sqrt(len(x) - 1) for x, mean in pairs)
    root = svdvals(r_a @ r_b.T).sum()
    return _distance(means[0] - means[1], np.square(r_a).sum(), np.square(r_b).sum(), root)


def extrapolate(sizes: Sequence[float], distances: Sequence[float]) -> float:
    """FD-infinity: the intercept of the distance over 1 / n (Chong & Forsyth 2020, section 4).

    Args:
        sizes: samples in each set, or their share of all; two different ones or more.
        distances: the Fréchet distances at these sizes.

    Returns:
        The distance at infinite n, not clipped: below 0 says that the sets cannot be told from
        samples of one distribution.
    """
    return float(np.polyfit(1 / np.asarray(sizes, float), np.asarray(distances, float), 1)[1])


def _distance(shift: Array, trace_a: float, trace_b: float, root: float) -> float:
    return max(0.0, float(shift @ shift + trace_a + trace_b - 2 * root))  # below 0 is rounding


def _trace_root(a: Array, b: Array) -> float:
    """Trace of sqrt(AB).

    Where B = LL' has a Cholesky factor, AB has the eigenvalues of L'AL (LAPACK's symmetric-definite
    problem of type 2). Where A is singular, eigenvalues that should be 0 are ± rounding, and the
    root makes that large: the negative ones say how large. Where it matters, or B is singular too,
    the nuclear norm of F_a'F_b with A = F_a F_a', B = F_b F_b': no root, no harm.
    """
    try:
        # Symmetric, so the transpose is the same matrix, in the order that LAPACK reads without
        # copying element by element.
        values = eigh(a.T, b.T, type=2, eigvals_only=True, driver="gv", check_finite=False)
        root, rounding = (np.sqrt(np.clip(v, 0, None)).sum() for v in (values, -values))
        if rounding <= ROUNDING * root:
            return float(root)
    except LinAlgError:
        pass  # B is singular: few samples, or tokens after a LayerNorm, on a hyperplane
    return float(svdvals(_factor(a).T @ _factor(b), check_finite=False).sum())


def _factor(cov: Array) -> Array:
    """F (D, rank) with FF' = cov: Cholesky with pivots (Higham 2002, section 10.3)."""
    lower, pivots, rank, _ = lapack.dpstrf(cov.T, lower=1)
    factor = np.zeros((len(cov), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor
