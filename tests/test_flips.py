"""`flips: true`: the mean over mirror images, from images and from the cache, in 2D and in 3D, in training and in segmenting."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emadapt.data.ingest import Volume, open_volume
from emadapt.models.predict import predict_slices
from emadapt.models.segmenter import Segmenter, build_segmenter, load_segmenter
from emadapt.models.tokens import plain_view, token_key
from emadapt.models.tokens import run as tokens
from emadapt.study.settings import OWN_HEADS
from emadapt.study.study import BackboneSettings, RegimeSettings, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.train import train_unit
from tiny import blobs, make_study, settings

SPEC = BackboneSettings(
    "tiny_dinov2", "random", tile=56, overlap=0.25, views=0, precision="fp32", flips=True
)
CONV = RegimeSettings("resunet3d", patch=(3, 32, 32), channels=(4, 5, 6, 7, 8))
MIRRORED = ((), (1,), (2,), (1, 2))


@pytest.fixture
def volume() -> Volume:
    image, label = blobs((5, 90, 101), 3)
    return Volume(
        "v",
        image,
        label,
        {
            "split": {"train": [0], "val": [1], "test": [2, 3, 4]},
            "md5": "0",
            "voxel_nm": [30, 5, 5],
        },
    )


def make(regime: RegimeSettings, **change: Any) -> Segmenter:
    head = OWN_HEADS.get(regime.kind, "pyramid")
    return build_segmenter(dataclasses.replace(SPEC, **change), regime, head, seed=0).eval()


def seen(segmenter: Segmenter, volume: Volume, **how: Any) -> np.ndarray:
    return np.stack([p for _, p in predict_slices(segmenter, volume, [2, 3, 4], **how)])


@pytest.mark.parametrize(
    ("regime", "change"),
    [
        (RegimeSettings("frozen"), {"context": 1}),
        (RegimeSettings("lora_last_k", k=1), {"smooth_z_nm": 30.0, "scale": 0.7}),
    ],
    ids=["frozen", "lora_last_k"],
)
def test_cached_and_online_agree_and_differ_from_one_view(
    volume: Volume, tmp_path: Path, change: dict[str, Any], regime: RegimeSettings
) -> None:
    segmenter = make(regime, **change)
    view = plain_view(segmenter.backbone, segmenter.spec, volume, tmp_path, segmenter.cut)
    online, cached = seen(segmenter, volume), seen(segmenter, volume, view=view)
    np.testing.assert_allclose(cached, online, atol=3e-3)
    segmenter.spec = dataclasses.replace(segmenter.spec, flips=False)
    assert np.abs(seen(segmenter, volume) - online).max() > 0.02


@pytest.mark.parametrize(
    "regime", [RegimeSettings("frozen"), RegimeSettings("unet2d"), CONV], ids=lambda r: r.kind
)
def test_it_is_the_mean_of_what_mirrored_volumes_give(
    volume: Volume, regime: RegimeSettings
) -> None:
    """With tiles that lie symmetrically, so that a mirrored slice has the mirrored tiles."""
    image, label = blobs((5, 112, 112), 3)
    own = dataclasses.replace(volume, image=image, label=label)
    segmenter = make(regime, tile=56, overlap=0.0)
    found = seen(segmenter, own)
    segmenter.spec = dataclasses.replace(segmenter.spec, flips=False)
    single = [
        np.flip(seen(segmenter, dataclasses.replace(own, image=np.flip(image, axes).copy())), axes)
        for axes in MIRRORED
    ]
    np.testing.assert_allclose(found, np.mean(single, 0), atol=1e-5)
    assert np.abs(single[0] - found).max() > 1e-3


def test_entries_of_the_plain_views_are_those_without_flips_and_mirrored_ones_hold_no_training_slices(
    volume: Volume, tmp_path: Path
) -> None:
    segmenter = make(RegimeSettings("frozen"))
    without = dataclasses.replace(SPEC, flips=False)
    keys = [
        [token_key(segmenter.backbone, spec, volume, v) for v in (0, 1)] for spec in (SPEC, without)
    ]
    assert keys[0] == keys[1]
    assert "flips" not in without.described()
    view = plain_view(segmenter.backbone, SPEC, volume, tmp_path)
    assert not plain_view(segmenter.backbone, without, volume, tmp_path).mirrored
    for axes, mirrored in zip(MIRRORED[1:], view.mirrored, strict=True):
        assert set(mirrored.index[:, 0]) == {1, 2, 3, 4}
        own = view.index[:, 0] > 0
        np.testing.assert_array_equal(mirrored.index, view.index[own])
        assert mirrored.images is not None
        assert view.images is not None
        np.testing.assert_array_equal(mirrored.images, np.flip(view.images[own], axes))
        np.testing.assert_array_equal(mirrored.labels, np.flip(view.labels[own], axes))


@pytest.mark.usefixtures("tracking_off")
def test_a_unit_is_validated_tested_and_used_with_flips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = settings(epochs=1, steps_per_epoch=2)
    params["backbones"]["t"]["flips"] = True
    study = make_study(tmp_path, params)
    manifest = json.loads(tokens(study, "t", "a").read_text())
    assert [e["view"] for e in manifest["entries"]] == [-3, -2, -1, 0, 1]
    folder = train_unit(study, unit := Unit("t", "frozen", "a", 0))
    metrics = json.loads(evaluate_unit(study, unit).read_text())
    segmenter, card = load_segmenter(folder)
    own = open_volume("a")
    for part, iou in (("val", card["val"]["iou"]), ("test", metrics["test"]["a"]["iou"])):
        slices = own.split[part]
        found = np.stack([p for _, p in predict_slices(segmenter, own, slices)]) > 0.5
        truth = own.label[slices] > 0
        assert iou == pytest.approx((found & truth).sum() / (found | truth).sum(), abs=5e-3)
