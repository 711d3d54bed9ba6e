"""What stands in for a backbone where a network sees the image itself."""

from __future__ import annotations

import torch
from torch import nn

from emadapt.models.archs import Arch
from emadapt.models.weights import Provenance

NONE = Provenance(
    "none",
    "no pretrained weights",
    "none",
    "a U-Net from random initial values, drawn from the unit's seed",
)


class PassThrough(nn.Module):
    """Hands images on as they are; the head is the whole network.

    Args:
        multiple: sides of tiles are multiples of it, as they are of a backbone's patch.
        channels: of an image: 1, or 3 where a slice is seen between its neighbours.
    """

    def __init__(self, multiple: int, channels: int = 1) -> None:
        super().__init__()
        self.network: nn.Module | None = None
        zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.arch_name, self.provenance, self.blocks = "none", NONE, (1,)
        self.arch = Arch("none", "none", multiple, channels, 1, zeros, ones, "")

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]
