"""The bar from scratch: a 2D U-Net on the same crops, with no backbone in front of it."""

from __future__ import annotations

import torch
from torch import nn

from emadapt.models.heads import at_size
from emadapt.models.monai_parts import monai_part

STRIDE = 16
"""Of the deepest level: sides of tiles are multiples of it."""
FEATURES = (16, 32, 64, 128, 256, 16)
"""Channels of the five levels and of the last decoder stage."""


class UNet2d(nn.Module):
    """MONAI's BasicUNet on images (B, `dim`, H, W) in [0, 1].

    Five levels of two 3x3 convolutions, instance norm and LeakyReLU.

    Depth, 256-pixel crops and widths (16 to 256, doubling downwards) are those of the 2D U-Net that
    Franco-Barranco et al. (2022, Neuroinformatics 20:437) found stable on Lucchi; a first level
    twice as wide makes a step on a CPU twice as long. Instance norm, as in nnU-Net, so that
    training on a union of datasets does not mix their statistics.
    """

    def __init__(self, dim: int, n_blocks: int, n_logits: int = 2) -> None:
        super().__init__()
        nets = monai_part("networks.nets")
        self.net = nets.BasicUNet(
            spatial_dims=2, in_channels=dim * n_blocks, out_channels=n_logits, features=FEATURES
        )

    def forward(self, tokens: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        image = torch.cat(tokens, 1)
        if not len(image):  # one of several processes has no sample, but joins the backward pass
            return self.forward([image.new_zeros(1, *image.shape[1:])], size)[:0]
        return at_size(self.net(image).float(), size)  # B,C,H,W -> B,n_logits,H,W


def rounded_up(tile: int, multiple: int, least: int = 0) -> int:
    """A tile's side as a multiple (252 becomes 256), at least `least`; 0 stays 0."""
    return tile and max(least, -(-tile // multiple) * multiple)
