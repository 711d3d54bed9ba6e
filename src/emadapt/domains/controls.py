"""Controls: halves of a volume, half the contrast, random weights, raw pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from emadapt.data.ingest import Volume
from emadapt.data.tiles import Grey
from emadapt.domains.compare import compare, pairs, split_half_null
from emadapt.domains.features import Features
from emadapt.domains.moments import z_blocks
from emadapt.domains.token_sources import computed_features, pixel_features
from emadapt.models.backbones import Backbone, pretrained
from emadapt.models.device import device
from emadapt.study.backbones import BackboneSettings
from emadapt.study.training import DiagnoseSettings

CONTRAST = 0.5


def controls(
    spec: BackboneSettings,
    backbone: Backbone,
    before: dict[str, Features],
    volumes: list[Volume],
    own: DiagnoseSettings,
) -> dict[str, list[dict[str, Any]]]:
    """The four controls of a pretrained backbone, with its features of each dataset `before`."""
    random = spec.changed(source="random", file="")
    untrained = pretrained(random).to(device())
    weights, patch = untrained.provenance.sha256, backbone.arch.patch
    noise = {v.name: computed_features(untrained, random, v, own, weights) for v in volumes}
    pixels = {v.name: pixel_features(spec, patch, v, own) for v in volumes}
    backbone.to(device())
    contrast = []
    for volume in volumes:
        name = f"{volume.name} (contrast {CONTRAST})"
        changed = computed_features(
            backbone, spec, volume, own, backbone.provenance.sha256, lower_contrast, name
        )
        changed_pixels = pixel_features(spec, patch, volume, own, lower_contrast, name)
        contrast.append(_same_slices("token", before[volume.name], changed, own))
        contrast.append(_same_slices("pixel", pixels[volume.name], changed_pixels, own))
    return {
        "halves": [_halved(before[volume.name], own) for volume in volumes],
        "contrast": contrast,
        "random": [compare(a, b, "token", "all", own) for a, b in pairs(noise, own)],
        "pixels": [compare(a, b, "pixel", "all", own) for a, b in pairs(pixels, own)],
    }


def halves(whole: Features, own: DiagnoseSettings) -> tuple[Features, Features]:
    """The lower and the upper half of a volume's blocks, one of the ways to halve it."""
    first = z_blocks(len(whole.slices), own.blocks) < own.blocks // 2
    lower = whole.of(np.flatnonzero(first), f"{whole.name} (lower)")
    return lower, whole.of(np.flatnonzero(~first), f"{whole.name} (upper)")


def lower_contrast(image: Grey) -> Grey:
    """The slice (Y, X) uint8 at half the contrast around mid-grey."""
    return np.asarray(np.round(127.5 + CONTRAST * (image.astype(np.float32) - 127.5)), np.uint8)


def _halved(whole: Features, own: DiagnoseSettings) -> dict[str, Any]:
    """The two halves of a volume against the null of the whole."""
    null = split_half_null(whole, "token", "all", own)
    fewer = own.changed(blocks=own.blocks // 2)
    return compare(*halves(whole, own), "token", "all", fewer, null)


def _same_slices(
    level: str, one: Features, other: Features, own: DiagnoseSettings
) -> dict[str, Any]:
    """A dataset against itself after a change, on training slices: both tile them alike."""
    train = one.places("train")
    fewer = own.changed(blocks=min(own.blocks, len(train)))
    return compare(one.of(train, one.name), other.of(train, other.name), level, "all", fewer)
