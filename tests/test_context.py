"""2.5D: neighbouring slices as input channels, the same from the cache and in the loop, and no trace of it where it is off."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from emadapt.data.crops import CropDataset, Draw
from emadapt.data.ingest import Volume, open_volume
from emadapt.data.tiles import geometry_of, to_input, with_neighbours
from emadapt.errors import ConfigError
from emadapt.models.predict import predict_slice, predict_slices
from emadapt.models.segmenter import build_segmenter, load_segmenter
from emadapt.models.tokens import _ingredients, token_views
from emadapt.segment import job, preview
from emadapt.segment.job import Order
from emadapt.segment.run import segment_volume
from emadapt.study.study import BackboneSettings, RegimeSettings, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.train import train_unit
from emadapt.volumes import write_tiff, write_zarr
from tiny import blobs, make_study, settings, write_model

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


UNET = {"regime": RegimeSettings("unet2d"), "head": "unet2d"}


@pytest.mark.parametrize(
    "change", [{}, {"scale": 0.7, "smooth_z_nm": 30.0}, UNET], ids=["plain", "scaled", "unet2d"]
)
def test_segment_shows_the_neighbours_of_each_slice_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))
    image, label = blobs((7, 90, 60), 2)
    tifffile.imwrite(tmp_path / "image.tif", image, photometric="minisblack")
    model = write_model(tmp_path / "model", context=1, **change)
    volume = Volume(
        "v",
        image,
        label,
        {"split": {"train": [], "val": [], "test": []}, "md5": "", "voxel_nm": [30, 5, 5]},
    )
    expected = np.stack(
        [p for _, p in predict_slices(load_segmenter(model)[0], volume, list(range(7)))]
    )
    order = Order(
        str(tmp_path / "image.tif"),
        str(tmp_path / "mask.tif"),
        str(model),
        voxel_nm=(30.0, 5.0, 5.0),
        window=(0.0, 255.0),
        overwrite=True,
    )
    masks = []
    for depth, block in ((16, 2**25), (2, 2**25), (16, 1000)):
        for module in (job, write_tiff, write_zarr):
            monkeypatch.setattr(module, "CHUNK", 16)
        monkeypatch.setattr(job, "DEPTH", depth)
        monkeypatch.setattr(job, "BLOCK", block)
        segment_volume(order)
        masks.append(tifffile.imread(order.output))
    clear = np.abs(expected - 0.5) > (1e-4 if change else 0)
    for mask in masks:
        np.testing.assert_array_equal(mask[clear], np.where(expected > 0.5, 255, 0)[clear])
    np.testing.assert_array_equal(masks[0], masks[1])
    alone = np.stack(
        [predict_slice(load_segmenter(model)[0], np.repeat(z[..., None], 3, -1)) for z in image]
    )
    assert ((alone > 0.5) != (expected > 0.5)).any()
    preview.preview(dataclasses.replace(order, output=str(tmp_path / "page.html")))
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    ("context", "z_nm", "warned"), [(1, 30.0, False), (1, 300.0, True), (0, 300.0, False)]
)
def test_models_of_neighbours_say_so_where_slices_lie_farther_apart_than_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], context: int, z_nm: float, warned: bool
) -> None:
    tifffile.imwrite(tmp_path / "image.tif", blobs((4, 60, 60), 2)[0], photometric="minisblack")
    model = write_model(tmp_path / "model", context=context)
    job.prepare(
        Order(
            str(tmp_path / "image.tif"),
            str(tmp_path / "mask.tif"),
            str(model),
            voxel_nm=(z_nm, 5.0, 5.0),
        )
    )
    assert ("slices 300 nm apart, in training 30 nm" in capsys.readouterr().err) == warned
