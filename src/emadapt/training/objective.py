"""What a training step minimises: the losses, and the gradients of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

from emadapt.data.batches import Draw, Item
from emadapt.data.foreground import IGNORE
from emadapt.models.device import autocast, device
from emadapt.training.average import Average
from emadapt.training.inputs import Inputs

# MONAI's DiceLoss and DiceCELoss, which a test holds them to; importing those takes seconds.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of logits (B, n, H, W) and labels (B, 1, H, W), over background and classes, without `IGNORE`."""

SMOOTH = 1e-5
"""Added to numerator and denominator, for images without a class."""


def dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 minus Dice (Milletari et al. 2016, arXiv 1606.04797), the mean over samples and classes."""
    axes, known = list(range(2, logits.dim())), labels != IGNORE
    probability = logits.softmax(1) * known
    truth = F.one_hot(labels[:, 0] * known[:, 0], logits.shape[1]).movedim(-1, 1) * known
    hits = (probability * truth).sum(axes)
    false_positive, false_negative = probability.sum(axes) - hits, truth.sum(axes) - hits
    both = 2 * (hits + 0.5 * false_positive + 0.5 * false_negative)
    return (1 - (2 * hits + SMOOTH) / (both + SMOOTH)).mean()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over what is known."""
    total = F.cross_entropy(logits, labels[:, 0], ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def dice_ce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`dice` and cross-entropy, added."""
    return dice(logits, labels) + cross_entropy(logits, labels)


LOSSES: dict[str, Loss] = {"dice_ce": dice_ce, "dice": dice, "ce": cross_entropy}


class Objective:
    """The loss of labelled samples, one backward pass for each group of a batch."""

    def __init__(
        self, inputs: Inputs, loss_of: Loss, scaler: torch.amp.GradScaler, average: Average
    ) -> None:
        self.inputs, self.loss_of, self.scaler, self.average = inputs, loss_of, scaler, average
        self.precision, self.segmenter = inputs.train.precision, inputs.segmenter
        self.noted: dict[str, list[torch.Tensor]] = {}
        self.state: dict[str, torch.Tensor] = {}
        """What a checkpoint keeps of it."""

    def resume(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with what a checkpoint kept."""
        self.state = {name: value.to(device()) for name, value in state.items()}

    def plan(self, plan: list[list[Draw]], epoch: int) -> list[list[Draw]]:
        """What is drawn for each batch of an epoch, given the labelled draws."""
        return plan

    def backward(self, batch: list[Item], draws: list[Draw], n: int) -> torch.Tensor:
        """Add to the gradients those of a batch, or of this process's part of it.

        Args:
            batch: groups of equal shape.
            draws: what they were made of.
            n: labelled samples of the whole batch.

        Returns:
            The loss of the labelled samples, on the device: reading it would wait for the step.
        """
        total = torch.zeros((), device=device())
        for inputs, labels in batch:
            inputs, labels = (part.to(device(), non_blocking=True) for part in (inputs, labels))
            with autocast(self.precision):
                # A process without a sample still joins in the normalisation of the batch.
                shown = inputs if len(labels) else self.segmenter.no_tokens(inputs)
                logits = self.segmenter(shown, labels.shape[-2:])
            share = len(labels) / n
            loss = self.loss_of(logits, labels[:, None]) * share if share else logits.sum()
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def note(self, **values: torch.Tensor) -> None:
        """Keep values of a step for `metrics`."""
        for name, value in values.items():
            self.noted.setdefault(f"train/{name}", []).append(value.detach())

    def metrics(self) -> dict[str, float]:
        """Means of what was noted since the last call."""
        means = {k: float(np.mean(torch.stack(v).tolist())) for k, v in self.noted.items()}
        self.noted = {}
        return means
