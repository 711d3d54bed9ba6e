"""Where the tokens of a diagnosis come from: the cache, a pass of a backbone, or raw pixels."""

from __future__ import annotations

import math

import numpy as np
import torch

from emadapt.data.crops import as_input
from emadapt.data.ingest import Volume
from emadapt.data.tiles import geometry_of, label_to_input, to_input, with_neighbours
from emadapt.domains.features import Features, Tiles, features_of, patches
from emadapt.models.backbones import Backbone
from emadapt.models.tokens import compute_tokens, token_views
from emadapt.study.backbones import BackboneSettings
from emadapt.study.training import DiagnoseSettings

BATCH_TOKENS = 4096


def pretrained_features(
    backbone: Backbone, spec: BackboneSettings, volume: Volume, own: DiagnoseSettings
) -> Features:
    """From the token cache, which is filled if it is not there; errors of `features_of`."""
    view = token_views(backbone, spec, volume, range(1))[0]
    last = slice(-backbone.arch.dim, None)

    def tiles(z: int) -> Tiles:
        for row in view.rows_of_slice(z):
            _, y, x = view.index[row]
            tokens = np.asarray(view.tokens[row, last], np.float32)
            yield (int(y), int(x)), tokens, np.asarray(view.labels[row])

    return features_of(volume, own, geometry_of(volume, spec, backbone.arch.patch), tiles)


def computed_features(
    backbone: Backbone, spec: BackboneSettings, volume: Volume, own: DiagnoseSettings
) -> Features:
    """From a pass of `backbone`, adapted (adapters merged) or random, over the slices."""
    geo = geometry_of(volume, spec, backbone.arch.patch)
    batch = max(1, BATCH_TOKENS // math.prod(geo.grid))

    def tiles(z: int) -> Tiles:
        image = to_input(with_neighbours(volume, z, spec.context), geo)
        label = label_to_input(volume.label[z], geo)
        (h, w), corners = geo.tile, geo.corners(0.0)
        for start in range(0, len(corners), batch):
            now = corners[start : start + batch]
            images = torch.stack([as_input(image[y : y + h, x : x + w]) for y, x in now])
            tokens = compute_tokens(backbone, images, spec.precision)[-1].float().cpu().numpy()
            for (y, x), own_tokens in zip(now, tokens, strict=True):
                yield (y, x), own_tokens, label[y : y + h, x : x + w]

    return features_of(volume, own, geo, tiles)


def pixel_features(
    spec: BackboneSettings, patch: int, volume: Volume, own: DiagnoseSettings
) -> Features:
    """Grey values of each patch, in [0, 1], as its token (patch * patch values).

    They show how datasets differ before any model looks.
    """
    geo = geometry_of(volume, spec, patch)

    def tiles(z: int) -> Tiles:
        image = to_input(np.asarray(volume.image[z]), geo)
        label = label_to_input(volume.label[z], geo)
        h, w = geo.tile
        for y, x in geo.corners(0.0):
            grey = image[y : y + h, x : x + w].astype(np.float32) / 255.0
            cells = patches(grey, patch).transpose(2, 3, 0, 1)
            tokens = cells.reshape(patch * patch, *geo.grid)
            yield (y, x), tokens, label[y : y + h, x : x + w]

    return features_of(volume, own, geo, tiles)
