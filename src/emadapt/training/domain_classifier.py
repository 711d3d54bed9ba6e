"""Modules for training on several datasets: a classifier of the dataset behind a reversed gradient, copies for each dataset."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
"""Normalisation layers: batch and instance norm have the first as their base."""


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradient, None


def reverse(values: torch.Tensor, strength: float) -> torch.Tensor:
    """Gradient reversal layer (Ganin et al. 2016, arXiv 1505.07818): the values, and -strength times the gradient."""
    return torch.as_tensor(_Reversal.apply(values, strength))


def ramp(done: float) -> float:
    """Strength of the reversal by the share of training that is done, from 0 to almost 1 (ibid., section 5.2.2)."""
    return 2 / (1 + math.exp(-10 * done)) - 1


class DomainClassifier(nn.Sequential):
    """Features (n, dim) to logits (n, datasets): one hidden layer."""

    def __init__(self, dim: int, datasets: int, width: int = 128) -> None:
        super().__init__(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, datasets))


class Copies(nn.Module):
    """One copy of a layer, or of a whole head, per dataset, alike at the start.

    Parameters and running statistics belong to a copy; a batch goes through the one that `use` has chosen.
    """

    def __init__(self, layer: nn.Module, datasets: Sequence[str]) -> None:
        super().__init__()
        self.copies = nn.ModuleDict({key_of(name): copy.deepcopy(layer) for name in datasets})
        self.active = ""

    def forward(self, *given: Any) -> torch.Tensor:
        if not self.active:
            raise ValueError("no dataset chosen whose copy is to be used; call Segmenter.use")
        return torch.as_tensor(self.copies[key_of(self.active)](*given))


def key_of(dataset: str) -> str:
    """What a dataset's copies and adapters are called inside the model: `train`, say, cannot be the name of a module."""
    return f"of_{dataset}"


def give_copies(head: nn.Module, datasets: Sequence[str]) -> None:
    """Put `Copies` in the place of each normalisation layer of a head (Chang et al. 2019, arXiv 1906.03950)."""
    for parent in list(head.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NORMS):
                setattr(parent, name, Copies(child, datasets))


def use(head: nn.Module, dataset: str) -> None:
    """Choose the copies of `dataset`."""
    for module in head.modules():
        if isinstance(module, Copies):
            module.active = dataset


def last_layer(head: nn.Module) -> nn.Conv2d | nn.Conv3d:
    """The convolution that gives the two logits."""
    return [
        m for m in head.modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and m.out_channels == 2
    ][-1]


@contextmanager
def features_of(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that gets (B, C, h, w), what enters the head's last layer, of each forward pass within."""
    seen: list[torch.Tensor] = []
    handle = last_layer(head).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()
