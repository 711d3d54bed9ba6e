"""The networks from scratch: their form, and what several processes and neighbouring slices do to
them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from emadapt.data.ingest import Volume
from emadapt.data.tiles import geometry
from emadapt.errors import InputError
from emadapt.models import unet2d
from emadapt.models.parallel import BatchNorm
from emadapt.models.resunet3d import ResUNet3d
from emadapt.models.unet2d import STRIDE, UNet2d
from emadapt.study.regimes import regime_settings
from emadapt.study.training import TrainSettings
from emadapt.training.validate import val_slices
from tiny import regime_for

NARROW = (4, 5, 6, 7, 8)
BACKBONE = {"arch": "tiny_dinov2", "source": "random", "tile": 42}


@pytest.mark.parametrize(("tile", "own"), [(252, 256), (256, 256), (168, 176), (1, 32), (0, 0)])
def test_tiles_of_a_unet_are_rounded_up_to_the_stride(tile: int, own: int) -> None:
    backbone = BACKBONE | {"tile": tile, "views": 0}
    spec = regime_for(backbone, regime_settings(kind="unet2d"), "unet2d").spec
    assert spec.tile == own
    geo = geometry((300, 410), spec, STRIDE)
    assert geo.tile == ((own, own) if own else (304, 416))


def test_sizes_are_those_of_the_documents_and_of_the_paper() -> None:
    """On the paper's patch, without computing it: nothing is pooled along z."""
    with torch.device("meta"):
        net, plain = ResUNet3d(), UNet2d(1, 1)
        logits = net([torch.empty(1, 1, 18, 160, 160)], (160, 160))
    assert logits.shape == (1, 2, 18, 160, 160)
    assert sum(p.numel() for p in net.parameters()) == 1_459_022
    assert sum(p.numel() for p in plain.parameters()) == 1_948_146  # docs/how-to.md has it


def test_normalisation_over_processes_is_torchs_over_all_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What several processes compute, here with sums over one that has all samples."""
    monkeypatch.setattr("emadapt.models.parallel.size", lambda: 2)
    monkeypatch.setattr("emadapt.models.parallel.total", lambda values: values)
    ours, theirs = BatchNorm(3), nn.BatchNorm3d(3)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 4, 5, 6, generator=generator) * 3 + 1 for _ in range(2))
    grads = []
    for norm in (ours, theirs):
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        (out * y).sum().backward()
        grads.append((out, inputs.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_sample_a_network_takes_part_in_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of several processes one may have to."""
    monkeypatch.setattr(unet2d, "FEATURES", (8, 8, 16, 32, 64, 8))
    for net, shape in ((UNet2d(1, 1), (0, 1, 32, 48)), (ResUNet3d(NARROW), (0, 1, 2, 32, 48))):
        logits = net([torch.zeros(shape)], (32, 48))
        assert logits.shape == (0, 2, *shape[2:])
        logits.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_thin_volumes_are_refused() -> None:
    settings = regime_settings(kind="resunet3d", patch=(3, 32, 32), channels=NARROW)
    regime = regime_for(BACKBONE, settings, "resunet3d")
    image = np.zeros((4, 40, 40), np.uint8)
    volume, thin = (
        Volume("v", image, image, {"split": {"train": slices}}) for slices in ([0, 1, 2], [0, 1, 3])
    )
    regime.check([volume], TrainSettings(precision="fp32"))
    with pytest.raises(InputError, match="thinner than the patch: at most 2 consecutive"):
        regime.check([thin], TrainSettings(precision="fp32"))


def test_validation_of_blocks_looks_at_neighbours(tmp_path: Path) -> None:
    image = np.zeros((40, 4, 4), np.uint8)
    volume = Volume("v", image, image, {"split": {"val": list(range(20, 40))}})
    assert val_slices(volume, 4, depth=6) == list(range(27, 33))
    assert val_slices(volume, 8, depth=6) == list(range(26, 34))
    assert val_slices(volume, 4, depth=50) == val_slices(volume, 0, depth=6) == list(range(20, 40))
    assert val_slices(volume, 2) == [20, 39]
