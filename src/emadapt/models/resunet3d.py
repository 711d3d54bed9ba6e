"""A 3D residual U-Net from scratch (Xie et al. 2025, Bioinformatics Advances, vbaf021)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emadapt.data.crops import as_input
from emadapt.data.tiles import Geometry, Grey, window_starts
from emadapt.models.device import autocast
from emadapt.models.monai_parts import monai_part
from emadapt.models.parallel import BatchNorm
from emadapt.models.segmenter import Probability, Segmenter
from emadapt.study.backbones import BackboneSettings

STRIDE = 16
"""Sides of patches are multiples of it, in plane. Along z nothing is pooled."""
BATCH = 4
"""Windows at once."""


class BlockSegmenter(Segmenter):
    """A model that sees blocks of neighbouring slices, in windows that MONAI slides in plane.

    Args:
        spec: how slices enter it.
        backbone: hands images on.
        head: of volumes.
        depth: slices of a block.
    """

    def __init__(self, spec: BackboneSettings, backbone: Any, head: nn.Module, depth: int) -> None:
        super().__init__(spec, backbone, head)
        self.depth = depth

    @torch.inference_mode()
    def slab(self, shown: Grey, geo: Geometry, overlap: float | None = None) -> Probability:
        share = geo.overlap if overlap is None else overlap
        window = (len(shown), *geo.tile)
        in_plane = monai_part("data.utils").compute_importance_map(geo.tile, mode="gaussian")

        def run(part: torch.Tensor) -> tuple[torch.Tensor]:
            with autocast(self.spec.precision):
                logits = self(part, geo.tile)
            return (logits.float().softmax(1)[:, 1:],)  # B,classes,Z,H,W

        def foreground(batch: torch.Tensor) -> torch.Tensor:
            return self.fitting(run, batch)[0]

        found = monai_part("inferers").sliding_window_inference(
            as_input(shown).transpose(0, 1)[None],
            window,
            BATCH,
            foreground,
            overlap=(0.0, share, share),
            mode="gaussian",
            roi_weight_map=in_plane[None].expand(window),
            sw_device=self.device,
            device="cpu",
        )
        by_slice = torch.as_tensor(found)[0].movedim(0, 1).squeeze(1)  # Z,classes,H,W or Z,H,W
        return np.asarray(by_slice.numpy(), dtype=np.float32)

    def tops(self, geo: Geometry) -> list[int]:
        return window_starts(geo.padded[0], geo.tile[0], geo.overlap)


class Block(nn.Module):
    """A 1x3x3 and two 3x3x3 convolutions, with a skip from the first to after the third."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_convolution(into, out, (1, 3, 3)), BatchNorm(out), nn.ELU())
        self.second = nn.Sequential(_convolution(out, out, (3, 3, 3)), BatchNorm(out), nn.ELU())
        self.third = nn.Sequential(_convolution(out, out, (3, 3, 3)), BatchNorm(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        return F.elu(self.third(self.second(first)) + first)


class ResUNet3d(nn.Module):
    """Encoder and decoder of five levels. Images (B, 1, z, y, x) in [0, 1].

    A 1x5x5 convolution before and one after; a block on each level, down and up; maximum pooling
    1x2x2; trilinear up-sampling behind a 1x1x1 convolution to the channels of the level above,
    whose features are added. The form is that of Lee et al. 2017 (arXiv 1706.00120), the widths
    those of Xie et al.
    """

    def __init__(self, channels: Sequence[int] = (28, 36, 48, 64, 80), n_logits: int = 2) -> None:
        super().__init__()
        steps, first = list(pairwise(channels)), channels[0]
        entry = _convolution(1, first, (1, 5, 5))
        self.before = nn.Sequential(entry, BatchNorm(first), nn.ELU())
        self.down = nn.ModuleList([Block(first, first), *(Block(a, b) for a, b in steps)])
        self.lift = nn.ModuleList(_lift(below, above) for above, below in steps)
        self.up = nn.ModuleList(Block(a, a) for a, _ in steps)
        blocks = monai_part("networks.blocks")
        self.after = blocks.Convolution(3, first, n_logits, kernel_size=(1, 5, 5), conv_only=True)

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 1, z, y, x) -> (B, n_logits, z, y, x)."""
        if not len(image):  # one of several processes has no sample, but joins the backward pass
            return self.logits(image.new_zeros(1, *image.shape[1:]))[:0]
        if len(image) == 1 and image.device.type == "cpu" and not self.training:
            # oneDNN's 3D convolution is left to larger batches: one alone takes twice as long as
            # two.
            return self.logits(torch.cat([image, image]))[:1]
        x, skips = self.before(2 * image - 1), []  # centred: grey values from -1 to 1
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, (1, 2, 2)) if level else x)
            skips.append(x)
        skips.pop()
        upwards = (reversed(self.lift), reversed(self.up), reversed(skips))
        for lift, block, skip in zip(*upwards, strict=True):
            x = block(lift(x) + skip)
        return torch.as_tensor(self.after(x))

    def forward(self, tokens: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return self.logits(tokens[0]).float()


def _convolution(into: int, out: int, kernel: tuple[int, int, int]) -> nn.Module:
    """One that keeps the size, without a bias: batch normalisation follows."""
    blocks = monai_part("networks.blocks")
    return blocks.Convolution(3, into, out, kernel_size=kernel, bias=False, conv_only=True)


def _lift(below: int, above: int) -> nn.Module:
    """From a level to the one above it, twice as large in plane."""
    return monai_part("networks.blocks").UpSample(
        3,
        below,
        above,
        scale_factor=(1, 2, 2),
        mode="nontrainable",
        interp_mode="trilinear",
        align_corners=False,
    )
