"""The bar from scratch: a 2D U-Net on the same crops, with no backbone in front of it.

For everything that trains, predicts, saves and loads it is a segmenter like the others: its backbone hands the image on, and
its head is the whole network.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from emadapt.models.archs import Arch
from emadapt.models.backbones import Backbone
from emadapt.models.monai_parts import monai_part
from emadapt.models.weights import Provenance
from emadapt.study.study import BackboneSettings

STRIDE = 16
"""Of the deepest level: sides of tiles are multiples of it."""
FEATURES = (16, 32, 64, 128, 256, 16)
"""Channels of the five levels and of the last decoder stage."""
NONE = Provenance(
    "none",
    "no pretrained weights",
    "none",
    "a U-Net from random initial values, drawn from the unit's seed",
)


class NoBackbone(Backbone):
    """Hands images on as they are: of one channel, or of three where `context` shows a slice with its neighbours."""

    def __init__(self, channels: int = 1) -> None:
        nn.Module.__init__(self)
        self.arch_name = "none"
        self.arch = Arch(
            "none", "none", STRIDE, channels, 1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), None
        )
        self.vit, self.provenance = nn.Identity(), NONE
        self.blocks, self.normalisation, self.stride = (1,), "checkpoint", STRIDE

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]


class UNet2d(nn.Module):
    """MONAI's BasicUNet: 5 levels, two 3x3 convolutions each, instance norm, LeakyReLU; images (B, `dim`, H, W) in [0, 1].

    Depth, 256-pixel crops and widths (16 to 256, doubling downwards) are those of the 2D U-Net that Franco-Barranco et al. (2022,
    Neuroinformatics 20:437) found stable on Lucchi; a first level twice as wide makes a step on a CPU twice as long. Instance
    norm, as in nnU-Net, so that training on a union of datasets does not mix their statistics.
    """

    def __init__(self, dim: int, n_blocks: int) -> None:
        super().__init__()
        nets = monai_part("networks.nets")
        self.net = nets.BasicUNet(
            spatial_dims=2, in_channels=dim * n_blocks, out_channels=2, features=FEATURES
        )

    def logits(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        image = torch.cat(tokens, 1)
        if not len(
            image
        ):  # one of several processes may get none, and takes part in the backward pass all the same
            return self.logits([image.new_zeros(1, *image.shape[1:])])[:0]
        return torch.as_tensor(self.net(image))  # B,C,H,W -> B,2,H,W

    def forward(self, tokens: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        logits = self.logits(tokens).float()
        return (
            logits
            if logits.shape[-2:] == size
            else F.interpolate(logits, size, mode="bilinear", align_corners=False)
        )


def own_spec(spec: BackboneSettings, side: int = 2 * STRIDE) -> BackboneSettings:
    """The backbone's input settings for a U-Net: the tile rounded up to a multiple of its stride (252 becomes 256).

    At least `side`, by itself two strides, since one pixel on the deepest level has no statistics; 0 stays the whole slice.
    """
    return dataclasses.replace(spec, tile=spec.tile and max(side, -(-spec.tile // STRIDE) * STRIDE))
