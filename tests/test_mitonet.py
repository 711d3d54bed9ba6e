"""MitoNet as a baseline; its own network where empanada-dl is installed, which requirements.lock
leaves out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emadapt.models import mitonet
from emadapt.models.passthrough import PassThrough
from emadapt.models.published import Passed, two_classes
from emadapt.models.segmenter import Segmenter
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import regime_settings
from emadapt.training.regimes import REGIMES
from outside import scene, write_mitonet
from tiny import TINY, build_model, predict_slice

SPEC = BackboneSettings(**TINY | {"tile": 64})


class Bright(PassThrough):
    """Foreground is where the image, as the network sees it, is bright."""

    def __init__(self) -> None:
        super().__init__(16)
        self.seen = list[tuple[int, ...]]()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.seen.append(tuple(images.shape))
        return [two_classes((images - 0.5) * 40)]


@pytest.mark.parametrize(("factor", "seen"), [(1, (96, 128)), (2, (48, 64)), (4, (32, 32))])
def test_slices_are_downsampled_and_probabilities_come_back(
    factor: Any, seen: tuple[int, int]
) -> None:
    settings = regime_settings(kind="mitonet", weights="w", factor=factor)
    spec, backbone = REGIMES["mitonet"](settings, SPEC, "mitonet").spec, Bright()
    segmenter = Segmenter(spec, backbone, Passed()).eval()
    label = np.zeros((90, 120), bool)
    label[16:48, 20:60], label[64:88, 80:112] = True, True
    found = predict_slice(segmenter, np.where(label, 220, 30).astype(np.uint8))
    assert backbone.seen == [(1, 1, *seen)]  # the whole slice at once, padded to multiples of 16
    assert found.shape == label.shape
    iou = ((found > 0.5) & label).sum() / ((found > 0.5) | label).sum()
    assert iou == 1 if factor == 1 else iou > 0.85  # what four pixels in one leave of edges


@pytest.fixture
def empanada() -> None:
    pytest.importorskip(
        "empanada", reason="no empanada-dl, which requirements.lock leaves out (docs/how-to.md)"
    )


@pytest.mark.usefixtures("empanada")
@pytest.mark.parametrize(("kind", "factor"), [("DEEPLAB", 1), ("DEEPLAB", 4), ("BIFPN", 2)])
def test_mitonet_gets_the_slice_as_its_authors_feed_it(
    tmp_path: Path, monkeypatch, kind: str, factor: Any
) -> None:
    file = write_mitonet(tmp_path / "w.pt", monkeypatch, kind)
    segmenter = build_model(
        SPEC, regime_settings(kind="mitonet", weights=str(file), factor=factor), "mitonet"
    )
    segmenter.train()  # it stays as it is
    image, _ = scene(shape=(128, 256))
    small = np.asarray(
        Image.fromarray(image).resize((256 // factor, 128 // factor), Image.Resampling.BICUBIC)
    )
    multiple = 128 if kind == "BIFPN" else 16
    down = -small.shape[0] % multiple
    padded = np.pad(small, ((0, down), (0, 0)), mode="symmetric")
    network: Any = mitonet._network(kind == "BIFPN").eval()
    network.load_state_dict(torch.load(file, weights_only=True))
    with torch.inference_mode():
        logits = network(
            ((torch.from_numpy(padded) / 255 - 0.57571) / 0.12765)[None, None].float()
        )["sem_logits"]
    expected = logits[0, 0].sigmoid().numpy()[: small.shape[0]]
    expected = np.asarray(Image.fromarray(expected).resize((256, 128), Image.Resampling.BILINEAR))
    found = predict_slice(segmenter, image)
    assert np.ptp(expected) > 0.05
    assert found == pytest.approx(expected, abs=1e-5)
