"""Losses over both classes, on logits (B, 2, H, W) and labels (B, 1, H, W).

They are MONAI's DiceLoss and DiceCELoss, which a test holds them to; importing these takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SMOOTH = 1e-5
"""Added to numerator and denominator, for images without a class."""


def dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 minus Dice (Milletari et al. 2016, arXiv 1606.04797), the mean over samples and classes."""
    probability, axes = logits.softmax(1), list(range(2, logits.dim()))
    truth = F.one_hot(labels[:, 0], logits.shape[1]).movedim(-1, 1).to(probability.dtype)
    hits = (probability * truth).sum(axes)
    false_positive, false_negative = probability.sum(axes) - hits, truth.sum(axes) - hits
    both = 2 * (hits + 0.5 * false_positive + 0.5 * false_negative)
    return (1 - (2 * hits + SMOOTH) / (both + SMOOTH)).mean()


def dice_ce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`dice` and cross-entropy, added."""
    return dice(logits, labels) + F.cross_entropy(logits, labels[:, 0])


LOSSES: dict[str, Loss] = {"dice_ce": dice_ce, "dice": dice}
"""By name."""
