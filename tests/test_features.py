"""Features: each place once, none of the padding, the same places for every model."""

import numpy as np
import pytest
import torch

from emadapt.data.ingest import open_volume
from emadapt.data.tiles import geometry
from emadapt.domains import features, token_sources
from emadapt.errors import InputError
from emadapt.models.backbones import Backbone, pretrained
from emadapt.models.tokens import run, token_views
from emadapt.study.backbones import BackboneSettings
from emadapt.study.study import Study
from emadapt.study.training import DiagnoseSettings
from tiny import make_study

OWN = DiagnoseSettings(blocks=4, tokens=200)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_study(tmp_path)


def tokens_of(study: Study) -> tuple[Backbone, BackboneSettings]:
    run(study, "t", "a")
    return pretrained(study.backbone_settings["t"]), study.backbone_settings["t"]


@pytest.mark.parametrize("shape", [(90, 100), (64, 64), (30, 200)])
@pytest.mark.parametrize("overlap", [0.0, 0.4])
def test_each_place_of_a_slice_once_and_none_in_the_padding(shape, overlap):
    patch = 14
    spec = BackboneSettings(arch="tiny_dinov2", source="random", tile=64, overlap=overlap)
    geo = geometry(shape, spec, patch)
    label = (np.random.default_rng(0).random(geo.padded) < 0.5).astype(np.uint8)
    tiles = []
    for corner in geo.corners():
        (y, x), (h, w) = corner, geo.tile
        middles = (
            np.arange(n // patch) * patch + 7 + k for n, k in zip((h, w), corner, strict=True)
        )
        centres = np.stack(np.meshgrid(*middles, indexing="ij")).astype(np.float32)
        tiles.append((corner, centres, label[y : y + h, x : x + w]))
    tokens, ids, centres = features._one_slice(iter(tiles), geo)
    np.testing.assert_array_equal(tokens, centres)  # a token's value is where it is
    assert (centres < np.asarray(geo.resized)).all()
    assert len(np.unique(centres, axis=0)) == len(centres)
    rows, columns = (np.unique(centres[:, axis]) for axis in (0, 1))
    assert len(rows) * len(columns) == len(centres)
    for own, length in ((rows, geo.resized[0]), (columns, geo.resized[1])):
        assert own[0] <= patch
        assert length - own[-1] <= patch
        # Where two tiles meet their grids need not line up, but no gap is as wide as two patches.
        assert np.diff(own).max(initial=0) < 2 * patch
    for (y, x), own in list(zip(centres.astype(int), ids, strict=True))[:50]:
        assert own == (label[y - 7 : y + 7, x - 7 : x + 7].mean() >= 0.5)


def test_pretrained_features_are_the_caches_last_block(study):
    backbone, spec = tokens_of(study)
    volume = open_volume("a")
    found = token_sources.pretrained_features(backbone, spec, volume, OWN)
    view = token_views(backbone, spec, volume, range(1))[0]
    last = np.asarray(view.tokens[:, -backbone.arch.dim :], np.float32)
    for token, place, (cy, cx) in list(zip(found.tokens, found.at, found.where, strict=True))[::17]:
        there = []
        for row in view.rows_of_slice(int(found.slices[place])):
            _, y, x = view.index[row]
            i, j = (cy - y) / 14 - 0.5, (cx - x) / 14 - 0.5
            if i == int(i) and j == int(j) and 0 <= i < last.shape[2] and 0 <= j < last.shape[3]:
                there.append(last[row, :, int(i), int(j)])
        assert any(np.array_equal(token, t) for t in there)
    assert set(found.parts) == {"train", "val", "test"}
    assert found.moments.count.sum() >= len(found.tokens)


def test_computed_features_see_the_same_places_and_the_same_tokens(study):
    """With unchanged weights a pass gives what the cache holds, up to its fp16."""
    backbone, spec = tokens_of(study)
    volume = open_volume("a")
    cached = token_sources.pretrained_features(backbone, spec, volume, OWN)
    computed = token_sources.computed_features(backbone, spec, volume, OWN)
    one, other = (f.within("train") for f in (cached, computed))
    np.testing.assert_array_equal(cached.where[one], computed.where[other])
    np.testing.assert_array_equal(cached.ids[one], computed.ids[other])
    np.testing.assert_allclose(cached.tokens[one], computed.tokens[other], atol=2e-3)


def test_tokens_that_are_not_numbers_are_refused(study):
    backbone, spec = tokens_of(study)
    with torch.no_grad():
        backbone.vit.blocks[-1].mlp.fc2.bias[5] = torch.nan
    with pytest.raises(InputError, match=r"tokens of a, slice 0: found \d+ of \d+ with NaN"):
        token_sources.computed_features(backbone, spec, open_volume("a"), OWN)
