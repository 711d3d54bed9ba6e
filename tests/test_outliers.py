import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from emadapt.domains.outliers import mahalanobis_scores, outlier_auroc
from emadapt.errors import InputError


def test_scores_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    x_train, x = (
        rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4)),
        rng.standard_normal((9, 4)),
    )
    inverse, centre = np.linalg.inv(LedoitWolf().fit(x_train).covariance_), x_train.mean(0)
    expected = [(v - centre) @ inverse @ (v - centre) for v in x]
    np.testing.assert_allclose(
        mahalanobis_scores(x_train.astype(np.float32), x.astype(np.float32)), expected, rtol=1e-4
    )


def test_fewer_tokens_than_dimensions_are_scored_too() -> None:
    rng = np.random.default_rng(1)
    scores = mahalanobis_scores(rng.standard_normal((10, 40)), rng.standard_normal((30, 40)))
    assert np.isfinite(scores).all()
    assert scores.min() > 0


def test_auroc_over_tokens_and_over_slices() -> None:
    rng = np.random.default_rng(2)
    train, same, other = (rng.standard_normal((n, 3)) for n in (400, 200, 160))
    slices_same, slices_other = np.repeat(np.arange(10), 20), np.repeat([3, 7, 8, 9], 40)
    alike = outlier_auroc(train, same, slices_same, other, slices_other)
    assert alike[0] == pytest.approx(0.5, abs=0.08)
    apart = outlier_auroc(train, same, slices_same, 1.7 * other, slices_other)
    assert 0.6 < apart[0] < 0.95
    assert apart[1] == 1.0  # a slice's mean is surer than a token
    inside = outlier_auroc(train, same, slices_same, 0.1 * other, slices_other)
    assert inside[0] < 0.2
    assert inside[1] == 0.0


def test_bad_input() -> None:
    x, slices = np.eye(5), np.arange(5)
    with pytest.raises(InputError, match=r"other dataset: found 1 of 25 values that are NaN"):
        outlier_auroc(x, x, slices, np.where(np.arange(25).reshape(5, 5) == 3, np.inf, x), slices)
    with pytest.raises(InputError, match=r"held-out tokens: found features of shape \(0, 5\)"):
        outlier_auroc(x, x[:0], slices[:0], x, slices)
    with pytest.raises(InputError, match="5 of training tokens, 5 of held-out tokens, 4 of other"):
        outlier_auroc(x, x, slices, x[:, :4], slices)
