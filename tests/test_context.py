"""2.5D: neighbouring slices as input channels, the same from the cache and in the loop, and no trace of it where it is off."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emadapt.data.crops import CropDataset, Draw
from emadapt.data.ingest import Volume, open_volume
from emadapt.data.tiles import geometry_of, to_input, with_neighbours
from emadapt.errors import ConfigError
from emadapt.models.predict import predict_slice, predict_slices
from emadapt.models.segmenter import build_segmenter
from emadapt.models.tokens import _ingredients, token_views
from emadapt.study.study import BackboneSettings, RegimeSettings, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.train import train_unit
from tiny import make_study, settings

SPEC = BackboneSettings(
    "tiny_dinov2", "random", tile=56, overlap=0.25, views=1, precision="fp32", context=1
)


def test_ends_of_each_volume_reflect_and_nothing_is_read_across() -> None:
    image = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    volume = Volume("v", image, image, {"parts": [["train", 4], ["test", 2], ["all", 1]]})
    seen = [with_neighbours(volume, z, 1)[0, 0].tolist() for z in range(7)]
    assert seen == [[1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 2], [5, 4, 5], [4, 5, 4], [6, 6, 6]]
    np.testing.assert_array_equal(with_neighbours(volume, 3, 0), image[3])


def test_without_context_settings_and_hashes_are_as_before(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    plain = dataclasses.replace(SPEC, context=0)
    assert "context" not in plain.described()
    assert SPEC.described()["context"] == 1
    segmenter, volume = (
        build_segmenter(plain, RegimeSettings("frozen"), "linear", 0),
        open_volume("a", tmp_path / "build/ingest"),
    )
    assert "context" not in _ingredients(segmenter.backbone, plain, volume, 0, None)["settings"]
    assert _ingredients(segmenter.backbone, SPEC, volume, 0, None)["settings"]["context"] == 1
    assert "context" not in json.dumps(study.describe(Unit("t", "frozen", "a", 0)))
    params = settings()
    params["backbones"]["t"]["context"] = True
    with pytest.raises(ConfigError, match=r"context: found True; expected one of 0, 1"):
        make_study(tmp_path / "other", params, ingested=False)


def test_cache_and_loop_show_the_same_three_slices(tmp_path: Path) -> None:
    make_study(tmp_path)
    volume = open_volume("a", tmp_path / "build/ingest")
    segmenter = build_segmenter(
        SPEC, RegimeSettings("frozen"), "unet", 0
    ).eval()  # a head that looks at the image, too
    (view, augmented) = token_views(segmenter.backbone, SPEC, volume, range(2), tmp_path / "cache")
    geo, z = geometry_of(volume, SPEC, 14), volume.split["train"][1]
    assert view.images is not None
    assert augmented.images is not None
    row = int(view.rows_of_slice(z)[0])
    _, y, x = view.index[row]
    for channel, k in enumerate((z - 1, z, z + 1)):
        whole = to_input(np.asarray(volume.image[k]), geo)
        np.testing.assert_array_equal(view.images[row][..., channel], whole[y : y + 56, x : x + 56])
    assert augmented.images.shape[1:] == (56, 56, 3)
    test = volume.split["test"]
    cached, online = (dict(predict_slices(segmenter, volume, test, v)) for v in (view, None))
    for z in test:
        np.testing.assert_allclose(cached[z], online[z], atol=5e-3)  # the cache has half precision
        alone = predict_slice(segmenter, np.repeat(np.asarray(volume.image[z])[..., None], 3, -1))
        assert np.abs(alone - online[z]).max() > 1e-4  # neighbours count
    image, label = CropDataset([volume], SPEC, 14, augmented=True)[
        Draw(0, volume.split["train"][0], 5)
    ]
    assert (image.shape, label.shape) == ((3, 56, 56), (56, 56))


@pytest.mark.slow
def test_studies_train_and_evaluate_with_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    params = settings(steps_per_epoch=10, head_lr=3e-3)
    params["backbones"]["t"]["context"] = 1
    params["regimes"]["unet"] = {"kind": "unet2d"}
    params["study"]["regimes"] = ["frozen", "lora", "unet"]
    study = make_study(tmp_path, params)
    for regime in study.regimes:
        unit = Unit("t", regime, "a", 0)
        train_unit(study, unit)
        test = json.loads(evaluate_unit(study, unit).read_text())["test"]
        assert 0 < test["a"]["iou"] <= 1


@pytest.mark.parametrize("kind", ["unet2d", "resunet3d"])
def test_networks_from_scratch(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2D three slices enter, and the middle one is not all that counts; a patch in 3D has its own neighbours."""
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))
    regime = RegimeSettings(kind, patch=(6, 64, 64), channels=(4, 4, 4, 4, 4))
    model = build_segmenter(SPEC, regime, kind, 0).eval()
    if kind == "resunet3d":
        assert model.spec.context == 0
        assert model(torch.rand(1, 1, 6, 64, 64), (64, 64)).shape == (1, 2, 6, 64, 64)
        return
    assert model.spec.context == 1
    images = torch.rand(1, 3, 64, 64)
    alone = images[:, 1:2].expand(-1, 3, -1, -1)
    assert not torch.equal(model(images, (64, 64)), model(alone, (64, 64)))
    plain = build_segmenter(dataclasses.replace(SPEC, context=0), regime, kind, 0)
    first, ours = (next(m.head.parameters()) for m in (plain, model))
    assert (first.shape[1], ours.shape[1]) == (1, 3)
