"""Moments give what numpy gives on the tokens themselves, for any choice of slices."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emadapt.domains.moments import Moments, slice_moments, z_blocks


def some_slices(n_slices: int, seed: int) -> tuple[list[np.ndarray], Moments]:
    rng = np.random.default_rng(seed)
    tokens = [
        rng.normal(3, 1 + z, (int(rng.integers(5, 30)), 4)).astype(np.float32)
        for z in range(n_slices)
    ]
    columns = zip(*(slice_moments(own) for own in tokens), strict=True)
    return tokens, Moments(*(np.stack(column) for column in columns))


@given(seed=st.integers(0, 10_000), chosen=st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_merged_moments_are_those_of_the_pooled_tokens(seed, chosen):
    tokens, moments = some_slices(5, seed)
    pool = np.concatenate([tokens[z] for z in chosen]).astype(np.float64)
    n, mean, cov = moments.merged(chosen)
    assert n == len(pool)
    np.testing.assert_allclose(mean, pool.mean(0), atol=1e-9)
    np.testing.assert_allclose(cov, np.cov(pool.T), atol=1e-8)


@given(n=st.integers(4, 60), blocks=st.integers(2, 4))
def test_z_blocks_are_contiguous_and_even(n, blocks):
    found = z_blocks(n, blocks)
    assert (np.diff(found) >= 0).all()
    sizes = np.bincount(found, minlength=blocks)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
