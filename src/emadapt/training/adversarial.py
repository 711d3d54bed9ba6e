"""Domain-adversarial training: features that do not tell datasets apart.

A classifier of the dataset sees the features that enter the head's last layer; its gradient reaches
the model reversed (Ganin et al. 2016, arXiv 1505.07818). Datasets without labels take part in it
and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emadapt.data.batches import Draw, Item, cycle, members_of
from emadapt.models.device import autocast, device
from emadapt.training.objective import Objective

POSITIONS = 2048
"""Of each dataset of a batch, drawn from all that its samples have."""

Features = dict[int, torch.Tensor]
"""Dataset number -> (n, C) float32."""


class DomainClassifier(nn.Sequential):
    """Features (n, dim) to logits (n, datasets): one hidden layer."""

    def __init__(self, dim: int, datasets: int, width: int = 128) -> None:
        super().__init__(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, datasets))


class AdversarialObjective(Objective):
    """The loss of labelled samples, and that of a classifier behind a reversed gradient.

    The classifier minimises its cross-entropy, in which datasets weigh the same. `weight` is the
    strength of the reversed gradient at the end of its ramp (lambda in the paper).
    """

    def __init__(self, weight: float, *given: Any) -> None:
        super().__init__(*given)
        self.weight, samples = weight, self.inputs.samples
        self.n_labelled = len(self.inputs.volumes)
        torch.manual_seed(self.inputs.unit.seed)
        datasets = self.n_labelled + len(samples.unlabelled_rows())
        dim = last_layer(self.segmenter.head).in_channels
        self.classifier = DomainClassifier(dim, datasets).to(device())

    @property
    def modules(self) -> nn.Module:
        return self.classifier

    def plan(self, plan: list[list[Draw]], epoch: int) -> list[list[Draw]]:
        """Add draws of each unlabelled dataset, as many a batch as of a labelled one."""
        each = max(1, self.inputs.train.batch // self.n_labelled)
        rng = np.random.default_rng([self.inputs.unit.seed, epoch, 1])  # `plan_epoch`: without 1
        extra: list[list[Draw]] = [[] for _ in plan]
        for member, rows in enumerate(self.inputs.samples.unlabelled_rows(), self.n_labelled):
            chosen = cycle(rows, each * len(plan), rng)
            seeds = rng.integers(2**31, size=len(chosen))
            for i, (row, seed) in enumerate(zip(chosen, seeds, strict=True)):
                extra[i // each].append(Draw(member, int(row), int(seed)))
        return [batch + more for batch, more in zip(plan, extra, strict=True)]

    def backward(self, batch: list[Item], draws: list[Draw], n: int, done: float) -> float:
        loss, features = torch.zeros((), device=device()), Features()
        groups = zip(batch, members_of(self.inputs.samples, draws), strict=True)
        for (inputs, labels), members in groups:
            inputs, labels = inputs.to(device()), labels.to(device())
            with autocast(self.precision), features_of(self.segmenter.head) as seen:
                logits = self.segmenter(inputs, labels.shape[-2:])
            if some := [i for i, member in enumerate(members) if member < self.n_labelled]:
                loss = loss + self.loss_of(logits[some], labels[some][:, None]) * (len(some) / n)
            features |= at_some_positions(seen[0], members)
        self.scaler.scale(loss + self._domain_loss(features, self.weight * ramp(done))).backward()
        return float(loss.detach())

    def _domain_loss(self, features: Features, strength: float) -> torch.Tensor:
        losses, right = [], []
        for member, values in features.items():
            logits = self.classifier(reverse(values, strength))
            target = torch.full((len(logits),), member, device=logits.device)
            losses.append(F.cross_entropy(logits, target))
            right.append((logits.argmax(1) == target).float().mean())
        loss = torch.stack(losses).mean()
        self.note(domain_loss=loss, domain_accuracy=torch.stack(right).mean())
        return loss


def objective(weight: float) -> Any:
    """The objective of a regime whose setting `adversarial` is `weight`."""
    return partial(AdversarialObjective, weight) if weight else Objective


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradient, None


def reverse(values: torch.Tensor, strength: float) -> torch.Tensor:
    """The values, and -strength times the gradient."""
    return torch.as_tensor(_Reversal.apply(values, strength))


def ramp(done: float) -> float:
    """Strength of the reversal by the share of training done, from 0 to 1 (section 5.2.2)."""
    return 2 / (1 + math.exp(-10 * done)) - 1


def last_layer(head: nn.Module) -> nn.Conv2d | nn.Conv3d:
    """The convolution that gives the two logits."""
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    return [m for m in convolutions if m.out_channels == 2][-1]


@contextmanager
def features_of(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within, a list gets what enters the head's last layer, (B, C, h, w), of each pass."""
    seen: list[torch.Tensor] = []
    handle = last_layer(head).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()


def at_some_positions(features: torch.Tensor, members: Sequence[int]) -> Features:
    """Features (B, C, h, w) at `POSITIONS` positions of each dataset at most, drawn by torch.

    `members` (B,) are the dataset numbers.
    """
    flat, found = features.flatten(2), Features()
    for member in dict.fromkeys(members):
        samples = torch.tensor([i for i, m in enumerate(members) if m == member])
        chosen = torch.randperm(len(samples) * flat.shape[2])[:POSITIONS]
        sample = samples[chosen // flat.shape[2]].to(flat.device)
        place = (chosen % flat.shape[2]).to(flat.device)
        found[member] = flat[sample, :, place].float()
    return found
