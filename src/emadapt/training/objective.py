"""What a training step minimises: the loss of labelled samples, and the gradients of a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from emadapt.data.batches import Draw, Item
from emadapt.models.device import autocast, device
from emadapt.training.inputs import Inputs
from emadapt.training.losses import Loss


class Objective:
    """The loss of labelled samples, one backward pass for each group of a batch.

    Args:
        inputs: of the unit.
        loss_of: on logits and labels.
        scaler: of the loss, for fp16.
    """

    def __init__(self, inputs: Inputs, loss_of: Loss, scaler: torch.amp.GradScaler) -> None:
        self.inputs, self.loss_of, self.scaler = inputs, loss_of, scaler
        self.precision, self.segmenter = inputs.train.precision, inputs.segmenter
        self.noted: dict[str, list[float]] = {}

    @property
    def modules(self) -> nn.Module:
        """What is trained along with the segmenter, and not kept."""
        return nn.Module()

    def plan(self, plan: list[list[Draw]], epoch: int) -> list[list[Draw]]:
        """What is drawn for each batch of an epoch, given the labelled draws."""
        return plan

    def backward(self, batch: list[Item], draws: list[Draw], n: int, done: float) -> float:
        """Add to the gradients those of a batch, or of this process's part of it.

        Args:
            batch: groups of equal shape.
            draws: what they were made of.
            n: labelled samples of the whole batch.
            done: share of the training that is over.

        Returns:
            The loss of the labelled samples.
        """
        total = 0.0
        for inputs, labels in batch:
            inputs, labels = inputs.to(device()), labels.to(device())
            with autocast(self.precision):
                # Without a sample of its own, a process still joins in the normalisation of the
                # batch.
                shown = inputs if len(labels) else self.segmenter.no_tokens(inputs)
                logits = self.segmenter(shown, labels.shape[-2:])
            share = len(labels) / n
            loss = self.loss_of(logits, labels[:, None]) * share if share else logits.sum()
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def note(self, **values: torch.Tensor) -> None:
        """Remember values of a step."""
        for name, value in values.items():
            self.noted.setdefault(f"train/{name}", []).append(float(value.detach()))

    def metrics(self) -> dict[str, float]:
        """Means of what was noted since the last call."""
        means = {name: float(np.mean(values)) for name, values in self.noted.items()}
        self.noted = {}
        return means
