"""A 2D U-Net from random values."""

from __future__ import annotations

from typing import Any

from emadapt.models.passthrough import PassThrough
from emadapt.models.unet2d import STRIDE, UNet2d, rounded_up
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import RegimeSettings
from emadapt.training.regimes.regime import Regime


class UNet2dRegime(Regime):
    """The whole network is trained as a head, on the same crops as others."""

    def __init__(self, settings: RegimeSettings, spec: BackboneSettings, head: str) -> None:
        # One pixel on the deepest level would have no statistics, so a tile has two.
        tile = rounded_up(spec.tile, STRIDE, 2 * STRIDE)
        super().__init__(settings, spec.changed(tile=tile), head)

    @property
    def backbone(self) -> PassThrough:
        return PassThrough(STRIDE, 3 if self.spec.context else 1)

    def head(self, backbone: Any, n_logits: int) -> UNet2d:
        return UNet2d(backbone.arch.dim, 1, n_logits)
