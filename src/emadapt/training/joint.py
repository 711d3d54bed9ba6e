"""Training on several datasets at once: gradients of a step, with a penalty that brings datasets together, or per dataset.

Penalties compare the features that enter the head's last layer, at some positions of each dataset of a batch. Datasets without
labels take part in them and in nothing else.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emadapt.data.blocks import PatchDataset
from emadapt.data.crops import Cached, CropDataset, Draw, Item, TokenDataset, cycle
from emadapt.models.device import autocast, device
from emadapt.study.study import TrainSettings, Unit
from emadapt.training.domain_classifier import (
    DomainClassifier,
    features_of,
    key_of,
    last_layer,
    ramp,
    reverse,
)

if TYPE_CHECKING:
    from emadapt.training.fit import Inputs

POSITIONS = 2048
"""Of each dataset of a batch, drawn from all that its samples have."""

Features = dict[int, torch.Tensor]
"""Dataset number -> (n, C) float32."""


class Plain:
    """No alignment: one backward pass for each group of a batch. What other ways to train jointly change."""

    def __init__(
        self,
        inputs: Inputs,
        train: TrainSettings,
        unit: Unit,
        loss_of: nn.Module,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.inputs, self.train, self.seed, self.loss_of, self.scaler = (
            inputs,
            train,
            unit.seed,
            loss_of,
            scaler,
        )
        self.segmenter, self.data = inputs.segmenter, inputs.data
        self.sums: dict[str, list[float]] = {}

    @property
    def modules(self) -> nn.Module:
        """What is trained beside the segmenter, and not kept."""
        return nn.Module()

    def clipped(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Those whose gradients are clipped together."""
        return [parameters]

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
            with autocast(self.train.precision):
                # Where only other processes have samples, and normalise over all: no tokens.
                logits = self.segmenter(
                    inputs if len(labels) else self.segmenter.no_tokens(inputs), labels.shape[-2:]
                )
            loss = (
                self.loss_of(logits, labels[:, None]) * (len(labels) / n)
                if len(labels)
                else logits.sum()
            )
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def metrics(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: float(np.mean(values)) for name, values in self.sums.items()}
        self.sums = {}
        return means

    def note(self, **values: torch.Tensor) -> None:
        """Remember values of a step."""
        for name, value in values.items():
            self.sums.setdefault(f"train/{name}", []).append(float(value.detach()))


class PerDataset(Plain):
    """Each dataset through its own copies of the normalisation layers (`models.domain.Copies`)."""

    apart = False
    """Whether nothing is shared, so that the loss of a dataset is a mean over its own samples."""

    def backward(self, batch: list[Item], draws: list[Draw], n: int, done: float) -> float:
        total = 0.0
        for (inputs, labels), members in zip(batch, members_of(self.data, draws), strict=True):
            for member in dict.fromkeys(members):
                own = torch.tensor([m == member for m in members])
                self.segmenter.use(self.inputs.volumes[member].name)
                of, share = (int(own.sum()), float(own.sum()) / n) if self.apart else (n, 1.0)
                total += share * super().backward(
                    [(_pick(inputs, own), labels[own])], draws, of, done
                )
        return total


