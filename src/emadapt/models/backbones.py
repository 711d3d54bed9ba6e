"""Patch tokens of DINOv2, DINOv3 and OpenCLIP behind one call.

All three families run as timm models with one fused `qkv` Linear per block, so one LoRA recipe fits
all. Their differences (position encoding, final norm, input statistics) are settled here:
`Backbone(images)` takes grey images in [0, 1] and gives one (B, D, h, w) map per chosen block.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emadapt.errors import InputError
from emadapt.models.archs import IMAGENET, create_vit, get_arch, resolve_blocks
from emadapt.models.device import Fitting
from emadapt.models.weights import Weights, open_weights
from emadapt.study.backbones import BackboneSettings

# The attention's input and output projections, as peft matches them (by suffix). The leading
# "attn." keeps `patch_embed.proj` out.
LORA_TARGETS = ("attn.qkv", "attn.proj")

PLAIN_TOKENS = 512
"""With at most this many tokens, attention in bf16 on a CPU is computed as plain products.

oneDNN multiplies in bf16; torch's fused kernel does not in its backward pass. With more tokens the
products need too much memory.
"""


class Backbone(nn.Module):
    """A vision transformer that turns grey images into patch tokens.

    Away from the pretraining size (518 pixels for DINOv2, 224 for OpenCLIP) timm resamples the
    position embedding with antialiasing. Meta's DINOv2 without registers does not: tokens of
    dinov2_s on one Lucchi slice differ from Meta's rule by 3-5 % (relative norm) at 252 pixels and
    by 0.2-1 % at 518 and 700. With registers timm and Hugging Face agree at every size tested, and
    DINOv3 has rotary positions.

    Args:
        arch_name: key of `BACKBONES`.
        weights: of that architecture. They are read when a token is first computed, so that
            training on cached tokens does not wait for them.
        blocks: 1-based block numbers, ascending, or `auto` or `last`.
        normalisation: "checkpoint" (what the weights were trained with) or "imagenet" (the
            reference study's choice for every family).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch_name: str,
        weights: Weights,
        blocks: str | tuple[int, ...] = "auto",
        normalisation: str = "checkpoint",
    ) -> None:
        super().__init__()
        self.arch_name, self.arch = arch_name, get_arch(arch_name)
        self.blocks = resolve_blocks(arch_name, blocks)
        self.weights, self.provenance = weights, weights.provenance
        self.network: nn.Module | None = None
        self.fitting = Fitting()
        own = (self.arch.mean, self.arch.std)
        mean, std = IMAGENET if normalisation == "imagenet" else own
        # Not persistent: they belong to the architecture, not to the weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def vit(self) -> Any:
        """The timm model, nothing of it trainable at first; peft injects adapters into it."""
        if self.network is None:
            with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
                network = create_vit(self.arch)
            network.load_state_dict(self.weights.load(), strict=True)
            self.network = network.requires_grad_(False).eval().to(self.mean.device)
        return self.network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Patch tokens after each chosen block, with the final LayerNorm applied to each.

        Blocks after the last chosen one are not run. Autocast is the caller's choice.

        Args:
            images: (B, 1, H, W), or a slice between its neighbours (B, 3, H, W), floating point in
                [0, 1]; H and W are multiples of the patch.

        Returns:
            One (B, D, H / patch, W / patch) tensor for each of `blocks`.

        Raises:
            InputError: not grey floating-point images, or sides that are not multiples of the
                patch.
        """
        return [_as_map(tokens, self.grid(images)) for tokens, _ in self.intermediates(images)]

    def intermediates(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Patch tokens (B, h * w, D) of each chosen block, and class token and registers before."""
        self._choose_attention(self.grid(images))
        found = self.vit.forward_intermediates(
            self._normalised(images),
            indices=[b - 1 for b in self.blocks],
            return_prefix_tokens=True,
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return list(found)

    def shape_of(self, n_blocks: int, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Shape of the tokens of an image with `grid` patches, those of blocks concatenated."""
        return n_blocks * self.arch.dim, *grid

    def entering(self, images: Tensor, cut: int) -> tuple[list[Tensor], Tensor]:
        """The part of `forward` below block `cut` + 1, without gradients.

        Args:
            images: as for `forward`.
            cut: number of blocks to run, from 0 on; below the last of `blocks`.

        Returns:
            The tokens of those of `blocks` that lie below `cut`, as `forward` gives them; and (B,
            prefix + h * w, D), what enters the next block: class token, registers and patches,
            without the final norm.
        """
        grid, below = self.grid(images), []
        self._choose_attention(grid)
        with torch.no_grad():
            found = self.vit._pos_embed(self.vit.patch_embed(self._normalised(images)))
            embedded = found[0] if isinstance(found, tuple) else found  # DINOv3 adds the rotation
            x, rope = self.vit.norm_pre(embedded), self._rope(grid)
            for number, block in enumerate(self.vit.blocks[:cut], 1):
                x = block(x, **rope)
                if number in self.blocks and number < cut:
                    below.append(self._patches(x, grid))
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
                x = self._run(self.vit.blocks[number - 1], x, rope)
            if number in self.blocks:
                tokens.append(self._patches(x, grid))
        return tokens

    def _run(self, block: nn.Module, x: Tensor, rope: dict[str, Tensor]) -> Tensor:
        """What a block makes of `x`; with `gradient_checkpointing`, as timm's own `forward`."""
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            return torch.as_tensor(checkpoint(partial(block, **rope), x, use_reentrant=False))
        return torch.as_tensor(block(x, **rope))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens (h, w) that images (B, 1, H, W) become."""
        height, width = images.shape[-2:]
        return height // self.arch.patch, width // self.arch.patch

    def _choose_attention(self, grid: tuple[int, int]) -> None:
        """Compute attention as plain products where these are faster than the fused kernel."""
        autocast = torch.is_autocast_enabled("cpu")
        bf16 = autocast and torch.get_autocast_dtype("cpu") == torch.bfloat16
        plain = bf16 and self.mean.device.type == "cpu" and grid[0] * grid[1] <= PLAIN_TOKENS
        for block in self.vit.blocks:
            block.attn.fused_attn = not plain

    def _rope(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """The rotary position embedding as DINOv3's blocks take it; the others' take none."""
        rope = getattr(self.vit, "rope", None)
        return {} if rope is None else {"rope": rope.get_embed(shape=grid)}

    def _patches(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What leaves a block (B, prefix + h * w, D) as a normalised map (B, D, h, w)."""
        return _as_map(self.vit.norm(x)[:, self.vit.num_prefix_tokens :], grid)

    def _normalised(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W), normalised as in pretraining."""
        patch, (height, width) = self.arch.patch, images.shape[-2:]
        found = ""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            found = f"shape {tuple(images.shape)} of {images.dtype}"
        elif height % patch or width % patch or not height or not width:
            found = f"{height} x {width} pixels"
        if found:
            raise InputError(
                f"images for {self.arch_name}",
                found=found,
                expected="(B, 1, H, W) or (B, 3, H, W) floating point in [0, 1], with sides that "
                f"are multiples of the patch, {patch}",
                do="Convert, crop or pad the images first.",
            )
        return (images - self.mean) / self.std


class Pooled(Backbone):
    """The same for whole images: two vectors of each block, class token and mean patch token."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Two (B, D, 1, 1) of each block; arguments and errors of `Backbone.forward`."""
        vectors = []
        for patches, prefix in self.intermediates(images):
            vectors += [prefix[:, 0], patches.mean(1)]
        return [vector[..., None, None] for vector in vectors]

    def shape_of(self, n_blocks: int, grid: tuple[int, int]) -> tuple[int, int, int]:
        return 2 * n_blocks * self.arch.dim, 1, 1


def pretrained(spec: BackboneSettings, kind: type[Backbone] = Backbone) -> Backbone:
    """The backbone of a study as pretrained: in eval mode, nothing of it trainable.

    The global random state does not change.

    Raises:
        InputError: unknown name or setting, or weights that cannot be had.
    """
    return kind(spec.arch, open_weights(spec), spec.blocks, spec.normalisation).eval()


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h * w, D) -> (B, D, h, w)."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
