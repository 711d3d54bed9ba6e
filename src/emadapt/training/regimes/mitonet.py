"""MitoNet, as published or fine-tuned."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from emadapt.models.mitonet import TILE, MitoNet
from emadapt.models.published import WHOLE, Passed
from emadapt.models.unet2d import rounded_up
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import MitoNetSettings
from emadapt.training.regimes.regime import Regime


class MitoNetRegime(Regime):
    """Whole slices, downsampled by `factor`; while all of the network is trained, tiles."""

    settings: MitoNetSettings

    def __init__(self, settings: MitoNetSettings, spec: BackboneSettings, head: str) -> None:
        tile = rounded_up(spec.tile, TILE) if settings.finetune else 0
        own = spec.changed(**WHOLE, scale=1 / settings.factor, tile=tile)
        super().__init__(settings, own, head)

    @cached_property
    def backbone(self) -> MitoNet:
        return MitoNet(Path(self.settings.weights))

    def adapt(self, backbone: MitoNet) -> None:
        backbone.requires_grad_(self.settings.finetune)

    def head(self, backbone: Any, n_logits: int) -> Passed:
        return Passed()
