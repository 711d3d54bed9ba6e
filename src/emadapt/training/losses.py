"""Losses on (B, 2, H, W) logits and (B, 1, H, W) labels, over both classes, as in the reference study."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from emadapt.models.monai_parts import monai_part

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "dice_ce": lambda: monai_part("losses").DiceCELoss(softmax=True, to_onehot_y=True),
    "dice": lambda: monai_part("losses").DiceLoss(softmax=True, to_onehot_y=True),
}
"""MONAI's, by name."""
