"""A 3D residual U-Net from scratch, for patches of neighbouring slices: Xie et al. 2025 (Bioinformatics Advances, vbaf021).

Like `unet2d` it is a head behind a backbone that hands images on, so it is trained, scored, saved and loaded as others are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from emadapt.models.heads import BatchNorm
from emadapt.models.monai_parts import monai_part

STRIDE = 16
"""Of the deepest level, in plane: sides of patches are multiples of it. Along z nothing is pooled."""


class BatchNorm3d(BatchNorm):
    """The same for volumes (B, C, z, y, x)."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() != 5:
            raise ValueError(f"expected (B, C, z, y, x), got {x.dim()} axes")


def convolution(into: int, out: int, kernel: tuple[int, int, int]) -> nn.Module:
    """One that keeps the size, without a bias: batch normalisation follows."""
    return monai_part("networks.blocks").Convolution(
        3, into, out, kernel_size=kernel, bias=False, conv_only=True
    )


class Block(nn.Module):
    """A 1x3x3 convolution, then two 3x3x3; what the first gives is added to what the third gives, before its ELU."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(convolution(into, out, (1, 3, 3)), BatchNorm3d(out), nn.ELU())
        self.second = nn.Sequential(convolution(out, out, (3, 3, 3)), BatchNorm3d(out), nn.ELU())
        self.third = nn.Sequential(convolution(out, out, (3, 3, 3)), BatchNorm3d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        return F.elu(self.third(self.second(first)) + first)


class ResUNet3d(nn.Module):
    """Encoder and decoder of five levels; images (B, 1, z, y, x) in [0, 1], y and x multiples of 16.

    A 1x5x5 convolution before and one after; a block on each level, down and up; maximum pooling 1x2x2; trilinear up-sampling
    behind a 1x1x1 convolution to the channels of the level above, whose features are added. The form is that of Lee et al. 2017
    (arXiv 1706.00120), the widths those of Xie et al.
    """

    def __init__(
        self, dim: int, n_blocks: int, channels: Sequence[int] = (28, 36, 48, 64, 80)
    ) -> None:
        super().__init__()
        blocks = monai_part("networks.blocks")
        steps = list(pairwise(channels))
        self.before = nn.Sequential(
            convolution(dim * n_blocks, channels[0], (1, 5, 5)), BatchNorm3d(channels[0]), nn.ELU()
        )
        self.down = nn.ModuleList(
            [Block(channels[0], channels[0]), *(Block(a, b) for a, b in steps)]
        )
        self.lift = nn.ModuleList(
            blocks.UpSample(
                3,
                b,
                a,
                scale_factor=(1, 2, 2),
                mode="nontrainable",
                interp_mode="trilinear",
                align_corners=False,
            )
            for a, b in steps
        )
        self.up = nn.ModuleList(Block(a, a) for a, _ in steps)
        self.after = blocks.Convolution(3, channels[0], 2, kernel_size=(1, 5, 5), conv_only=True)

    def logits(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        image = torch.cat(tokens, 1)
        if not len(
            image
        ):  # one of several processes may get none, and takes part in the backward pass all the same
            return self.logits([image.new_zeros(1, *image.shape[1:])])[:0]
        if (
            len(image) == 1 and image.device.type == "cpu" and not self.training
        ):  # PyTorch leaves oneDNN's convolution in 3D to
            return self.logits([torch.cat([image, image])])[
                :1
            ]  # larger batches: one alone takes twice as long as two
        x, skips = self.before(2 * image - 1), []  # centred: grey values from -1 to 1
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, (1, 2, 2)) if level else x)
            skips.append(x)
        skips.pop()
        for lift, block, skip in zip(
            reversed(self.lift), reversed(self.up), reversed(skips), strict=True
        ):
            x = block(lift(x) + skip)
        return torch.as_tensor(self.after(x))  # B,1,z,y,x -> B,2,z,y,x

    def forward(self, tokens: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return self.logits(tokens).float()
