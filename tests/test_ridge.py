import numpy as np
import torch
from sklearn.linear_model import Ridge

from emadapt.models.heads import Linear
from emadapt.models.ridge import EPS, STRENGTHS, solve, sums_of

N, DIM = 400, 12


def tokens_and_shares(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated tokens far from zero, one channel without variance, and two shares that depend on
    them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, DIM)) @ rng.normal(size=(DIM, DIM)) + 30
    x[:, 3] = 7.0
    along = x @ rng.normal(size=(DIM, 2))
    share = 1 / (1 + np.exp(along.mean(0) - along))
    return x, share


def standardised(x: np.ndarray) -> np.ndarray:
    return np.asarray((x - x.mean(0)) / np.sqrt(x.var(0) + EPS))


def test_every_strength_is_scikit_learns_ridge_solved_by_itself() -> None:
    x, y = tokens_and_shares()
    path = solve(sums_of(x, y))
    assert len(path.weights) == len(STRENGTHS) == len(set(STRENGTHS))
    for strength, weights in zip(STRENGTHS, path.weights, strict=True):
        alone = Ridge(alpha=strength * N).fit(standardised(x), y)
        np.testing.assert_allclose(weights, alone.coef_, atol=1e-4)
        np.testing.assert_allclose(path.intercept, alone.intercept_, atol=1e-6)
        prediction = path.intercept + standardised(x) @ weights.T
        np.testing.assert_allclose(prediction, alone.predict(standardised(x)), atol=1e-6)


def test_sums_of_parts_add_up_and_weights_are_scikit_learns_sample_weights() -> None:
    x, y = tokens_and_shares()
    whole, parts = sums_of(x, y), sums_of(x[:150], y[:150]) + sums_of(x[150:], y[150:])
    for name in ("n", "x", "xx", "y", "xy"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)
    path = solve(sums_of(x[:150], y[:150]).weighted(3.0) + sums_of(x[150:], y[150:]), (0.01,))
    weight = np.where(np.arange(N) < 150, 3.0, 1.0)
    mean = np.average(x, axis=0, weights=weight)
    scaled = (x - mean) / np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weight) + EPS)
    alone = Ridge(alpha=0.01 * weight.sum()).fit(scaled, y, sample_weight=weight)
    np.testing.assert_allclose(path.weights[0], alone.coef_, atol=1e-6)


def test_the_head_says_what_the_path_says_with_the_threshold_at_one_half() -> None:
    x, y = tokens_and_shares()
    path = solve(sums_of(x, y))
    tokens = torch.from_numpy(x[:24].astype(np.float32)).view(2, 3, 4, DIM).movedim(-1, 1)
    shares = path.predict(tokens)
    assert shares.shape == (len(STRENGTHS), 2, 2, 3, 4)
    expected = (
        path.intercept + (x[:24] - path.mean) / np.sqrt(path.variance + EPS) @ path.weights[4].T
    )
    np.testing.assert_allclose(shares[4].flatten(1).T, expected, atol=1e-4)
    head = Linear(DIM // 2, 2, 3).eval()
    thresholds, slopes = np.array([0.3, 0.6]), np.array([9.0, 5.0])
    path.write(head, 4, thresholds, slopes)
    with torch.inference_mode():
        logits = head([tokens[:, : DIM // 2], tokens[:, DIM // 2 :]], (3, 4))
    for own, (threshold, slope) in enumerate(zip(thresholds, slopes, strict=True)):
        odds = logits[:, 1 + own] - logits[:, 0]
        expected = slope * (shares[4, own] - threshold)
        torch.testing.assert_close(odds, expected, atol=1e-3, rtol=1e-3)
