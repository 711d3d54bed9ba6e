"""Heads: patch tokens of several blocks in, logits per pixel out.

The logits are of the background and of each class.

`forward` gives them at the image's resolution; `logits`, of heads that see tokens alone, at the
head's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from emadapt.models.parallel import BatchNorm

Tokens = list[torch.Tensor]


class TokenHead(nn.Module):
    """A head that sees tokens alone."""

    def logits(self, tokens: Tokens) -> torch.Tensor:
        """One (B, D, h, w) per block -> (B, n_logits, h', w'), at the head's own resolution."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, size: tuple[int, int]) -> torch.Tensor:
        return at_size(self.logits(tokens).float(), size)


class Linear(TokenHead):
    """A 1x1 convolution on the concatenated tokens, resized to the image."""

    def __init__(self, dim: int, n_blocks: int, n_logits: int = 2) -> None:
        super().__init__()
        self.norm = BatchNorm(dim * n_blocks, affine=False)
        self.classify = nn.Conv2d(dim * n_blocks, n_logits, 1)

    def logits(self, tokens: Tokens) -> torch.Tensor:
        x = self.norm(torch.cat(tokens, 1))  # B,N*D,h,w
        return torch.as_tensor(self.classify(x))


class Deconv(TokenHead):
    """The reference study's head (arXiv 2602.08505): 1x1 to 512, four doublings, 1x1 to the logits.

    4,156,546 parameters for D=1024 and 3,828,866 for D=384, of one block and two logits; several
    blocks are concatenated.
    """

    def __init__(self, dim: int, n_blocks: int, n_logits: int = 2) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.Conv2d(dim * n_blocks, 512, 1, bias=False), BatchNorm(512), nn.GELU()
        )
        widths = [512, 256, 128, 64, 64]
        self.up = nn.Sequential(*[self._double(a, b) for a, b in itertools.pairwise(widths)])
        self.classify = nn.Conv2d(64, n_logits, 1)

    @staticmethod
    def _double(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False),
            BatchNorm(b),
            nn.GELU(),
            nn.Conv2d(b, b, 3, padding=1, bias=False),
            BatchNorm(b),
            nn.GELU(),
        )

    def logits(self, tokens: Tokens) -> torch.Tensor:
        x = self.squeeze(torch.cat(tokens, 1))  # B,N*D,h,w -> B,512,h,w
        return torch.as_tensor(self.classify(self.up(x)))  # B,n_logits,16h,16w


class Pyramid(TokenHead):
    """Each block projected, fused, then doubled twice: 3.5 pixels a cell for a patch of 14.

    GroupNorm, so that training on a union of datasets does not mix their statistics.
    """

    def __init__(self, dim: int, n_blocks: int, n_logits: int = 2, width: int = 128) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(dim, width, 1) for _ in range(n_blocks))
        self.fuse = nn.Sequential(
            _norm_act(width * n_blocks), _conv(width * n_blocks, width, 1), _conv(width, width, 3)
        )
        self.up1 = _conv(width, width // 2, 3)
        self.up2 = _conv(width // 2, width // 2, 3)
        self.classify = nn.Conv2d(width // 2, n_logits, 1)

    def logits(self, tokens: Tokens) -> torch.Tensor:
        projected = [project(t) for project, t in zip(self.project, tokens, strict=True)]
        x = self.fuse(torch.cat(projected, 1))  # B,N*width,h,w -> B,width,h,w
        x = self.up1(_doubled(x))  # B,width/2,2h,2w
        x = self.up2(_doubled(x))  # B,width/2,4h,4w
        return torch.as_tensor(self.classify(x))


class PyramidBatch(Pyramid):
    """`Pyramid` with BatchNorm instead of GroupNorm: it mixes the statistics of a union."""

    def __init__(self, dim: int, n_blocks: int, n_logits: int = 2) -> None:
        super().__init__(dim, n_blocks, n_logits)
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.GroupNorm):
                    setattr(parent, name, BatchNorm(child.num_channels))


def at_size(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits (B, C, h, w) -> (B, C, *size), bilinear."""
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def with_background(odds: torch.Tensor, axis: int) -> torch.Tensor:
    """Logits of the background and of classes, whose logarithmic odds against it lie on `axis`."""
    logits = torch.cat([torch.zeros_like(odds.narrow(axis, 0, 1)), odds], axis)
    return logits - logits.mean(axis, keepdim=True)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _norm_act(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(8, channels), nn.GELU())


def _conv(a: int, b: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), *_norm_act(b))


HEADS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": Linear,
    "deconv": Deconv,
    "pyramid": Pyramid,
    "pyramid_bn": PyramidBatch,
}
"""By name, one of `study.training.Head`. head(dim, n_blocks, n_logits)(tokens, size) gives
(B, n_logits, H, W) float32."""
