"""How much of the speed of a matrix product the backbones reach when they compute tokens."""

from __future__ import annotations

import torch

from benchmarks.timing import print_table, seconds
from emadapt.models.archs import BACKBONES
from emadapt.models.backbones import pretrained
from emadapt.models.device import autocast, device
from emadapt.study.backbones import BackboneSettings

BATCH = 4


def operations(arch: str, tile: int) -> float:
    """Multiplications and additions of a backbone on one square tile, those of attention included.

    A block of width D on T tokens has 12 D^2 weights in four linear layers, each used once for a
    token, and two products of attention, T^2 D each. The patch embedding has 3 p^2 D weights.
    """
    facts = BACKBONES[arch]
    tokens = (tile // facts.patch) ** 2 + 1
    block = 2 * tokens * 12 * facts.dim**2 + 2 * 2 * tokens**2 * facts.dim
    return float(facts.depth * block + 2 * tokens * 3 * facts.patch**2 * facts.dim)


def product_speed(size: int = 2048, precision: str = "auto") -> float:
    """Operations in a second of a product of two square matrices."""
    a, b = torch.rand(2, size, size, device=device())
    with torch.inference_mode(), autocast(precision):
        return 2 * size**3 / seconds(lambda: a @ b)


def compared(arch: str, tile: int) -> dict[str, float | str]:
    """Speed of a backbone on a batch of tiles, and its share of that of the product."""
    backbone = pretrained(BackboneSettings(arch=arch, source="random")).to(device()).eval()
    images = torch.rand(BATCH, 1, tile, tile, device=device())
    with torch.inference_mode(), autocast("auto"):
        taken = seconds(lambda: backbone(images), 3)
    share = BATCH * operations(arch, tile) / taken / product_speed()
    return {"arch": arch, "tile": tile, "tiles_per_s": BATCH / taken, "share": share}


if __name__ == "__main__":
    archs = ("dinov2_s", "dinov2_b", "dinov2_l")
    print_table([compared(arch, tile) for arch in archs for tile in (252, 518)])
