from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from emadapt.models import nearest
from emadapt.models.nearest import Nearest
from emadapt.study.regimes import regime_settings
from emadapt.training.model_files import load_model, save_model
from tiny import regime_for

DIM = 6


def filled(n: int = 90) -> Nearest:
    """A bank of two classes and the background."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(n, 2 * DIM, generator=generator) * 3 + 5
    head = Nearest(DIM, 2, 3)
    ids = torch.randint(3, (n,), generator=generator)
    head.fill(tokens, ids, tokens.mean(0), tokens.std(0))
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
    head = filled()
    asked = ((flat - head.shift) / head.scale).numpy()
    for k, shares in zip(ks, head.shares(queries(), ks), strict=True):
        votes = KNeighborsClassifier(k).fit(head.bank.float().numpy(), head.targets.numpy())
        expected = votes.predict_proba(asked)[:, 1:]
        np.testing.assert_allclose(shares.flatten(1).T, expected, atol=1e-6)


def test_logits_of_a_class_and_the_background_are_equal_at_its_threshold() -> None:
    head = filled()
    head.k.fill_(5)
    head.threshold.copy_(torch.tensor([0.4, 0.2]))
    head.slope.copy_(torch.tensor([8.0, 3.0]))
    blocks = list(queries().split(DIM, 1))
    logits = head(blocks, (3, 5))
    one, other = head.shares(queries(), (5,))[0]
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], 8 * (one - 0.4))
    torch.testing.assert_close(logits[:, 2] - logits[:, 0], 3 * (other - 0.2))
    assert head(blocks, (42, 70)).shape == (2, 3, 42, 70)


def test_the_bank_is_saved_in_half_precision_and_loaded_whatever_its_size(tmp_path: Path) -> None:
    backbone = {"arch": "tiny_dinov2", "source": "random", "blocks": (2, 4), "tile": 56}
    regime = regime_for(backbone, regime_settings(kind="knn"), "knn")
    segmenter, generator = regime.build(0), torch.Generator().manual_seed(0)
    tokens = torch.randn(77, 128, generator=generator)
    targets = torch.randint(2, (77,), generator=generator)
    segmenter.head.fill(tokens, targets, tokens.mean(0), tokens.std(0))  # type: ignore[operator]
    segmenter.head.k.fill_(3)  # type: ignore[operator]
    save_model(segmenter, regime, tmp_path, {})
    assert 77 * 128 * 2 < (tmp_path / "model.safetensors").stat().st_size < 77 * 128 * 2 + 4000
    loaded, _ = load_model(tmp_path)
    images = torch.rand(2, 1, 56, 56, generator=generator)
    with torch.inference_mode():
        assert torch.equal(loaded(images, (56, 56)), segmenter.eval()(images, (56, 56)))
    assert segmenter.n_trainable() == 0
