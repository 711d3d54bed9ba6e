from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from emadapt.models import nearest
from emadapt.models.nearest import Nearest
from emadapt.study.regimes import regime_settings
from emadapt.training.model_files import load_model, save_model
from tiny import regime_for

DIM = 6


def filled(n: int = 90, hard: bool = False) -> Nearest:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(n, 2 * DIM, generator=generator) * 3 + 5
    targets = torch.rand(n, generator=generator)
    head = Nearest(DIM, 2)
    head.fill(tokens, targets.round() if hard else targets, tokens.mean(0), tokens.std(0))
    return head


def queries() -> torch.Tensor:
    """Two grids of 3 x 5 tokens, (B, D, h, w)."""
    return torch.randn(2, 2 * DIM, 3, 5, generator=torch.Generator().manual_seed(1)) * 3 + 5


@pytest.mark.parametrize("per_chunk", [7, 1024])
def test_shares_are_those_of_scikit_learns_neighbours(
    monkeypatch: pytest.MonkeyPatch, per_chunk: int
) -> None:
    monkeypatch.setattr(nearest, "QUERIES", per_chunk)
    ks, flat = (1, 5, 12), queries().movedim(1, -1).reshape(-1, 2 * DIM)
    soft, hard = filled(), filled(hard=True)
    for k, share, vote in zip(
        ks, soft.shares(queries(), ks), hard.shares(queries(), ks), strict=True
    ):
        asked = ((flat - soft.shift) / soft.scale).numpy()
        mean = KNeighborsRegressor(k).fit(soft.bank.float().numpy(), soft.targets.numpy())
        votes = KNeighborsClassifier(k).fit(hard.bank.float().numpy(), hard.targets.numpy())
        np.testing.assert_allclose(share.flatten(), mean.predict(asked), atol=1e-6)
        np.testing.assert_allclose(vote.flatten(), votes.predict_proba(asked)[:, 1], atol=1e-6)


def test_logits_cross_zero_at_the_threshold() -> None:
    head = filled()
    head.k.fill_(5)
    head.threshold.fill_(0.4)
    head.slope.fill_(8.0)
    blocks = list(queries().split(DIM, 1))
    logits = head(blocks, (3, 5))
    torch.testing.assert_close(
        logits[:, 1] - logits[:, 0], 8 * (head.shares(queries(), (5,))[0] - 0.4)
    )
    assert head(blocks, (42, 70)).shape == (2, 2, 42, 70)


def test_the_bank_is_saved_in_half_precision_and_loaded_whatever_its_size(tmp_path: Path) -> None:
    backbone = {"arch": "tiny_dinov2", "source": "random", "blocks": (2, 4), "tile": 56}
    regime = regime_for(backbone, regime_settings(kind="knn"), "knn")
    segmenter, generator = regime.build(0), torch.Generator().manual_seed(0)
    tokens = torch.randn(77, 128, generator=generator)
    targets = torch.rand(77, generator=generator)
    segmenter.head.fill(tokens, targets, tokens.mean(0), tokens.std(0))  # type: ignore[operator]
    segmenter.head.k.fill_(3)  # type: ignore[operator]
    save_model(segmenter, regime, tmp_path, {})
    assert 77 * 128 * 2 < (tmp_path / "model.safetensors").stat().st_size < 77 * 128 * 2 + 4000
    loaded, _ = load_model(tmp_path)
    images = torch.rand(2, 1, 56, 56, generator=generator)
    with torch.inference_mode():
        assert torch.equal(loaded(images, (56, 56)), segmenter.eval()(images, (56, 56)))
    assert segmenter.n_trainable() == 0
