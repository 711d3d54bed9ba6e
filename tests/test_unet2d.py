import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emadapt.data.tiles import geometry
from emadapt.models import unet2d
from emadapt.models.predict import predict_slice
from emadapt.models.segmenter import build_segmenter, load_segmenter, save_segmenter
from emadapt.models.unet2d import STRIDE, UNet2d, own_spec
from emadapt.study.study import BackboneSettings, RegimeSettings, Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.train import train_unit
from tiny import make_study, settings, stop_after_an_epoch

UNET = Unit("t", "unet2d", "a", 0)
SPEC = BackboneSettings("tiny_dinov2", "random", tile=42)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the channels, a tenth of the time."""
    monkeypatch.setattr(unet2d, "FEATURES", (8, 8, 16, 32, 64, 8))


@pytest.fixture
def no_backbone(tmp_path: Path, narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's folder in which no backbone can be built and no token be computed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a U-Net has no backbone")

    for place in ("models.segmenter.build_backbone", "train.plain_view", "evaluate.plain_view"):
        monkeypatch.setattr(f"emadapt.{place}", refuse)


def a_study(tmp_path: Path, **train: Any) -> Study:
    params = settings(**{"epochs": 2, "steps_per_epoch": 2, **train})
    params["regimes"] = {"unet2d": {"kind": "unet2d"}}
    params["study"] |= {"regimes": ["unet2d"], "train_sets": ["a"]}
    return make_study(tmp_path, params)


@pytest.mark.parametrize(("tile", "own"), [(252, 256), (256, 256), (168, 176), (1, 32), (0, 0)])
def test_tiles_are_rounded_up_to_the_stride(tile: int, own: int) -> None:
    spec = own_spec(dataclasses.replace(SPEC, tile=tile))
    assert spec.tile == own
    assert own_spec(spec) == spec
    geo = geometry((300, 410), spec, STRIDE)
    assert all(side % STRIDE == 0 for side in geo.tile)
    assert geo.tile == (own, own) or geo.tile == (304, 416)


def test_it_is_trained_and_evaluated_without_a_backbone_and_learns(
    tmp_path: Path, no_backbone: None
) -> None:
    study = a_study(tmp_path, steps_per_epoch=12, head_lr=3e-3)
    folder = train_unit(study, UNET)
    card = json.loads((folder / "model.json").read_text())
    assert card["weights"] == {
        "source": "none",
        "name": "no pretrained weights",
        "sha256": "none",
        "note": "a U-Net from random initial values, drawn from the unit's seed",
    }
    assert (card["head"], card["backbone"]["tile"]) == ("unet2d", 64)
    metrics = json.loads(evaluate_unit(study, UNET).read_text())
    assert metrics["test"]["a"]["iou"] > 0.7  # bright discs on noise: chance is 0.2
    segmenter, _ = load_segmenter(folder)
    image, label = (np.load(f"build/ingest/a/{kind}.npy")[9] for kind in ("image", "label"))
    found = predict_slice(segmenter, image) > 0.5
    iou = (found & (label > 0)).sum() / (found | (label > 0)).sum()
    assert iou == pytest.approx(metrics["test"]["a"]["per_slice"]["iou"][-1])


def test_stopped_after_an_epoch_it_goes_on_to_the_same_bytes(
    tmp_path: Path, no_backbone: None, monkeypatch
) -> None:
    study = a_study(tmp_path)
    undisturbed = (train_unit(study, UNET) / "model.safetensors").read_bytes()
    (tmp_path / "scratch/units").rename(tmp_path / "gone")
    stop_after_an_epoch(study, UNET, monkeypatch)
    saved = torch.load(next(tmp_path.glob("scratch/units/*/*/checkpoint.pt")), weights_only=True)
    assert saved["progress"]["epoch"] == 1
    assert (train_unit(study, UNET) / "model.safetensors").read_bytes() == undisturbed


def test_its_size() -> None:
    assert (
        sum(p.numel() for p in UNet2d(1, 1).parameters()) == 1_948_146
    )  # what docs/how-to.md says


def test_the_seed_decides_and_what_is_saved_is_loaded(tmp_path: Path, narrow: None) -> None:
    one, same, other = (
        build_segmenter(SPEC, RegimeSettings("unet2d"), "unet2d", seed).eval() for seed in (0, 0, 1)
    )
    images = torch.rand(2, 1, 48, 64, generator=torch.Generator().manual_seed(0))
    save_segmenter(one, tmp_path, {})
    loaded, _ = load_segmenter(tmp_path)
    with torch.inference_mode():
        first = one(images, (48, 64))
        assert first.shape == (2, 2, 48, 64)
        assert first.dtype == torch.float32
        assert torch.equal(same(images, (48, 64)), first)
        assert not torch.equal(other(images, (48, 64)), first)
        assert torch.equal(loaded(images, (48, 64)), first)
    assert loaded.spec.tile == 48


def test_without_a_sample_it_takes_part_in_the_backward_pass(narrow: None) -> None:
    """As of several processes one may have to."""
    net = unet2d.UNet2d(1, 1)
    logits = net([torch.zeros(0, 1, 32, 48)], (32, 48))
    assert logits.shape == (0, 2, 32, 48)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