class Routed(PerDataset):
    """An adapter and a head for each dataset, each trained as if the others were not there, but for the choice of the epoch."""

    apart = True

    def clipped(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        named = list(self.segmenter.named_parameters())
        return [
            [p for name, p in named if f".{key_of(v.name)}." in name] for v in self.inputs.volumes
        ]


class Penalised(Plain, abc.ABC):
    """A penalty on the features of the datasets of a batch; one backward pass for all of them."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.weight = self.segmenter.regime.align_weight
        self.n_labelled = len(self.inputs.volumes)

    def plan(self, plan: list[list[Draw]], epoch: int) -> list[list[Draw]]:
        """Of each unlabelled dataset as many draws a batch as of a labelled one, and no row twice before all were drawn once."""
        rows = self.data.unlabelled_rows()
        each = max(1, self.train.batch // self.n_labelled)
        rng = np.random.default_rng([self.seed, epoch, 1])  # `plan_epoch` draws without the 1
        extra: list[list[Draw]] = [[] for _ in plan]
        for member, own in enumerate(rows, self.n_labelled):
            chosen = cycle(own, each * len(plan), rng)
            for i, (row, seed) in enumerate(
                zip(chosen, rng.integers(2**31, size=len(chosen)), strict=True)
            ):
                extra[i // each].append(Draw(member, int(row), int(seed)))
        return [batch + more for batch, more in zip(plan, extra, strict=True)]

    def backward(self, batch: list[Item], draws: list[Draw], n: int, done: float) -> float:
        loss, features = torch.zeros((), device=device()), Features()
        for (inputs, labels), members in zip(batch, members_of(self.data, draws), strict=True):
            inputs, labels = inputs.to(device()), labels.to(device())
            with autocast(self.train.precision), features_of(self.segmenter.head) as seen:
                logits = self.segmenter(inputs, labels.shape[-2:])
            if some := [i for i, member in enumerate(members) if member < self.n_labelled]:
                loss = loss + self.loss_of(logits[some], labels[some][:, None]) * (len(some) / n)
            features |= at_some_positions(seen[0], members)
        self.scaler.scale(loss + self.penalty(features, done)).backward()
        return float(loss.detach())

    @abc.abstractmethod
    def penalty(self, features: Features, done: float) -> torch.Tensor:
        """What is added to the loss: a scalar from features (n, C) per dataset, at a share `done` of the training."""


class Coral(Penalised):
    """Covariances alike (Sun & Saenko 2016, arXiv 1607.01719): the mean of `coral` over all pairs of datasets of a batch."""

    def penalty(self, features: Features, done: float) -> torch.Tensor:
        pairs = [coral(a, b) for a, b in itertools.combinations(features.values(), 2)]
        if not pairs:
            return torch.zeros((), device=device())
        value = torch.stack(pairs).mean()
        self.note(coral=value)
        return self.weight * value


class Adversarial(Penalised):
    """Features from which a classifier cannot tell the dataset (Ganin et al. 2016, arXiv 1505.07818).

    The classifier minimises its cross-entropy, in which datasets weigh the same; `align_weight` is the strength of the reversed
    gradient at the end of the ramp, their lambda.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        torch.manual_seed(self.seed)
        datasets = self.n_labelled + len(self.data.unlabelled_rows())
        self.classifier = DomainClassifier(
            last_layer(self.segmenter.head).in_channels, datasets
        ).to(device())

    @property
    def modules(self) -> nn.Module:
        return self.classifier

    def penalty(self, features: Features, done: float) -> torch.Tensor:
        strength = self.weight * ramp(done)
        losses, right = [], []
        for member, values in features.items():
            logits = self.classifier(reverse(values, strength))
            target = torch.full((len(logits),), member, device=logits.device)
            losses.append(F.cross_entropy(logits, target))
            right.append((logits.argmax(1) == target).float().mean())
        loss = torch.stack(losses).mean()
        self.note(domain_loss=loss, domain_accuracy=torch.stack(right).mean())
        return loss


ALIGN: dict[str, type[Plain]] = {
    "": Plain,
    "coral": Coral,
    "adversarial": Adversarial,
    "norm": PerDataset,
    "routed": Routed,
}
"""`align` of a regime."""


def coral(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius distance of the covariances of two samples (n, d), over 4 d²; unbiased covariances."""
    distance = torch.cov(a.T) - torch.cov(b.T)
    return distance.square().sum() / (4 * a.shape[1] ** 2)


def members_of(
    data: CropDataset | TokenDataset | PatchDataset, draws: Sequence[Draw]
) -> list[list[int]]:
    """Dataset number of each sample of each group, as `load_epoch` groups the draws: by shape, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for draw in draws:
        groups.setdefault(data.shapes(draw.member)[0], []).append(draw.member)
    return list(groups.values())


def at_some_positions(features: torch.Tensor, members: Sequence[int]) -> Features:
    """At most `POSITIONS` positions of each dataset, drawn without replacement by torch's generator.

    Args:
        features: (B, C, h, w).
        members: (B,) dataset numbers.

    Returns:
        (n, C) float32 of each dataset.
    """
    flat, found = features.flatten(2), Features()
    for member in dict.fromkeys(members):
        samples = torch.tensor([i for i, m in enumerate(members) if m == member])
        chosen = torch.randperm(len(samples) * flat.shape[2])[:POSITIONS]
        places = chosen % flat.shape[2]
        found[member] = flat[
            samples[chosen // flat.shape[2]].to(flat.device), :, places.to(flat.device)
        ].float()
    return found


def _pick(inputs: torch.Tensor | Cached, some: torch.Tensor) -> torch.Tensor | Cached:
    """Samples of a batch by a mask (B,)."""
    return inputs.pick(some) if isinstance(inputs, Cached) else inputs[some]
