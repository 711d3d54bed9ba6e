"""2.5D: neighbouring slices as input channels, the same from the cache and in the loop, and no
trace of it where it is off."""

import numpy as np
import torch

from emadapt.data.batches import Draw
from emadapt.data.crops import CropDataset
from emadapt.data.ingest import Volume, open_volume
from emadapt.data.tiles import with_neighbours
from emadapt.models.predict import predict_slices
from emadapt.models.tokens import token_views
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import regime_settings
from tiny import build_model, make_study, predict_slice

SPEC = BackboneSettings(
    arch="tiny_dinov2", source="random", tile=56, overlap=0.25, views=1, precision="fp32", context=1
)


def test_ends_of_each_volume_reflect_and_nothing_is_read_across():
    image = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    volume = Volume("v", image, image, {"parts": [["train", 4], ["test", 2], ["all", 1]]})
    seen = [with_neighbours(volume, z, 1)[0, 0].tolist() for z in range(7)]
    assert seen == [[1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 2], [5, 4, 5], [4, 5, 4], [6, 6, 6]]
    np.testing.assert_array_equal(with_neighbours(volume, 3, 0), image[3])


def test_cache_and_loop_show_the_same_three_slices(tmp_path):
    make_study(tmp_path)
    volume = open_volume("a", tmp_path / "build/ingest")
    segmenter = build_model(SPEC, regime_settings(kind="frozen"), "pyramid").eval()
    [view] = token_views(segmenter.backbone, SPEC, volume, range(1), tmp_path / "cache")
    test = volume.split["test"]
    cached, online = (dict(predict_slices(segmenter, volume, test, v)) for v in (view, None))
    for z in test:
        np.testing.assert_allclose(cached[z], online[z], atol=5e-3)  # the cache is fp16
        alone = predict_slice(segmenter, np.repeat(np.asarray(volume.image[z])[..., None], 3, -1))
        assert np.abs(alone - online[z]).max() > 1e-4  # neighbours count
    z = volume.split["train"][1]
    image, label = CropDataset([volume], SPEC, 14, augmented=False)[Draw(0, z, 5)]
    assert (image.shape, label.shape) == ((3, 56, 56), (56, 56))
    plain = CropDataset([volume], SPEC.changed(context=0), 14, augmented=False)
    single = [plain[Draw(0, k, 5)][0][0] for k in (z - 1, z, z + 1)]
    assert torch.equal(image, torch.stack(single))
