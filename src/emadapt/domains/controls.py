"""Controls: datasets as random weights see them, and their raw pixels."""

from __future__ import annotations

import itertools
from typing import Any

from emadapt.data.ingest import Volume
from emadapt.domains.compare import compare
from emadapt.domains.token_sources import computed_features, pixel_features
from emadapt.models.backbones import Backbone, pretrained
from emadapt.models.device import device
from emadapt.study.backbones import BackboneSettings
from emadapt.study.training import DiagnoseSettings


def controls(
    spec: BackboneSettings, backbone: Backbone, volumes: list[Volume], own: DiagnoseSettings
) -> dict[str, list[dict[str, Any]]]:
    """How far apart datasets are without anything learned, for a pretrained backbone."""
    random = spec.changed(source="random", file="")
    untrained = pretrained(random).to(device())
    noise = [computed_features(untrained, random, v, own) for v in volumes]
    pixels = [pixel_features(spec, backbone.arch.patch, v, own) for v in volumes]
    return {
        "random": [compare(a, b, "token", own) for a, b in itertools.combinations(noise, 2)],
        "pixels": [compare(a, b, "pixel", own) for a, b in itertools.combinations(pixels, 2)],
    }
