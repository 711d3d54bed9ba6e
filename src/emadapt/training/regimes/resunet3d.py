"""A 3D residual U-Net from random values, on blocks of slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from emadapt.data.blocks import BlockDataset
from emadapt.data.ingest import Volume
from emadapt.data.splits import check_depth
from emadapt.data.tiles import Geometry
from emadapt.models.passthrough import PassThrough
from emadapt.models.resunet3d import STRIDE, BlockSegmenter, ResUNet3d
from emadapt.models.segmenter import Segmenter
from emadapt.models.unet2d import rounded_up
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import ResUNet3dSettings
from emadapt.study.training import TrainSettings
from emadapt.training.regimes.regime import Regime


class ResUNet3dRegime(Regime):
    """The whole network is trained as a head, on blocks that hold a slice's neighbours."""

    settings: ResUNet3dSettings

    def __init__(self, settings: ResUNet3dSettings, spec: BackboneSettings, head: str) -> None:
        tile = rounded_up(spec.tile, STRIDE, max(settings.patch[1:]))
        super().__init__(settings, spec.changed(context=0, tile=tile), head)
        self.crops = partial(BlockDataset, patch=settings.patch)

    @property
    def backbone(self) -> PassThrough:
        return PassThrough(STRIDE)

    def segmenter(self, backbone: Any, n_logits: int) -> Segmenter:
        head = ResUNet3d(self.settings.channels, n_logits)
        return BlockSegmenter(self.spec, backbone, head, self.settings.depth)

    def check(self, volumes: Sequence[Volume], train: TrainSettings) -> None:
        for volume in volumes:
            check_depth(volume.name, volume.runs("train"), self.settings.patch)

    def geometry(self, volume: Volume) -> Geometry:
        return dataclasses.replace(super().geometry(volume), tile=self.settings.patch[1:])
