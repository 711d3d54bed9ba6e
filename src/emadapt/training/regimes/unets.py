"""U-Nets from random values, without a backbone; the 3D one sees blocks of slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from emadapt.data.blocks import BlockDataset
from emadapt.data.ingest import Volume
from emadapt.data.splits import check_depth
from emadapt.data.tiles import Geometry
from emadapt.models.device import check_precision
from emadapt.models.passthrough import PassThrough
from emadapt.models.resunet3d import STRIDE as BLOCK_STRIDE
from emadapt.models.resunet3d import BlockSegmenter, ResUNet3d
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import TokenView
from emadapt.models.unet2d import STRIDE, UNet2d, rounded_up
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import RegimeSettings, ResUNet3dSettings
from emadapt.study.training import TrainSettings
from emadapt.training.inputs import Labelled
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

    def head(self, backbone: Any) -> UNet2d:
        return UNet2d(backbone.arch.dim, 1)


class ResUNet3dRegime(Regime):
    """The whole network is trained as a head, on blocks that hold a slice's neighbours."""

    settings: ResUNet3dSettings

    def __init__(self, settings: ResUNet3dSettings, spec: BackboneSettings, head: str) -> None:
        tile = rounded_up(spec.tile, BLOCK_STRIDE, max(settings.patch[1:]))
        super().__init__(settings, spec.changed(context=0, tile=tile), head)
        self.depth = settings.patch[0]

    @property
    def backbone(self) -> PassThrough:
        return PassThrough(BLOCK_STRIDE)

    def segmenter(self, backbone: Any) -> Segmenter:
        head = ResUNet3d(self.settings.channels)
        return BlockSegmenter(self.spec, backbone, head, self.depth)

    def check(self, volumes: Sequence[Volume], train: TrainSettings) -> None:
        check_precision(train.precision, "train.precision")
        check_precision(self.spec.precision, "precision of the backbone")
        for volume in volumes:
            check_depth(volume.name, volume.split["train"], self.settings.patch)

    def geometry(self, volume: Volume) -> Geometry:
        return dataclasses.replace(super().geometry(volume), tile=self.settings.patch[1:])

    def samples(
        self,
        segmenter: Segmenter,
        labelled: Labelled,
        views: list[list[TokenView]],
        unlabelled: Sequence[Volume],
        train: TrainSettings,
    ) -> BlockDataset:
        volumes, tiles, block = labelled.volumes, labelled.tiles, self.settings.patch
        patch, augment = segmenter.patch, train.augment
        return BlockDataset(volumes, self.spec, patch, block, augment, tiles, unlabelled)
